"""What a search did, drawn: SVG to be put into a page as it is, see charts.css.

Every drawing has a title and a description for whoever cannot see it; the numbers themselves belong
into a table beside it. What is not known is left out, never drawn as 0.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from evomerge.report.candidate import Comparison
from evomerge.report.coefficients import Coefficients
from evomerge.report.history import History, Point, Reference, Spent
from evomerge.report.population import FrontPoint, Importance
from evomerge.report.svg import Scale, apart, bands, element, polylines, text

STYLE = Path(__file__).with_name("charts.css")  # of all drawings

_WIDTH, _HEIGHT = 720.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 150.0, 26.0, 36.0  # margins; names of lines stand at the right
_ROW = 24.0  # of drawings with one line of text for each thing, which begin at the top
_SHADES = 9  # of a heatmap, beside none
_APART = ("s0", "s2", "s4", "s3", "s5", "s1")  # colours of things that are told apart by them alone


def fitness(history: History) -> Markup:
    """The incumbent's shrunk score with its interval and the generations' mean, by generation;
    parents and the best other baseline as lines across, with their intervals at the edge."""
    points = _proposed(history)
    lines = [one for one in history.references if one.parent] + _best_other(history.references)
    known = [value for p in points for value in (p.best, p.mean, *(p.best_interval or ()))]
    known += [value for one in lines for value in (one.score, *one.interval)]
    frame = _Frame.of(points, [value for value in known if value is not None], "score", percent)
    band = bands([_ends(frame, p, p.best_interval) for p in points], "s0")
    mean = polylines([_at(frame, p, p.mean) for p in points], "s1")
    best = polylines([_at(frame, p, p.best) for p in points], "s0")
    names = [("incumbent, shrunk", "s0", _last(points, lambda p: p.best))]
    names += [("mean of generation", "s1", _last(points, lambda p: p.mean))]
    names += [(one.name, "reference", one.score) for one in lines]
    shown = [_reference(frame, one, i) for i, one in enumerate(lines)]
    return _drawing(
        f"Score by generation of search {history.search}",
        f"{_found(points, 'the incumbent', lambda p: p.best)}; "
        + "; ".join(f"{one.name} {percent(one.score)}" for one in lines),
        frame.axes() + Markup("").join(shown) + band + mean + best + frame.names(names),
    )


def gap(history: History) -> Markup:
    """How much better the incumbent is on the examples that chose it than on the monitor slice."""
    points = _proposed(history)
    known = [value for p in points for value in (p.gap, *(p.gap_interval or ()))]
    values = [0.0, *(value for value in known if value is not None)]
    frame = _Frame.of(points, values, "gap", percent)
    zero = element(
        "line", x1=_LEFT, x2=frame.right, y1=frame.y(0.0), y2=frame.y(0.0), class_="reference line"
    )
    band = bands([_ends(frame, p, p.gap_interval) for p in points], "s2")
    line = polylines([_at(frame, p, p.gap) for p in points], "s2")
    names = [("train less monitor", "s2", _last(points, lambda p: p.gap))]
    return _drawing(
        f"Gap between train and monitor slice of search {history.search}",
        _found(points, "the gap", lambda p: p.gap),
        frame.axes() + zero + band + line + frame.names(names),
    )


def step_size(history: History) -> Markup:
    """How far the optimizer scatters its proposals, on a logarithmic scale."""
    points = _proposed(history)
    values = [p.step_size for p in points if p.step_size]
    frame = _Frame.of(points, values or [0.1, 1.0], "step size", _plain, logarithmic=True)
    line = polylines([_at(frame, p, p.step_size or None) for p in points], "s3")
    return _drawing(
        f"Step size of search {history.search}",
        _found(points, "the step size", lambda p: p.step_size, _plain),
        frame.axes() + line,
    )


def budget(spent: dict[str, Spent]) -> Markup:
    """What is used of each limit, as a bar; of what has no limit a number."""
    bars = []
    for key, one in spent.items():
        used = _amount(one.used)
        share = None if one.allowed is None else min(1.0, one.used / max(one.allowed, 1e-12))
        of = used if one.allowed is None else f"{used} of {_amount(one.allowed)}"
        bars.append(_Bar(key.replace("_", " "), share, of))
    return _bars("Budget", bars)


def importance(found: Sequence[Importance]) -> Markup:
    """How much each coordinate sets the best candidates apart."""
    bars = [_Bar(one.coordinate, one.value, percent(one.value)) for one in found]
    return _bars("Importance of coordinates", bars, scaled=True)


def front(points: Sequence[FrontPoint], across: str, up: str) -> Markup:
    """Two objectives against each other: the candidates on the front, and the baselines."""
    horizontal = Scale.around([p.values[across] for p in points], _LEFT, _WIDTH - 20)
    vertical = Scale.around([p.values[up] for p in points], _HEIGHT - _BOTTOM, _TOP)
    (across_name, written_x), (up_name, written_y) = (
        _objective(name, [p.values[name] for p in points]) for name in (across, up)
    )
    frame = _Frame(horizontal, vertical, across_name, up_name, written_x, written_y)
    marks, ordered = Markup(""), sorted(points, key=lambda p: p.on_front)  # the front on top
    for point in ordered:
        x, y = horizontal(point.values[across]), vertical(point.values[up])
        kind = "s0" if point.on_front else "reference"
        name = point.label or f"candidate {point.candidate}"
        said = f"{name}: {across} {written_x(point.values[across])}"
        said += f", {up} {written_y(point.values[up])}"
        radius = 6.0 if point.winner else 4.0
        marks += element(
            "circle", element("title", said), cx=x, cy=y, r=radius, class_=f"{kind} dot"
        )
        if point.label or point.winner:
            end = x > _WIDTH - 140
            at, anchor = (x - 9, "end") if end else (x + 9, "start")
            marks += text(at, y + 4, point.label or "winner", "label", anchor)
    count = sum(p.on_front for p in points)
    return _drawing(
        f"Front of {across} and {up}",
        f"{count} candidates that no other beats in all objectives, and the baselines",
        frame.axes() + marks,
    )


def heatmap(found: Coefficients) -> Markup:
    """A recipe's coefficients: a row for each model, a column for each group of tensors."""
    left = 12 + 7 * max(map(len, found.rows), default=0)
    cell = min(48.0, (_WIDTH - left) / max(1, len(found.columns)))
    height = 26.0
    known = [abs(value) for row in found.values for value in row if value is not None]
    most = max(known, default=0.0) or 1.0
    bottom = _TOP + height * len(found.rows)
    marks = Markup("")
    for i, (name, row) in enumerate(zip(found.rows, found.values, strict=True)):
        y = _TOP + height * i
        marks += text(left - 8, y + height / 2 + 4, name, "label", "end")
        for j, (column, value) in enumerate(zip(found.columns, row, strict=True)):
            x, shade = left + cell * j, "unknown"
            if value is not None:
                shade = f"heat{round(_SHADES * abs(value) / most)}" + " negative" * (value < 0)
            said = f"{name}, {column}: {'not said' if value is None else _plain(value)}"
            marks += element(
                "rect", element("title", said), x=x, y=y, width=cell - 1, height=height - 1,
                class_=shade,
            )  # fmt: skip
            if value is not None and cell >= 34:
                ink = "value inverse" if abs(value) / most > 0.55 else "value"
                marks += text(x + cell / 2, y + height / 2 + 4, f"{value:.2f}", ink, "middle")
    marks += _beneath(found.columns, float(left), cell, bottom + 16)
    return _drawing(
        f"{found.parameter} by model and layer",
        f"{len(found.rows)} models, {len(found.columns)} groups of tensors; the largest "
        f"{_plain(most)}",
        marks,
        bottom + 26,
    )


def _beneath(columns: Sequence[str], left: float, cell: float, y: float) -> Markup:
    """The names of columns, as many as have room: the first, the last, and others between."""
    found, free, names = Markup(""), left, [name.removeprefix("layer ") for name in columns]
    end = left + cell * len(names) - 7 * len(names[-1]) - 12 if names else left
    for i, name in enumerate(names):
        at, half = left + cell * (i + 0.5), 3.5 * len(name)
        if i == len(names) - 1:
            found += text(left + cell * len(names), y, name, "tick", "end")
        elif i == 0 and half > cell / 2:
            found += text(left, y, name, "tick")
            free = left + 2 * half + 12
        elif at - half >= free and at + half <= end:
            found += text(at, y, name, "tick", "middle")
            free = at + half + 12
    return found


def path(layers: Sequence[tuple[str, int]]) -> Markup:
    """The way through the layers of a merge of layers: at each depth of the merged model, whose
    layer stands there, and where it stood."""
    names = list(dict.fromkeys(name for name, _ in layers))
    across = Scale(0.0, max(1.0, len(layers) - 1.0), _LEFT, _WIDTH - _RIGHT)
    up = Scale.around([float(at) for _, at in layers], _HEIGHT - _BOTTOM, _TOP, whole=True)
    frame = _Frame(across, up, "layer of the merged model", "layer of its source", *[_whole] * 2)
    places = [(across(float(i)), up(float(at))) for i, (_, at) in enumerate(layers)]
    marks = polylines(places, "reference")
    for (name, at), (x, y) in zip(layers, places, strict=True):
        said = f"{name}, layer {at}"
        shade = f"{_APART[names.index(name) % len(_APART)]} dot"
        marks += element("circle", element("title", said), cx=x, cy=y, r=4, class_=shade)
    for i, name in enumerate(names):
        y = _TOP + 10 + 18 * i
        shade = f"{_APART[i % len(_APART)]} dot"
        marks += element("circle", cx=frame.right + 14, cy=y - 4, r=4, class_=shade)
        marks += text(frame.right + 24, y, name)
    said = ", ".join(f"{sum(n == name for n, _ in layers)} layers of {name}" for name in names)
    return _drawing(
        "Path through the layers", f"{len(layers)} layers: {said}", frame.axes() + marks
    )


def intervals(comparisons: Sequence[Comparison]) -> Markup:
    """Gains over each parent with their intervals; what does not cross 0 is hardly luck, where one
    was not chosen by it."""
    left = 24 + 7 * max((len(f"{c.parent}, {c.split}") for c in comparisons), default=0)
    bottom = _TOP + _ROW * len(comparisons)
    ends = [0.0, *(value for c in comparisons for value in (c.gain, *c.interval))]
    across = Scale.around(ends, float(left), _WIDTH - 130)
    zero = across(0.0)
    marks = element("line", x1=zero, x2=zero, y1=_TOP, y2=bottom, class_="reference line")
    for tick in across.ticks():
        marks += text(across(tick), bottom + 16, percent(tick), "tick", "middle")
    for i, one in enumerate(comparisons):
        y = _TOP + _ROW * (i + 0.5)
        low, high = across(one.interval[0]), across(one.interval[1])
        marks += text(left - 12, y + 4, f"{one.parent}, {one.split}", "label", "end")
        marks += element("line", x1=low, x2=high, y1=y, y2=y, class_="s0 line")
        marks += element("circle", cx=across(one.gain), cy=y, r=4, class_="s0 dot")
        marks += text(_WIDTH - 118, y + 4, f"{one.gain:+.1%}", "value")
        marks += text(_WIDTH - 64, y + 4, _luck(one.p_value), "value")
    said = "; ".join(f"{c.parent} on {c.split}: {c.gain:+.1%}" for c in comparisons)
    return _drawing("Gain over each parent", said, marks, height=bottom + 24)


@dataclass(frozen=True)
class _Frame:
    """Axes, and where values are."""

    x: Scale
    y: Scale
    across: str
    up: str
    written_x: Callable[[float], str]
    written_y: Callable[[float], str]

    @classmethod
    def of(
        cls,
        points: Sequence[Point],
        values: Sequence[float],
        up: str,
        written: Callable[[float], str],
        logarithmic: bool = False,
    ) -> "_Frame":
        """By generation."""
        numbers = [float(p.generation) for p in points]
        across = Scale.around(numbers, _LEFT, _WIDTH - _RIGHT, whole=True)
        vertical = Scale.around(values, _HEIGHT - _BOTTOM, _TOP, logarithmic)
        return cls(across, vertical, "generation", up, _whole, written)

    @property
    def right(self) -> float:
        return self.x.end

    def axes(self) -> Markup:
        """Lines across at round values, and what these are."""
        found, bottom = Markup(""), self.y.start
        for tick in self.y.ticks(self.written_y is _whole):
            y = self.y(tick)
            found += element("line", x1=_LEFT, x2=self.right, y1=y, y2=y, class_="grid")
            found += text(_LEFT - 6, y + 4, self.written_y(tick), "tick", "end")
        for tick in self.x.ticks(self.written_x is _whole):
            found += text(self.x(tick), bottom + 16, self.written_x(tick), "tick", "middle")
        found += text((_LEFT + self.right) / 2, bottom + 32, self.across, "axis", "middle")
        found += text(4.0, 12.0, self.up, "axis")
        found += element("line", x1=_LEFT, x2=self.right, y1=bottom, y2=bottom, class_="frame")
        return found

    def names(self, of: Iterable[tuple[str, str, float | None]]) -> Markup:
        """The names of lines beside their right ends, none on top of another."""
        shown = [(name, shade, value) for name, shade, value in of if value is not None]
        places = apart([self.y(value) for _, _, value in shown], 14.0)
        beyond = max([*places, self.y.start + 24]) - (self.y.start + 24)  # the drawing's lower edge
        found = Markup("")
        for (name, shade, _), y in zip(shown, places, strict=True):
            found += text(self.right + 10, y + 4 - beyond, name, f"label {shade}")
        return found


@dataclass(frozen=True)
class _Bar:
    """share: of the whole width, None for no bar."""

    name: str
    share: float | None
    said: str


def _bars(title: str, bars: Sequence[_Bar], scaled: bool = False) -> Markup:
    """scaled: the longest fills the width."""
    left = 16 + 7 * max((len(bar.name) for bar in bars), default=0)
    room = _WIDTH - left - 170
    most = max((bar.share or 0.0 for bar in bars), default=0.0) if scaled else 1.0
    marks = Markup("")
    for i, bar in enumerate(bars):
        y = 4 + _ROW * i
        marks += text(left - 8, y + 15, bar.name, "label", "end")
        if bar.share is not None:
            marks += element("rect", x=left, y=y + 4, width=room, height=14, class_="track")
            filled = room * bar.share / (most or 1.0)
            marks += element("rect", x=left, y=y + 4, width=filled, height=14, class_="s0 fill")
        at = left + room + 10 if bar.share is not None else left
        marks += text(at, y + 15, bar.said, "value")
    said = "; ".join(f"{bar.name} {bar.said}" for bar in bars)
    return _drawing(title, said, marks, height=8 + _ROW * len(bars))


def _reference(frame: _Frame, one: Reference, beside: int) -> Markup:
    """A line across at a baseline's score, its interval a stroke at the right edge, beside those
    of `beside` others."""
    y, edge = frame.y(one.score), frame.right - 3 - 5 * beside
    shade = "reference line best" if one.best else "reference line"
    across = element("line", x1=_LEFT, x2=frame.right, y1=y, y2=y, class_=shade)
    low, high = (frame.y(end) for end in one.interval)
    return across + element("line", x1=edge, x2=edge, y1=low, y2=high, class_="reference whisker")


def _proposed(history: History) -> list[Point]:
    return [point for point in history.points if point.kind == "proposed"]


def _best_other(references: Sequence[Reference]) -> list[Reference]:
    others = [one for one in references if not one.parent]
    return [max(others, key=lambda one: one.score)] if others else []


def _at(frame: _Frame, point: Point, value: float | None) -> tuple[float, float] | None:
    return None if value is None else (frame.x(point.generation), frame.y(value))


def _ends(
    frame: _Frame, point: Point, interval: tuple[float, float] | None
) -> tuple[float, float, float] | None:
    if interval is None:
        return None
    return frame.x(point.generation), frame.y(interval[0]), frame.y(interval[1])


def _last(points: Sequence[Point], value: Callable[[Point], float | None]) -> float | None:
    return next((found for p in reversed(points) if (found := value(p)) is not None), None)


def _found(
    points: Sequence[Point],
    what: str,
    value: Callable[[Point], float | None],
    written: Callable[[float], str] | None = None,
) -> str:
    """For whoever cannot see a line: where it begins and ends."""
    say = written or percent
    known = [(p.generation, found) for p in points if (found := value(p)) is not None]
    if not known:
        return f"{what} is not known yet"
    (first, began), (last, ended) = known[0], known[-1]
    return f"{what} goes from {say(began)} in generation {first} to {say(ended)} in {last}"


def percent(value: float) -> str:
    """A share, for people."""
    return f"{value:.1%}".replace(".0%", "%")


def _objective(name: str, values: Sequence[float]) -> tuple[str, Callable[[float], str]]:
    """The name of an objective, and how its values are written: what is kept small is maximised as
    its negative, which nobody wants to read."""
    if max(values, default=0.0) < 0:
        return f"{name} (less is better)", lambda value: _plain(-value)
    return name, _plain


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _plain(value: float) -> str:
    return f"{value:.3g}"


def _luck(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p {p_value:.3f}"


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


def _drawing(title: str, description: str, marks: Markup, height: float = _HEIGHT) -> Markup:
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        marks,
        viewBox=f"0 0 {_WIDTH:.0f} {height:.0f}",
        class_="chart",
        role="img",
        aria_label=f"{title}: {description}",
        xmlns="http://www.w3.org/2000/svg",
    )
