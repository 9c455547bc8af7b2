"""The job file: what to search, how far, and on what; one pydantic model per section.

Knows the form of a job and where its paths lead, but opens neither models nor data.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from evomerge.errors import JobError, nearest
from evomerge.recipe import METHODS, explain, one_line
from evomerge.reference import halves, hub_id

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")

# Names that tables and stored searches give to what is no parent.
_RESERVED = {
    "base": "the base model",
    "mean": "the mean of the optimizer's distribution",
    "ties": "a baseline",
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Parent(_Section):
    """A source model."""

    model: str = Field(
        description="A folder with config.json and safetensors files, or a hub id ORG/NAME[@REV]; "
        "either may end in +ADAPTER, a folder or hub id too."
    )


class Bounds(_Section):
    """The box of one kind of coefficient: values in [low, high], the search starts at `start`."""

    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)
    start: float | None = Field(None, description="Where the search starts; default: the middle.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"[{self.low}, {self.high}] is empty: give [low, high], low < high")
        if self.start is not None and not self.low <= self.start <= self.high:
            raise ValueError(f"start {self.start} is outside [{self.low}, {self.high}]")
        return self


def _pair_as_bounds(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) == 2:
        return {"low": value[0], "high": value[1]}
    if not isinstance(value, Mapping | Bounds):
        raise ValueError(f"{value!r}: give [low, high]")
    return value


_Bounds = Annotated[
    Bounds,
    BeforeValidator(_pair_as_bounds, json_schema_input_type=Bounds | tuple[float, float]),
]


class Space(_Section):
    """What is searched: a preset of `search_spaces/`, with overrides, or written out in full."""

    preset: str | None = Field(None, description="A file of search_spaces/, or a path.")
    kind: Literal["weight", "layers"] | None = Field(
        None, description="weight: mixing coefficients; layers: which layers, in which order."
    )
    method: str | None = Field(None, description="The merge method of a weight space.")
    per: Literal["model", "layer", "module"] | None = Field(
        None, description="What shares a coefficient: the whole model, a layer, a module of one."
    )
    granularity: int | None = Field(
        None, ge=1, description="How many consecutive layers share their coefficients."
    )
    weight: _Bounds | None = None
    density: _Bounds | None = None
    normalize: bool | None = Field(None, description="The method's parameter of this name.")
    repeats: int | None = Field(
        None, ge=1, description="How many times a stack may use each layer of each parent."
    )
    max_layers: int | None = Field(None, ge=1, description="The deepest stack that is tried.")

    @model_validator(mode="after")
    def _known_method(self) -> Self:
        if self.method is not None and self.method not in METHODS:
            raise ValueError(f"method: '{self.method}' is unknown: {nearest(self.method, METHODS)}")
        return self


class TaskEntry(_Section):
    """A task that drives the search, and its share of the objective."""

    task: str = Field(description="A folder with a task.yaml, or the file itself.")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)


class Optimizer(_Section):
    """Who proposes."""

    name: Literal["cma-es", "random"] = "cma-es"
    population: int | Literal["auto"] = Field(
        "auto", description="Candidates in a generation; auto: 4 + floor(3 ln d)."
    )
    sigma0: float | None = Field(
        None, gt=0, le=1 / 3, description="First step size, in units of the box; default: its own."
    )

    @model_validator(mode="after")
    def _large_enough(self) -> Self:
        if self.population != "auto" and self.population < 2:
            raise ValueError(f"population {self.population}: give at least 2, or auto")
        return self


class Budget(_Section):
    """When to stop: whichever is reached first, at the end of a generation."""

    candidates: int | None = Field(None, ge=1)
    example_evaluations: int | None = Field(None, ge=1)
    hours: float | None = Field(None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if self.candidates is self.example_evaluations is self.hours is None:
            raise ValueError("no limit: give candidates, example_evaluations or hours")
        return self


class Staging(_Section):
    """Score a generation in stages and let only the best go on.

    Stage i scores every candidate still in the race on the first stages[i] of the generation's
    examples; the keep[i] best go on to stage i + 1.
    """

    stages: tuple[int, ...] = Field(min_length=1)
    keep: tuple[int, ...]

    @model_validator(mode="after")
    def _narrowing(self) -> Self:
        if len(self.keep) != len(self.stages) - 1:
            raise ValueError(f"keep: {len(self.stages) - 1} numbers go between the stages")
        if list(self.stages) != sorted(set(self.stages)) or self.stages[0] < 1:
            raise ValueError(f"stages: {list(self.stages)} do not grow")
        if list(self.keep) != sorted(self.keep, reverse=True) or min(self.keep, default=1) < 1:
            raise ValueError(f"keep: {list(self.keep)} does not shrink towards 1")
        return self


class Guard(_Section):
    """What protects the claim."""

    validation_looks: int = Field(
        5, ge=2, description="Uses of validation: one for the best parent, the rest for finalists."
    )
    alpha: float = Field(0.05, gt=0, lt=1, description="Chance of promoting without a real gain.")
    monitor: float = Field(
        0.2, ge=0, lt=1, description="Share of train that the optimizer is never told about."
    )


class Engine(_Section):
    """What runs the merged model."""

    kind: Literal["transformers"] = "transformers"
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="What the model computes in; auto: as the merged model is stored."
    )
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="CPU threads; results may depend on it, so it is kept for resuming."
    )
    batch_size: int = Field(64, ge=1, description="Examples in one forward at most.")


class Executor(_Section):
    """Where candidates are scored."""

    kind: Literal["inline"] = "inline"


class Job(_Section):
    """One search, from launch to finish."""

    name: str = Field(description="Names the search in its store.")
    seed: int = Field(0, ge=0)
    parents: dict[str, Parent] = Field(min_length=2)
    base: Parent | None = None
    space: Space
    tasks: tuple[TaskEntry, ...] = Field(min_length=1)
    objective: Literal["mean"] = Field("mean", description="The weighted mean over the tasks.")
    shaping: float = Field(
        0.05,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the mean log-likelihood per reference token in the fitness: it "
        "gives the optimizer something to climb where every score is 0. Never reported as score.",
    )
    optimizer: Optimizer = Optimizer()
    budget: Budget
    staging: Staging | None = None
    guard: Guard = Guard()
    engine: Engine = Engine()
    executor: Executor = Executor()
    store: str = Field("sqlite:///evomerge.db", description="--store and EVOMERGE_STORE win.")

    @model_validator(mode="after")
    def _well_named(self) -> Self:
        for what, name in [("name", self.name), *(("parents", key) for key in self.parents)]:
            if not NAME.match(name):
                raise ValueError(
                    f"{what}: '{name}': use letters, digits, '.', '_' and '-', at most 64"
                )
        for name in self.parents:
            if name in _RESERVED:
                raise ValueError(
                    f"parents: '{name}' is the name of {_RESERVED[name]}: choose another"
                )
        return self

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> "Job":
        """Check plain data. Raises JobError; `where` names it in messages."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise JobError(f"{where}: {explain(error, cls)}") from None

    @classmethod
    def from_file(cls, path: Path, overrides: Sequence[str] = ()) -> "Job":
        """Read a job file, apply `key.sub=value` overrides (values are YAML), resolve its paths.

        In the result every path is absolute and the space's preset is written out. Raises JobError.
        """
        data = read_yaml(path)
        for override in overrides:
            _override(data, override)
        folder = path.resolve().parent
        job = cls.from_dict(data, str(path))
        return job.model_copy(
            update={
                "parents": {
                    k: Parent(model=_model(folder, p.model, f"parents.{k}"))
                    for k, p in job.parents.items()
                },
                "base": job.base and Parent(model=_model(folder, job.base.model, "base")),
                "tasks": tuple(
                    entry.model_copy(update={"task": _task(folder, entry.task)})
                    for entry in job.tasks
                ),
                "space": _written_out(job.space, folder, str(path)),
            }
        )


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises JobError."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"'{path}' cannot be read: {one_line(error)}") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is the latter
        raise JobError(f"'{path}' is not YAML: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise JobError(f"'{path}' holds no keys: see `evomerge check --schema`")
    return data


def packaged(kind: Literal["search_spaces", "fitness"]) -> Path:
    """The folder of what ships with evomerge, in an installed package or in a checkout."""
    package = Path(__file__).parent
    inside = package / "packaged" / kind
    return inside if inside.is_dir() else package.parent / kind


def find_task(name: str, folder: Path | None = None) -> Path:
    """The task.yaml that `name` means: a folder or file, or the name of a packaged task.

    Looked up from `folder` (default: the working directory) first. Raises JobError.
    """
    for root in (folder or Path.cwd(), packaged("fitness")):
        path = root / name
        for candidate in (path, path / "task.yaml"):
            if candidate.is_file():
                return candidate.resolve()
    known = {p.parent.name for p in packaged("fitness").glob("*/task.yaml")}
    raise JobError(f"task '{name}' is neither a file nor a packaged task: {nearest(name, known)}")


def _task(folder: Path, name: str) -> str:
    return str(find_task(name, folder))


def _model(folder: Path, name: str, where: str) -> str:
    """A reference to a model with absolute paths."""

    def is_folder(half: str) -> bool:
        return bool(half) and (folder / os.path.expanduser(half)).is_dir()

    located = []
    for half in filter(None, halves(name, is_folder)):
        path = folder / os.path.expanduser(half)
        if not is_folder(half) and hub_id(half) is None:
            raise JobError(
                f"{where}.model: no folder '{path}': give the folder of a saved model, or a hub id "
                "ORG/NAME"
            )
        located.append(os.path.normpath(path) if is_folder(half) else half)
    return "+".join(located)


def _written_out(space: Space, folder: Path, where: str) -> Space:
    """The space with its preset's values where it gives none of its own."""
    if space.preset is None:
        return space
    for path in (folder / space.preset, packaged("search_spaces") / f"{space.preset}.yaml"):
        if path.is_file():
            break
    else:
        known = {p.stem for p in packaged("search_spaces").glob("*.yaml")}
        raise JobError(
            f"{where}: space.preset: '{space.preset}' is unknown: {nearest(space.preset, known)}"
        )
    given = space.model_dump(exclude_none=True, exclude={"preset"})
    try:
        return Space.model_validate({"preset": space.preset, **read_yaml(path), **given})
    except ValidationError as error:
        raise JobError(f"{path}: {explain(error, Space)}") from None


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise JobError(f"override '{override}': write key=value, such as budget.candidates=100")
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise JobError(f"override '{override}': '{parent}' holds no keys")
    try:
        node[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise JobError(f"override '{override}': '{text}' is not YAML") from None
