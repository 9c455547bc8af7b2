"""The executor of a laptop: one worker in this process, one candidate after the other, each of
which is merged while the one before it is scored, where the engine can do that."""

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from evomerge.devices import Device
from evomerge.engine import Engine
from evomerge.errors import OutOfMemory
from evomerge.executor import Landed, Request, Stopped, Take, Workers
from evomerge.executor.account import Account
from evomerge.executor.worker import Worker
from evomerge.fitness.results import Failed
from evomerge.fitness.task import Task
from evomerge.job import Engine as EngineSection


class InlineExecutor:
    """See Executor, and Worker for what it is made of."""

    def __init__(
        self,
        section: EngineSection,
        opened: Callable[[], Engine],
        tasks: Mapping[str, Task],
        shaped: bool,
    ) -> None:
        """opened: opens the engine of this section."""
        started = time.monotonic()
        self._worker = Worker(opened(), tasks, shaped)
        self._account = _account(section)
        self._account.hold(started)
        self._account.opened(time.monotonic() - started)

    def evaluate(self, take: Take) -> Iterator[Landed]:
        """See Executor."""
        with suppress(Stopped):
            request = take()
            while request is not None:
                upcoming = take() if self._worker.merges_ahead else None
                yield self._landed(request, upcoming)
                request = upcoming or take()

    def _landed(self, request: Request, upcoming: Request | None) -> Landed:
        started, account = time.perf_counter(), self._account
        try:
            evaluation = self._worker.evaluate(request, upcoming)
        except OutOfMemory as error:  # there is no other device
            evaluation = Failed(str(error), time.perf_counter() - started)
        account.landed(evaluation)
        return Landed(request, evaluation, account.name, account.charge)

    def workers(self) -> Workers:
        """See Executor."""
        return Workers(1, self._account.gpus, self._worker.merges_ahead)

    def devices(self) -> tuple[Device, ...]:
        """See Executor."""
        return (self._account.device(),)

    def close(self) -> None:
        """See Executor."""
        self._worker.close()
        self._account.give_back()


def _account(section: EngineSection) -> Account:
    """Of the device that the engine of this section runs on."""
    from evomerge.merge.device import named_device  # loads torch, which an engine has done

    device, host = named_device(section.device, "engine.device"), socket.gethostname()
    if device.type == "cpu":
        return Account(f"{host}/cpu 0", 0.0)
    first, count = device.index or 0, section.tensor_parallel
    numbers = "+".join(str(first + i) for i in range(count))
    return Account(f"{host}/gpu {numbers}", float(count))
