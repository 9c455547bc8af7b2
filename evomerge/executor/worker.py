"""What evaluates a request, whichever process it is in: one engine, and the tasks.

Knows nothing of what it was opened from, and of how requests come here.
"""

import time
from collections.abc import Mapping

from evomerge.engine import BrokenModel, Engine
from evomerge.errors import ModelError, OutOfMemory, RecipeError
from evomerge.executor import Request
from evomerge.fitness.example import Verdict
from evomerge.fitness.results import Evaluation, Failed, Scored
from evomerge.fitness.score import judged, packed, sampled
from evomerge.fitness.task import Task


class Worker:
    """A live engine and the tasks that it is scored on, by name.

    shaped: also take the log-likelihood of the reference answers.
    """

    def __init__(self, engine: Engine, tasks: Mapping[str, Task], shaped: bool) -> None:
        self._engine = engine
        self._tasks = tasks
        self._shaped = shaped

    @property
    def merges_ahead(self) -> bool:
        """Whether it makes use of being told what is upcoming."""
        return self._engine.merges_ahead

    def evaluate(self, request: Request, upcoming: Request | None = None) -> Evaluation:
        """Merge and score. What is wrong with the candidate gives Failed; raises OutOfMemory where
        another device might do. upcoming: what will most likely be asked next: where memory allows
        it is merged while this one is scored."""
        started = time.perf_counter()
        try:
            self._engine.load(request.recipe)
        except OutOfMemory:
            raise
        except (RecipeError, ModelError) as error:
            return Failed(str(error), time.perf_counter() - started)
        merged = time.perf_counter()
        if upcoming is not None:
            self._engine.prepare(upcoming.recipe)
        try:
            found = {name: self._judged(name, request) for name in request.examples}
        except BrokenModel as error:
            return Failed(str(error), time.perf_counter() - started)
        tasks = {name: packed(request.examples[name], own) for name, own in found.items()}
        replies = {
            name: sampled(request.examples[name], own, request.samples)
            for name, own in found.items()
        }
        return Scored(tasks, merged - started, time.perf_counter() - started, replies)

    def _judged(self, name: str, request: Request) -> list[Verdict]:
        task = self._tasks[name]
        items = task.examples(request.split)
        return judged(self._engine, task, items, request.examples[name], self._shaped)

    def close(self) -> None:
        """Free the device."""
        self._engine.close()
