"""Watching a search: the gap with its standard error, the shrunk score, and why to stop."""

from typing import Any

import numpy as np
import pytest

from evomerge.fitness.results import Scored, Scores
from evomerge.guard.estimates import Estimate, wilson
from evomerge.guard.review import Review, Used, review, stop_reason, warning
from evomerge.job import Budget, Stop

ONE = {"a": 1.0}


def scored(**tasks: list[float]) -> Scored:
    def part(values: list[float]) -> Scores:
        n = len(values)
        zeros = np.zeros(n, np.uint32)
        shaping = np.full(n, -9.0, np.float32)
        examples, plain = np.arange(n, dtype=np.uint32), np.array(values, np.float32)
        return Scores(examples, plain, shaping, zeros > 0, zeros, zeros > 0)

    return Scored({task: part(values) for task, values in tasks.items()}, 0.0, 0.0)


def hits(right: int, n: int) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


SHRUNK = Estimate(0.4, (0.3, 0.5))


def test_the_gap_is_train_minus_monitor() -> None:
    found = review(17, scored(a=hits(60, 80)), scored(a=hits(10, 20)), SHRUNK, ONE)
    assert found.incumbent == 17
    assert (found.train, found.monitor, found.gap) == (0.75, 0.5, 0.25)
    assert found.standard_error == pytest.approx((0.75 * 0.25 / 80 + 0.25 / 20) ** 0.5, rel=0.01)
    assert (found.shrunk, found.shrunk_interval) == (0.4, (0.3, 0.5))


def test_the_gap_is_negative_when_the_monitor_slice_does_better() -> None:
    assert review(0, scored(a=[0, 0]), scored(a=[1, 1]), SHRUNK, ONE).gap == -1.0


def test_a_gap_of_a_few_examples_is_not_certain() -> None:
    found = review(0, scored(a=[1] * 20), scored(a=[0, 0]), SHRUNK, ONE)
    assert found.gap == 1.0
    assert (found.standard_error or 0) > 0.3


def test_tasks_are_weighed_in_the_gap_and_in_its_error() -> None:
    train = scored(a=hits(40, 40), b=hits(20, 40), c=[0, 0, 1])
    monitor = scored(a=hits(0, 20), b=hits(10, 20), c=[0, 1])
    found = review(0, train, monitor, SHRUNK, {"a": 3.0, "b": 1.0, "c": 0.0})
    assert found.gap == pytest.approx(0.75)
    parts = [
        review(0, scored(a=t), scored(a=m), SHRUNK, ONE).standard_error or 0.0
        for t, m in ((hits(40, 40), hits(0, 20)), (hits(20, 40), hits(10, 20)))
    ]
    expected = ((0.75 * parts[0]) ** 2 + (0.25 * parts[1]) ** 2) ** 0.5
    assert found.standard_error == pytest.approx(expected)


def test_without_a_monitor_slice_there_is_no_gap_but_a_score() -> None:
    found = review(3, scored(a=[1, 0]), None, SHRUNK, ONE)
    assert (found.train, found.monitor, found.gap, found.standard_error) == (0.5, None, None, None)
    assert found.shrunk == 0.4


def alarming(shrunk: float, monitor: float | None, error: float | None = 0.05) -> Review:
    gap = None if monitor is None else 0.9 - monitor
    return Review(1, 0.9, monitor, gap, error, shrunk, (0.0, 1.0))


def test_a_search_that_learns_train_by_heart_is_warned_of_once() -> None:
    calm, alarm = alarming(0.7, 0.6), alarming(0.7, 0.5)
    assert warning([]) is None
    assert warning([calm]) is None  # though the raw gap is six standard errors
    text = warning([calm, alarm])
    assert text is not None
    assert "shrunk score of 70.0% is 4.0 standard errors above its 50.0% on the monitor" in text
    assert warning([calm, alarm, alarm]) is None
    assert warning([calm, alarm, calm]) is None
    assert warning([calm, alarm, calm, alarm]) is None


def test_without_a_monitor_slice_nothing_is_warned_of() -> None:
    assert warning([alarming(0.9, None, None)]) is None


def test_a_search_that_learns_nothing_by_heart_is_seldom_warned_of() -> None:
    """Each of 30 incumbents is an occasion, on the same small slice."""
    false = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        slice_ = draw.random(20) < 0.5  # what all of them get right or wrong there, mostly
        reviews = []
        for i in range(30):
            changed = np.where(draw.random(20) < 0.3, draw.random(20) < 0.5, slice_)
            found = review(i, scored(a=hits(50, 80)), scored(a=list(changed)), wilson(0.5, 80), ONE)
            reviews.append(found)
        false += any(warning(reviews[: i + 1]) for i in range(30))
    assert false <= 10


USED = Used(candidates=600, example_evaluations=60_000, hours=7.5, gpu_hours=15.0)
OPEN = Budget(candidates=10_000)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"candidates": 601}, None),
        ({"candidates": 600}, "the budget of 600 candidates is spent"),
        ({"candidates": 1}, "the budget of 1 candidates is spent"),
        ({"example_evaluations": 60_001}, None),
        ({"example_evaluations": 60_000}, "the budget of 60,000 example evaluations is spent"),
        ({"hours": 8}, None),
        ({"hours": 7.5}, "the budget of 7.5 hours is spent"),
        ({"gpu_hours": 15.5}, None),
        ({"gpu_hours": 15}, "the budget of 15.0 GPU hours is spent"),
        ({"candidates": 1000, "hours": 10, "example_evaluations": 10**9, "gpu_hours": 16}, None),
        ({"candidates": 1000, "hours": 1}, "the budget of 1.0 hours is spent"),
        ({"candidates": 10, "hours": 1}, "the budget of 10 candidates is spent"),
    ],
)
def test_the_first_limit_that_is_reached_is_named(
    budget: dict[str, Any], words: str | None
) -> None:
    assert stop_reason(Stop(), Budget(**budget), USED, []) == words


def history(
    *shrunk: float,
    train: list[float] | None = None,
    monitor: list[float | None] | None = None,
    incumbents: list[int] | None = None,
    error: float | None = None,
) -> list[Review]:
    n = len(shrunk) or len(train or [])
    return [
        Review(
            incumbents[i] if incumbents else i,
            train[i] if train else 0.5,
            monitor[i] if monitor else None,
            None,
            error,
            shrunk[i] if shrunk else 0.0,
            (0.0, 1.0),
        )
        for i in range(n)
    ]


def reason(reviews: list[Review], **stop: Any) -> str | None:
    return stop_reason(Stop(**stop), OPEN, USED, reviews)


def test_nothing_stops_a_search_that_asked_for_nothing() -> None:
    falling = history(0.9, 0.8, 0.7, train=[0.5, 0.6, 0.7], monitor=[0.5, 0.4, 0.3])
    assert reason(falling) is None


def test_the_latest_shrunk_score_reaches_the_target() -> None:
    assert reason([], target=0.8) is None
    assert reason(history(0.7, 0.79), target=0.8) is None
    assert reason(history(0.85, 0.79), target=0.8) is None
    assert reason(history(0.7, None), target=0.8) is None
    found = reason(history(0.7, 0.85), target=0.8)
    assert found == "the target of 80.0% is reached, by a shrunk score of 85.0%"
    assert stop_reason(Stop(target=0.8), Budget(candidates=1), USED, history(0.8)) is not None


def test_a_target_that_is_reached_is_said_though_the_budget_is_spent() -> None:
    found = stop_reason(Stop(target=0.8), Budget(candidates=1), USED, history(0.8))
    assert found is not None
    assert "target" in found


@pytest.mark.parametrize(
    ("scores", "stopped"),
    [
        ([], False),
        ([0.5, 0.5], False),
        ([0.5, 0.5, 0.5], False),  # the best is two generations old
        ([0.5, 0.5, 0.5, 0.5], True),
        ([0.5, 0.4, 0.4, 0.51], False),
        ([0.5, 0.6, 0.6, 0.6], False),
        ([0.5, 0.6, 0.6, 0.5, 0.59], True),
    ],
)
def test_three_generations_without_a_better_shrunk_score_are_stagnation(
    scores: list[float], stopped: bool
) -> None:
    found = reason(history(*scores), stagnation=3)
    assert (found is not None) == stopped
    if found is not None:
        assert "stagnation" in found
        assert "the last 3 generations" in found


@pytest.mark.parametrize(
    ("train", "monitor", "incumbents", "stopped"),
    [
        ([0.5, 0.6, 0.7], [0.5, 0.4, 0.3], [1, 2, 3], True),
        ([0.5, 0.6], [0.5, 0.4], [1, 2], False),  # once
        ([0.5, 0.6, 0.7], [0.5, 0.5, 0.4], [1, 2, 3], False),  # did not fall at first
        ([0.5, 0.6, 0.6], [0.5, 0.4, 0.3], [1, 2, 3], False),  # train did not rise
        ([0.5, 0.6, 0.7, 0.8], [0.5, 0.4, 0.3, 0.4], [1, 2, 3, 4], False),  # it recovered
        ([0.5, 0.6, 0.7, 0.8], [0.2, 0.4, 0.3, 0.2], [1, 2, 3, 4], True),
        ([0.5, 0.6, 0.6, 0.6, 0.7], [0.5, 0.4, 0.4, 0.4, 0.3], [1, 2, 2, 2, 3], True),
        ([0.5, 0.6, 0.7, 0.7], [0.5, 0.4, 0.3, 0.3], [1, 2, 3, 3], True),
        ([0.5, 0.6, 0.7], [0.5, None, 0.3], [1, 2, 3], False),
        ([], [], [], False),
    ],
)
def test_overfitting_is_a_row_of_new_incumbents_that_gain_on_train_and_lose_on_monitor(
    train: list[float], monitor: list[float | None], incumbents: list[int], stopped: bool
) -> None:
    found = reason(history(train=train, monitor=monitor, incumbents=incumbents), overfitting=2)
    assert (found is not None) == stopped
    if found is not None:
        assert found.startswith("overfitting: 2 times in a row")


@pytest.mark.parametrize(("error", "stopped"), [(0.35, True), (0.39, True), (0.41, False)])
def test_a_gap_that_grew_by_less_than_its_standard_error_stops_nothing(
    error: float, stopped: bool
) -> None:
    """By 0.2 in train and 0.2 on the monitor slice: half of all new incumbents fall there."""
    falling = history(
        train=[0.5, 0.6, 0.7], monitor=[0.5, 0.4, 0.3], incumbents=[1, 2, 3], error=error
    )
    assert (reason(falling, overfitting=2) is not None) == stopped
