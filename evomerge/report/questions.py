"""What the tasks of a stored search ask, read again where their files are at hand.

A store holds hashes of what was asked, and no texts. Never opens a test split.
"""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import InputError
from evomerge.fitness.task import Task
from evomerge.job import TaskEntry, find_task, packaged
from evomerge.job.files import LM_EVAL
from evomerge.store import SearchRow, Store

Split = Literal["train", "validation"]
Stamp = tuple[int, int, int]

# Splits whose items are kept in memory: ten thousand are some 20 MB, with eight worked examples
# before each some 50.
_KEPT = 24


def at_hand(store: Store, row: SearchRow, task: str, split: Split = "train") -> Task | None:
    """A task of a search, by name, if the records of a split lie in a file here and this is what it
    was at launch; else None. See Task.at_hand: nothing is fetched, and no code that came with a
    task runs, so that those of lm-eval are never at hand."""
    found = _opened(store, row, task, split)
    return found if found is not None and _is_what_it_was(store, row, found, split) else None


def groups_of(
    store: Store, row: SearchRow, split: Split, tasks: Iterable[str]
) -> dict[str, NDArray[np.int64]]:
    """Of tasks whose items belong together, by name, see Task.groups, as far as that can be told
    here."""
    found = {}
    for name in tasks:
        task = _opened(store, row, name, split)
        try:
            groups = None if task is None else task.groups(split)
        except InputError:
            continue
        if task is not None and groups is not None and _is_what_it_was(store, row, task, split):
            found[name] = groups
    return found


def _opened(store: Store, row: SearchRow, name: str, split: Split) -> Task | None:
    names = list(dict.fromkeys(task for task, _ in store.splits(row.id)))
    entry = TaskEntry.model_validate(row.job["tasks"][names.index(name)])
    if entry.task.startswith(LM_EVAL):
        return None
    try:
        path = find_task(entry.task, packaged("fitness"))
        found = Task.at_hand(path, split, entry.chat)
        if found is None:
            return None
        return _kept(path, split, entry.chat, tuple(map(_stamp, found.files)))
    except InputError:
        return None


@lru_cache(_KEPT)
def _kept(
    path: Path, split: Split, chat: bool | None, stamps: tuple[Stamp | None, ...]
) -> Task | None:
    """A task with all that was read and made of it before, as long as its files have these stamps:
    whoever looks at one candidate after the other waits for ten thousand questions once."""
    found = Task.at_hand(path, split, chat)
    return None if found is None else found.task


def _stamp(path: Path) -> Stamp | None:
    """What changes whenever a file does, whatever its times are set to; None without one."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_ctime_ns


def _is_what_it_was(store: Store, row: SearchRow, task: Task, split: Split) -> bool:
    try:
        return task.content(split) == store.splits(row.id)[task.name, split].content
    except (InputError, KeyError):  # another name is another task
        return False
