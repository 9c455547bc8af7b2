"""How a search went, generation by generation, and what should worry whoever looks at it.

Scores are in [0, 1], as the objective of the search sees them; reads the store alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from evomerge.guard.estimates import normal
from evomerge.report.weighing import Weighing
from evomerge.search import summary
from evomerge.search.wear import tests_of, wear
from evomerge.store import GenerationRow, SearchRow, Store, Sums, consistent
from evomerge.store.sums import GenerationSums

Interval = tuple[float, float]
AlertKind = Literal["truncation", "stale", "failures", "gap", "contamination", "worn"]

_CUT_OFF = 0.05  # share of replies from which on the token limit is part of what is measured
_FAILED = 0.25  # share of candidates
_SILENCE = timedelta(minutes=10)  # at least
_LONGEST = 5.0  # times the longest evaluation so far, after which nothing should take so long


@dataclass(frozen=True)
class Point:
    """One generation. kind: baselines | proposed | final.

    mean: score of its candidates that were scored to the end, on average. best: the shrunk score of
    the incumbent after it, with its interval; raw_best: as it was scored; monitor: on the monitor
    slice; gap: raw_best less monitor. candidates, failed: how many, infeasible ones among the
    failed. examples: that proposed candidates cost so far, from the first generation on. What is
    not known, such as of a generation that is still open, is None.
    """

    generation: int
    kind: str
    mean: float | None
    best: float | None
    best_interval: Interval | None
    raw_best: float | None
    monitor: float | None
    gap: float | None
    gap_interval: Interval | None
    step_size: float | None
    hypervolume: float | None
    candidates: int
    failed: int
    examples: int
    opened_at: str
    told_at: str | None


@dataclass(frozen=True)
class Reference:
    """A baseline on all of train. parent: whether it is a model that is merged, or the base. best:
    whether it is the best of those."""

    candidate: int
    name: str
    score: float
    interval: Interval
    parent: bool
    best: bool


@dataclass(frozen=True)
class Alert:
    """What should worry whoever looks. at: UTC, ISO 8601, where it is known when it began."""

    kind: AlertKind
    text: str
    at: str | None


@dataclass(frozen=True)
class Spent:
    """Of one limit of the budget; allowed is None where there is no such limit."""

    used: float
    allowed: float | None


@dataclass(frozen=True)
class History:
    """A search. state: see SearchRow. budget: by limit: candidates, example_evaluations, hours,
    gpu_hours. seconds_left: see summary.show."""

    search: str
    state: str
    objective: str
    points: tuple[Point, ...]
    references: tuple[Reference, ...]
    alerts: tuple[Alert, ...]
    budget: dict[str, Spent]
    stop_reason: str | None
    seconds_left: float | None


@consistent
def history(store: Store, name: str) -> History:
    """Raises StoreError for an unknown search."""
    row = store.search(name)
    generations = store.generations(row.id)
    weighing = Weighing.of(store, row)
    sums = Sums(store, row.id).generations(summary.last_stage(row))
    spent, seconds_left = summary.spending(store, row)
    return History(
        row.name,
        row.state,
        row.job["objective"],
        _points(generations, sums, weighing),
        _references(weighing),
        tuple(_alerts(store, row, generations, sums)),
        {key: Spent(**entry) for key, entry in spent.items()},
        row.stop_reason,
        seconds_left,
    )


def _points(
    generations: Sequence[GenerationRow], sums: Mapping[int, GenerationSums], weighing: Weighing
) -> tuple[Point, ...]:
    found, examples = [], 0
    for generation in generations:
        own = sums.get(generation.number, GenerationSums({}, 0, {}))
        review: Mapping[str, Any] = generation.review or {}
        examples += own.examples
        gap, error = review.get("gap"), review.get("standard_error")
        interval = review.get("shrunk_interval")
        found.append(
            Point(
                generation.number,
                generation.kind,
                weighing.mean(own.means) if own.means else None,
                review.get("shrunk"),
                None if interval is None else (interval[0], interval[1]),
                review.get("train"),
                review.get("monitor"),
                gap,
                None if gap is None or error is None else normal(gap, error).interval,
                generation.step_size,
                review.get("hypervolume"),
                sum(own.states.values()),
                own.states.get("failed", 0) + own.states.get("infeasible", 0),
                examples,
                generation.opened_at,
                generation.told_at,
            )
        )
    return tuple(found)


def _references(weighing: Weighing) -> tuple[Reference, ...]:
    found = {one: weighing.estimate(one.means) for one in weighing.baselines if one.means}
    parents = [one for one in found if one.parent]
    best = max(parents, key=lambda one: found[one].value, default=None)
    return tuple(
        Reference(
            one.candidate, one.name, found[one].value, found[one].interval, one.parent, one == best
        )
        for one in found
    )


def _alerts(
    store: Store,
    row: SearchRow,
    generations: Sequence[GenerationRow],
    sums: Mapping[int, GenerationSums],
) -> list[Alert]:
    said: tuple[AlertKind, ...] = ("gap", "contamination")
    events = store.events(row.id)
    found = [Alert(kind, text, at) for kind in said for at, of, text in events if of == kind]
    tests = tests_of(store, row.id)
    found += [Alert("worn", str(one), None) for one in wear(store, tests, apart_from=row.name)]
    return found + _failures(sums) + _truncation(store, row, generations) + _staleness(store, row)


def _failures(sums: Mapping[int, GenerationSums]) -> list[Alert]:
    """Of candidates whose models could be merged."""
    states = [own.states for number, own in sums.items() if number]  # 0: of the baselines
    failed, scored = (sum(one.get(state, 0) for one in states) for state in ("failed", "scored"))
    if failed == 0 or failed < _FAILED * (failed + scored):
        return []
    text = f"{failed:,} of {failed + scored:,} candidates have failed: see the reasons"
    return [Alert("failures", text, None)]


def _truncation(store: Store, row: SearchRow, generations: Sequence[GenerationRow]) -> list[Alert]:
    """Of whoever leads."""
    reviews = [g.review for g in generations if g.review]
    leader = (row.verdict or {}).get("winner") or (reviews[-1]["incumbent"] if reviews else None)
    if leader is None:
        return []
    means = store.means(row.id, "train", [leader]) or store.means(row.id, "full", [leader])
    return [
        Alert(
            "truncation",
            f"task '{task}': the token limit cut off {mean.truncated:.0%} of the replies of "
            f"candidate {leader}, which leads: raise max_tokens in the task file",
            None,
        )
        for task, mean in means.get(leader, {}).items()
        if mean.truncated >= _CUT_OFF
    ]


def _staleness(store: Store, row: SearchRow) -> list[Alert]:
    """Of a search that runs, and hears nothing of its devices."""
    if row.state != "running":
        return []
    latest, longest = store.latest_evaluation(row.id)
    if latest is None:
        return []
    silence = datetime.now().astimezone() - datetime.fromisoformat(latest)
    if silence < max(_SILENCE, timedelta(seconds=_LONGEST * longest)):
        return []
    minutes = silence.total_seconds() / 60
    text = (
        f"nothing was evaluated for {minutes:,.0f} minutes, and no evaluation took longer than "
        f"{longest / 60:,.1f}: see its log, and whether its devices answer"
    )
    return [Alert("stale", text, latest)]
