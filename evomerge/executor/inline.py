"""The executor of a laptop: one worker in this process, one candidate after the other."""

import time
from collections.abc import Iterable, Iterator, Mapping

from evomerge.engine import Engine
from evomerge.errors import OutOfMemory
from evomerge.executor import Request
from evomerge.executor.worker import Worker
from evomerge.fitness.results import Evaluation, Failed
from evomerge.fitness.task import Task


class InlineExecutor:
    """See Executor, and Worker for what it is made of."""

    def __init__(self, engine: Engine, tasks: Mapping[str, Task], shaped: bool) -> None:
        self._worker = Worker(engine, tasks, shaped)

    def evaluate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Evaluation]]:
        """See Executor."""
        for request in requests:
            started = time.perf_counter()
            try:
                evaluation = self._worker.evaluate(request)
            except OutOfMemory as error:  # there is no other device
                evaluation = Failed(str(error), time.perf_counter() - started)
            yield request, evaluation

    def close(self) -> None:
        """See Executor."""
        self._worker.close()
