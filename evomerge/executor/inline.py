"""The executor of a laptop: one engine in this process, one candidate after the other."""

import time
from collections.abc import Iterator, Mapping, Sequence

from evomerge.engine import BrokenModel, Engine
from evomerge.errors import ModelError, RecipeError
from evomerge.executor import Request
from evomerge.fitness.results import Evaluation, Failed, Scored, Scores
from evomerge.fitness.score import score
from evomerge.fitness.task import Task


class InlineExecutor:
    """See Executor.

    tasks: by name. shaped: also take the log-likelihood of the reference answers.
    """

    def __init__(self, engine: Engine, tasks: Mapping[str, Task], shaped: bool) -> None:
        self._engine = engine
        self._tasks = tasks
        self._shaped = shaped

    def evaluate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Evaluation]]:
        """See Executor."""
        for request in requests:
            yield request, self._evaluated(request)

    def _evaluated(self, request: Request) -> Evaluation:
        started = time.perf_counter()
        try:
            self._engine.load(request.recipe)
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
        """See Executor."""
        self._engine.close()
