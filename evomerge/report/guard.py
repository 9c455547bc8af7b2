"""What keeps the claim of a search true: its splits, the looks at validation, the seal of test.

Reads the store alone. Of test there are hashes and counts here, never what a model scored on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.search.wear import MoreLooks, more_looks, tests_of, wear
from evomerge.store import Queue, SearchRow, Store, consistent


@dataclass(frozen=True)
class GuardedSplit:
    """One split of a task: n items; content: the hash of how they are asked; identity: of the
    records alone, by which openings of a test split are counted."""

    task: str
    split: str
    n: int
    content: str
    identity: str


@dataclass(frozen=True)
class Look:
    """A use of validation. at: UTC, ISO 8601."""

    at: str
    candidate: int
    label: str | None


@dataclass(frozen=True)
class SealOpening:
    """An opening of a test split of a search, by this search or another one of the store, for a
    candidate of that one. by: who asked a server for it; None where no server was asked."""

    at: str
    task: str
    search: str
    candidate: int | None
    by: str | None


@dataclass(frozen=True)
class Guarded:
    """Of one search. allowed: looks at validation, of which `looks` are used. monitor: share of
    train that the optimizer is never told about. contamination: see search.splits.examine; None of
    searches that were launched before it was looked for. worn: what others have opened of its test
    splits, in words."""

    search: str
    state: str
    splits: tuple[GuardedSplit, ...]
    looks: tuple[Look, ...]
    allowed: int
    more_looks: tuple[MoreLooks, ...]
    monitor: float
    openings: tuple[SealOpening, ...]
    contamination: Mapping[str, Any] | None
    worn: tuple[str, ...]


@consistent
def guard(store: Store, name: str) -> Guarded:
    """Raises StoreError for an unknown search."""
    row = store.search(name)
    splits = store.splits(row.id)
    section = row.job["guard"]
    return Guarded(
        row.name,
        row.state,
        tuple(
            GuardedSplit(task, split, found.n, found.content, found.identity)
            for (task, split), found in splits.items()
        ),
        _looks(store, row),
        section["validation_looks"],
        tuple(more_looks(store, row)),
        section["monitor"],
        _openings(store, {s.identity: task for (task, of), s in splits.items() if of == "test"}),
        store.contamination(row.id),
        tuple(str(one) for one in wear(store, tests_of(store, row.id), apart_from=row.name)),
    )


def _looks(store: Store, row: SearchRow) -> tuple[Look, ...]:
    used = [one for one in store.ledger() if one.kind == "look" and one.search == row.id]
    ids = [one.entry["candidate"] for one in used]
    rows = store.candidates(row.id, ids=ids, with_genotypes=False)
    labels = {one.id: one.label for one in rows}
    return tuple(Look(one.at, id, labels.get(id)) for one, id in zip(used, ids, strict=True))


def _openings(store: Store, tests: Mapping[str, str]) -> tuple[SealOpening, ...]:
    """tests: the tasks by the identities of their test splits."""
    ledger = [one for one in store.ledger() if one.kind == "unseal" and one.content in tests]
    names = {search.id: search.name for search in store.searches()}
    asked = {
        (one.search, one.document.get("candidate")): one.by
        for one in reversed(Queue(store).all())  # of several the first
        if one.kind == "export" and not one.document.get("recipe_only")
    }
    found = []
    for one in ledger:
        search, candidate = names[one.search], one.entry.get("candidate")
        by = asked.get((search, candidate))
        found.append(SealOpening(one.at, tests[one.content], search, candidate, by))
    return tuple(found)
