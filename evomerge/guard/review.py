"""Watching a running search: the gap, and whether to stop.

The incumbent is scored on a monitor slice of train that the optimizer is never told about. When
its train score runs ahead of that, the search has begun to learn the examples by heart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from evomerge.fitness.results import Scored
from evomerge.guard.estimates import Estimate
from evomerge.guard.selection import Sampled
from evomerge.job import Budget, Stop

_ALARM = 3.0  # standard errors; each new incumbent is another occasion for a false one


@dataclass(frozen=True)
class Review:
    """After one generation.

    incumbent: its candidate. train, monitor: its scores; gap: their difference, in fractions, with
    its standard error. These three are None without a monitor slice. shrunk: its train score with
    the luck of the best taken out, and its interval.
    """

    incumbent: int
    train: float
    monitor: float | None
    gap: float | None
    standard_error: float | None
    shrunk: float
    shrunk_interval: tuple[float, float]


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
    shrunk: Estimate,
    weights: Mapping[str, float],
) -> Review:
    """The gap of the incumbent, beside its shrunk score.

    train, monitor: its own results; monitor is None where there is none. shrunk: see
    selection.Tried. weights: see Objective.shares.
    """
    ours = Sampled.of(train.tasks, weights)
    if monitor is None:
        return Review(incumbent, ours.value, None, None, None, shrunk.value, shrunk.interval)
    theirs = Sampled.of(monitor.tasks, weights)
    error = math.hypot(ours.standard_error, theirs.standard_error)
    gap = ours.value - theirs.value
    return Review(incumbent, ours.value, theirs.value, gap, error, shrunk.value, shrunk.interval)


def warning(reviews: Sequence[Review]) -> str | None:
    """What to say of the gap after the last of these generations; None where nothing is to be said,
    or was said before.

    The raw gap is positive in every search, as the incumbent is the luckiest of many. So the shrunk
    score is compared, and what is left beyond _ALARM standard errors is no luck of one candidate:
    the search as a whole fits the examples that it is told about, and not those that it is not.
    """
    alarms = [_apart(found) > _ALARM for found in reviews]
    if not alarms or not alarms[-1] or any(alarms[:-1]):
        return None
    last = reviews[-1]
    return (
        f"the search learns train by heart: the incumbent's shrunk score of {last.shrunk:.1%} is "
        f"{_apart(last):.1f} standard errors above its {last.monitor:.1%} on the monitor slice: "
        "give it more examples, or a smaller space"
    )


def _apart(found: Review) -> float:
    """By how many standard errors the shrunk score is above that on the monitor slice."""
    if found.monitor is None or not found.standard_error:
        return 0.0
    return (found.shrunk - found.monitor) / found.standard_error


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
    """Whether the incumbent's train score rose and its monitor score fell so often in a row, and
    the gap grew by more than its standard error meanwhile.

    By luck alone every other new incumbent falls on the monitor slice. A generation without a new
    incumbent says nothing: it neither counts nor ends the row.
    """
    if stop.overfitting is None:
        return None
    row, grown = 0, 0.0
    for before, after in pairwise(reviews):
        if after.incumbent == before.incumbent:
            continue
        rise, fall = after.train - before.train, _fall(before, after)
        row, grown = (row + 1, grown + rise + fall) if rise > 0 and fall > 0 else (0, 0.0)
    if row < stop.overfitting or grown <= (reviews[-1].standard_error or 0.0):
        return None
    return (
        f"overfitting: {row} times in a row the train score of a new incumbent rose while that on "
        f"the monitor slice fell, and their gap grew by {grown:.1%}"
    )


def _fall(before: Review, after: Review) -> float:
    """Of the monitor score; 0 where it is not known."""
    if before.monitor is None or after.monitor is None:
        return 0.0
    return before.monitor - after.monitor


def _stagnation(stop: Stop, reviews: Sequence[Review]) -> str | None:
    """Whether the best shrunk score is that old; the first one counts as a best."""
    known = [found.shrunk for found in reviews]
    if stop.stagnation is None or len(known) <= stop.stagnation:
        return None
    best = max(known[: -stop.stagnation])
    if max(known[-stop.stagnation :]) > best:
        return None
    return f"stagnation: no shrunk score above {best:.1%} in the last {stop.stagnation} generations"
