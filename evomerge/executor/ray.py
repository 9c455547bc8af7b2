"""The executor of many devices: requests go to whichever worker of a pool on Ray is free.

A request whose worker, device or node fails is tried elsewhere, and nothing is said of its score.
Only a candidate that no worker survives has failed.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from evomerge.executor import Request
from evomerge.executor.pool import Loss, Pool, Slot
from evomerge.executor.worker import WorkerSpec
from evomerge.fitness.results import Evaluation, Failed
from evomerge.job import Executor as ExecutorSection

# How often an evaluation comes to no end, by the cause, until it is the candidate's fault. A node
# is seldom lost by what runs on it, and a worker that was dead already not at all.
_PATIENCE = {"worker": 3, "memory": 2, "node": 10, "nobody": math.inf}


@dataclass(eq=False)
class _Work:
    """A request until it is evaluated. losses: what came of it so far. tried: the slots where."""

    request: Request
    losses: list[Loss] = field(default_factory=list)
    tried: set[Slot] = field(default_factory=set)

    def verdict(self) -> Failed | None:
        """Whether there were too many losses."""
        last = self.losses[-1]
        count = sum(loss.cause == last.cause for loss in self.losses)
        if count < _PATIENCE[last.cause]:
            return None
        seconds = sum(loss.seconds for loss in self.losses)
        return Failed(f"failed on {count} workers, the last time: {last.reason}", seconds)


class RayExecutor:
    """See Executor, and Pool for what may be raised."""

    def __init__(self, section: ExecutorSection, spec: WorkerSpec) -> None:
        """Returns when the first worker is open."""
        self._pool = Pool(section, spec)

    def evaluate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Evaluation]]:
        """See Executor."""
        queue, pool = _Queue(requests), self._pool
        under_way: dict[Slot, _Work] = {}
        while True:
            for slot in pool.slots:
                if slot.doing == "idle" and (work := queue.take(slot, pool.slots)):
                    under_way[slot] = work
                    pool.send(slot, work.request)
            if not under_way and queue.is_empty:
                return
            found = pool.step()
            if found is None or found[0] not in under_way:  # of an iterator that was given up
                continue
            slot, outcome = found
            work = under_way.pop(slot)
            if isinstance(outcome, Loss):
                work.losses.append(outcome)
                work.tried.add(slot)
                verdict = work.verdict()
                if verdict is None:
                    queue.put_back(work)
                    continue
                outcome = verdict
            yield work.request, outcome

    def close(self) -> None:
        """See Executor."""
        self._pool.close()


class _Queue:
    """What waits for a worker: requests that came back, then those that nobody has had yet."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._again: list[_Work] = []
        self._new = iter(requests)
        self._no_more = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left to take, now or later."""
        return self._no_more and not self._again

    def put_back(self, work: _Work) -> None:
        """It has to be evaluated again."""
        self._again.append(work)

    def take(self, slot: Slot, slots: Sequence[Slot]) -> _Work | None:
        """What this slot is to do next: nothing that another one is better for."""
        ready = {other for other in slots if other.doing != "placing"}
        for work in self._again:
            if slot not in work.tried or ready <= work.tried:
                self._again.remove(work)
                return work
        request = None if self._no_more else next(self._new, None)
        self._no_more = request is None
        return None if request is None else _Work(request)
