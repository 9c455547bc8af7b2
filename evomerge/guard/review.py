"""Watching a running search: the gap, and whether to stop.

The incumbent is scored on a monitor slice of train that the optimizer is never told about. When
its train score runs ahead of that, the search has begun to learn the examples by heart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from evomerge.fitness.results import Scored
from evomerge.guard.estimates import shrunk
from evomerge.job import Budget, Stop


@dataclass(frozen=True)
class Review:
    """After one generation.

    incumbent: its candidate. train, monitor: its scores; gap: their difference, in fractions, with
    its standard error. These three are None without a monitor slice. shrunk: its train score with
    the luck of the best taken out.
    """

    incumbent: int
    train: float
    monitor: float | None
    gap: float | None
    standard_error: float | None
    shrunk: float


@dataclass(frozen=True)
class Used:
    """What a search has spent so far. gpu_hours: of devices at work, summed over them."""

    candidates: int
    example_evaluations: int
    hours: float
    gpu_hours: float


def review(
    incumbent: int,
    train: Scored,
    monitor: Scored | None,
    others: Sequence[Scored],
    weights: Mapping[str, float],
) -> Review:
    """The gap of the incumbent, and its shrunk score.

    train, monitor: its own results; monitor is None where there is none. others: the other
    candidates of the generation, on as many examples as `train`. weights: see Objective.shares.
    """
    means = np.array([*(found.score(weights) for found in others), train.score(weights)])
    shares = {task: weights[task] / sum(weights[t] for t in train.tasks) for task in train.tasks}
    # As many examples of one task would leave as much to luck.
    n = round(1 / sum(shares[task] ** 2 / len(scores) for task, scores in train.tasks.items()))
    kept = shrunk(means, n, best=len(others)).value
    ours = train.score(weights)
    if monitor is None:
        return Review(incumbent, ours, None, None, None, kept)
    theirs = monitor.score(weights)
    variance = sum(
        shares[task] ** 2 * scores.standard_error**2
        for part in (train, monitor)
        for task, scores in part.tasks.items()
    )
    return Review(incumbent, ours, theirs, ours - theirs, variance**0.5, kept)


def stop_reason(stop: Stop, budget: Budget, used: Used, reviews: Sequence[Review]) -> str | None:
    """Why a search should stop, in words; None while it should go on.

    reviews: of its generations so far, in their order.
    """
    return (
        _target_reached(stop, reviews)
        or _budget_spent(budget, used)
        or _overfitting(stop, reviews)
        or _stagnation(stop, reviews)
    )


def _target_reached(stop: Stop, reviews: Sequence[Review]) -> str | None:
    found = reviews[-1].shrunk if reviews else None
    if stop.target is None or found is None or found < stop.target:
        return None
    return f"the target of {stop.target:.1%} is reached, by a shrunk score of {found:.1%}"


def _budget_spent(budget: Budget, used: Used) -> str | None:
    limits = (
        ("candidates", used.candidates, budget.candidates),
        ("example evaluations", used.example_evaluations, budget.example_evaluations),
        ("hours", used.hours, budget.hours),
        ("GPU hours", used.gpu_hours, budget.gpu_hours),
    )
    for what, spent, allowed in limits:
        if allowed is not None and spent >= allowed:
            return f"the budget of {allowed:,} {what} is spent"
    return None


def _overfitting(stop: Stop, reviews: Sequence[Review]) -> str | None:
    """Whether the incumbent's train score rose and its monitor score fell so often in a row.

    A generation without a new incumbent says nothing: it neither counts nor ends the row.
    """
    if stop.overfitting is None:
        return None
    row = 0
    for before, after in pairwise(reviews):
        if after.incumbent == before.incumbent:
            continue
        if before.monitor is None or after.monitor is None:
            row = 0
        else:
            apart = after.train > before.train and after.monitor < before.monitor
            row = row + 1 if apart else 0
    if row < stop.overfitting:
        return None
    return (
        f"overfitting: {row} times in a row the train score of a new incumbent rose while that on "
        "the monitor slice fell"
    )


def _stagnation(stop: Stop, reviews: Sequence[Review]) -> str | None:
    """Whether the best shrunk score is that old; the first one counts as a best."""
    known = [found.shrunk for found in reviews]
    if stop.stagnation is None or len(known) <= stop.stagnation:
        return None
    best = max(known[: -stop.stagnation])
    if max(known[-stop.stagnation :]) > best:
        return None
    return f"stagnation: no shrunk score above {best:.1%} in the last {stop.stagnation} generations"
