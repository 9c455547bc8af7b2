"""The noisy landscape of the benchmarks, and that the recommended search crosses it cheaply."""

import math

import numpy as np
import pytest

from benchmarks import landscape, modes
from benchmarks.landscape import FULL, SEARCHES, STAGED, Landscape, spent

CENTRE = np.full(landscape.DIMENSIONS, 0.5)


@pytest.mark.parametrize("seed", range(1, 6))
def test_the_gap_runs_from_the_middle_of_the_cube_to_the_optimum(seed: int) -> None:
    found = Landscape.draw(seed)
    assert found.closed(CENTRE) == pytest.approx(0.0, abs=1e-6)
    assert found.closed(found.optimum) == pytest.approx(1.0, abs=1e-6)
    assert np.linalg.norm(found.optimum - CENTRE) == pytest.approx(0.6)
    assert ((found.optimum > 0) & (found.optimum < 1)).all()
    way = [found.closed(CENTRE + t * (found.optimum - CENTRE)) for t in np.linspace(0, 1, 11)]
    assert way == sorted(way)


def test_a_seed_draws_the_same_landscape_and_another_seed_another() -> None:
    first, again, other = (Landscape.draw(seed) for seed in (1, 1, 2))
    assert np.array_equal(first.optimum, again.optimum)
    assert np.array_equal(first.curvature, again.curvature)
    assert not np.array_equal(first.optimum, other.optimum)


def test_hard_examples_are_solved_less_often() -> None:
    found = Landscape.draw(1)
    (chances,) = found.probabilities(CENTRE[None])
    assert (np.diff(chances) < 0).all()  # the difficulties ascend
    assert 0 < chances.min() < chances.max() < 1
    far = found.probabilities(np.full((1, landscape.DIMENSIONS), 1e3))
    assert np.isfinite(far).all()


def test_a_search_is_repeated_exactly() -> None:
    assert spent(STAGED, 1) == spent(STAGED, 1)


def test_the_staged_search_closes_the_gap_with_a_quarter_of_the_example_evaluations() -> None:
    """Five seeds."""
    seeds = range(1, 6)
    full = float(np.median([spent(FULL, seed) for seed in seeds]))
    assert math.isfinite(full)
    assert all(spent(STAGED, seed) <= full / 4 for seed in seeds)


def test_what_a_generation_costs() -> None:
    found = Landscape.draw(1)
    points = np.tile(CENTRE, (landscape.POPULATION, 1))
    costs = {
        search.title: landscape.raced(found, points, search, seed=1, generation=1)[1]
        for search in SEARCHES
    }
    assert costs[FULL.title] == 14 * 500
    assert costs[STAGED.title] == 14 * 10 + 10 * 10 + 7 * 20


@pytest.mark.parametrize("devices", [1, 8])
def test_devices_change_what_the_synchronous_mode_takes_only_in_time(devices: int) -> None:
    found = modes.crossed(STAGED, 3, "synchronous", devices)
    assert found.examples == spent(STAGED, 3)
    assert found.busy == pytest.approx(1) if devices == 1 else found.busy < 0.9


def test_in_the_asynchronous_mode_no_device_is_ever_idle() -> None:
    found = modes.crossed(STAGED, 3, "asynchronous")
    assert found.busy == pytest.approx(1)
    assert found == modes.crossed(STAGED, 3, "asynchronous")
    assert modes.crossed(STAGED, 3, "asynchronous", 1) == modes.crossed(STAGED, 3, "synchronous", 1)
