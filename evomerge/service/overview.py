"""All searches at a glance: those of the store, and those that wait in its queue.

Reads the store alone, and little of it: a list is looked at more often than anything else.
"""

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from evomerge.errors import InputError, NotFound
from evomerge.report.compare import Estimate
from evomerge.report.history import Spent
from evomerge.search import summary
from evomerge.store import Queue, SearchRow, Store, Submission, consistent
from evomerge.store.queue import Head

State = Literal["queued", "running", "paused", "finished", "failed", "cancelled"]
MOST = 200  # searches on a page


@dataclass(frozen=True)
class Asked:
    """A submission, see Submission, without its document, and without its webhook, whose address
    may be a secret."""

    id: int
    kind: Literal["search", "export", "push"]
    search: str
    state: State
    priority: int
    overrides: tuple[str, ...]
    attempts: int
    error: str | None
    result: dict[str, Any] | None
    by: str
    submitted_at: str
    started_at: str | None
    ended_at: str | None

    @classmethod
    def of(cls, one: Submission) -> "Asked":
        """What may be told of it."""
        return cls(
            one.id,
            one.kind,
            one.search,
            one.state,
            one.priority,
            one.overrides,
            one.attempts,
            one.error,
            one.result,
            one.by,
            one.submitted_at,
            one.started_at,
            one.ended_at,
        )


@dataclass(frozen=True)
class Overview:
    """One search. state: of its work, as its submission and its row say together; a search that
    nobody conducts and that can be resumed is paused. validation: of its winner; gain: over the
    best parent there. shrunk: of the incumbent, on train. spent: by each limit of its budget.
    seconds_left: see summary.show. place: in the queue, from 1, while it waits there. created_at:
    when it was submitted, or launched."""

    name: str
    state: State
    submission: Asked | None
    place: int | None
    generations: int
    candidates: int
    validation: Estimate | None
    gain: Estimate | None
    promoted: bool | None
    shrunk: float | None
    spent: dict[str, Spent]
    seconds_left: float | None
    hours: float
    stop_reason: str | None
    created_at: str


@dataclass(frozen=True)
class Overviews:
    """A part of the list. next: the cursor of what follows; None at the end. total: of the list, as
    it was filtered."""

    items: tuple[Overview, ...]
    next: str | None
    total: int


@dataclass(frozen=True)
class Standing:
    """What a search is at, see Overview."""

    name: str
    state: State
    submission: Asked | None
    place: int | None


@consistent
def standing(store: Store, name: str) -> Standing:
    """Raises NotFound for a search that is neither in the store nor in its queue."""
    queue = Queue(store)
    submission = queue.of(name)
    try:
        row = store.search(name)
    except NotFound:
        if submission is None:
            raise
        return _standing(name, submission.state, submission, queue)
    return _standing(name, _state(row, submission), submission, queue)


@consistent
def overviews(
    store: Store, state: State | None = None, after: str | None = None, limit: int = 50
) -> Overviews:
    """A page of searches, the latest first. state: of these alone; after: `next` of the page
    before, which searches that come meanwhile do not shift; limit: 1 to MOST. Raises InputError for
    a cursor that is none."""
    queue = Queue(store)
    heads = queue.heads()
    rows = {row.name: row for row in store.searches()}
    listed = []
    for name in {**rows, **heads}:
        row, head = rows.get(name), heads.get(name)
        at = row.created_at if row is not None else heads[name].submitted_at
        if state in (None, _state(row, head)):
            listed.append((at, name))
    listed.sort(reverse=True)
    begin = None if after is None else _opened(after)
    rest = [key for key in listed if begin is None or key < begin]
    chosen = rest[:limit]
    lines = {line["name"]: line for line in summary.ls(store)}
    places = queue.places()
    found = queue.some([heads[name].id for _, name in chosen if name in heads])
    submissions = {one.search: one for one in found.values()}
    items = tuple(
        _overview(store, at, name, rows.get(name), submissions.get(name), lines.get(name), places)
        for at, name in chosen
    )
    return Overviews(items, _cursor(chosen[-1]) if len(rest) > limit else None, len(listed))


def _overview(
    store: Store,
    at: str,
    name: str,
    row: SearchRow | None,
    submission: Submission | None,
    line: Mapping[str, Any] | None,
    places: Mapping[int, int],
) -> Overview:
    verdict = (row.verdict if row is not None else None) or {}
    begun = line or {"generations": 0, "candidates": 0, "shrunk": None, "hours": 0.0}
    if row is not None:
        spent, left = _spending(store, row, begun)
    else:
        job = submission.document if submission is not None else {}
        spent, left = {key: Spent(0, limit) for key, limit in _limits(job).items()}, None
    return Overview(
        name=name,
        state=_state(row, submission),
        submission=None if submission is None else Asked.of(submission),
        place=None if submission is None else places.get(submission.id),
        generations=begun["generations"],
        candidates=begun["candidates"],
        validation=_estimate(verdict.get("estimates", {}).get("validation")),
        gain=_estimate(verdict.get("validation_gain")),
        promoted=verdict.get("promoted"),
        shrunk=begun["shrunk"],
        spent=spent,
        seconds_left=left,
        hours=begun["hours"],
        stop_reason=None if row is None else row.stop_reason,
        created_at=at,
    )


def _standing(name: str, state: State, submission: Submission | None, queue: Queue) -> Standing:
    if submission is None:
        return Standing(name, state, None, None)
    place = queue.places().get(submission.id) if submission.state == "queued" else None
    return Standing(name, state, Asked.of(submission), place)


def _state(row: SearchRow | None, submission: Submission | Head | None) -> State:
    """What a row and the latest submission say together; one of them is there."""
    if row is not None and row.state == "running":
        return "running"
    if submission is not None and (
        row is None
        or submission.state in ("queued", "running")
        # Nobody goes on with it until somebody has seen to it.
        or (submission.state == "failed" and row.state == "stopped")
    ):
        return submission.state
    if row is not None and row.state in ("finished", "failed"):
        return "finished" if row.state == "finished" else "failed"
    return "paused"


def _spending(
    store: Store, row: SearchRow, begun: Mapping[str, Any]
) -> tuple[dict[str, Spent], float | None]:
    """By limit of the budget; and the seconds left of a search that goes on, or may."""
    limits = _limits(row.job)
    if row.state in ("running", "stopped"):
        used, left = summary.spending(store, row)
        return {key: Spent(**used[key]) for key in limits}, left
    ways: dict[str, Callable[[], float]] = {
        "candidates": lambda: begun["candidates"],
        "example_evaluations": lambda: store.example_evaluations(row.id),
        "hours": lambda: begun["hours"],
        "gpu_hours": lambda: store.device_seconds(row.id) / 3600,
    }
    return {key: Spent(ways[key](), limit) for key, limit in limits.items()}, None


def _limits(job: Mapping[str, Any]) -> dict[str, float]:
    return {key: limit for key, limit in job.get("budget", {}).items() if limit is not None}


def _estimate(found: Mapping[str, Any] | None) -> Estimate | None:
    if found is None:
        return None
    interval = found.get("interval")
    return Estimate(found["value"], None if interval is None else (interval[0], interval[1]))


def _cursor(key: tuple[str, str]) -> str:
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode().rstrip("=")


def _opened(cursor: str) -> tuple[str, str]:
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        at, name = json.loads(base64.urlsafe_b64decode(padded.encode("ascii")))
    except (ValueError, TypeError):
        raise InputError("cursor: it is none of this list: begin without one") from None
    return str(at), str(name)
