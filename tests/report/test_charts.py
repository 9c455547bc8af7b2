"""Whatever a search has done is drawn: well-formed, finite, and nothing that is not known."""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from evomerge.report import charts
from evomerge.report.candidate import Comparison
from evomerge.report.coefficients import Coefficients
from evomerge.report.history import History, Point, Reference, Spent
from evomerge.report.population import FrontPoint, Importance

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '<img src=x onerror="alert(1)">&'

settled = settings(derandomize=True, deadline=None, max_examples=25)
scores = st.floats(0, 1)
gains = st.floats(-1, 1)
sizes = st.floats(1e-12, 10)
names = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn")), max_size=12)


def intervals(of: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[float, float]]:
    return st.tuples(of, of).map(lambda ends: (min(ends), max(ends)))


points = st.builds(
    Point,
    generation=st.just(0),
    kind=st.sampled_from(["baselines", "proposed", "final"]),
    mean=st.none() | scores,
    best=st.none() | scores,
    best_interval=st.none() | intervals(scores),
    raw_best=st.none() | scores,
    monitor=st.none() | scores,
    gap=st.none() | gains,
    gap_interval=st.none() | intervals(gains),
    step_size=st.none() | st.just(0.0) | sizes,
    hypervolume=st.none(),
    candidates=st.just(4),
    failed=st.just(0),
    examples=st.just(0),
    opened_at=st.just("2026-01-01T00:00:00+00:00"),
    told_at=st.none(),
)
references = st.builds(
    Reference, st.integers(1, 9), names, scores, intervals(scores), st.booleans(), st.booleans()
)
spent = st.builds(Spent, st.floats(0, 1e9), st.none() | st.floats(1e-3, 1e9))
histories = st.builds(
    lambda points, references, budget: History(
        HOSTILE,
        "running",
        "mean",
        tuple(replace(point, generation=i) for i, point in enumerate(points)),
        tuple(references),
        (),
        budget,
        None,
        None,
    ),
    st.lists(points, max_size=12),
    st.lists(references, max_size=5),
    st.dictionaries(st.sampled_from(["candidates", "hours", "gpu_hours"]), spent),
)


def parsed(drawing: Markup) -> Element:
    """A drawing that is well-formed, whose numbers are finite and within its box, and that says
    what it is to whoever cannot see it."""
    root = ElementTree.fromstring(drawing)
    left, top, width, height = map(float, root.attrib["viewBox"].split())
    assert (left, top) == (0, 0)
    for element in root.iter():
        assert "style" not in element.attrib
        for at, limit in (("x", width), ("y", height)):
            for key in (at, f"{at}1", f"{at}2", f"c{at}"):
                assert -0.01 <= float(element.get(key, 0)) <= limit + 0.01, element.attrib
        for size in ("width", "height", "r"):
            assert 0 <= float(element.get(size, 0)) < 1e4
        for pair in element.get("points", "").split():
            x, y = map(float, pair.split(","))
            assert -0.06 <= x <= width + 0.06
            assert -0.06 <= y <= height + 0.06
    title, description = (root.findtext(f"{SVG}{tag}") for tag in ("title", "desc"))
    assert title
    assert root.get("aria-label") == f"{title}: {description}"
    assert root.get("role") == "img"
    return root


def having(root: Element, *classes: str) -> Iterator[Element]:
    return (one for one in root.iter() if {*classes} <= {*one.get("class", "").split()})


def vertices(root: Element, shade: str) -> int:
    """Points that lines of a class go through, single ones included."""
    lines = sum(len(line.attrib["points"].split()) for line in having(root, shade, "line"))
    return lines + sum(1 for _ in having(root, shade, "dot"))


def known(history: History, key: str) -> int:
    values = [getattr(p, key) for p in history.points if p.kind == "proposed"]
    return sum(value is not None for value in values)


@given(histories)
@settled
def test_scores_that_are_known_are_drawn_and_no_others(history: History) -> None:
    root = parsed(charts.fitness(history))
    assert vertices(root, "s0") == known(history, "best")
    assert vertices(root, "s1") == known(history, "mean")
    corners = sum(len(band.attrib["points"].split()) for band in having(root, "s0", "band"))
    assert corners == 2 * known(history, "best_interval")


@given(histories)
@settled
def test_parents_and_the_best_other_baseline_are_lines_across(history: History) -> None:
    root = parsed(charts.fitness(history))
    parents = [one for one in history.references if one.parent]
    others = [one for one in history.references if not one.parent]
    drawn = parents + ([max(others, key=lambda one: one.score)] if others else [])
    assert sum(1 for _ in having(root, "reference", "line")) == len(drawn)
    shown = [one.text or "" for one in having(root, "label", "reference")]
    assert shown == [one.name for one in drawn]


@given(histories)
@settled
def test_gaps_and_step_sizes_that_are_known_are_drawn_and_no_others(history: History) -> None:
    assert vertices(parsed(charts.gap(history)), "s2") == known(history, "gap")
    steps = sum(bool(p.step_size) for p in history.points if p.kind == "proposed")
    assert vertices(parsed(charts.step_size(history)), "s3") == steps


@given(histories)
@settled
def test_bars_are_as_long_as_what_is_used_and_never_longer_than_all(history: History) -> None:
    root = parsed(charts.budget(history.budget))
    limited = [one for one in history.budget.values() if one.allowed is not None]
    tracks, fills = (list(having(root, shade)) for shade in ("track", "fill"))
    assert len(tracks) == len(fills) == len(limited)
    for one, track, fill in zip(limited, tracks, fills, strict=True):
        share = float(fill.attrib["width"]) / float(track.attrib["width"])
        assert share == pytest.approx(min(1.0, one.used / (one.allowed or 1)), abs=0.01)


@given(st.lists(st.tuples(names, st.floats(0, 1)), max_size=20))
@settled
def test_the_most_important_coordinate_fills_the_width(found: list[tuple[str, float]]) -> None:
    root = parsed(charts.importance([Importance(*one) for one in found]))
    widths = [float(bar.attrib["width"]) for bar in having(root, "fill")]
    assert len(widths) == len(found)
    if any(value > 0 for _, value in found):
        (track, *_) = having(root, "track")
        assert max(widths) == pytest.approx(float(track.attrib["width"]), abs=0.01)


@given(
    st.lists(
        st.tuples(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12), st.none() | names, st.booleans()),
        max_size=20,
    )
)
@settled
def test_each_point_of_a_front_has_a_mark_that_says_what_it_is(
    found: list[tuple[float, float, str | None, bool]],
) -> None:
    front = [
        FrontPoint(i, 1, i, label, {"score": a, "length": b}, on_front, i == 0)
        for i, (a, b, label, on_front) in enumerate(found)
    ]
    root = parsed(charts.front(front, "score", "length"))
    marks = list(having(root, "dot"))
    assert len(marks) == len(front)
    assert sum(1 for _ in having(root, "s0", "dot")) == sum(p.on_front for p in front)
    assert all(mark.findtext(f"{SVG}title") for mark in marks)


@given(st.data(), st.integers(1, 4), st.integers(1, 40))
@settled
def test_a_heatmap_has_a_cell_for_each_coefficient(
    data: st.DataObject, rows: int, columns: int
) -> None:
    row = st.lists(st.none() | st.floats(-3, 3), min_size=columns, max_size=columns).map(tuple)
    values = tuple(data.draw(st.lists(row, min_size=rows, max_size=rows)))
    labels = ("embeddings", *(f"layer {i}" for i in range(columns - 1)))
    found = Coefficients("weight", tuple(f"m{i}" for i in range(rows)), labels, values)
    root = parsed(charts.heatmap(found))
    cells = list(root.iter(f"{SVG}rect"))
    assert len(cells) == rows * columns
    flat = [value for row in values for value in row]
    assert sum(1 for _ in having(root, "unknown")) == flat.count(None)
    negative = sum(value is not None and value < 0 for value in flat)
    assert sum(1 for _ in having(root, "negative")) == negative
    sheet = charts.STYLE.read_text()
    assert all(f".{cell.attrib['class'].split()[0]} " in sheet for cell in cells)


@pytest.mark.parametrize("layers", [1, 6, 33, 120])
def test_names_of_columns_do_not_stand_on_each_other(layers: int) -> None:
    columns = ("embed_tokens", *(f"layer {i}" for i in range(layers)), "rest")
    found = Coefficients("weight", ("m",), columns, ((0.5,) * len(columns),))
    root = parsed(charts.heatmap(found))
    free = 0.0
    for tick in having(root, "tick"):
        wide = 6.0 * len(tick.text or "")
        x = float(tick.attrib["x"])
        start = x - wide * {"start": 0, "middle": 0.5, "end": 1}[tick.attrib["text-anchor"]]
        assert start >= free
        free = start + wide
    assert (tick.text, tick.attrib["text-anchor"]) == ("rest", "end")


@given(st.lists(st.tuples(st.sampled_from(["a", "b", HOSTILE]), st.integers(0, 90)), max_size=60))
@settled
def test_a_path_has_a_mark_for_each_layer_and_one_for_each_source(
    layers: list[tuple[str, int]],
) -> None:
    root = parsed(charts.path(layers))
    marks = [dot for dot in having(root, "dot") if "reference" not in dot.attrib["class"]]
    assert len(marks) == len(layers) + len({name for name, _ in layers})


@given(
    st.lists(
        st.builds(
            lambda parent, gain, ends, p: Comparison(parent, "train", 40, 0.5, 0.5, gain, ends, p),
            names,
            gains,
            intervals(gains),
            scores,
        ),
        max_size=8,
    )
)
@settled
def test_each_comparison_is_an_interval_a_mark_and_what_they_say(found: list[Comparison]) -> None:
    root = parsed(charts.intervals(found))
    lines, dots = list(having(root, "s0", "line")), list(having(root, "s0", "dot"))
    assert len(lines) == len(dots) == len(found)
    assert all(float(line.attrib["x1"]) <= float(line.attrib["x2"]) for line in lines)
    said = [one.text for one in having(root, "value")][::2]
    assert said == [f"{one.gain:+.1%}" for one in found]


def test_names_of_many_parents_stay_apart_and_inside() -> None:
    point = Point(1, "proposed", 0.0, 0.0, *[None] * 7, 4, 0, 9, "x", None)
    many = tuple(Reference(i, f"parent {i}", 0.0, (0.0, 0.1), True, i == 0) for i in range(8))
    history = History("s", "running", "mean", (point,), many, (), {}, None, None)
    heights = sorted(
        float(name.attrib["y"]) for name in having(parsed(charts.fitness(history)), "label")
    )
    assert len(heights) == 10
    assert all(b - a >= 13.9 for a, b in pairwise(heights))


def test_no_class_is_without_a_style_and_no_colour_without_a_class() -> None:
    point = Point(1, "proposed", 0.5, 0.6, (0.5, 0.7), 0.6, 0.5, 0.1, (0, 0.2), 0.1, None, 4, 0, 9,
        "x", None)  # fmt: skip
    parent = Reference(1, HOSTILE, 0.4, (0.3, 0.5), True, True)
    went = History(HOSTILE, "running", "mean", (point,), (parent,), (), {}, None, None)
    drawn = charts.fitness(went) + charts.gap(went) + charts.step_size(went)
    sheet = charts.STYLE.read_text()
    classes = {name for one in re.findall(r'class="([^"]+)"', drawn) for name in one.split()}
    assert {name for name in classes if f".{name}" not in sheet} <= {"label"}
    assert "#" not in drawn.replace("&#", "")
    assert "<img" not in drawn
