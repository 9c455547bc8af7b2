"""What claims and estimates are worth, over many whole searches whose truth is known.

EVOMERGE_STATS=small measures a part of it, with room for chance.
"""

import os
from functools import cache, partial
from statistics import mean

import pytest

from benchmarks.claims import (
    SMALL,
    Nothing,
    Overfitted,
    Size,
    Something,
    nothing,
    over_seeds,
    overfitted,
    something,
)

pytestmark = pytest.mark.stats
SIZE = SMALL if os.environ.get("EVOMERGE_STATS") == "small" else Size()
FULL = Size() == SIZE
POINT = 0.01


@cache
def without() -> list[Nothing]:
    return over_seeds(partial(nothing, SIZE.candidates), SIZE.nothing)


@cache
def with_something() -> list[Something]:
    return over_seeds(partial(something, SIZE.candidates), SIZE.something)


@cache
def long(examples: int, staged: bool) -> list[Overfitted]:
    measure = partial(overfitted, SIZE.long, examples, staged)
    return over_seeds(measure, SIZE.overfitted)


def test_where_there_is_nothing_to_find_next_to_nothing_is_promoted() -> None:
    assert sum(found.promoted for found in without()) <= (5 if FULL else 2)


def test_the_best_train_score_would_have_claimed_a_gain_on_the_same_searches() -> None:
    assert mean(found.naive for found in without()) >= 4 * POINT


def test_a_claimed_gain_is_the_true_gain() -> None:
    errors = [found.claimed - found.true for found in with_something()]
    assert abs(mean(errors)) <= (1 if FULL else 2.5) * POINT
    assert mean(found.true for found in with_something()) > 5 * POINT
    assert mean(found.promoted for found in with_something()) > 0.6


def test_the_interval_of_a_claim_holds_the_true_gain() -> None:
    covered = mean(found.covered for found in with_something())
    assert covered >= (0.9 if FULL else 0.6)


@pytest.mark.parametrize(("examples", "naive", "shrunk"), [(100, 9.0, 2.5), (500, 3.0, 1.2)])
def test_a_shrunk_score_is_near_the_truth_where_the_raw_one_is_far_from_it(
    examples: int, naive: float, shrunk: float
) -> None:
    found = long(examples, False)
    room = 1.0 if FULL else 2.0
    assert mean(f.naive for f in found) > naive * POINT * (1 if FULL else 0.6)
    assert abs(mean(f.shrunk for f in found)) <= shrunk * POINT * room
    assert abs(mean(f.errors["shrunk"] for f in found)) <= shrunk * POINT * room


@pytest.mark.parametrize(("examples", "room"), [(100, 5.0), (500, 2.5)])
@pytest.mark.parametrize("staged", [False, True])
def test_the_estimates_of_a_verdict_are_near_the_truth(
    examples: int, room: float, staged: bool
) -> None:
    found = long(examples, staged)
    for name in ("shrunk", "bbc_cv", "validation_bbc"):
        error = mean(f.errors[name] for f in found)
        assert abs(error) <= room * POINT * (1 if FULL else 1.5), name
        assert mean(f.covered[name] for f in found) >= (0.75 if FULL else 0.5), name
