"""Charts of the benchmarks: what is drawn is on the page, and is what was measured."""

from xml.etree import ElementTree

import pytest

from benchmarks.chart import Curve, draw

SVG = "{http://www.w3.org/2000/svg}"
CURVES = [
    Curve("one & two", [[(100, 0.0), (1000, 0.5)], [(100, 0.2), (1000, 0.9)]]),
    Curve("short", [[(50, 1.0), (500, 1.0)]]),
]


def points(element: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (p.split(",") for p in element.get("points").split())]


@pytest.fixture(scope="module")
def page() -> ElementTree.Element:
    return ElementTree.fromstring(draw(CURVES, "accuracy", "cost"))


def test_every_curve_has_a_line_a_band_and_its_name(page: ElementTree.Element) -> None:
    texts = [element.text for element in page.iter(f"{SVG}text")]
    assert {"one & two", "short", "accuracy", "cost", "0%", "100%"} <= set(texts)
    assert len(list(page.iter(f"{SVG}polyline"))) == len(CURVES)
    assert len(list(page.iter(f"{SVG}polygon"))) == len(CURVES)


def test_everything_is_on_the_page(page: ElementTree.Element) -> None:
    _, _, width, height = map(float, page.get("viewBox").split())
    drawn = [
        p for shape in ("polyline", "polygon") for e in page.iter(SVG + shape) for p in points(e)
    ]
    assert all(0 < x < width and 0 < y < height for x, y in drawn)


def test_the_line_is_the_median_and_better_is_higher(page: ElementTree.Element) -> None:
    both, short = (points(element) for element in page.iter(f"{SVG}polyline"))
    (zero,) = (float(e.get("y")) - 4 for e in page.iter(f"{SVG}text") if e.text == "0%")
    top = short[0][1]
    assert [(zero - y) / (zero - top) for _, y in both] == pytest.approx([0.1, 0.7], abs=1e-3)
    assert short[-1][0] < both[-1][0]
