"""What a worker is opened from, on this machine or on another, and what that has to turn out to be.

A spec is small, and travels. A model or a task is opened where it lies or is to be had; one that a
node does not have, or has otherwise, is fetched into the node's cache. Knows nothing of where a
worker runs, or of how files come there.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from evomerge.engine.build import build
from evomerge.errors import InputError, ModelError, TaskError
from evomerge.executor.parcel import Contents, File, Parcel, Source, Step, Stock, fetching
from evomerge.executor.worker import Worker
from evomerge.fitness.task import Task
from evomerge.fitness.task_file import Split
from evomerge.job import Engine as EngineSection
from evomerge.job import TaskEntry, find_task, packaged
from evomerge.job.files import LM_EVAL

if TYPE_CHECKING:
    from evomerge.merge.checkpoint import Checkpoint  # loads torch

_SCORED: tuple[Split, ...] = ("train", "validation")  # never test, whose data may be elsewhere
_MODEL, _ADAPTER = "model", "adapter"  # folders of a model's parcel

Opened = TypeVar("Opened")

# On the way to something opened: see `fetching`.
Opening = Generator[Step, Source | None, Opened]


@dataclass(frozen=True)
class ModelSpec:
    """Where a model is, its content hash, and the files that it consists of: where they lie on the
    machine where the search was started, by their names in the parcel."""

    uri: str
    sha: str
    parcel: Parcel
    paths: Mapping[str, str]

    @classmethod
    def of(cls, model: "Checkpoint") -> "ModelSpec":
        """Of an opened model."""
        hashes = model.files
        paths, files = {}, {}
        for name, path in {**model.sources, **model.beside}.items():
            place = f"{_ADAPTER}/{name[1:]}" if name.startswith("+") else f"{_MODEL}/{name}"
            paths[place] = str(path.absolute())
            known = hashes.get(name)
            files[place] = File(path.stat().st_size, known) if known else File.of(path.read_bytes())
        return cls(model.uri, model.sha, Parcel(files), paths)

    def opening(self) -> Opening["Checkpoint"]:
        """Raises ModelError where it cannot be opened, InputError where it cannot be fetched."""
        what = f"model '{self.uri}'"
        return _opening(what, self.parcel, lambda: self._open(self.uri), self._open_copy)

    def carried(self) -> Contents:
        """What its parcel holds, where the search was started."""
        return {name: Path(path) for name, path in self.paths.items()}

    def _open_copy(self, folder: Path) -> "Checkpoint":
        adapted = any(name.startswith(f"{_ADAPTER}/") for name in self.paths)
        return self._open(f"{folder / _MODEL}" + (f"+{folder / _ADAPTER}" if adapted else ""))

    def _open(self, reference: str) -> "Checkpoint":
        from evomerge.merge.sources import open_model

        model = open_model(reference)
        if model.sha != self.sha:
            raise ModelError(
                f"model '{reference}' is not what it is where the search was started: copy its "
                "files from there"
            )
        return model


@dataclass(frozen=True)
class TaskSpec:
    """Where a task is, a ready-made one by its name, and what it asks and how: the content hashes
    of its splits. chat, metric: see Task.open. parcel: the task without its test split; None for
    one of lm-eval's, which is not sent."""

    name: str
    chat: bool | None
    metric: str | None
    contents: Mapping[Split, str]
    parcel: Parcel | None

    @classmethod
    def of(cls, task: Task, entry: TaskEntry) -> "TaskSpec":
        """Of an opened task, and how the job asks for it."""
        ready_made = packaged("fitness").resolve()
        name = str(task.path)
        if task.path.resolve().is_relative_to(ready_made):
            name = str(task.path.resolve().relative_to(ready_made))
        elif not name.startswith(LM_EVAL):
            name = str(task.path.absolute())
        contents = {split: task.content(split) for split in _SCORED}
        files = task.portable()
        parcel = files and Parcel({name: File.of(held) for name, held in files.items()})
        return cls(name, entry.chat, entry.metric, contents, parcel or None)

    def opening(self) -> Opening[Task]:
        """Raises TaskError where it cannot be opened, InputError where it cannot be fetched."""
        return _opening(f"task '{self.name}'", self.parcel, self._open_named, self._open_copy)

    def carried(self) -> Contents:
        """What its parcel holds, where the search was started. Raises TaskError where the task is
        not what it was."""
        return self._open_named().portable() or {}

    def _open_named(self) -> Task:
        return self._open(find_task(self.name, packaged("fitness")))

    def _open_copy(self, folder: Path) -> Task:
        return self._open(folder / "task.yaml")

    def _open(self, path: Path) -> Task:
        task = Task.open(path, self.chat, self.metric)
        for split, content in self.contents.items():
            if task.content(split) != content:
                raise TaskError(
                    f"task '{task.name}': {split} is not what it is where the search was started: "
                    "copy its files from there"
                )
        return task


@dataclass(frozen=True)
class WorkerSpec:
    """What to open a worker from. models: by their names in recipes; first: which of them gives
    config and tokenizer. shaped: see Worker."""

    engine: EngineSection
    models: Mapping[str, ModelSpec]
    first: str
    tasks: tuple[TaskSpec, ...]
    shaped: bool

    def opening(self) -> Opening[Worker]:
        """Raises InputError where a model or a task is neither here nor to be fetched."""
        tasks, models = [], {}
        for task in self.tasks:
            tasks.append((yield from task.opening()))
        for name, model in self.models.items():
            models[name] = yield from model.opening()
        engine = build(self.engine, models, self.first)
        return Worker(engine, {task.name: task for task in tasks}, self.shaped)

    def stock(self) -> Stock:
        """What is sent to nodes that lack it: of tasks nothing of the test split."""
        parcels = {model.parcel.key: model.carried for model in self.models.values()}
        tasks = {task.parcel.key: task.carried for task in self.tasks if task.parcel}
        return Stock(parcels | tasks)


def _opening(
    what: str,
    parcel: Parcel | None,
    open_here: Callable[[], Opened],
    open_copy: Callable[[Path], Opened],
) -> Opening[Opened]:
    """Open something where it is to be had, else a copy of it."""
    try:
        return open_here()
    except InputError:
        if parcel is None:
            raise
    folder = yield from fetching(parcel, what)
    try:
        return open_copy(folder)
    except InputError:  # a cache may be damaged like any disk
        yield from fetching(parcel, what, suspect=True)
    return open_copy(folder)
