"""The splits of a job's tasks: opened, kept apart, and divided into what drives a search, what
watches it and what judges its finalists.

What is found to be in two splits, in the same words or in others, is left out of the less guarded
one. Knows nothing of models.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import JobError, TaskError
from evomerge.fitness.task import Seen, Task
from evomerge.fitness.task_file import SPLITS, Split
from evomerge.guard.benchmarks import recognise, uses
from evomerge.guard.contamination import Part, counted, find
from evomerge.job import Job, Staging
from evomerge.search.race import Examples
from evomerge.seeds import generator

Sizes = Mapping[str, Mapping[Split, int]]


@dataclass(frozen=True)
class Splits:
    """tasks: by name, weights: their shares of the objective. sizes: items by task and split.

    Positions, by task: driving, monitor: in train, that the optimizer is told about, and that it
    never is. validation: that finalists are judged by. contamination: see `examine`; None of a
    search that was launched before anyone looked.
    """

    tasks: Mapping[str, Task]
    weights: Mapping[str, float]
    sizes: Sizes
    driving: Examples
    monitor: Examples
    validation: Examples
    contamination: Mapping[str, Any] | None

    @classmethod
    def open(cls, job: Job) -> "Splits":
        """Of a new search. Raises JobError and TaskError for what cannot be read, for splits that
        share an item, and for a public test set in train that the job does not stand by."""
        tasks, weights = _open_tasks(job)
        seen: Seen = {}
        sizes = {name: task.check_splits(seen) for name, task in tasks.items()}
        contamination = examine(tasks.values())
        _check_gate(job, contamination)
        return cls._of(job, tasks, weights, sizes, contamination)

    @classmethod
    def reopen(cls, job: Job, contamination: Mapping[str, Any] | None) -> "Splits":
        """Of a stored search, whose splits are as they were at launch, and so is what was left out
        of them. Raises JobError and TaskError."""
        tasks, weights = _open_tasks(job)
        sizes = {
            name: {split: len(task.item_hashes(split)) for split in SPLITS}
            for name, task in tasks.items()
        }
        return cls._of(job, tasks, weights, sizes, contamination)

    @classmethod
    def _of(
        cls,
        job: Job,
        tasks: Mapping[str, Task],
        weights: Mapping[str, float],
        sizes: Sizes,
        contamination: Mapping[str, Any] | None,
    ) -> "Splits":
        quarantined = {} if contamination is None else contamination["quarantined"]
        driving: Examples = {}
        monitor: Examples = {}
        validation: Examples = {}
        for index, (task, size) in enumerate(sizes.items()):
            out = quarantined.get(task, {})
            shuffled = generator(job.seed, "monitor", index).permutation(size["train"])
            order = _without(task, "train", shuffled.astype(np.uint32), out)
            # Searches that were launched before anyone looked had their groups divided.
            groups = None if contamination is None else tasks[task].groups("train")
            monitor[task], driving[task] = _carved(order, job.guard.monitor, groups)
            every = np.arange(size["validation"], dtype=np.uint32)
            validation[task] = _without(task, "validation", every, out)
        _check_stages(job, driving)
        return cls(tasks, weights, sizes, driving, monitor, validation, contamination)

    def groups(self, split: Split) -> dict[str, NDArray[np.int64]]:
        """Of the tasks whose items belong together, by name; see Task.groups."""
        found = {name: task.groups(split) for name, task in self.tasks.items()}
        return {name: groups for name, groups in found.items() if groups is not None}


def examine(tasks: Iterable[Task]) -> dict[str, Any]:
    """What splits of tasks have in common, and what of train is of a public test set; plain data.

    quarantined, overlaps, repeated: see Contamination. benchmarks: see Use. notes: the same in
    words. Names positions of test, never its texts.
    """
    parts, used = [], []
    for task in tasks:
        for split in SPLITS:
            fingerprints = task.fingerprints(split)
            known = recognise(task.origin(split), fingerprints)
            problems = [None if item is None else item.problem for item in known]
            parts.append(Part(task.name, split, fingerprints, problems))
            if split == "train":
                used += uses(task.name, split, known)
    found = find(parts)
    said = [
        f"task '{use.task}': {counted(use.items)} of {use.split}, {100 * use.share:.3g}% of it, of "
        f"the public test set of {use.benchmark}"
        for use in used
    ]
    return {
        **found.as_dict(),
        "benchmarks": [use.as_dict() for use in used],
        "notes": [*found.notes(), *said],
    }


def _open_tasks(job: Job) -> tuple[dict[str, Task], dict[str, float]]:
    tasks: dict[str, Task] = {}
    weights: dict[str, float] = {}
    for entry in job.tasks:
        task = Task.open(Path(entry.task), entry.chat, entry.metric)
        if task.name in tasks:
            raise JobError(f"tasks: '{task.name}' is named twice: give it one weight")
        tasks[task.name], weights[task.name] = task, entry.weight
    return tasks, weights


def _check_gate(job: Job, contamination: Mapping[str, Any]) -> None:
    """Refuse to search on what others are scored by, unless the job stands by it."""
    if job.guard.train_on_public_test_sets or not contamination["benchmarks"]:
        return
    use = contamination["benchmarks"][0]
    raise JobError(
        f"task '{use['task']}': train has {counted(use['items'])}, {100 * use['share']:.3g}% of it,"
        f" of the public test set of {use['benchmark']}: search on other data, or write 'guard: "
        "{train_on_public_test_sets: true}', and the model card will say so"
    )


def _without(
    task: str, split: Split, positions: NDArray[np.uint32], out: Mapping[str, Sequence[int]]
) -> NDArray[np.uint32]:
    """The positions of a split that are not left out, in their order."""
    left = positions[~np.isin(positions, out.get(split, ()))]
    if not len(left):
        raise TaskError(
            f"task '{task}': every item of {split} is also in a more guarded split of this job, in "
            "the same words, in most of them, or in another language: search on other data"
        )
    return left


def _carved(
    order: NDArray[np.uint32], share: float, groups: NDArray[np.int64] | None
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """The monitor slice, the first `share` of these positions, and what drives the search; each
    group, by position, whole in one of them, so that the slice may be smaller."""
    held = int(len(order) * share)
    if groups is not None:
        _, first, owner = np.unique(groups[order], return_index=True, return_inverse=True)
        order = order[np.argsort(first[owner], kind="stable")]
        while held and groups[order[held - 1]] == groups[order[held]]:
            held -= 1
    return np.sort(order[:held]), np.sort(order[held:])


def _check_stages(job: Job, driving: Examples) -> None:
    stages = job.staging.stages if isinstance(job.staging, Staging) else ()
    for task, examples in driving.items():
        if len(stages) > 1 and stages[-1] > len(examples):  # a single one: at most so many
            raise JobError(
                f"staging.stages: {stages[-1]} examples are more than the {len(examples)} of task "
                f"'{task}' that drive the search: give fewer"
            )
