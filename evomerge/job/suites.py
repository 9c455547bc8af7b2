"""Suites: several tasks under one name, and what is aimed at over them.

A job that names a suite is written out in full when its file is read, so that a stored search does
not depend on the suite's file. Knows the form of suites, and nothing of what is in their tasks.
"""

from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator

from evomerge.errors import JobError
from evomerge.job.files import SUITE, find, find_task, read_yaml
from evomerge.job.sections import Constraint, Objective, Section, TaskEntry
from evomerge.messages import explain


class Suite(Section):
    """A suite file, suite.yaml. What it says of objective and constraints holds for a job that
    says nothing of them itself."""

    name: str
    about: str | None = Field(None, description="Where it comes from; changes nothing.")
    tasks: tuple[TaskEntry, ...] = Field(
        min_length=1, description="Paths are looked up from the suite's folder first."
    )
    objective: Objective | None = None
    objectives: tuple[str, ...] = ()
    constraints: tuple[Constraint, ...] = ()

    @model_validator(mode="after")
    def _aims_at_several(self) -> Self:
        if self.objectives and self.objective != "pareto":
            raise ValueError("objectives: these are of pareto: set objective: pareto")
        return self

    @classmethod
    def from_file(cls, path: Path) -> "Suite":
        """Read a suite, the paths of its tasks made absolute. Raises JobError."""
        try:
            suite = cls.model_validate(read_yaml(path))
        except ValidationError as error:
            raise JobError(f"{path}: {explain(error, cls)}") from None
        try:
            tasks = tuple(_located(entry, path.parent) for entry in suite.tasks)
        except JobError as error:
            raise JobError(f"{path}: {error}") from None
        return suite.model_copy(update={"tasks": tasks})


def expanded(
    entries: Sequence[TaskEntry], folder: Path
) -> tuple[tuple[TaskEntry, ...], tuple[Suite, ...]]:
    """The tasks that a job's entries mean, with absolute paths, and the suites among them.

    The weight of an entry that names a suite multiplies those of the suite's tasks; whether it is
    asked as a conversation, where the entry says so, holds for all of them. Raises JobError.
    """
    tasks: list[TaskEntry] = []
    suites: list[Suite] = []
    for entry in entries:
        path = find(entry.task, folder)
        if path.name != SUITE:
            tasks.append(entry.model_copy(update={"task": str(path)}))
            continue
        if entry.metric is not None:
            raise JobError(f"task '{entry.task}': metric: it is a suite: leave the metric out")
        suite = Suite.from_file(path)
        suites.append(suite)
        tasks += _weighted(suite, entry)
    return tuple(tasks), tuple(suites)


def aims(suites: Sequence[Suite], own: Set[str], where: str) -> dict[str, object]:
    """The keys of a job that suites give: those of objective, objectives and constraints that are
    not its own. Raises JobError where two suites disagree on the objective."""
    found: dict[str, object] = {}
    wanted = {(suite.objective, suite.objectives): suite for suite in suites if suite.objective}
    if wanted and "objective" not in own:
        if len(wanted) > 1:
            said = ", ".join(f"{suite.name}: {suite.objective}" for suite in wanted.values())
            raise JobError(
                f"{where}: suites disagree on the objective ({said}): give one in the job"
            )
        ((objective, objectives),) = wanted
        found |= {"objective": objective, "objectives": objectives}
    found["constraints"] = tuple(one for suite in suites for one in suite.constraints)
    return {key: aim for key, aim in found.items() if key not in own}


def _located(entry: TaskEntry, folder: Path) -> TaskEntry:
    return entry.model_copy(update={"task": str(find_task(entry.task, folder))})


def _weighted(suite: Suite, entry: TaskEntry) -> Iterator[TaskEntry]:
    for task in suite.tasks:
        chat = task.chat if entry.chat is None else entry.chat
        yield task.model_copy(update={"weight": task.weight * entry.weight, "chat": chat})
