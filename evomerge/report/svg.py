"""Drawing: scales, axes, and SVG elements as text. Knows nothing of what is drawn.

What is drawn has classes and no colours or fonts of its own: charts.css gives these, for light and
for dark. Lengths are in user units, which are CSS pixels where a drawing is as wide as its box.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from markupsafe import Markup, escape

P = TypeVar("P")

_SAME = 1e-6  # of values: they differ by less than anyone can see


def element(name: str, /, *children: str, **attributes: object) -> Markup:
    """An SVG element. Children that are no Markup are escaped; of attributes `_` becomes `-`, a
    final one is dropped (`class_`), and None is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_written(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(children)
    return Markup(f"<{name}{given}>{inside}</{name}>" if inside else f"<{name}{given}/>")


def _written(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text(x: float, y: float, content: str, class_: str = "label", anchor: str = "start") -> Markup:
    """anchor: start | middle | end: which part of the text is at x."""
    return element("text", content, x=x, y=y, class_=class_, text_anchor=anchor)


def polylines(points: Iterable[tuple[float, float] | None], class_: str) -> Markup:
    """Lines through points; None leaves a gap. A point between two gaps becomes a dot."""
    found = Markup("")
    for run in _runs(points):
        if len(run) == 1:
            found += element("circle", cx=run[0][0], cy=run[0][1], r=2, class_=f"{class_} dot")
        else:
            found += element("polyline", points=_joined(run), class_=f"{class_} line")
    return found


def bands(points: Iterable[tuple[float, float, float] | None], class_: str) -> Markup:
    """The area between (x, low, high); None leaves a gap."""
    found = Markup("")
    for run in _runs(points):
        low, high = [(x, a) for x, a, _ in run], [(x, b) for x, _, b in reversed(run)]
        found += element("polygon", points=_joined([*low, *high]), class_=f"{class_} band")
    return found


def _runs(points: Iterable[P | None]) -> list[list[P]]:
    runs: list[list[P]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def _joined(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


@dataclass(frozen=True)
class Scale:
    """Values from low to high, on a line from start to end; logarithmic, of positive values, where
    asked for."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, 1e-300))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    @classmethod
    def around(
        cls,
        values: Iterable[float],
        start: float,
        end: float,
        logarithmic: bool = False,
        whole: bool = False,
    ) -> "Scale":
        """From a round number below all values to one above; from 0 to 1 where there is none.
        whole: of counts, whose ticks are whole numbers."""
        found = [value for value in values if math.isfinite(value)]
        low, high = (min(found), max(found)) if found else (0.0, 1.0)
        if logarithmic:
            below, above = math.floor(math.log10(low)), math.ceil(math.log10(high))
            return cls(10.0**below, 10.0 ** max(above, below + 1), start, end, True)
        if high - low <= _SAME * max(1.0, abs(low), abs(high)):
            margin = max(1.0 if whole else 0.1, abs(low) * 0.1)
            low, high = low - margin * (not whole), high + margin
        if whole:
            return cls(low, high, start, end)
        step = _step(high - low)
        return cls(math.floor(low / step) * step, math.ceil(high / step) * step, start, end)

    def ticks(self, whole: bool = False) -> list[float]:
        """Round numbers on it, about five of them."""
        if self.logarithmic:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            return [10.0**exponent for exponent in range(first, last + 1, 1 + (last - first) // 5)]
        step = _step(self.high - self.low)
        step = max(1.0, round(step)) if whole else step
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(number * step, 10) for number in range(first, last + 1)]


def _step(span: float) -> float:
    """A round number of which about five make up a span."""
    rough = span / 5
    unit: float = 10.0 ** math.floor(math.log10(rough))
    return next((unit * factor for factor in (1, 2, 2.5, 5) if unit * factor >= rough), unit * 10)


def apart(places: Sequence[float], least: float) -> list[float]:
    """Places moved as little as needed to have at least `least` between neighbours, in their order
    as given; the whole of them stays where it was on average."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = [places[i] for i in order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + least)
    shift = (sum(moved) - sum(places)) / len(places) if places else 0.0
    found = [0.0] * len(places)
    for i, place in zip(order, moved, strict=True):
        found[i] = place - shift
    return found
