"""The candidates of a search: page by page, what nobody beats, what led when, what mattered.

Reads the store alone.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from evomerge.coordinates import Coordinate
from evomerge.errors import InputError, nearest
from evomerge.guard.estimates import combined
from evomerge.optimizer.importance import ped_anova
from evomerge.search.summary import last_stage, task_weights
from evomerge.store import CandidateRow, MeanRow, SearchRow, Sort, Store, Sums, consistent

SORTS: tuple[Sort, ...] = get_args(Sort)
STATES = ("open", "scored", "failed", "infeasible")
MOST = 500  # candidates on a page

_ENOUGH = 2_000  # candidates to judge coordinates by
_LEAST = 40  # of whom the best tenth say something


@dataclass(frozen=True)
class Member:
    """A candidate in a list. state: open | scored | failed | infeasible. label: of baselines, and
    'mean' of the distribution's mean. score: the weighted mean over the tasks on n examples of
    train, with its interval: the best of many flatter. objectives: of a search with several, by
    name, higher is better. violation: by how much it breaks the constraints. seconds: of devices
    that it took."""

    id: int
    generation: int
    slot: int
    label: str | None
    state: str
    reason: str | None
    fitness: float | None
    score: float | None
    interval: tuple[float, float] | None
    n: int
    scores: dict[str, float]
    objectives: dict[str, float] | None
    violation: float | None
    seconds: float
    recipe_sha: str | None


@dataclass(frozen=True)
class Page:
    """A part of a list. next: the cursor of what follows; None at the end. total: of the list, as
    it was filtered."""

    items: tuple[Member, ...]
    next: str | None
    total: int


@dataclass(frozen=True)
class FrontPoint:
    """A candidate's values of each objective, higher is better. on_front: nobody beats it in all of
    them; else it is a baseline, to compare with, or the winner, which validation has chosen."""

    candidate: int
    generation: int
    slot: int
    label: str | None
    values: dict[str, float]
    on_front: bool
    winner: bool


@dataclass(frozen=True)
class Importance:
    """How much a coordinate sets the best candidates apart from the others, as a share of what all
    coordinates do, in [0, 1]."""

    coordinate: str
    value: float


@dataclass(frozen=True)
class Lead:
    """From when on a candidate was the incumbent. generation: after which it was."""

    generation: int
    candidate: int
    slot: int
    born: int
    shrunk: float | None
    at: str | None


@dataclass(frozen=True)
class Ancestor:
    """A parent that is a candidate of another search of this store."""

    parent: str
    search: str
    candidate: int


@dataclass(frozen=True)
class Lineage:
    """Where what leads a search has come from. leads: its incumbents, in their order."""

    leads: tuple[Lead, ...]
    ancestors: tuple[Ancestor, ...]


@consistent
def population(
    store: Store,
    name: str,
    state: str | None = None,
    generation: int | None = None,
    sort: str = "fitness",
    descending: bool = True,
    after: str | None = None,
    limit: int = 50,
) -> Page:
    """A page of candidates; those without what they are sorted by come last.

    sort: one of SORTS; standing: whoever was scored, keeps the constraints, was scored on more
    examples, is fitter, in this order. after: `next` of the page before, which candidates that come
    meanwhile do not shift. limit: 1 to MOST. Raises StoreError for an unknown search, InputError
    for a sort, a state, a limit or a cursor that is none.
    """
    chosen = _sort(sort)
    if state is not None and state not in STATES:
        raise InputError(f"state '{state}' is unknown: {nearest(state, STATES)}")
    if not 1 <= limit <= MOST:
        raise InputError(f"limit {limit} is outside 1 to {MOST}: ask for several pages")
    row = store.search(name)
    sums, weights = Sums(store, row.id), task_weights(store, row)
    begin = None if after is None else _opened(after, chosen, descending)
    keys = sums.keys(chosen, descending, weights, limit + 1, begin, state, generation)
    more, keys = len(keys) > limit, keys[:limit]
    return Page(
        members(store, row, [int(key[-1]) for key in keys]),
        _cursor(chosen, descending, keys[-1]) if more else None,
        sums.count(state, generation),
    )


def members(store: Store, row: SearchRow, ids: Sequence[int]) -> tuple[Member, ...]:
    """These candidates, in this order."""
    weights = task_weights(store, row)
    rows = {c.id: c for c in store.candidates(row.id, ids=ids, with_genotypes=False)}
    means = store.means(row.id, "full", ids) | store.means(row.id, "train", ids)
    seconds = Sums(store, row.id).seconds(ids)
    names = row.job.get("objectives") or ()
    return tuple(
        _member(rows[id], means.get(id, {}), weights, names, seconds.get(id, 0.0)) for id in ids
    )


def _member(
    row: CandidateRow,
    means: dict[str, MeanRow],
    weights: dict[str, float],
    names: Sequence[str],
    seconds: float,
) -> Member:
    counted = {task: (mean.mean, mean.n) for task, mean in means.items()}
    score = combined(counted, weights) if counted else None
    return Member(
        row.id,
        row.generation,
        row.slot,
        row.label,
        row.state,
        row.reason,
        row.fitness,
        None if score is None else score.value,
        None if score is None else score.interval,
        sum(n for task, (_, n) in counted.items() if weights[task]),
        {task: mean for task, (mean, _) in counted.items()},
        _named(names, row.objectives),
        row.violation,
        seconds,
        row.recipe_sha,
    )


@consistent
def front(store: Store, name: str) -> tuple[FrontPoint, ...]:
    """Whom nobody beats in all objectives, the baselines, and the winner; empty with one objective.
    Raises StoreError for an unknown search."""
    row = store.search(name)
    names = row.job.get("objectives") or ()
    on_front = set(store.latest_review(row.id).get("front", ()))
    if not names:
        return ()
    baselines = store.candidates(row.id, generation=0, with_genotypes=False)
    winner = (row.verdict or {}).get("winner")
    named = on_front if winner is None else {*on_front, winner}
    best = store.candidates(row.id, ids=named, with_genotypes=False)
    return tuple(
        FrontPoint(c.id, c.generation, c.slot, c.label, values, c.id in on_front, c.id == winner)
        for c in (*baselines, *best)
        if (values := _named(names, c.objectives)) is not None
    )


@consistent
def importance(store: Store, name: str) -> tuple[Importance, ...]:
    """Which coordinates set the best tenth of the candidates apart from the others, the most
    important first: see optimizer.importance. Of those that were scored to the end and keep the
    constraints, of at most _ENOUGH, taken evenly; empty where they are fewer than _LEAST, or all
    alike. With several objectives by the first one. Raises StoreError for an unknown search, and
    for genotypes that are damaged."""
    row = store.search(name)
    genotypes, fitness = Sums(store, row.id).proposals(last_stage(row), _ENOUGH)
    if len(fitness) < _LEAST:
        return ()
    width = genotypes.shape[1]
    coordinates = store.coordinates(row.id) or [Coordinate(f"x{i}", 0.5) for i in range(width)]
    values = ped_anova(genotypes, fitness, [c.choices for c in coordinates])
    total = float(values.sum())
    if total == 0:
        return ()
    found = [
        Importance(c.name, float(value) / total)
        for c, value in zip(coordinates, values, strict=True)
    ]
    return tuple(sorted(found, key=lambda one: -one.value))


@consistent
def lineage(store: Store, name: str) -> Lineage:
    """Raises StoreError for an unknown search."""
    row = store.search(name)
    leads: list[tuple[int, int, float | None, str | None]] = []
    for generation in store.generations(row.id):
        review = generation.review
        if review is not None and (not leads or leads[-1][1] != review["incumbent"]):
            found = review["incumbent"], review.get("shrunk"), generation.told_at
            leads.append((generation.number, *found))
    ids = {lead[1] for lead in leads}
    rows = {c.id: c for c in store.candidates(row.id, ids=ids, with_genotypes=False)}
    return Lineage(
        tuple(
            Lead(number, id, rows[id].slot, rows[id].generation, shrunk, at)
            for number, id, shrunk, at in leads
        ),
        _ancestors(store, row),
    )


def _ancestors(store: Store, row: SearchRow) -> tuple[Ancestor, ...]:
    """Winners are merged into folders that are named by their recipes, see search.pool."""
    names = {other.id: other.name for other in store.searches()}
    found = []
    for parent, model in store.models(row.id).items():
        sha = model["uri"].rsplit("/", 1)[-1]
        if len(sha) == 64:
            scored = [(s, c) for s, c in store.scored_on_train(sha) if s != row.id]
            found += [Ancestor(parent, names[s], c) for s, c in scored[-1:]]
    return tuple(found)


def _named(names: Sequence[str], values: Sequence[float] | None) -> dict[str, float] | None:
    return None if values is None else dict(zip(names, values, strict=True))


def _sort(sort: str) -> Sort:
    for known in SORTS:
        if sort == known:
            return known
    raise InputError(f"sort '{sort}' is unknown: {nearest(sort, SORTS)}")


def _cursor(sort: Sort, descending: bool, key: tuple[float, ...]) -> str:
    text = json.dumps([sort, descending, *key], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _opened(cursor: str, sort: Sort, descending: bool) -> tuple[float, ...]:
    """The key in a cursor of this list. Raises InputError for any other."""
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        found: list[Any] = json.loads(base64.urlsafe_b64decode(padded.encode("ascii")))
        whose, key = found[:2], tuple(found[2:])
    except (ValueError, TypeError):
        whose, key = [], ()
    numbers = all(isinstance(value, int | float) for value in key)
    if whose != [sort, descending] or not key or not numbers:
        raise InputError(f"cursor '{cursor}' is none of this list: begin without one")
    return key
