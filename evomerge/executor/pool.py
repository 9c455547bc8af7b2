"""A pool of workers on Ray: actors that are started, told what to do, and replaced.

Each slot of the pool has one actor at a time, which first finds a place in the cluster, then opens
its models and tasks, then evaluates what it is sent. One that dies, hangs or breaks is replaced.
Where there is a place for one, and for how many, follows from the search's share of the cluster:
a worker that has to go ends its evaluation first; a place where nothing comes to an end is given
up. Says what became of each request, and leaves it to others what that means.
"""

import logging
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any, Literal
from uuid import uuid4

import evomerge
from evomerge.devices import Device
from evomerge.errors import EvomergeError, InputError, JobError, OutOfMemory
from evomerge.executor import Request, Workers
from evomerge.executor.account import Account, Accounts
from evomerge.executor.actor import Actor, Place, Ready, Sender
from evomerge.executor.board import Board, Look
from evomerge.executor.cluster import Cluster
from evomerge.executor.deadlines import Deadlines
from evomerge.executor.demand import demanded, environment, settled, spelt
from evomerge.executor.parcel import Step
from evomerge.executor.shares import Claim, Node, Places, room
from evomerge.executor.slot import Loss, Slot
from evomerge.executor.spec import WorkerSpec
from evomerge.fitness.results import Evaluation
from evomerge.job import Executor as ExecutorSection
from evomerge.messages import one_line

_log = logging.getLogger(__name__)

_TROUBLES = 3  # that follow each other until a place is given up
_LOOK = 1.0  # seconds at most between two looks at the share
_JUST = 0.1  # seconds: whoever has answered within them is not asked whether it has begun
_READERS = 4  # pieces of models that are read at once for other nodes

_SEEKING = ("waiting", "placing")


Outcome = Evaluation | Loss


class Pool:
    """The slots are for reading, see `send` and `step`; idle: those that wait for something to do,
    the longest first. What is done for each result takes as long whatever the number of slots."""

    def __init__(self, section: ExecutorSection, spec: WorkerSpec) -> None:
        """Returns when the first worker is open. Raises InputError where there is no cluster, no
        room in it, or no node with these models and tasks; EvomergeError where none starts."""
        self._section = section
        self._environment = environment(spec.engine)
        self._started = False
        self._sender: Any = None  # where some node lacked something
        self._board: Board | None = None
        self._look: Look | None = None  # the last that was followed
        self._share: Places = {}
        self._broken = Counter[str]()  # places that were given up, by node
        self._waits = False  # for room that other searches have
        # What actors were told and have come to an end of, filled by Ray's own thread: waiting for
        # one of a thousand costs no more than waiting for one.
        self._ended: SimpleQueue[tuple[Slot, Future[Any]]] = SimpleQueue()
        self.slots: list[Slot] = []
        self.idle: dict[Slot, None] = {}
        self._deadlines = Deadlines[Slot]()
        self._cluster = Cluster(section.address)
        self._ray = self._cluster.ray
        try:
            self._demand = demanded(section, spec.engine, self._cluster.has)
            self._accounts = Accounts(self._demand.get("GPU", 0.0))
            self._spec = replace(spec, engine=settled(spec.engine, self._demand))
            self._most = None if section.workers == "auto" else section.workers
            if self._most is None and not self._demand:
                raise JobError("executor.workers: auto: they ask for nothing: say how many")
            for _ in range(self._most or 1):
                self._add()
            self._own = Claim(uuid4().hex, section.priority, time.time(), self._demand, self._most)
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

    def workers(self) -> Workers:
        """See Executor: as many as the share has places for."""
        merge_ahead = any(slot.merges_ahead for slot in self.slots)
        count = max(1, sum(self._share.values()))  # one is open, even where its place is gone
        return Workers(count, self._demand.get("GPU", 0.0), merge_ahead)

    def devices(self) -> tuple[Device, ...]:
        """See Executor."""
        return self._accounts.devices()

    def send(
        self, slot: Slot, request: Request, upcoming: Request | None, again: bool = False
    ) -> Account:
        """Let an idle worker evaluate a request. upcoming: what it will be sent next, as far as is
        known, for one that merges ahead. again: it was lost before: should it be once more, it has
        to be known whether it had begun. Gives the account of its device."""
        if slot.account is None:
            raise ValueError(f"the slot is {slot.doing}, not idle")
        # A call costs as much as all else that is done for a result.
        just = not again and time.monotonic() - slot.rested < _JUST
        slot.begun = None if just else slot.actor.begin.remote()
        slot.request = request
        self._limit(slot, self._section.time_limit)
        self._tell(slot, "evaluating", slot.actor.evaluate.remote(request, upcoming))
        return slot.account

    def acquit(self, request: Request) -> None:
        """That it was lost is no device's fault."""
        for slot in self.slots:
            slot.troubles.discard(request)

    def step(self) -> tuple[Slot, Outcome] | None:
        """Wait for the next thing to happen to any worker, and do what follows from it. Gives what
        became of an evaluation, if that is what ended.

        Raises EvomergeError when there is no worker left and none to be had, InputError for what
        no worker could help.
        """
        self._cluster.check()
        if self._board is not None and self._board.last is not self._look:
            self._follow(self._board.last)
        first = self._deadlines.first()
        left = _LOOK if first is None else max(0.0, self._deadlines.left(first))
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
        held = tuple(slot.node for slot in list(self.slots) if slot.is_open and slot.node)
        return replace(self._own, held=held, broken=dict(self._broken))

    def _follow(self, look: Look) -> None:
        """Have workers where the share says."""
        self._look = look
        if look.claim.broken != self._broken:  # it names places that were given up meanwhile
            return
        self._share = look.share
        missing = Counter(self._share)
        leave = 0
        for slot in sorted(self.slots, key=_staying):
            left, slot.leaving = slot.leaving, False
            if slot.node is None:
                continue
            if missing[slot.node]:
                missing[slot.node] -= 1
                continue
            leave += slot.is_open and not left
            if slot.doing == "evaluating":
                slot.leaving = True
            else:
                self._send_away(slot)
        if leave:
            _log.warning(
                "executor: workers leave, %d of %d: their share is smaller: other searches go "
                "first, or a node is drained or lost",
                leave,
                len(self.slots),
            )
        places = list(missing.elements())
        waiting = [slot for slot in self.slots if slot.doing == "waiting"]
        if self._most is None:
            waiting += [self._add() for _ in range(len(places) - len(waiting))]
            for slot in waiting[len(places) :]:
                self._drop(slot)
        for slot, node in zip(waiting, places, strict=False):
            self._place(slot, node)
        self._mind_others()

    def _mind_others(self) -> None:
        """Say so where other searches leave no room; once they do, time for a place begins anew."""
        waits = not self._share and self._others_have_room()
        if waits and not self._waits:
            _log.warning("executor: other searches go first and leave no room: this one waits")
        if self._waits and not waits:
            for slot in self.slots:
                if slot.doing in _SEEKING:
                    self._limit(slot, self._section.start_limit)
        self._waits = waits

    def _others_have_room(self) -> bool:
        """Whether there would be room if there were no other searches."""
        look = self._look
        return look is not None and look.others and room(look.nodes, self._claim()) > 0

    def _add(self) -> Slot:
        """One slot more, which waits for a place."""
        slot = Slot()
        self.slots.append(slot)
        self._limit(slot, self._section.start_limit)
        return slot

    def _drop(self, slot: Slot) -> None:
        """Do without a slot that waits, unless it is the only one."""
        if len(self.slots) > 1:
            self._deadlines.clear(slot)
            self.slots.remove(slot)

    def _send_away(self, slot: Slot) -> None:
        """End a slot's worker, until there is a place for it again."""
        self._end(slot)
        self._wait(slot)

    def _wait(self, slot: Slot) -> None:
        """Have no actor until there is a place for one."""
        if slot.doing != "placing":  # where it only tries again its time runs on
            self._limit(slot, self._section.start_limit)
        slot.actor = slot.node = slot.place = slot.told = slot.begun = None
        slot.doing, slot.leaving, slot.landed = "waiting", False, False
        slot.troubles.clear()

    def _give_up(self, slot: Slot, error: EvomergeError) -> None:
        """Do without a place: another one is looked for. Where nothing sound is on its node, the
        whole of it is done without. Raises what is wrong where there is nothing left to try."""
        node = slot.node
        self._send_away(slot)
        nodes: Sequence[Node] = self._look.nodes if self._look is not None else ()
        if node is not None:
            whole = not any(other.is_sound for other in self.slots if other.node == node)
            claim = replace(self._claim(), workers=None)
            holds = room([one for one in nodes if one.name == node], claim)
            self._broken[node] += holds if whole else 1
        if any(other.is_sound for other in self.slots) or room(nodes, self._claim()):
            _log.warning("executor: one place less for workers: %s", error)
        elif self._started:
            raise EvomergeError(f"{error}: no worker is left: put it right and resume the search")
        else:
            raise error

    # -- how workers come into being ---------------------------------------------------------------

    def _place(self, slot: Slot, node: str) -> None:
        """Start an actor on a node, as soon as there is room for it."""
        slot.node = node
        slot.actor = self._cluster.start(Actor, [self._environment], self._demand, node)
        slot.place = slot.begun = None
        if slot.doing != "waiting" or self._deadlines.left(slot) == math.inf:
            self._limit(slot, self._section.start_limit)
        self._tell(slot, "placing", slot.actor.place.remote())

    def _open(self, slot: Slot, place: Place) -> None:
        """Let an actor that has a place open a worker there."""
        slot.place, here = place, evomerge.__version__
        slot.account = self._accounts.held(place.host, place.gpus)
        if place.version != here:
            text = f"{slot.host} has evomerge {place.version}: install {here} there, as it is here"
            self._give_up(slot, JobError(text))
        else:
            self._limit(slot, self._section.time_limit)
            self._tell(slot, "opening", slot.actor.open.remote(self._spec))

    def _supply(self, slot: Slot, step: Step) -> None:
        """Let an actor go on with opening, with what is here and its node lacks. The time limit is
        for each step, which ends after seconds if anything comes."""
        if step.lacks and self._cluster.is_client:
            text = (
                f"{slot.host}: {step.word}: nothing can be sent by ray://: start the search on a "
                "node of the cluster, or use a path that all nodes share"
            )
            self._give_up(slot, JobError(text))
            return
        if step.lacks and self._sender is None:
            given = [self._environment, self._spec]
            self._sender = self._cluster.start_here(Sender, given, _READERS)
        if step.word and not step.lacks:
            _log.warning("executor: %s: %s", slot.host, step.word)
        self._limit(slot, self._section.time_limit)
        self._tell(slot, "opening", slot.actor.supply.remote(self._sender))

    def _tell(
        self, slot: Slot, doing: Literal["placing", "opening", "evaluating"], reference: Any
    ) -> None:
        told: Future[Any] = reference.future()
        self.idle.pop(slot, None)
        slot.doing, slot.told, slot.since = doing, told, time.monotonic()
        told.add_done_callback(lambda told: self._ended.put((slot, told)))

    def _limit(self, slot: Slot, limit: float) -> None:
        """Let a slot be overdue after so many seconds."""
        self._deadlines.set(slot, limit)

    def _rest(self, slot: Slot) -> None:
        """There is nothing to do for a slot."""
        self._deadlines.clear(slot)
        slot.doing, slot.told, slot.rested = "idle", None, time.monotonic()
        self.idle[slot] = None

    def _end(self, slot: Slot) -> None:
        """End a slot's actor, whatever it does."""
        self.idle.pop(slot, None)
        if slot.actor is not None:
            self._cluster.kill(slot.actor)
        account, slot.account = slot.account, None
        if account is not None:
            if slot.doing == "opening":
                account.opened(_elapsed(slot))
            elif slot.doing == "evaluating":
                account.lost(_elapsed(slot))
            account.give_back()

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
            return self._lost(slot, _gist(error), died=True)
        if slot.account is None:  # it was placing
            self._open(slot, value)
            return None
        doing = slot.doing
        self._rest(slot)
        if doing == "opening":
            slot.account.opened(_elapsed(slot))
            if isinstance(value, Ready):
                slot.merges_ahead = value.merges_ahead
            else:
                self._supply(slot, value)
            return None
        evaluation: Evaluation = value
        slot.account.landed(evaluation)
        slot.landed = True
        slot.troubles.clear()
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
        """What an actor was told takes too long, or a slot has no place for too long."""
        if slot.doing in _SEEKING:
            self._without_room()
            return None
        what = "an evaluation" if slot.doing == "evaluating" else "opening models and tasks"
        limit = f"executor.time_limit, {self._section.time_limit:g} s"
        return self._lost(slot, f"{what} took longer than {limit}")

    def _without_room(self) -> None:
        """Some slots have no place for too long: say so, once for all of them. Raises where none
        has one, and that is not because of other searches."""
        limit = self._section.start_limit
        seeking = [slot for slot in self.slots if slot.doing in _SEEKING]
        for slot in seeking:
            if self._deadlines.left(slot) < limit / 20:  # whose turn would be next
                self._deadlines.clear(slot)  # there may be room for it some day
        late = [slot for slot in seeking if self._deadlines.left(slot) == math.inf]
        text = (
            f"executor: no room for {len(late)} of {len(self.slots)} workers after "
            f"executor.start_limit, {limit:g} s: each asks for {spelt(self._demand)}, the cluster "
            f"has {spelt(self._cluster.has)} and {spelt(self._cluster.free)} of it free"
        )
        if self._others_have_room():
            for slot in seeking:
                self._limit(slot, limit)
            placed = any(slot.doing == "placing" for slot in late)
            why = "have not ended what they are at" if placed else "have the rest"
            if self._share:  # one without a share has said so
                _log.warning("%s: other searches %s", text, why)
        elif len(late) < len(self.slots):
            _log.warning("%s: the others go on", text)
        elif self._started:
            raise EvomergeError(f"{text}: bring nodes back and resume the search")
        else:
            raise JobError(f"{text}: ask for less, or add nodes")

    def _lost(self, slot: Slot, reason: str, died: bool = False) -> Loss | None:
        """An actor is dead, or of no use any more: replace it."""
        node_lost = slot.node is not None and not self._cluster.is_alive(slot.node)
        reason = "the node was lost" if node_lost else reason
        loss = None
        trouble: object = slot.told
        if slot.doing == "evaluating":
            cause = "node" if node_lost else self._cause(slot, died)
            loss = Loss(cause, reason, _elapsed(slot))
            if loss.cause != "nobody":
                trouble = slot.request
        if not node_lost:
            slot.troubles.add(trouble)
        if len(slot.troubles) >= _TROUBLES:
            what = "no evaluation comes to an end" if loss else "a worker does not start"
            text = f"on {slot.host} {what}, {_TROUBLES} times in a row: {reason}"
            self._give_up(slot, EvomergeError(text))
            return loss
        _log.warning("executor: the worker on %s is replaced: %s", slot.host, reason)
        self._end(slot)
        if node_lost or slot.leaving or slot.node is None:
            self._wait(slot)
        else:
            self._place(slot, slot.node)
        return loss

    def _cause(self, slot: Slot, died: bool) -> Literal["worker", "unproven", "nobody"]:
        """What an evaluation was lost by, where its node is still there; see Loss."""
        if slot.begun is None and died:
            return "nobody"
        try:
            if slot.begun is not None:
                self._ray.get(slot.begun, timeout=0)
        except self._ray.exceptions.RayError:  # it was dead when the evaluation was sent
            return "nobody"
        return "worker" if slot.is_proven else "unproven"


def _staying(slot: Slot) -> int:
    """Who stays rather than others on its node is the smallest."""
    return ("evaluating", "idle", "opening", "placing", "waiting").index(slot.doing)


def _elapsed(slot: Slot) -> float:
    return time.monotonic() - slot.since


def _gist(error: Exception) -> str:
    """Of Ray's page-long messages only what kind of end it was, where they say, and where more is
    to be found."""
    kind = re.search(r"Worker exit type: (\w+)", str(error))
    process = re.search(r"pid: (\d+)", str(error))
    return (
        f"its process ended: {kind[1] if kind else type(error).__name__}: see "
        f"worker-*-{process[1] if process else ''}*.err in Ray's folder of logs there, and whether "
        "its memory was enough"
    )
