"""The ends of the executor that run in Ray's processes: workers, and who sends them what they lack.
Loads nothing before it is told to open a worker, so that the environment that it is given holds for
whatever is loaded then."""

import os
import socket
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import evomerge

if TYPE_CHECKING:
    from evomerge.executor import Request
    from evomerge.executor.parcel import Source, Step
    from evomerge.executor.spec import Opening, WorkerSpec
    from evomerge.executor.worker import Worker
    from evomerge.fitness.results import Evaluation


@dataclass(frozen=True)
class Place:
    """Where an actor runs. node: Ray's id of it. gpus: the numbers of those that it was given.
    version: of evomerge there."""

    node: str
    host: str
    gpus: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Ready:
    """A worker is open. merges_ahead: see Worker."""

    merges_ahead: bool


class Actor:
    """A worker in a process of its own; whatever it raises reaches the executor."""

    _worker: "Worker"

    def __init__(self, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)

    def place(self) -> Place:
        """Answered as soon as there is a process."""
        import ray

        context = ray.get_runtime_context()
        gpus = tuple(context.get_accelerator_ids()["GPU"])
        return Place(context.get_node_id(), socket.gethostname(), gpus, evomerge.__version__)

    def open(self, spec: "WorkerSpec") -> "Ready | Step":
        """Open the worker. Where it is not ready, gives what is in the way: `supply` goes on."""
        self._opening: Opening[Worker] = spec.opening()
        return self._go_on(None)

    def supply(self, sender: Any) -> "Ready | Step":
        """Go on with opening for a while, with what a Sender has. Gives what `open` does."""
        return self._go_on(_Sent(sender))

    def _go_on(self, source: "Source | None") -> "Ready | Step":
        try:
            return self._opening.send(source)
        except StopIteration as end:
            self._worker = end.value
            return Ready(self._worker.merges_ahead)

    def begin(self) -> None:
        """Answered by whoever lives to hear the next call."""

    def evaluate(self, request: "Request", upcoming: "Request | None" = None) -> "Evaluation":
        """See Worker."""
        return self._worker.evaluate(request, upcoming)


class Sender:
    """Reads for others what their nodes lack: see Stock."""

    def __init__(self, environment: Mapping[str, str], spec: "WorkerSpec") -> None:
        os.environ.update(environment)
        self._stock = spec.stock()

    def read(self, key: str, name: str, start: int, stop: int) -> bytes:
        """See Stock."""
        return self._stock.read(key, name, start, stop)


class _Sent:
    """See Source. Not more than two pieces are on their way, so that few are ever in memory."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender

    def pieces(self, key: str, name: str, start: int, stop: int) -> Iterator[bytes]:
        """See Source."""
        from evomerge.executor.parcel import PIECE

        coming: deque[Any] = deque()
        for at in range(start, stop, PIECE):
            coming.append(self._sender.read.remote(key, name, at, min(at + PIECE, stop)))
            if len(coming) == 2:
                yield _arrived(coming.popleft())
        yield from map(_arrived, coming)


def _arrived(piece: Any) -> bytes:
    """Raises what the sender raised."""
    import ray
    import ray.exceptions

    try:
        held: bytes = ray.get(piece)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return held
