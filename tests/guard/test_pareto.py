"""Several objectives: fronts and volumes against brute force and by hand, knees of known fronts."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from evomerge.guard.pareto import front, hypervolume, knees, reference

Rows = NDArray[np.float64]


def rows(*values: tuple[float, ...]) -> Rows:
    return np.array(values, dtype=np.float64)


def small(widest: int = 4, longest: int = 9) -> st.SearchStrategy[Rows]:
    """Few values, so that many are equal."""
    shapes = st.tuples(st.integers(1, longest), st.integers(1, widest))
    return shapes.flatmap(
        lambda shape: arrays.arrays(np.float64, shape, elements=st.integers(-2, 5).map(float))
    )


def dominates(one: Rows, other: Rows) -> bool:
    return bool((one >= other).all() and (one > other).any())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(small())
def test_the_front_is_what_nobody_dominates(values: Rows) -> None:
    expected = [
        i for i, row in enumerate(values) if not any(dominates(other, row) for other in values)
    ]
    assert front(values).tolist() == expected


def test_numbers_of_any_size_make_no_difference_to_the_front() -> None:
    assert front(rows((-1e18, 0.1), (-1e18, 0.2), (1e-9, 0.2))).tolist() == [2]
    assert front(rows((1.0, 1e17), (2.0, 1e17))).tolist() == [1]  # their sums are equal
    assert front(rows((2.0, 1e17), (1.0, 1e17))).tolist() == [0]


def cells(values: Rows, corner: Rows) -> float:
    """The volume of a union of boxes, counted cell by cell between all the coordinates."""
    sides = [
        sorted({low, *column[column > low]}) for low, column in zip(corner, values.T, strict=True)
    ]
    total = 0.0
    for cell in product(*(pairwise(side) for side in sides)):
        middle = np.array([(low + high) / 2 for low, high in cell])
        if any((row >= middle).all() for row in values):
            total += float(np.prod([high - low for low, high in cell]))
    return total


@settings(max_examples=150, deadline=None, derandomize=True)
@given(small())
def test_the_volume_is_that_of_its_cells(values: Rows) -> None:
    corner = np.zeros(values.shape[1])
    assert hypervolume(values, corner) == pytest.approx(cells(values, corner))


@pytest.mark.parametrize(
    ("values", "volume"),
    [
        (rows((2, 3)), 6.0),
        (rows((2, 3), (2, 3), (1, 1)), 6.0),
        (rows((1, 3), (2, 2), (3, 1)), 6.0),
        (rows((4, 0), (0, 4), (-1, 5)), 0.0),
        (rows((2, 2, 2)), 8.0),
        (rows((1, 2, 2), (2, 1, 2), (2, 2, 1)), 7.0),  # of the eight, the far corner is missing
        (rows((1, 1, 1, 3), (1, 1, 3, 1), (1, 3, 1, 1), (3, 1, 1, 1)), 9.0),
    ],
)
def test_volumes_by_hand(values: Rows, volume: float) -> None:
    assert hypervolume(values, np.zeros(values.shape[1])) == pytest.approx(volume)


def test_no_candidates_have_no_volume() -> None:
    assert hypervolume(np.empty((0, 3)), np.zeros(3)) == 0.0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(small(), st.permutations(range(9)))
def test_the_order_of_the_candidates_does_not_matter(values: Rows, order: list[int]) -> None:
    corner = np.full(values.shape[1], -1.0)
    shuffled = values[[i for i in order if i < len(values)]]
    assert hypervolume(shuffled, corner) == pytest.approx(hypervolume(values, corner))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(small(), st.data())
def test_the_volume_is_that_of_the_front_and_never_falls(values: Rows, data: st.DataObject) -> None:
    corner = np.full(values.shape[1], -3.0)
    whole = hypervolume(values, corner)
    assert hypervolume(values[front(values)], corner) == pytest.approx(whole)
    n = data.draw(st.integers(1, len(values)))
    assert hypervolume(values[:n], corner) <= whole + 1e-9


def test_a_large_front_in_three_objectives_is_exact() -> None:
    """An eighth of a ball, from inside and from outside."""
    draw = np.random.default_rng(0)
    sphere = np.abs(draw.normal(size=(600, 3)))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    found = hypervolume(sphere, np.zeros(3))
    points = draw.random((20_000, 3))
    hit = np.zeros(len(points), np.bool_)
    for row in sphere:
        hit |= (points <= row).all(axis=1)
    error = float(hit.std() / len(hit) ** 0.5)
    assert found == pytest.approx(hit.mean(), abs=4 * error)
    assert found < np.pi / 6


def test_the_reference_is_a_tenth_beyond_the_worst_baseline() -> None:
    baselines = rows((0.2, -100.0, -24.0, 0.0), (0.7, -40.0, -24.0, 0.0))
    assert reference(baselines) == pytest.approx([0.15, -106.0, -26.4, -0.1])
    assert hypervolume(baselines, reference(baselines)) > 0


def test_the_knee_comes_first() -> None:
    values = rows((0, 1), (0.05, 0.99), (0.8, 0.85), (0.9, 0.5), (1, 0), (0.5, 0.5))
    assert knees(values, 1).tolist() == [2]


def test_the_knee_does_not_depend_on_units() -> None:
    values = rows((0, 1), (0.05, 0.99), (0.8, 0.85), (0.9, 0.5), (1, 0))
    scaled = values * [1e9, 0.01] - [3e9, 40.0]
    assert knees(scaled, 4).tolist() == knees(values, 4).tolist()


def test_knees_are_spread_over_the_front() -> None:
    angles = np.linspace(0, np.pi / 2, 41)
    crowded = np.linspace(0.7, 0.9, 100)  # most candidates are alike
    angles = np.concatenate([angles, crowded])
    values = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    chosen = angles[knees(values, 3)]
    assert chosen[0] == pytest.approx(np.pi / 4, abs=0.05)
    assert sorted(chosen)[0] < np.pi / 8 + 0.1
    assert sorted(chosen)[2] > 3 * np.pi / 8 - 0.1


def test_equal_candidates_and_dominated_ones_are_no_knees() -> None:
    values = rows((1, 0), (1, 0), (0, 1), (0, 0.5))
    assert sorted(knees(values, 9).tolist()) == [0, 2]


def test_an_objective_that_is_the_same_for_all_does_not_count() -> None:
    values = rows((0, 7, 1), (0.8, 7, 0.8), (1, 7, 0))
    assert knees(values, 1).tolist() == [1]
    assert knees(rows((3, 3)), 5).tolist() == [0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(small(), st.integers(1, 10))
def test_knees_are_different_members_of_the_front(values: Rows, count: int) -> None:
    chosen = knees(values, count)
    members = values[front(values)]
    assert len({tuple(row) for row in values[chosen]}) == len(chosen)
    assert len(chosen) == min(count, len(np.unique(members, axis=0)))
    assert set(chosen.tolist()) <= set(front(values).tolist())
