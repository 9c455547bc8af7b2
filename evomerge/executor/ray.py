"""The executor of many devices: requests go to whichever worker of a pool on Ray is free.

A request whose worker, device or node fails is tried elsewhere, and nothing is said of its score.
Only a candidate that no worker survives has failed. A worker that merges ahead is told with each
request which one it will be sent next; that is a promise to the worker, and to nobody else: where
another one has nothing to do, it takes the request.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from evomerge.devices import Device
from evomerge.executor import Landed, Request, Stopped, Take, Workers
from evomerge.executor.account import Account
from evomerge.executor.pool import Pool
from evomerge.executor.slot import Loss, Slot
from evomerge.executor.spec import WorkerSpec
from evomerge.fitness.results import Failed
from evomerge.job import Executor as ExecutorSection

# How often an evaluation comes to no end, by the cause, until it is the candidate's fault. A node
# is seldom lost by what runs on it, and a worker that was dead already not at all. A device that
# has evaluated nothing, or nothing since its last loss, may itself be what is broken; but where
# there is nothing else to be evaluated, that has to have an end, too.
_PATIENCE = {"worker": 3, "unproven": 5, "memory": 2, "node": 10, "nobody": math.inf}


@dataclass(eq=False)
class _Work:
    """A request until it is evaluated. losses: what came of it so far. tried: the slots where."""

    request: Request
    losses: list[Loss] = field(default_factory=list)
    tried: set[Slot] = field(default_factory=set)

    def failure(self) -> Failed | None:
        """Whether there were too many losses."""
        last = self.losses[-1]
        causes = {last.cause, "worker"} if last.cause == "unproven" else {last.cause}
        count = sum(loss.cause in causes for loss in self.losses)
        if count < _PATIENCE[last.cause]:
            return None
        seconds = sum(loss.seconds for loss in self.losses)
        return Failed(f"failed on {count} workers, the last time: {last.reason}", seconds)


class RayExecutor:
    """See Executor, and Pool for what may be raised."""

    def __init__(self, section: ExecutorSection, spec: WorkerSpec) -> None:
        """Returns when the first worker is open."""
        self._pool = Pool(section, spec)

    def evaluate(self, take: Take) -> Iterator[Landed]:
        """See Executor."""
        queue, pool = _Queue(take, self._pool), self._pool
        under_way: dict[Slot, tuple[_Work, Account]] = {}
        while True:
            try:
                for slot, work in queue.next():
                    upcoming = queue.reserve(slot)
                    account = pool.send(slot, work.request, upcoming, again=bool(work.losses))
                    under_way[slot] = work, account
            except Stopped:
                queue.stop()
            if not under_way and queue.is_empty:
                return
            found = pool.step()
            if found is None or found[0] not in under_way:  # of an iterator that was given up
                continue
            slot, outcome = found
            work, account = under_way.pop(slot)
            if slot.doing != "idle":
                queue.release(slot)
            if isinstance(outcome, Loss):
                work.losses.append(outcome)
                work.tried.add(slot)
                failure = work.failure()
                if failure is None:
                    queue.put_back(work)
                    continue
                pool.acquit(work.request)
                outcome = failure
            yield Landed(work.request, outcome, account.name, account.charge)
            queue.ask_again()

    def workers(self) -> Workers:
        """See Executor."""
        return self._pool.workers()

    def devices(self) -> tuple[Device, ...]:
        """See Executor."""
        return self._pool.devices()

    def close(self) -> None:
        """See Executor."""
        self._pool.close()


class _Queue:
    """What waits for a worker: what is reserved for one, what came back, and what `take` gives."""

    def __init__(self, take: Take, pool: Pool) -> None:
        self._take = take
        self._pool = pool
        self._none = False  # `take` has none, until something lands
        self._stopped = False
        self._again: list[_Work] = []
        self._reserved: dict[Slot, _Work] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return self._none and not self._again and not self._reserved

    def ask_again(self) -> None:
        """Something has landed: `take` may have something."""
        self._none = self._stopped

    def stop(self) -> None:
        """Nothing is wanted any more."""
        self._none = self._stopped = True
        self._again.clear()
        self._reserved.clear()

    def put_back(self, work: _Work) -> None:
        """It has to be evaluated again."""
        if not self._stopped:
            self._again.append(work)

    def reserve(self, slot: Slot) -> Request | None:
        """What a slot that has just been given something is to do after that, if its worker can
        make use of knowing it."""
        work = self._waiting(slot) if slot.merges_ahead else None
        if work is None:
            return None
        self._reserved[slot] = work
        return work.request

    def release(self, slot: Slot) -> None:
        """A slot will not do what is reserved for it."""
        if slot in self._reserved:
            self.put_back(self._reserved.pop(slot))

    def next(self) -> list[tuple[Slot, _Work]]:
        """What idle slots are to do next: all are served before anything is reserved for one."""
        found = []
        for slot in self._pool.idle:
            if self.is_empty:
                break
            work = self._reserved.pop(slot, None) or self._waiting(slot) or self._stolen(slot)
            if work is not None:
                found.append((slot, work))
        return found

    def _waiting(self, slot: Slot) -> _Work | None:
        again = next((work for work in self._again if self._suits(work, slot)), None)
        # A slot that has evaluated nothing since shows by something else what it is good for.
        if again is None or (slot in again.tried and not slot.is_proven):
            request = None if self._none else self._take()
            self._none = request is None
            if request is not None:
                return _Work(request)
        if again is not None:
            self._again.remove(again)
        return again

    def _stolen(self, slot: Slot) -> _Work | None:
        """What is reserved for a slot that is at work, the one that has been so for least long."""
        for other in reversed(self._reserved):
            if other.doing == "evaluating" and self._suits(self._reserved[other], slot):
                return self._reserved.pop(other)
        return None

    def _suits(self, work: _Work, slot: Slot) -> bool:
        """Whether there is no slot that would tell more of it."""
        if not work.tried:
            return True
        best = max(_telling(work, other) for other in self._pool.slots if other.is_open)
        return _telling(work, slot) == best


def _telling(work: _Work, slot: Slot) -> tuple[bool, bool, bool]:
    """How much it tells of a request that was lost elsewhere what becomes of it here: the greater
    the more."""
    return (slot not in work.tried, slot.is_proven, not slot.troubles)
