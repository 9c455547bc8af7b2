"""Scales, axes and elements: round numbers, nothing on top of another, nothing but text."""

from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from evomerge.report.svg import Scale, apart, bands, element, polylines, text

HOSTILE = """<script>alert("x")</script>'&amp;"""

numbers = st.floats(-1e12, 1e12)
settled = settings(derandomize=True, deadline=None, max_examples=50)


def test_what_is_no_markup_is_escaped_wherever_it_stands() -> None:
    drawn = element("text", HOSTILE, element("tspan", "x"), aria_label=HOSTILE)
    found = ElementTree.fromstring(drawn)
    assert found.text == HOSTILE
    assert found.get("aria-label") == HOSTILE
    assert [child.tag for child in found] == ["tspan"]


def test_attributes_that_are_none_are_left_out_and_numbers_are_short() -> None:
    assert element("line", x1=1 / 3, x2=2.0, y1=None, class_="grid") == Markup(
        '<line x1="0.33" x2="2" class="grid"/>'
    )
    assert text(1, 2, "a").count("text-anchor") == 1


def test_a_line_has_a_gap_where_nothing_is_known() -> None:
    drawn = polylines([(0, 0), (1, 1), None, (3, 3), None, None, (4, 4), (5, 5)], "s0")
    found = ElementTree.fromstring(f"<g>{drawn}</g>")
    assert [(child.tag, child.get("points")) for child in found] == [
        ("polyline", "0.0,0.0 1.0,1.0"),
        ("circle", None),
        ("polyline", "4.0,4.0 5.0,5.0"),
    ]
    assert polylines([None, None], "s0") == ""


def test_a_band_goes_there_below_and_back_above() -> None:
    (found,) = ElementTree.fromstring(f"<g>{bands([(0, 5, 1), (1, 6, 2)], 's0')}</g>")
    assert found.get("points") == "0.0,5.0 1.0,6.0 1.0,2.0 0.0,1.0"


@given(st.lists(numbers), st.booleans())
@settled
def test_a_scale_holds_all_values_between_its_ends_and_ticks_stand_on_it(
    values: list[float], whole: bool
) -> None:
    values = [float(round(value)) for value in values] if whole else values
    scale = Scale.around(values, 10, 110, whole=whole)
    assert scale.low < scale.high
    assert scale(scale.low) == pytest.approx(10)
    assert scale(scale.high) == pytest.approx(110)
    assert all(10 - 1e-6 <= scale(value) <= 110 + 1e-6 for value in values)
    ticks = scale.ticks(whole)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 8
    assert all(10 - 1e-6 <= scale(tick) <= 110 + 1e-6 for tick in ticks)
    assert not whole or all(tick == int(tick) for tick in ticks)


@given(st.lists(st.floats(1e-12, 1e12), min_size=1))
@settled
def test_a_logarithmic_scale_has_powers_of_ten_for_ticks(values: list[float]) -> None:
    scale = Scale.around(values, 0, 100, logarithmic=True)
    assert all(-1e-6 <= scale(value) <= 100 + 1e-6 for value in values)
    assert all(f"{tick:e}".startswith("1.000000e") for tick in scale.ticks())
    assert len(scale.ticks()) >= 2


def test_values_that_are_none_at_all_have_a_scale_too() -> None:
    scale = Scale.around([float("inf"), float("nan")], 0, 100)
    assert (scale.low, scale.high) == (0, 1)
    assert scale.ticks() == [0, 0.2, 0.4, 0.6, 0.8, 1]


@given(st.lists(st.floats(0, 300)))
@settled
def test_places_are_moved_apart_without_changing_their_order_or_their_middle(
    places: list[float],
) -> None:
    moved = apart(places, 14)
    order = sorted(range(len(places)), key=places.__getitem__)
    assert all(moved[j] - moved[i] >= 14 - 1e-6 for i, j in pairwise(order))
    assert sum(moved) == pytest.approx(sum(places), abs=1e-6)


def test_places_that_are_apart_stay() -> None:
    assert apart([50, 0, 20], 14) == pytest.approx([50, 0, 20])
