"""The job file: what to search, how far, and on what; one pydantic model per section.

Knows the form of a job and where its paths lead, but opens neither models nor data.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from evomerge.errors import JobError, nearest
from evomerge.job.files import (
    find_task,
    located,
    override,
    packaged,
    read_yaml,
    series,
    written_out,
)
from evomerge.job.mergekit_evolve import is_mergekit_evolve, translated
from evomerge.job.sections import (
    RESERVED,
    Budget,
    Constraint,
    Engine,
    Executor,
    Guard,
    Objective,
    Optimizer,
    Parent,
    Section,
    Staging,
    Stop,
    TaskEntry,
)
from evomerge.job.space import BothSpace, LayerSpace, Range, SeriesSpace, Space, WeightSpace
from evomerge.job.suites import Suite, aims, expanded
from evomerge.messages import explain, without_password

__all__ = [
    "BothSpace",
    "Budget",
    "Constraint",
    "Engine",
    "Executor",
    "Guard",
    "Job",
    "LayerSpace",
    "Optimizer",
    "Parent",
    "Range",
    "SeriesSpace",
    "Space",
    "Staging",
    "Stop",
    "Suite",
    "TaskEntry",
    "WeightSpace",
    "find_task",
    "packaged",
    "read_yaml",
]

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")

# What pareto may weigh against each other, besides task:NAME.
_OBJECTIVES = ("score", "length", "layers", "parameters", "latency")


class Job(Section):
    """One search, from launch to finish."""

    name: str = Field(description="Names the search in its store.")
    seed: int = Field(0, ge=0)
    parents: dict[str, Parent] = Field(min_length=1)
    base: Parent | None = None
    space: Space
    tasks: tuple[TaskEntry, ...] = Field(min_length=1)
    objective: Objective = Field(
        "mean",
        description="What is maximised: the weighted mean of the tasks' scores; the worst of them; "
        "the weighted mean of each as a share of the best parent's; or several things at once.",
    )
    objectives: tuple[str, ...] = Field(
        (),
        description="Of pareto: score, task:NAME (that task alone), and, to be kept small, length "
        "(of replies, in tokens), layers, parameters, latency (length times parameters).",
    )
    constraints: tuple[Constraint, ...] = ()
    shaping: float = Field(
        0.05,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the mean log-likelihood per reference token in the fitness: it "
        "gives the optimizer something to climb where every score is 0. Never reported as score.",
    )
    optimizer: Optimizer = Optimizer()
    mode: Literal["synchronous", "asynchronous"] = Field(
        "synchronous",
        description="When the next generation is proposed: once the one before is complete; or as "
        "soon as a device has nothing to do, from what is known by then.",
    )
    budget: Budget
    stop: Stop = Stop()
    staging: Staging | Literal["auto"] | None = Field(
        None, description="auto: from the measured cost of merging against scoring."
    )
    guard: Guard = Guard()
    engine: Engine = Engine()
    executor: Executor = Executor()
    store: str = Field(
        "sqlite:///evomerge.db",
        description="A SQLite file or a database's URL; --store and EVOMERGE_STORE win.",
    )

    @model_validator(mode="after")
    def _well_named(self) -> Self:
        for what, name in [("name", self.name), *(("parents", key) for key in self.parents)]:
            if not NAME.match(name):
                raise ValueError(
                    f"{what}: '{name}': use letters, digits, '.', '_' and '-', at most 64"
                )
        for name in self.parents:
            if name in RESERVED:
                raise ValueError(
                    f"parents: '{name}' is the name of {RESERVED[name]}: choose another"
                )
        return self

    @model_validator(mode="after")
    def _enough_parents(self) -> Self:
        if self.base is not None and self.base.series is not None:
            raise ValueError("base.series: a base is one model: give 'model' or 'search'")
        alone = len(self.parents) < 2 and self.base is None and not self._has_series()
        if alone and self.space.kind != "layers":
            raise ValueError("parents: 1 given: give at least 2, or a base beside it")
        return self

    @model_validator(mode="after")
    def _has_an_aim(self) -> Self:
        if not any(entry.weight for entry in self.tasks):
            raise ValueError("tasks: every weight is 0: give one task a weight")
        if self.objective != "pareto" and self.objectives:
            raise ValueError(f"objectives: '{self.objective}' has none: set objective: pareto")
        distinct = set(self.objectives)
        if self.objective == "pareto" and not 2 <= len(distinct) == len(self.objectives):
            raise ValueError(
                f"objectives: {list(self.objectives)}: pareto needs two or more, each named once, "
                "such as [score, length]"
            )
        for name in self.objectives:
            if name not in _OBJECTIVES and not name.startswith("task:"):
                remedy = nearest(name, (*_OBJECTIVES, "task:NAME"))
                raise ValueError(f"objectives: '{name}' is unknown: {remedy}")
        return self

    @model_validator(mode="after")
    def _constrained_by_known_models(self) -> Self:
        models = {*self.parents, *(["base"] if self.base is not None else [])}
        for i, constraint in enumerate(self.constraints):
            if constraint.of not in models and not self._has_series():  # names of its folders
                remedy = nearest(constraint.of, models)
                raise ValueError(
                    f"constraints[{i}].of: model '{constraint.of}' is unknown: {remedy}"
                )
        return self

    def document(self) -> dict[str, Any]:
        """As it is stored: plain data for `from_dict`, complete, with no preset to look up again,
        and no password."""
        presets = {"space": {"preset"}}
        data = self.model_dump(mode="json", exclude_none=True, by_alias=True, exclude=presets)
        return data | {"store": without_password(data["store"])}

    def _has_series(self) -> bool:
        return any(parent.series is not None for parent in self.parents.values())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str, folder: Path | None = None) -> "Job":
        """Check plain data, its preset looked up from `folder` first. Raises JobError; `where`
        names the data in messages."""
        written = dict(data)
        if "space" in written:
            written["space"] = written_out(written["space"], folder or Path.cwd(), where)
        try:
            return cls.model_validate(written)
        except ValidationError as error:
            message = explain(error, cls)
        space = written.get("space")
        if message.startswith("space") and isinstance(space, Mapping) and "preset" in space:
            message += f" (over preset '{space['preset']}')"
        raise JobError(f"{where}: {message}")

    @classmethod
    def from_file(
        cls,
        path: Path,
        overrides: Sequence[str] = (),
        task_folders: Sequence[Path] = (),
        tell: Callable[[str], None] | None = None,
    ) -> "Job":
        """Read a job file, apply `key.sub=value` overrides (values are YAML), resolve its paths.

        In the result every path is absolute, the space's preset and suites of tasks are written
        out, and each folder of a series is a parent. A file of mergekit-evolve is made a job first:
        `tell` hears what each of its keys became; task_folders: where its tasks are looked for,
        after its own folder. Raises JobError.
        """
        data = read_yaml(path)
        if is_mergekit_evolve(data):
            made = translated(data, path, task_folders)
            data = made.job
            if tell is not None:
                for note in made.notes:
                    tell(note)
        elif task_folders:
            raise JobError(
                f"--task-search-path: '{path}' is no file of mergekit-evolve: it says itself where "
                "its tasks are: leave it out"
            )
        for assignment in overrides:
            override(data, assignment)
        return cls.located(data, str(path), path.resolve().parent)

    @classmethod
    def located(cls, data: Mapping[str, Any], where: str, folder: Path) -> "Job":
        """Plain data of a job file as `from_file` gives it, its paths looked up from `folder`.
        Raises JobError; `where` names the data in messages."""
        job = cls.from_dict(data, where, folder)
        try:
            tasks, suites = expanded(job.tasks, folder)
            base = job.base and _absolute(folder, "base", job.base)
            parents = _expanded(folder, job.parents)
        except JobError as error:
            raise JobError(f"{where}: {error}") from None
        given = aims(suites, job.model_fields_set, where)
        whole = {**dict(job), **given, "parents": parents, "base": base, "tasks": tasks}
        try:
            return cls.model_validate(whole)  # of a series, all names are known only now
        except ValidationError as error:
            raise JobError(f"{where}: {explain(error, cls)}") from None


def _expanded(folder: Path, parents: Mapping[str, Parent]) -> dict[str, Parent]:
    """The parents with absolute paths, each folder of a series a parent named after both."""
    expanded: dict[str, Parent] = {}
    for name, parent in parents.items():
        where = f"parents.{name}"
        if parent.series is None:
            expanded[name] = _absolute(folder, where, parent)
            continue
        for number, model in series(folder, parent.series, where).items():
            key = f"{name}-{number}"
            if key in expanded or key in parents:
                raise JobError(f"{where}: '{key}' is another parent's name too: rename one")
            expanded[key] = Parent(model=model)
    return expanded


def _absolute(folder: Path, where: str, parent: Parent) -> Parent:
    if parent.model is None:
        return parent
    return Parent(model=located(folder, parent.model, where))
