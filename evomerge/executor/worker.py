"""What evaluates a request, whichever process it is in: one engine, and the tasks.

A `WorkerSpec` says what to open one from, on this machine or on another, and what that has to turn
out to be. Knows nothing of how requests come here.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.engine import BrokenModel, Engine
from evomerge.engine.build import build
from evomerge.errors import ModelError, OutOfMemory, RecipeError, TaskError
from evomerge.executor import Request
from evomerge.fitness.results import Evaluation, Failed, Scored, Scores
from evomerge.fitness.score import score
from evomerge.fitness.task import Task
from evomerge.fitness.task_file import Split
from evomerge.job import Engine as EngineSection
from evomerge.job import TaskEntry, find_task, packaged

if TYPE_CHECKING:
    from evomerge.merge.checkpoint import Checkpoint  # loads torch

_SCORED: tuple[Split, ...] = ("train", "validation")  # never test, whose data may be elsewhere


class Worker:
    """A live engine and the tasks that it is scored on, by name.

    shaped: also take the log-likelihood of the reference answers.
    """

    def __init__(self, engine: Engine, tasks: Mapping[str, Task], shaped: bool) -> None:
        self._engine = engine
        self._tasks = tasks
        self._shaped = shaped

    def evaluate(self, request: Request) -> Evaluation:
        """Merge and score. What is wrong with the candidate gives Failed; raises OutOfMemory where
        another device might do."""
        started = time.perf_counter()
        try:
            self._engine.load(request.recipe)
        except OutOfMemory:
            raise
        except (RecipeError, ModelError) as error:
            return Failed(str(error), time.perf_counter() - started)
        merged = time.perf_counter()
        try:
            tasks = {name: self._scores(name, request) for name in request.examples}
        except BrokenModel as error:
            return Failed(str(error), time.perf_counter() - started)
        return Scored(tasks, merged - started, time.perf_counter() - started)

    def _scores(self, name: str, request: Request) -> Scores:
        task = self._tasks[name]
        items = task.examples(request.split)
        return score(self._engine, task, items, request.examples[name], self._shaped)

    def close(self) -> None:
        """Free the device."""
        self._engine.close()


@dataclass(frozen=True)
class ModelSpec:
    """Where a model is, and its content hash."""

    uri: str
    sha: str

    @classmethod
    def of(cls, model: "Checkpoint") -> "ModelSpec":
        """Of an opened model."""
        return cls(model.uri, model.sha)

    def open(self) -> "Checkpoint":
        """Raises ModelError where it is not here, or another."""
        from evomerge.merge.sources import open_model

        model = open_model(self.uri)
        if model.sha != self.sha:
            raise ModelError(
                f"model '{self.uri}' is not what it is where the search was started: copy its "
                "files from there"
            )
        return model


@dataclass(frozen=True)
class TaskSpec:
    """Where a task is, a ready-made one by its name, and what it asks and how: the content hashes
    of its splits. chat, metric: see Task.open."""

    name: str
    chat: bool | None
    metric: str | None
    contents: Mapping[Split, str]

    @classmethod
    def of(cls, task: Task, entry: TaskEntry) -> "TaskSpec":
        """Of an opened task, and how the job asks for it."""
        ready_made = packaged("fitness").resolve()
        path = task.path
        if path.is_relative_to(ready_made):
            path = path.relative_to(ready_made)
        contents = {split: task.content(split) for split in _SCORED}
        return cls(str(path), entry.chat, entry.metric, contents)

    def open(self) -> Task:
        """Raises InputError where it is not here, or another."""
        task = Task.open(find_task(self.name, packaged("fitness")), self.chat, self.metric)
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

    def open(self) -> Worker:
        """Raises InputError where a model or task is missing here, or not what it was."""
        tasks = [task.open() for task in self.tasks]
        models = {name: model.open() for name, model in self.models.items()}
        engine = build(self.engine, models, self.first)
        return Worker(engine, {task.name: task for task in tasks}, self.shaped)
