"""What went wrong in a search, grouped by cause. Reads the store alone."""

import re
from dataclasses import dataclass
from typing import Literal

from evomerge.store import FailureSums, Store, Sums, consistent

# What differs between failures of one cause: texts in quotes, places, numbers.
_QUOTED = re.compile(r"'[^']*'")
_NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d.,]*(?:e[+-]?\d+)?(?![\w.]*\w)", re.IGNORECASE)
_FEW = 5  # candidates that are named


@dataclass(frozen=True)
class Failure:
    """kind: failed, where a model could not be merged or run; infeasible, where a genotype means no
    model. cause: of several that differ by numbers and names alone, the first. count: candidates.
    candidates: the first few of these. first_at, last_at: UTC, ISO 8601."""

    kind: Literal["failed", "infeasible"]
    cause: str
    count: int
    candidates: tuple[int, ...]
    first_at: str
    last_at: str


@consistent
def failures(store: Store, name: str) -> tuple[Failure, ...]:
    """The most frequent first. Raises StoreError for an unknown search."""
    together: dict[tuple[str, str], list[FailureSums]] = {}
    for one in Sums(store, store.search(name).id).failures(_FEW):
        together.setdefault((one.kind, alike(one.reason)), []).append(one)
    found = [_failure(parts) for parts in together.values()]
    return tuple(sorted(found, key=lambda one: (-one.count, one.first_at)))


def alike(reason: str) -> str:
    """What reasons of one cause have in common."""
    return _NUMBER.sub("0", _QUOTED.sub("''", reason))


def _failure(parts: list[FailureSums]) -> Failure:
    first = min(parts, key=lambda part: (part.first_at, part.candidates))
    return Failure(
        first.kind,
        first.reason,
        sum(part.count for part in parts),
        tuple(sorted({id for part in parts for id in part.candidates})[:_FEW]),
        first.first_at,
        max(part.last_at for part in parts),
    )
