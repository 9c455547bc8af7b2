"""Watching a running search: the gap, and whether to stop.

The incumbent is scored on a monitor slice of train that the optimizer is never told about. When
its train score runs ahead of that, the search has begun to learn the examples by heart.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from evomerge.fitness.results import Scored
from evomerge.job import Budget


@dataclass(frozen=True)
class Review:
    """After one generation. gap: train minus monitor score of the incumbent, in fractions."""

    incumbent: int
    train: float
    monitor: float
    gap: float
    standard_error: float


@dataclass(frozen=True)
class Used:
    """What a search has spent so far."""

    candidates: int
    example_evaluations: int
    hours: float


def review(incumbent: int, train: Scored, monitor: Scored, weights: Mapping[str, float]) -> Review:
    """The gap of the incumbent, with the standard error of the difference."""
    total = sum(weights[task] for task in train.tasks)
    variance = sum(
        (weights[task] / total) ** 2 * scores.standard_error**2
        for part in (train, monitor)
        for task, scores in part.tasks.items()
    )
    ours, theirs = train.score(weights), monitor.score(weights)
    return Review(incumbent, ours, theirs, ours - theirs, variance**0.5)


def budget_spent(budget: Budget, used: Used) -> str | None:
    """Which limit of the budget is reached, in words; None while all are open."""
    limits = (
        ("candidates", used.candidates, budget.candidates),
        ("example evaluations", used.example_evaluations, budget.example_evaluations),
        ("hours", used.hours, budget.hours),
    )
    for what, spent, allowed in limits:
        if allowed is not None and spent >= allowed:
            return f"the budget of {allowed:,} {what} is spent"
    return None
