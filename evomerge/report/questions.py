"""What the tasks of a stored search ask, read again where their files are at hand.

A store holds hashes of what was asked, and no texts. Never opens a test split.
"""

from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import InputError
from evomerge.fitness.task import Task
from evomerge.job import TaskEntry, find_task, packaged
from evomerge.job.files import LM_EVAL
from evomerge.store import SearchRow, Store

Split = Literal["train", "validation"]


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
        return Task.at_hand(find_task(entry.task, packaged("fitness")), split, entry.chat)
    except InputError:
        return None


def _is_what_it_was(store: Store, row: SearchRow, task: Task, split: Split) -> bool:
    try:
        return task.content(split) == store.splits(row.id)[task.name, split].content
    except (InputError, KeyError):  # another name is another task
        return False
