"""A pool of workers on Ray: actors that are started, told what to do, and replaced.

Each slot of the pool has one actor at a time, which first finds a place in the cluster, then opens
its models and tasks, then evaluates what it is sent. One that dies, hangs or breaks is replaced.
Where there is a place for one, and for how many, follows from the search's share of the cluster:
a worker that has to go ends its evaluation first. Says what became of each request, and leaves it
to others what that means.
"""

import logging
import math
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any, Literal
from uuid import uuid4

import evomerge
from evomerge.devices import Device
from evomerge.errors import EvomergeError, InputError, JobError, OutOfMemory
from evomerge.executor import Request
from evomerge.executor.account import Account
from evomerge.executor.actor import Place
from evomerge.executor.board import Board
from evomerge.executor.cluster import Cluster, demanded, environment, settled, spelt
from evomerge.executor.parcel import Step
from evomerge.executor.shares import Claim, Places, room
from evomerge.executor.spec import WorkerSpec
from evomerge.fitness.results import Evaluation
from evomerge.job import Executor as ExecutorSection
from evomerge.messages import one_line

_log = logging.getLogger(__name__)

_STARTS = 3  # of an actor that come to nothing, one after the other, until its slot is given up
_LOOK = 1.0  # seconds at most between two looks at the share


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

    told: what comes of that. begun: Ray's reference to its beginning, where it is an evaluation.
    since, deadline: on the monotonic clock. place, account: None until the actor has a place;
    account: of the device that it holds there. node: Ray's id of the one on which the actor is or
    waits for room, None where the share has no place for it: then there is no actor. leaving: it
    ends when its evaluation does. merges_ahead: see Worker. starts: how many came to nothing since
    the last that did not.
    """

    actor: Any = None
    doing: Literal["placing", "opening", "idle", "evaluating"] = "placing"
    told: Future[Any] | None = None
    begun: Any = None
    since: float = 0.0
    deadline: float = math.inf
    place: Place | None = None
    account: Account | None = None
    node: str | None = None
    leaving: bool = False
    merges_ahead: bool = False
    starts: int = 0

    @property
    def host(self) -> str:
        """For people: where it is."""
        return f"node '{self.place.host}'" if self.place else "an unknown node"


Outcome = Evaluation | Loss


class Pool:
    """The slots are for reading, see `send` and `step`; idle: those that wait for something to do,
    the longest first. What is done for each result takes as long whatever the number of slots."""

    def __init__(self, section: ExecutorSection, spec: WorkerSpec) -> None:
        """Returns when the first worker is open. Raises InputError where there is no cluster, no
        room in it, or no node with these models and tasks."""
        self._section = section
        self._environment = environment(spec.engine)
        self._started = False
        self._sender: Any = None  # where some node lacked something
        self._accounts: dict[str, Account] = {}
        self._board: Board | None = None
        self._share: Places = {}
        self._broken: list[str] = []  # the nodes of slots that were given up
        self._waits = False  # for room that other searches have
        # What actors were told and have come to an end of, filled by Ray's own thread: waiting for
        # one of a thousand costs no more than waiting for one.
        self._ended: SimpleQueue[tuple[Slot, Future[Any]]] = SimpleQueue()
        self.slots: list[Slot] = []
        self.idle: dict[Slot, None] = {}
        # By their time limit, in the order in which they were told: the first is due first.
        self._timed: dict[float, OrderedDict[Slot, None]] = {}
        self._cluster = Cluster(section.address)
        self._ray = self._cluster.ray
        try:
            self._demand = demanded(section, spec.engine, self._cluster.has)
            self._spec = replace(spec, engine=settled(spec.engine, self._demand))
            if section.workers == "auto" and not self._demand:
                raise JobError("executor.workers: auto: they ask for nothing: say how many")
            for _ in range(1 if section.workers == "auto" else section.workers):
                self._add()
            self._own = Claim(uuid4().hex, section.priority, time.time(), self._demand, None)
            self._board = Board(self._cluster, self._claim)
            while not self.idle:
                self.step()
        except BaseException:
            self.close()
            raise
        self._started = True

    def close(self) -> None:
        """End all workers, and Ray where it was started here."""
        if self._board is not None:
            self._board.close()
        for slot in self.slots:
            self._end(slot)
        self.slots = []
        if self._sender is not None:
            self._cluster.kill(self._sender)
        self._cluster.leave()

    def devices(self) -> tuple[Device, ...]:
        """See Executor."""
        return tuple(account.device() for account in self._accounts.values())

    def send(self, slot: Slot, request: Request, upcoming: Request | None) -> Account:
        """Let an idle worker evaluate a request. upcoming: what it will be sent next, as far as is
        known, for one that merges ahead. Gives the account of its device."""
        if slot.account is None:
            raise ValueError(f"the slot is {slot.doing}, not idle")
        slot.begun = slot.actor.begin.remote()
        told = slot.actor.evaluate.remote(request, upcoming)
        self._tell(slot, "evaluating", told, self._section.time_limit)
        return slot.account

    def step(self) -> tuple[Slot, Outcome] | None:
        """Wait for the next thing to happen to any worker, and do what follows from it. Gives what
        became of an evaluation, if that is what ended.

        Raises EvomergeError when there is no worker left and none to be had, InputError for what
        no worker could help.
        """
        self._cluster.check()
        if self._board is not None and self._board.share is not self._share:
            self._follow(self._board)
        due = [next(iter(timed)) for timed in self._timed.values() if timed]
        first = min(due, key=lambda slot: slot.deadline, default=None)
        left = math.inf if first is None else max(0.0, first.deadline - time.monotonic())
        outcome: Outcome | None
        try:
            slot, told = self._ended.get(timeout=min(left, _LOOK))
        except Empty:
            if first is None or left > _LOOK:
                return None
            slot, outcome = first, self._overdue(first)
        else:
            if told is not slot.told:  # of an actor that has been given up
                return None
            outcome = self._heard(slot, told)
        if slot.leaving and slot.doing == "idle":
            self._send_away(slot)
        return None if outcome is None else (slot, outcome)

    # -- how many there are, and where -------------------------------------------------------------

    def _claim(self) -> Claim:
        """What the search asks for and has; called in the board's thread."""
        slots = list(self.slots)
        return replace(
            self._own,
            workers=None if self._section.workers == "auto" else len(slots),
            held=tuple(slot.node for slot in slots if slot.place and slot.node),
            broken=tuple(self._broken),
        )

    def _follow(self, board: Board) -> None:
        """Have workers where the share says."""
        self._share = board.share
        missing = Counter(self._share)
        leave = 0
        for slot in sorted(self.slots, key=_staying):
            left, slot.leaving = slot.leaving, False
            if slot.node is None:
                continue
            if missing[slot.node]:
                missing[slot.node] -= 1
                continue
            leave += slot.place is not None and not left
            if slot.doing == "evaluating":
                slot.leaving = True
            else:
                self._send_away(slot)
        if leave:
            text = (
                "executor: workers leave, %d of %d: other searches go first, or a node is drained"
            )
            _log.warning(text, leave, len(self.slots))
        places = list(missing.elements())
        waiting = [slot for slot in self.slots if slot.node is None]
        if self._section.workers == "auto":
            waiting += [self._add() for _ in range(len(places) - len(waiting))]
            for slot in waiting[len(places) :]:
                self._drop(slot)
        for slot, node in zip(waiting, places, strict=False):
            self._place(slot, node)
        waits = not self._share and self._others_have_room(board)
        if waits and not self._waits:
            _log.warning("executor: other searches go first and leave no room: this one waits")
        self._waits = waits

    def _others_have_room(self, board: Board) -> bool:
        """Whether there would be room if there were no other searches."""
        return board.others and room(self._cluster.nodes(self._demand), self._claim()) > 0

    def _add(self) -> Slot:
        """One slot more, which waits for a place."""
        slot = Slot()
        self.slots.append(slot)
        self._wait(slot)
        return slot

    def _drop(self, slot: Slot) -> None:
        """Do without a slot that waits, unless it is the only one."""
        if len(self.slots) > 1:
            self._leave(slot)
            self.slots.remove(slot)

    def _send_away(self, slot: Slot) -> None:
        """End a slot's worker, until there is a place for it again."""
        self._end(slot)
        self._wait(slot)

    def _wait(self, slot: Slot) -> None:
        """Have no actor until there is a place for one."""
        slot.actor = slot.node = slot.place = slot.told = slot.begun = None
        slot.doing, slot.leaving = "placing", False
        self._limit(slot, self._section.start_limit)

    # -- how workers come into being ---------------------------------------------------------------

    def _place(self, slot: Slot, node: str) -> None:
        """Start an actor on a node, as soon as there is room for it."""
        slot.node = node
        slot.actor = self._cluster.start(self._demand, self._environment, node)
        slot.place = slot.begun = None
        self._tell(slot, "placing", slot.actor.place.remote(), self._section.start_limit)

    def _open(self, slot: Slot, place: Place) -> None:
        """Let an actor that has a place open a worker there."""
        slot.place, here = place, evomerge.__version__
        slot.account = self._account(place)
        slot.account.hold(time.monotonic())
        if place.version != here:
            text = f"{slot.host} has evomerge {place.version}: install {here} there, as it is here"
            self._give_up(slot, JobError(text))
        else:
            told = slot.actor.open.remote(self._spec)
            self._tell(slot, "opening", told, self._section.time_limit)

    def _supply(self, slot: Slot, step: Step) -> None:
        """Let an actor go on with opening, with what is here and its node lacks. The time limit is
        for each step, which ends after seconds if anything comes."""
        try:
            if step.lacks and self._sender is None:
                self._sender = self._cluster.sender(self._spec, self._environment)
        except JobError as error:
            self._give_up(slot, JobError(f"{slot.host}: {step.word}: {error}"))
            return
        if step.word and not step.lacks:
            _log.warning("executor: %s: %s", slot.host, step.word)
        told = slot.actor.supply.remote(self._sender)
        self._tell(slot, "opening", told, self._section.time_limit)

    def _account(self, place: Place) -> Account:
        """Of the device that a new actor has there: that of the actor before it, where there was
        one and nobody has it now."""
        taken = {slot.account.name for slot in self.slots if slot.account is not None}
        name = next(name for name in _names(place) if name not in taken)
        return self._accounts.setdefault(name, Account(name, self._demand.get("GPU", 0.0)))

    def _tell(
        self,
        slot: Slot,
        doing: Literal["placing", "opening", "evaluating"],
        reference: Any,
        limit: float,
    ) -> None:
        told: Future[Any] = reference.future()
        slot.doing, slot.told = doing, told
        self._limit(slot, limit)
        told.add_done_callback(lambda told: self._ended.put((slot, told)))

    def _limit(self, slot: Slot, limit: float) -> None:
        """Let a slot be overdue after so many seconds from now."""
        self._leave(slot)
        slot.since = time.monotonic()
        slot.deadline = slot.since + limit
        self._timed.setdefault(limit, OrderedDict())[slot] = None

    def _rest(self, slot: Slot) -> None:
        """There is nothing to do for a slot."""
        self._leave(slot)
        slot.doing, slot.told = "idle", None
        self.idle[slot] = None

    def _leave(self, slot: Slot) -> None:
        """A slot is not idle any more, nor timed."""
        slot.deadline = math.inf
        self.idle.pop(slot, None)
        for timed in self._timed.values():
            timed.pop(slot, None)

    def _end(self, slot: Slot) -> None:
        """End a slot's actor, whatever it does."""
        self._leave(slot)
        if slot.actor is not None:
            self._cluster.kill(slot.actor)
        account, slot.account = slot.account, None
        if account is not None:
            if slot.doing == "opening":
                account.opened(_elapsed(slot))
            elif slot.doing == "evaluating":
                account.lost(_elapsed(slot))
            account.give_back()

    def _give_up(self, slot: Slot, error: EvomergeError) -> None:
        """Do without a slot. Raises what is wrong with it if it was the last one."""
        self._end(slot)
        self.slots.remove(slot)
        if slot.node is not None:
            self._broken.append(slot.node)
        if self.slots:
            _log.warning("executor: one worker less, %d left: %s", len(self.slots), error)
        elif self._started:
            raise EvomergeError(f"{error}: no worker is left: put it right and resume the search")
        else:
            raise error

    # -- what becomes of what they are told --------------------------------------------------------

    def _heard(self, slot: Slot, told: Future[Any]) -> Outcome | None:
        """An actor has come to the end of what it was told."""
        try:
            value = told.result()
        except self._ray.exceptions.RayTaskError as error:
            return self._raised(slot, error.cause)
        except self._ray.exceptions.ActorUnschedulableError:  # its node is gone, or is drained
            self._wait(slot)
            return None
        except self._ray.exceptions.RayError as error:
            return self._lost(slot, _gist(error))
        if slot.account is None:  # it was placing
            self._open(slot, value)
            return None
        doing = slot.doing
        self._rest(slot)
        if doing == "opening":
            slot.account.opened(_elapsed(slot))
            if isinstance(value, Step):
                self._supply(slot, value)
            else:
                slot.merges_ahead, slot.starts = value, 0
            return None
        evaluation: Evaluation = value
        slot.account.landed(evaluation)
        return evaluation

    def _raised(self, slot: Slot, error: Exception) -> Loss | None:
        """An exception in an actor: the user's matter, the device's, or one of unknown origin."""
        if isinstance(error, InputError) and slot.doing != "evaluating":
            self._give_up(slot, type(error)(f"{slot.host}: {error}"))
            return None
        if isinstance(error, InputError) and slot.account is not None:
            self._rest(slot)
            slot.account.lost(_elapsed(slot))
            if not isinstance(error, OutOfMemory):
                raise error
            return Loss("memory", str(error), _elapsed(slot))
        return self._lost(slot, f"{type(error).__name__}: {one_line(error)}")

    def _overdue(self, slot: Slot) -> Loss | None:
        """What an actor was told takes too long."""
        if slot.doing != "placing":
            what = "an evaluation" if slot.doing == "evaluating" else "opening models and tasks"
            limit = f"executor.time_limit, {self._section.time_limit:g} s"
            return self._lost(slot, f"{what} took longer than {limit}")
        self._leave(slot)  # there may be room for it some day
        waiting = [s for s in self.slots if s.doing == "placing" and s.deadline == math.inf]
        text = (
            f"executor: no room for {len(waiting)} of {len(self.slots)} workers after "
            f"executor.start_limit, {self._section.start_limit:g} s: each asks for "
            f"{spelt(self._demand)}, the cluster has {spelt(self._cluster.has)} and "
            f"{spelt(self._cluster.free)} of it free"
        )
        if self._board is not None and self._others_have_room(self._board):
            self._limit(slot, self._section.start_limit)
            if self._share and slot is self.slots[0]:  # one without a share has said so
                _log.warning("%s: other searches have not ended what they are at", text)
            return None
        if len(waiting) < len(self.slots):
            _log.warning("%s: the others go on", text)
            return None
        if self._started:
            raise EvomergeError(f"{text}: bring nodes back and resume the search")
        raise JobError(f"{text}: ask for less, or add nodes")

    def _lost(self, slot: Slot, reason: str) -> Loss | None:
        """An actor is dead, or of no use any more: replace it."""
        node_lost = slot.node is not None and not self._cluster.is_alive(slot.node)
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
            self._end(slot)
            if node_lost or slot.leaving or slot.node is None:
                self._wait(slot)
            else:
                self._place(slot, slot.node)
        return loss

    def _had_begun(self, slot: Slot) -> bool:
        """Whether the actor was still alive when its evaluation was sent."""
        try:
            self._ray.get(slot.begun, timeout=0)
        except self._ray.exceptions.RayError:
            return False
        return True


def _names(place: Place) -> Iterator[str]:
    """Of the devices there: GPUs by their numbers, and again where several workers share them;
    cores by counting, for nobody holds a certain one."""
    if not place.gpus:
        yield from (f"{place.host}/cpu {n}" for n in count())
    name = f"{place.host}/gpu {'+'.join(place.gpus)}"
    yield name
    yield from (f"{name} ({n})" for n in count(2))


def _staying(slot: Slot) -> int:
    """Who stays rather than others on its node is the smallest."""
    return ("evaluating", "idle", "opening", "placing").index(slot.doing)


def _elapsed(slot: Slot) -> float:
    return time.monotonic() - slot.since


def _gist(error: Exception) -> str:
    """Of Ray's page-long messages only what kind of end it was, where they say."""
    kind = re.search(r"Worker exit type: (\w+)", str(error))
    return f"its process ended: {kind[1] if kind else type(error).__name__}"
