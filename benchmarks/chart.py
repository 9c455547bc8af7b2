"""Learning curves as an SVG file: a line for the median over repetitions, a band for their range.

The chart brings its own light ground, so that it reads alike on a light page and on a dark one.
Knows nothing of what is drawn.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

# Told apart by people who see colours differently too (Okabe and Ito 2008).
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9")
_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 40, 20, 96
_ROW = 20  # of the legend


@dataclass(frozen=True)
class Curve:
    """A line. repetitions: of each the points (x, y), x ascending and y in [0, 1], a share of what
    the axis reaches."""

    title: str
    repetitions: Sequence[Sequence[tuple[float, float]]]


def draw(
    curves: Sequence[Curve], vertical: str, horizontal: str, reach: float | None = None
) -> str:
    """The text of an SVG file. vertical, horizontal: what the axes show. reach: what the top of
    the vertical axis stands for, by default 100%."""
    furthest = max(x for curve in curves for points in curve.repetitions for x, _ in points)
    step = _step(furthest)
    right = math.ceil(furthest / step) * step
    height = _HEIGHT - 24 + _ROW * ((len(curves) + 1) // 2 - 1)

    def path(points: Iterable[tuple[float, float]]) -> str:
        return " ".join("{:.1f},{:.1f}".format(*_at(x, y, right)) for x, y in points)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="13" fill="#222" role="img">',
        f"<title>{escape(vertical)} over {escape(horizontal)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="#fafafa"/>',
        *_grid(right, step, vertical, horizontal, reach),
    ]
    for index, curve in enumerate(curves):
        colour = _COLOURS[index % len(_COLOURS)]
        xs, low, middle, high = _summary(curve)
        band = [*zip(xs, high, strict=True), *reversed(list(zip(xs, low, strict=True)))]
        line = zip(xs, middle, strict=True)
        parts += [
            f'<polygon points="{path(band)}" fill="{colour}" opacity="0.13"/>',
            f'<polyline points="{path(line)}" fill="none" stroke="{colour}" '
            'stroke-width="2.5" stroke-linejoin="round"/>',
            *_legend(index, curve.title, colour),
        ]
    return "\n".join([*parts, "</svg>", ""])


def _summary(
    curve: Curve,
) -> tuple[list[float], list[float], list[float], list[float]]:
    """x, lowest, median and highest y, where every repetition has begun and none has ended."""
    first = max(points[0][0] for points in curve.repetitions)
    last = min(points[-1][0] for points in curve.repetitions)
    own = {x for points in curve.repetitions for x, _ in points if first <= x <= last}
    xs = sorted(own | {first, last})
    ys: NDArray[np.float64] = np.array(
        [np.interp(xs, *np.array(points).T) for points in curve.repetitions]
    )
    return xs, ys.min(axis=0).tolist(), np.median(ys, axis=0).tolist(), ys.max(axis=0).tolist()


def _grid(
    right: float, step: float, vertical: str, horizontal: str, reach: float | None
) -> list[str]:
    base, end = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for fifth in range(6):
        y = _at(0, fifth / 5, right)[1]
        label = f"{20 * fifth}%" if reach is None else f"{reach * fifth / 5:,.0f}"
        parts += [
            f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{end}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>',
        ]
    for mark in range(round(right / step) + 1):
        x = _at(mark * step, 0, right)[0]
        parts += [
            f'<line x1="{x:.1f}" y1="{base}" x2="{x:.1f}" y2="{base + 5}" stroke="#888"/>',
            f'<text x="{x:.1f}" y="{base + 20}" text-anchor="middle">{mark * step:,.0f}</text>',
        ]
    middle, centre = (_LEFT + end) / 2, (_TOP + base) / 2
    return [
        *parts,
        f'<text x="{middle}" y="{base + 40}" text-anchor="middle">{escape(horizontal)}</text>',
        f'<text transform="translate(16 {centre}) rotate(-90)" text-anchor="middle">'
        f"{escape(vertical)}</text>",
    ]


def _legend(index: int, title: str, colour: str) -> list[str]:
    """Two columns under the axis."""
    x = _LEFT + index % 2 * (_WIDTH - _LEFT) / 2
    y = _HEIGHT - _BOTTOM + 64 + index // 2 * _ROW
    return [
        f'<line x1="{x}" y1="{y}" x2="{x + 22}" y2="{y}" stroke="{colour}" stroke-width="2.5"/>',
        f'<text x="{x + 30}" y="{y + 4}">{escape(title)}</text>',
    ]


def _at(x: float, y: float, right: float) -> tuple[float, float]:
    """Where a point stands on the page."""
    across = _LEFT + x / right * (_WIDTH - _LEFT - _RIGHT)
    return across, _TOP + (1 - y) * (_HEIGHT - _TOP - _BOTTOM)


def _step(furthest: float) -> float:
    """Of the marks on the axis, about six of them: 1, 2 or 5 times a power of ten."""
    rough = furthest / 6
    power = 10.0 ** math.floor(math.log10(rough))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= rough)
