"""Evaluations that are wanted, on their way to the executor and back into the record.

What is in the store is not done again, and what several candidates have in common is done once.
Whoever wants something is called when it is there; nobody waits. Knows nothing of generations, nor
of what results mean.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from evomerge.executor import Executor, Landed, Request, Stopped
from evomerge.fitness.results import Evaluation, Failed, Scored
from evomerge.fitness.task_file import Split
from evomerge.search import Interrupted
from evomerge.search.race import Examples
from evomerge.search.record import Member, Record, TwinKey, twin_key
from evomerge.store import Placement

Then = Callable[[Evaluation], None]  # is called with what was found

_SAMPLES = 8  # replies of each task


@dataclass(frozen=True, eq=False)
class Wanted:
    """An evaluation that is wanted of a member, and who is called with it.

    scope: within which a failure counts for twins too; elsewhere another may be luckier. It is the
    generation of a race; 0 for baselines and finalists.
    """

    scope: int
    member: Member
    purpose: str
    stage: int
    split: Split
    examples: Examples
    then: Then

    @property
    def key(self) -> TwinKey:
        """Evaluations that have this in common find the same."""
        return twin_key(self.member.recipe_sha or "", self.split, self.examples)

    @property
    def samples(self) -> int:
        """How many replies of each task are kept for people: of every candidate a few, once, and of
        a baseline, which others are compared with, all."""
        if self.purpose == "full" and self.member.genotype is None:
            return max(len(positions) for positions in self.examples.values())
        first = "full" if self.member.label is not None else "train"  # the mean is in no race
        return _SAMPLES if (self.purpose, self.stage) == (first, 0) else 0


class Flow:
    """Whatever is wanted at present. heard: is called after each evaluation that the executor made,
    once everybody has been called who wanted it."""

    def __init__(
        self,
        record: Record,
        executor: Executor,
        heard: Callable[[], None],
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self._record = record
        self._executor = executor
        self._heard = heard
        self._asked_to_stop = asked_to_stop
        self._stopping = False
        self._queue: deque[tuple[Wanted, float]] = deque()
        self._under_way: dict[Request, tuple[Wanted, float]] = {}  # since when, as in the queue
        self._answered: deque[tuple[Then, Evaluation]] = deque()
        self._waiting: dict[TwinKey, list[Wanted]] = {}  # for what is queued or under way
        self._failed: dict[tuple[int, TwinKey], tuple[int, Failed]] = {}  # by scope

    def want(self, wanted: Wanted) -> None:
        """Have an evaluation made, or found."""
        key, member = wanted.key, wanted.member
        stored = self._record.evaluation(member.id, wanted.purpose, wanted.stage)
        if stored is not None:
            if isinstance(stored, Failed):
                self._failed.setdefault((wanted.scope, key), (member.id, stored))
            self._answered.append((wanted.then, stored))
        elif twin := self._record.twin(key) or self._failed.get((wanted.scope, key)):
            self._copy(wanted, *twin)
        elif key in self._waiting:
            self._waiting[key].append(wanted)
        else:
            self._waiting[key] = []
            self._queue.append((wanted, time.monotonic()))

    def run(self, more: Callable[[], bool] = lambda: False) -> None:
        """Until nothing is wanted any more.

        more: is called when a device has nothing to do; wants something more, or gives False.
        Raises Interrupted once the search was asked to stop, and what was under way is recorded.
        """
        self._settle()
        for landed in self._executor.evaluate(lambda: self._taken(more)):
            self._receive(landed)
            self._stopping = self._stopping or self._asked_to_stop()
        if self._stopping:
            raise Interrupted

    def _taken(self, more: Callable[[], bool]) -> Request | None:
        while not self._stopping:
            if self._queue:
                wanted, since = self._queue.popleft()
                recipe = self._record.recipe(wanted.member)
                request = Request(
                    wanted.member.id, recipe, wanted.split, wanted.examples, wanted.samples
                )
                self._under_way[request] = wanted, since
                return request
            if not more():
                return None
            self._settle()
            # Nobody has asked where nothing was left to score.
            self._stopping = not self._queue and self._asked_to_stop()
        raise Stopped

    def _receive(self, landed: Landed) -> None:
        """Write down what was found, for everybody who wanted it."""
        wanted, since = self._under_way.pop(landed.request)
        found, key, owner = landed.evaluation, wanted.key, wanted.member.id
        # One that merges ahead takes a request long before it begins to evaluate it.
        waited = max(0.0, time.monotonic() - since - found.seconds)
        placement = Placement(landed.device, landed.gpus, waited)
        self._record.add(owner, wanted.purpose, wanted.stage, found, placement=placement)
        if isinstance(found, Scored):
            found = replace(found, replies={})
        if isinstance(found, Failed):
            self._failed[wanted.scope, key] = owner, found
        self._answered.append((wanted.then, found))
        for other in self._waiting.pop(key):
            self.want(other)
        self._settle()
        self._heard()

    def _copy(self, wanted: Wanted, owner: int, evaluation: Evaluation) -> None:
        """What was found of a twin is written down for a member too; it took no time."""
        copy = replace(evaluation, seconds=0.0)
        if isinstance(copy, Scored):
            copy = replace(copy, merge_seconds=0.0)
        self._record.add(wanted.member.id, wanted.purpose, wanted.stage, copy, copied_from=owner)
        self._answered.append((wanted.then, copy))

    def _settle(self) -> None:
        """Call whoever has an answer, which may make them want more."""
        while self._answered:
            then, evaluation = self._answered.popleft()
            then(evaluation)
