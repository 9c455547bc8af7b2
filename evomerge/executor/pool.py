"""A pool of workers on Ray: actors that are started, told what to do, and replaced.

Each slot of the pool has one actor at a time, which first finds a place in the cluster, then opens
its models and tasks, then evaluates what it is sent. One that dies, hangs or breaks is replaced.
Says what became of each request, and leaves it to others what that means.
"""

import logging
import math
import re
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import evomerge
from evomerge.errors import EvomergeError, InputError, JobError, OutOfMemory
from evomerge.executor import Request
from evomerge.executor.actor import Place
from evomerge.executor.cluster import Cluster, demanded, environment, settled, spelt
from evomerge.executor.worker import WorkerSpec
from evomerge.fitness.results import Evaluation
from evomerge.job import Executor as ExecutorSection
from evomerge.messages import one_line

_log = logging.getLogger(__name__)

_STARTS = 3  # of an actor that come to nothing, one after the other, until its slot is given up


@dataclass(frozen=True)
class Loss:
    """An evaluation that came to no end.

    cause: its worker died, hung or broke; its device has too little memory; its node was lost; the
    worker was dead before it began. seconds: from when it was sent.
    """

    cause: Literal["worker", "memory", "node", "nobody"]
    reason: str
    seconds: float


@dataclass(eq=False)
class Slot:
    """A place in the pool, and what its actor is doing.

    told: Ray's reference to the end of that. begun: to its beginning, where it is an evaluation.
    since, deadline: on the monotonic clock. place: None until the actor has one. starts: how many
    came to nothing since the last that did not.
    """

    actor: Any = None
    doing: Literal["placing", "opening", "idle", "evaluating"] = "placing"
    told: Any = None
    begun: Any = None
    since: float = 0.0
    deadline: float = math.inf
    place: Place | None = None
    starts: int = 0

    @property
    def host(self) -> str:
        """For people: where it is."""
        return f"node '{self.place.host}'" if self.place else "an unknown node"


Outcome = Evaluation | Loss


class Pool:
    """The slots are for reading; see `send` and `step`."""

    def __init__(self, section: ExecutorSection, spec: WorkerSpec) -> None:
        """Returns when the first worker is open. Raises InputError where there is no cluster, no
        room in it, or no node with these models and tasks."""
        self._section = section
        self._environment = environment(spec.engine)
        self._started = False
        self.slots: list[Slot] = []
        self._cluster = Cluster(section.address)
        self._ray = self._cluster.ray
        try:
            self._demand = demanded(section, spec.engine, self._cluster.has)
            self._spec = replace(spec, engine=settled(spec.engine, self._demand))
            self.slots = [Slot() for _ in range(self._count())]
            for slot in self.slots:
                self._place(slot)
            while not any(slot.doing == "idle" for slot in self.slots):
                self.step()
        except BaseException:
            self.close()
            raise
        self._started = True

    def _count(self) -> int:
        if self._section.workers == "auto":
            return max(1, self._cluster.room(self._demand))  # it waits where there is none
        return self._section.workers

    def close(self) -> None:
        """End all workers, and Ray where it was started here."""
        for slot in self.slots:
            self._cluster.kill(slot.actor)
        self.slots = []
        self._cluster.leave()

    def send(self, slot: Slot, request: Request) -> None:
        """Let an idle worker evaluate a request."""
        slot.begun = slot.actor.begin.remote()
        told = slot.actor.evaluate.remote(request)
        _tell(slot, "evaluating", told, self._section.time_limit)

    def step(self) -> tuple[Slot, Outcome] | None:
        """Wait for the next thing to happen to any worker, and do what follows from it. Gives what
        became of an evaluation, if that is what ended.

        Raises EvomergeError when there is no worker left and none to be had, InputError for what
        no worker could help.
        """
        waiting = {slot.told: slot for slot in self.slots if slot.told is not None}
        due = min(waiting.values(), key=lambda slot: slot.deadline)
        timeout = None
        if due.deadline < math.inf:
            timeout = max(0.0, due.deadline - time.monotonic())
        done, _ = self._ray.wait(list(waiting), num_returns=1, timeout=timeout)
        slot = waiting[done[0]] if done else due
        outcome = self._heard(slot) if done else self._overdue(slot)
        return None if outcome is None else (slot, outcome)

    # -- how workers come into being ---------------------------------------------------------------

    def _place(self, slot: Slot) -> None:
        """Start an actor, as soon as there is room for it."""
        slot.actor = self._cluster.start(self._demand, self._environment)
        slot.place = slot.begun = None
        _tell(slot, "placing", slot.actor.place.remote(), self._section.start_limit)

    def _open(self, slot: Slot, place: Place) -> None:
        """Let an actor that has a place open a worker there."""
        slot.place, here = place, evomerge.__version__
        if place.version != here:
            text = f"{slot.host} has evomerge {place.version}: install {here} there, as it is here"
            self._give_up(slot, JobError(text))
        else:
            told = slot.actor.open.remote(self._spec)
            _tell(slot, "opening", told, self._section.time_limit)

    def _give_up(self, slot: Slot, error: EvomergeError) -> None:
        """Do without a slot. Raises what is wrong with it if it was the last one."""
        self._cluster.kill(slot.actor)
        self.slots.remove(slot)
        if self.slots:
            _log.warning("executor: one worker less, %d left: %s", len(self.slots), error)
        elif self._started:
            raise EvomergeError(f"{error}: no worker is left: put it right and resume the search")
        else:
            raise error

    # -- what becomes of what they are told --------------------------------------------------------

    def _heard(self, slot: Slot) -> Outcome | None:
        """An actor has come to the end of what it was told."""
        try:
            value = self._ray.get(slot.told)
        except self._ray.exceptions.RayTaskError as error:
            return self._raised(slot, error.cause)
        except self._ray.exceptions.RayError as error:
            return self._lost(slot, _gist(error))
        doing = slot.doing
        if doing == "placing":
            self._open(slot, value)
            return None
        _rest(slot)
        if doing == "opening":
            slot.starts = 0
            return None
        evaluation: Evaluation = value
        return evaluation

    def _raised(self, slot: Slot, error: Exception) -> Loss | None:
        """An exception in an actor: the user's matter, the device's, or one of unknown origin."""
        if isinstance(error, InputError) and slot.doing != "evaluating":
            self._give_up(slot, type(error)(f"{slot.host}: {error}"))
            return None
        if isinstance(error, OutOfMemory):
            _rest(slot)
            return Loss("memory", str(error), _elapsed(slot))
        if isinstance(error, InputError):
            _rest(slot)
            raise error
        return self._lost(slot, f"{type(error).__name__}: {one_line(error)}")

    def _overdue(self, slot: Slot) -> Loss | None:
        """What an actor was told takes too long."""
        if slot.doing != "placing":
            what = "an evaluation" if slot.doing == "evaluating" else "opening models and tasks"
            limit = f"executor.time_limit, {self._section.time_limit:g} s"
            return self._lost(slot, f"{what} took longer than {limit}")
        slot.deadline = math.inf  # there may be room for it some day
        waiting = [s for s in self.slots if s.doing == "placing" and s.deadline == math.inf]
        text = (
            f"executor: no room for {len(waiting)} of {len(self.slots)} workers after "
            f"executor.start_limit, {self._section.start_limit:g} s: each asks for "
            f"{spelt(self._demand)}, the cluster has {spelt(self._cluster.has)} and "
            f"{spelt(self._cluster.free)} of it free"
        )
        if len(waiting) < len(self.slots):
            _log.warning("%s: the others go on", text)
            return None
        if self._started:
            raise EvomergeError(f"{text}: bring nodes back and resume the search")
        raise JobError(f"{text}: ask for less, or add nodes")

    def _lost(self, slot: Slot, reason: str) -> Loss | None:
        """An actor is dead, or of no use any more: replace it."""
        self._cluster.kill(slot.actor)
        node_lost = slot.place is not None and not self._cluster.is_alive(slot.place.node)
        reason = "the node was lost" if node_lost else reason
        loss = None
        if slot.doing == "evaluating":
            cause: Literal["node", "worker", "nobody"] = (
                "worker" if self._had_begun(slot) else "nobody"
            )
            loss = Loss("node" if node_lost else cause, reason, _elapsed(slot))
        elif not node_lost:
            slot.starts += 1
        if slot.starts == _STARTS:
            text = f"executor: on {slot.host} a worker does not start: {reason}"
            self._give_up(slot, EvomergeError(text))
        else:
            _log.warning("executor: the worker on %s is replaced: %s", slot.host, reason)
            self._place(slot)
        return loss

    def _had_begun(self, slot: Slot) -> bool:
        """Whether the actor was still alive when its evaluation was sent."""
        try:
            self._ray.get(slot.begun, timeout=0)
        except self._ray.exceptions.RayError:
            return False
        return True


def _tell(
    slot: Slot, doing: Literal["placing", "opening", "evaluating"], told: Any, limit: float
) -> None:
    slot.doing, slot.told = doing, told
    slot.since = time.monotonic()
    slot.deadline = slot.since + limit


def _rest(slot: Slot) -> None:
    slot.doing, slot.told, slot.deadline = "idle", None, math.inf


def _elapsed(slot: Slot) -> float:
    return time.monotonic() - slot.since


def _gist(error: Exception) -> str:
    """Of Ray's page-long messages only what kind of end it was, where they say."""
    kind = re.search(r"Worker exit type: (\w+)", str(error))
    return f"its process ended: {kind[1] if kind else type(error).__name__}"
