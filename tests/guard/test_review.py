"""Watching a search: the gap with its standard error, the shrunk score, and why to stop."""

from typing import Any

import numpy as np
import pytest

from evomerge.fitness.results import Scored, Scores
from evomerge.guard.estimates import shrunk
from evomerge.guard.review import Review, Used, review, stop_reason
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


def test_the_gap_is_train_minus_monitor() -> None:
    found = review(17, scored(a=[1, 1, 1, 0]), scored(a=[1, 0]), [], ONE)
    assert found.incumbent == 17
    assert (found.train, found.monitor, found.gap) == (0.75, 0.5, 0.25)
    # 0.25 from train, 0.5 from monitor
    assert found.standard_error == pytest.approx((0.25**2 + 0.5**2) ** 0.5)


def test_the_gap_is_negative_when_the_monitor_slice_does_better() -> None:
    assert review(0, scored(a=[0, 0]), scored(a=[1, 1]), [], ONE).gap == -1.0


def test_tasks_are_weighed_in_the_gap_and_in_its_error() -> None:
    train = scored(a=[1, 1], b=[1, 0], c=[0, 0, 1])
    monitor = scored(a=[0, 0], b=[1, 0], c=[0, 1])
    found = review(0, train, monitor, [], {"a": 3.0, "b": 1.0, "c": 0.0})
    assert found.gap == pytest.approx(0.75)
    assert found.standard_error == pytest.approx(0.25 * (0.5**2 + 0.5**2) ** 0.5)


def test_without_a_monitor_slice_there_is_no_gap_but_a_score() -> None:
    found = review(3, scored(a=[1, 0]), None, [], ONE)
    assert (found.train, found.monitor, found.gap, found.standard_error) == (0.5, None, None, None)
    assert found.shrunk == pytest.approx(0.5)


def test_the_shrunk_score_is_that_of_the_incumbent_among_the_others() -> None:
    others = [scored(a=hits(k, 40)) for k in (10, 12, 20, 25)]
    found = review(0, scored(a=hits(32, 40)), None, others, ONE)
    means = np.array([10, 12, 20, 25, 32]) / 40
    assert found.shrunk == pytest.approx(shrunk(means, 40, best=4).value)
    assert 0.5 < (found.shrunk or 0) < 0.8


def test_a_score_that_rests_on_a_small_task_is_shrunk_further() -> None:
    def found(weights: dict[str, float]) -> float:
        others = [scored(a=hits(k, 10), b=hits(10 * k, 100)) for k in (3, 4, 5)]
        train = scored(a=hits(8, 10), b=hits(80, 100))
        return review(0, train, None, others, weights).shrunk

    assert found({"a": 1.0, "b": 0.0}) < found({"a": 1.0, "b": 1.0}) < found({"a": 0.0, "b": 1.0})
    means = np.array([0.3, 0.4, 0.5, 0.8])
    assert found({"a": 1.0, "b": 0.0}) == pytest.approx(shrunk(means, 10, best=3).value)
    pooled = shrunk(means, 110, best=3).value
    assert found({"a": 10.0, "b": 100.0}) == pytest.approx(pooled)


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
) -> list[Review]:
    n = len(shrunk) or len(train or [])
    return [
        Review(
            incumbents[i] if incumbents else i,
            train[i] if train else 0.5,
            monitor[i] if monitor else None,
            None,
            None,
            shrunk[i] if shrunk else 0.0,
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
