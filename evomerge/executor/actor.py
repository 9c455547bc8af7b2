"""The end of the executor that runs in Ray's processes. Loads nothing before it is told to open a
worker, so that the environment that it is given holds for whatever is loaded then."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import evomerge

if TYPE_CHECKING:
    from evomerge.executor import Request
    from evomerge.executor.worker import Worker, WorkerSpec
    from evomerge.fitness.results import Evaluation


@dataclass(frozen=True)
class Place:
    """Where an actor runs. node: Ray's id of it. version: of evomerge there."""

    node: str
    host: str
    version: str


class Actor:
    """A worker in a process of its own; whatever it raises reaches the executor."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)

    def place(self) -> Place:
        """Answered as soon as there is a process."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return Place(node, socket.gethostname(), evomerge.__version__)

    def open(self, spec: "WorkerSpec") -> None:
        """Open the worker."""
        self._worker: Worker = spec.open()

    def begin(self) -> None:
        """Answered by whoever lives to hear the next call."""

    def evaluate(self, request: "Request") -> "Evaluation":
        """See Worker."""
        return self._worker.evaluate(request)
