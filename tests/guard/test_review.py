"""Watching a search: the gap with its standard error, and the limits of the budget."""

from typing import Any

import numpy as np
import pytest

from evomerge.fitness.results import Scored, Scores
from evomerge.guard.review import Used, budget_spent, review
from evomerge.job import Budget


def scored(**tasks: list[float]) -> Scored:
    def part(values: list[float]) -> Scores:
        n = len(values)
        shaping = np.full(n, -9.0, np.float32)
        return Scores(
            np.arange(n, dtype=np.uint32), np.array(values, np.float32), shaping, shaping > 0
        )

    return Scored({task: part(values) for task, values in tasks.items()}, 0.0, 0.0)


def test_the_gap_is_train_minus_monitor() -> None:
    found = review(17, scored(a=[1, 1, 1, 0]), scored(a=[1, 0]), {"a": 1.0})
    assert found.incumbent == 17
    assert (found.train, found.monitor, found.gap) == (0.75, 0.5, 0.25)
    # 0.25 from train, 0.5 from monitor
    assert found.standard_error == pytest.approx((0.25**2 + 0.5**2) ** 0.5)


def test_the_gap_is_negative_when_the_monitor_slice_does_better() -> None:
    assert review(0, scored(a=[0, 0]), scored(a=[1, 1]), {"a": 1.0}).gap == -1.0


def test_tasks_are_weighed_in_the_gap_and_in_its_error() -> None:
    train, monitor = scored(a=[1, 1], b=[1, 0]), scored(a=[0, 0], b=[1, 0])
    found = review(0, train, monitor, {"a": 3.0, "b": 1.0})
    assert found.gap == pytest.approx(0.75)
    assert found.standard_error == pytest.approx(0.25 * (0.5**2 + 0.5**2) ** 0.5)


USED = Used(candidates=600, example_evaluations=60_000, hours=7.5)


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
        ({"candidates": 1000, "hours": 10, "example_evaluations": 10**9}, None),
        ({"candidates": 1000, "hours": 1}, "the budget of 1.0 hours is spent"),
        ({"candidates": 10, "hours": 1}, "the budget of 10 candidates is spent"),
    ],
)
def test_the_first_limit_that_is_reached_is_named(
    budget: dict[str, Any], words: str | None
) -> None:
    assert budget_spent(Budget(**budget), USED) == words
