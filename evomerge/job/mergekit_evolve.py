"""Jobs from the files of mergekit-evolve (mergekit 0.1.5): what each of their keys becomes.

Works on plain data. Knows what those files mean, and what a job can say; where tasks are found,
but not what is in them.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from evomerge.errors import JobError
from evomerge.job.files import LM_EVAL, find_task, located
from evomerge.job.sections import RESERVED, Section
from evomerge.messages import explain
from evomerge.reference import halves, model_name

_CANDIDATES = 100  # mergekit-evolve's default of --max-fevals
_SIGMA = 1 / 6  # its default of --sigma0: in units of a coefficient, where a job has the box's
_LARGEST = 2.0  # weight of the presets
_SMALLEST = 0.001  # of an average: weights that are all 0 cannot be normalized
_METRICS = {"acc", "exact_match"}  # what a task's own score may stand for
_Model = Annotated[str, BeforeValidator(model_name)]
_SEPARATORS = re.compile(r"[^A-Za-z0-9._-]+")


class _Genome(Section):
    models: list[_Model] = Field(min_length=2)
    merge_method: Literal["linear", "task_arithmetic", "ties", "dare_ties", "slerp"]
    base_model: _Model | None = None
    tokenizer_source: Any = None
    layer_granularity: int = 0
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: list[str] | None = None
    smooth: bool = False

    @model_validator(mode="after")
    def _can_be_searched(self) -> Self:
        slerp = self.merge_method == "slerp"
        if slerp and len(self.models) > 2:
            raise ValueError(
                f"models: {len(self.models)} for slerp: the two that a group merges cannot be "
                "searched: name two models, or take merge_method linear"
            )
        if slerp and self.base_model not in (None, *self.models):
            raise ValueError("base_model: slerp merges two models and no third: leave it out")
        if slerp and self.filters:
            raise ValueError("filters: slerp has none in mergekit-evolve either: leave them out")
        if self.merge_method not in ("slerp", "linear") and self.base_model is None:
            raise ValueError(f"base_model: '{self.merge_method}' needs one")
        if self.smooth and self.layer_granularity > 0:
            raise ValueError(
                "smooth: coefficients that run evenly from group to group are not searched: write "
                "smooth: false, which gives each group of layers its own"
            )
        if len(set(self.models)) < len(self.models):
            raise ValueError("models: name each model once")
        return self


class _Task(Section):
    name: str
    weight: float = 1.0
    metric: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class _File(Section):
    genome: _Genome
    tasks: list[_Task] = Field(min_length=1)
    limit: int | None = Field(None, ge=1)
    num_fewshot: int | None = None
    shuffle: bool = False
    random_init: bool = False
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True

    @field_validator("num_fewshot")
    @classmethod
    def _left_to_tasks(cls, value: int | None) -> int | None:
        if value:
            raise ValueError(
                f"num_fewshot: {value}: a task has the worked examples that its own file asks for: "
                "write num_fewshot there"
            )
        return value


@dataclass(frozen=True)
class Translated:
    """The plain data of a job, and one line for each key of the file it was made from: what it
    became, or why it is left out."""

    job: dict[str, Any]
    notes: tuple[str, ...]


def is_mergekit_evolve(data: Mapping[str, Any]) -> bool:
    """Whether plain data is that of mergekit-evolve's file."""
    return "genome" in data


def translated(data: Mapping[str, Any], path: Path, task_folders: Sequence[Path]) -> Translated:
    """The job that a file of mergekit-evolve asks for.

    path: of the file. Models are folders of the working directory, as in mergekit, or else of the
    file's. task_folders: where task files of lm-eval are looked for, after the file's folder.
    Raises JobError for what is malformed, and for what no job can say.
    """
    try:
        file = _File.model_validate(data)
    except ValidationError as error:
        raise JobError(f"{path}: {explain(error, _File)}") from None
    folder = path.resolve().parent
    genome = _located(file.genome, (Path.cwd(), folder))
    models, base, about_models = _models(genome)
    space, sigma, about_space = _space(genome)
    parents = dict(zip(_names(models), models, strict=True))
    tasks = [_found(task, folder, task_folders) for task in file.tasks]
    job: dict[str, Any] = {
        "name": _plain(path.stem)[:64],
        "parents": {name: {"model": model} for name, model in parents.items()},
        "space": space,
        "tasks": [
            {**task.entry, "weight": of.weight, "chat": file.apply_chat_template}
            for of, task in zip(file.tasks, tasks, strict=True)
        ],
        "optimizer": {"name": "cma-es", "sigma0": sigma},
        "budget": {"candidates": _CANDIDATES},
    }
    if base is not None:
        job["base"] = {"model": base}
    if file.limit is not None:
        job["staging"] = {"stages": [file.limit], "keep": []}
    about_tasks = (
        f"tasks[{i}]: '{of.name}' is {task.entry['task']}, weight {of.weight:g}: a search reads "
        f"its train split; {task.about}"
        for i, (of, task) in enumerate(zip(file.tasks, tasks, strict=True))
    )
    notes = (
        f"genome.models: parents {', '.join(parents)}",
        *about_models,
        *about_space,
        *about_tasks,
        *_about_scoring(file),
        f"without a key: optimizer cma-es, sigma0 {sigma:.3g} of the bounds (1/6 of a weight or "
        f"of t, less of a density); budget.candidates {_CANDIDATES}; candidates are stored in "
        "their models' dtype",
    )
    return Translated(job, notes)


def _located(genome: _Genome, folders: Sequence[Path]) -> _Genome:
    """With absolute paths where a model is a folder, of the first that holds it."""

    def holds(root: Path, name: str) -> bool:
        return (root / os.path.expanduser(name)).is_dir()

    def found(model: str) -> str:
        for root in folders:
            whole, _ = halves(model, partial(holds, root))
            if holds(root, whole):
                return located(root, model, "genome")
        return model

    base = genome.base_model and found(genome.base_model)
    models = [found(model) for model in genome.models]
    return genome.model_copy(update={"models": models, "base_model": base})


def _models(genome: _Genome) -> tuple[list[str], str | None, list[str]]:
    """The parents, the base, and what became of the key base_model."""
    models, base = genome.models, genome.base_model
    if base is None:
        return models, None, []
    if base not in models:
        return models, base, ["genome.base_model: base"]
    others = [model for model in models if model != base]
    if genome.merge_method == "slerp":
        return models, None, ["genome.base_model: ignored: the key t searches both directions"]
    if genome.merge_method == "linear":
        note = "genome.base_model: the first parent, which gives config and tokenizer"
        return [base, *others], None, [note]
    note = "genome.base_model: base, and no parent: it differs from itself by nothing"
    return others, base, [note]


def _space(genome: _Genome) -> tuple[dict[str, Any], float, list[str]]:
    """The weight space, the first step size in units of its bounds, and what became of the keys."""
    method, group = genome.merge_method, genome.layer_granularity
    preset = f"mergekit_evolve_{method}"
    space: dict[str, Any] = {"preset": preset}
    notes = [f"genome.merge_method: space.preset {preset}"]
    if group > 0:
        space |= {"per": "slice", "granularity": group}
        notes.append(f"genome.layer_granularity: space.per slice, space.granularity {group}")
    else:
        space["per"] = "model"
        notes.append("genome.layer_granularity: 0, so space.per model")
    if method == "slerp":
        ignored = {"normalize": genome.normalize, "allow_negative_weights": None}
    else:
        low = _SMALLEST if method == "linear" else 0.0
        if genome.allow_negative_weights:
            low = -_LARGEST
        start = 1 / len(genome.models)  # a base among them has its share, though nothing uses it
        space["weight"] = {"low": low, "high": _LARGEST, "start": start}
        bounds = f"{low:g} to {_LARGEST:g}, from {start:.3g}"
        notes.append(f"genome.allow_negative_weights: space.weight {bounds}")
        normalize = genome.normalize
        if normalize is None:
            normalize = method != "task_arithmetic"
        space["normalize"] = normalize
        notes.append(f"genome.normalize: space.normalize {str(normalize).lower()}")
        ignored = {}
    if genome.filters:
        space["filters"] = genome.filters
        notes.append(f"genome.filters: space.filters {', '.join(genome.filters)}")
    for key in ignored:
        if key in genome.model_fields_set:
            notes.append(f"genome.{key}: ignored: slerp has no such parameter")
    if genome.tokenizer_source is not None:
        notes.append(
            "genome.tokenizer_source: ignored: the models of a search have to share one tokenizer"
        )
    if "smooth" in genome.model_fields_set:
        notes.append("genome.smooth: ignored: there is nothing to smooth")
    signed = method != "slerp" and genome.allow_negative_weights
    width = 1.0 if method == "slerp" else 2 * _LARGEST if signed else _LARGEST
    return space, _SIGMA / width, notes


def _about_scoring(file: _File) -> Iterator[str]:
    if file.limit is not None:
        yield (
            f"limit: staging.stages [{file.limit}]: so many examples of each task's train split, "
            "drawn anew for each generation"
        )
    given = file.model_fields_set
    if "num_fewshot" in given:
        yield "num_fewshot: ignored: a task has the worked examples that its own file asks for"
    if "shuffle" in given:
        yield "shuffle: ignored: what a generation meets is drawn at random from the job's seed"
    if "random_init" in given:
        yield "random_init: ignored: the search starts where all models have an equal share"
    chat = str(file.apply_chat_template).lower()
    yield f"apply_chat_template: tasks[].chat {chat}"
    if "fewshot_as_multiturn" in given:
        yield (
            "fewshot_as_multiturn: ignored: in a conversation worked examples are turns of their "
            "own"
        )


def _names(models: Sequence[str]) -> list[str]:
    """A name of its own for each parent, from the end of its path."""
    names: list[str] = []
    for model in models:
        plain = _plain(re.split(r"[/\\]", model.rstrip("/\\"))[-1])[:60]
        name, number = plain, 1
        while name in names or name in RESERVED:
            number += 1
            name = f"{plain}-{number}"
        names.append(name)
    return names


def _plain(text: str) -> str:
    """Text in the letters of a job's names."""
    return _SEPARATORS.sub("-", text).lstrip("._-") or "model"


@dataclass(frozen=True)
class _Found:
    """entry: of a job's tasks. about: what scores it, for people."""

    entry: dict[str, Any]
    about: str


def _found(task: _Task, folder: Path, task_folders: Sequence[Path]) -> _Found:
    """What a task is: lm-eval's, by a file in the file's folder or anywhere in those given;
    evomerge's own; or one that comes with lm-eval. Raises JobError."""
    name, metric = task.name, task.metric
    path = _file_of_lm_eval(name, folder, task_folders) or _file(name, folder)
    if path is None and re.search(r"[/\\]|\.ya?ml$", name):
        raise JobError(f"task '{name}': there is no such file in '{folder}'")
    if path is not None and not _of_lm_eval(r"\S+?", path):
        return _own(task, path)
    entry = {"task": f"{LM_EVAL}{name.removeprefix(LM_EVAL)}" if path is None else str(path)}
    if metric is None:
        return _Found(entry, "its first metric that is a mean over examples is the score")
    return _Found({**entry, "metric": metric}, f"{metric} is the score")


def _file(name: str, folder: Path) -> Path | None:
    """Of a task, by its path or as one of evomerge's."""
    with suppress(JobError):
        path = find_task(name, folder)
        return path if path.is_file() else None
    return None


def _own(task: _Task, path: Path) -> _Found:
    if task.metric is not None and task.metric.partition(",")[0] not in _METRICS:
        raise JobError(
            f"task '{task.name}' is evomerge's own, which '{task.metric}' cannot score: leave "
            f"metric out, or name lm-eval's: {LM_EVAL}{task.name}"
        )
    about = f"its own score takes the place of any metric; lm-eval's is {LM_EVAL}{task.name}"
    return _Found({"task": str(path)}, about)


def _file_of_lm_eval(name: str, folder: Path, task_folders: Sequence[Path]) -> Path | None:
    nearby = sorted(folder.glob("*.yaml"))
    elsewhere = [path for root in task_folders for path in sorted(root.rglob("*.yaml"))]
    named = (path for path in (*nearby, *elsewhere) if _of_lm_eval(re.escape(name), path))
    return next((path.resolve() for path in named), None)


def _of_lm_eval(task: str, path: Path) -> bool:
    """Whether a file is lm-eval's and calls its task by this pattern. Read as text: it may hold
    what plain YAML does not."""
    line = re.compile(rf"^task:\s*(['\"]?){task}\1\s*(#.*)?$", re.MULTILINE)
    return line.search(path.read_text(encoding="utf-8", errors="replace")) is not None
