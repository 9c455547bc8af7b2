"""How worn the guarded splits of a search are: which searches of a store have read its test split
before, or a part of it, and which looks at validation were asked for after its launch.

Each reading that someone learns from makes the next one say less: a search that is launched because
an earlier one did badly on test has test among its causes. Reads the store alone.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.store import SearchRow, Store

if TYPE_CHECKING:
    from evomerge.fitness.task import Task

_NAMED = 5  # searches, in a sentence


@dataclass(frozen=True)
class Sealed:
    """A task's test split: its identity (see Task), and the hashes of its items' questions."""

    content: str
    items: frozenset[str]


@dataclass(frozen=True)
class Wear:
    """Openings of one test content that a task's test split is, or shares items with.

    content: its identity. times: for how many recipes it was opened, by which searches. share: of
    the task's items.
    """

    task: str
    content: str
    times: int
    searches: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        """For people."""
        times = "once" if self.times == 1 else f"{self.times:,} times"
        shown, more = self.searches[:_NAMED], len(self.searches) - _NAMED
        by = f"by search{'es' if len(self.searches) > 1 else ''} {', '.join(shown)}"
        by += f" and {more} more" if more > 0 else ""
        if self.share == 1:
            what = f"the test split of task '{self.task}' was opened {times} before, {by}"
        else:
            share = f"{100 * self.share:.2g}%"
            what = (
                f"{share} of the test split of task '{self.task}' is part of one that was opened "
                f"{times} before, {by}"
            )
        return f"{what}: its p-values are no longer those of a first reading"


def wear(store: Store, tests: Mapping[str, Sealed], apart_from: str | None = None) -> list[Wear]:
    """What has been opened of these test splits, by task, the fullest overlap first.

    apart_from: a search whose own openings do not count.
    """
    ledger = store.ledger()  # first: a search that is launched meanwhile is not in it
    names = {search.id: search.name for search in store.searches()}
    opened: dict[str, Counter[str]] = {}
    for row in ledger:
        if row.kind == "unseal" and names[row.search] != apart_from:
            opened.setdefault(row.content, Counter())[names[row.search]] += 1
    found = []
    for content, searches in opened.items():
        items = store.items(content)
        for task, test in tests.items():
            same = content == test.content
            share = 1.0 if same else len(items & test.items) / len(test.items)
            if share:
                found.append(Wear(task, content, searches.total(), tuple(searches), share))
    return sorted(found, key=lambda wear: -wear.share)


def tests_of(store: Store, search: int) -> dict[str, Sealed]:
    """The test splits of a stored search, by task."""
    return {
        task: Sealed(row.identity, frozenset(store.items(row.identity, search)))
        for (task, split), row in store.splits(search).items()
        if split == "test"
    }


def sealed(tasks: "Mapping[str, Task]") -> dict[str, Sealed]:
    """The test splits of opened tasks."""
    return {
        name: Sealed(task.identity("test"), frozenset(task.item_hashes("test")))
        for name, task in tasks.items()
    }


@dataclass(frozen=True)
class MoreLooks:
    """Looks that a search was allowed after its launch: what is chosen by them is chosen post hoc.

    before, allowed: how many there were, and from then on. opened: whether its test split had been
    opened by then.
    """

    at: str
    before: int
    allowed: int
    opened: bool


def more_looks(store: Store, search: SearchRow) -> list[MoreLooks]:
    """What a search was allowed later, oldest first; empty where its looks were fixed at launch."""
    own = {row.identity for (_, of), row in store.splits(search.id).items() if of == "test"}
    found, opened = [], False
    for row in store.ledger():
        opened |= row.kind == "unseal" and row.content in own
        if row.kind == "more looks" and row.search == search.id:
            found.append(MoreLooks(row.at, row.entry["from"], row.entry["to"], opened))
    return found
