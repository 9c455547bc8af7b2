"""Evaluations that are wanted, on their way to the executor and back into the record.

What is in the store is not done again, and what several candidates have in common is done once.
Whoever wants something is called when it is there; nobody waits. Knows nothing of generations but
their numbers, nor of what results mean.
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
from evomerge.search.record import Alike, Member, Ran, Record, alike

Then = Callable[[Evaluation], None]


@dataclass(frozen=True, eq=False)
class Errand:
    """An evaluation that is wanted of a member of a generation, and who is called with it."""

    generation: int
    member: Member
    purpose: str
    stage: int
    split: Split
    examples: Examples
    then: Then

    @property
    def alike(self) -> Alike:
        """Errands that have this in common find the same."""
        return alike(self.member.recipe_sha or "", self.split, self.examples)


class Flow:
    """Whatever is wanted at present. heard: is called with the purpose of each evaluation that the
    executor made, once everybody has been called who wanted it."""

    def __init__(
        self,
        record: Record,
        executor: Executor,
        heard: Callable[[str], None],
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self._record = record
        self._executor = executor
        self._heard = heard
        self._asked_to_stop = asked_to_stop
        self._stopping = False
        self._queue: deque[tuple[Errand, float]] = deque()
        self._under_way: dict[Request, tuple[Errand, float]] = {}
        self._answered: deque[tuple[Then, Evaluation]] = deque()
        self._waiting: dict[Alike, list[Errand]] = {}  # for what is queued or under way
        # Of candidates of the same generation: another one may be luckier.
        self._failed: dict[tuple[int, Alike], tuple[int, Failed]] = {}

    def want(self, errand: Errand) -> None:
        """Have an evaluation made, or found."""
        key, member = errand.alike, errand.member
        stored = self._record.evaluation(member.id, errand.purpose, errand.stage)
        if stored is not None:
            if isinstance(stored, Failed):
                self._failed.setdefault((errand.generation, key), (member.id, stored))
            self._answered.append((errand.then, stored))
        elif twin := self._record.twin(key) or self._failed.get((errand.generation, key)):
            self._copy(errand, *twin)
        elif key in self._waiting:
            self._waiting[key].append(errand)
        else:
            self._waiting[key] = []
            self._queue.append((errand, time.monotonic()))

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
                errand, since = self._queue.popleft()
                recipe = self._record.recipe(errand.member)
                request = Request(errand.member.id, recipe, errand.split, errand.examples)
                self._under_way[request] = errand, time.monotonic() - since
                return request
            if not more():
                return None
            self._settle()
            # Nobody has asked where nothing was left to score.
            self._stopping = not self._queue and self._asked_to_stop()
        raise Stopped

    def _receive(self, landed: Landed) -> None:
        """Write down what was found, for everybody who wanted it."""
        errand, waited = self._under_way.pop(landed.request)
        found, key, owner = landed.evaluation, errand.alike, errand.member.id
        ran = Ran(landed.device, landed.gpus, waited)
        self._record.add(owner, errand.purpose, errand.stage, found, ran=ran)
        if isinstance(found, Failed):
            self._failed[errand.generation, key] = owner, found
        self._answered.append((errand.then, found))
        for other in self._waiting.pop(key):
            self.want(other)
        self._settle()
        self._heard(errand.purpose)

    def _copy(self, errand: Errand, owner: int, evaluation: Evaluation) -> None:
        """What was found of a twin is written down for a member too; it took no time."""
        copy = replace(evaluation, seconds=0.0)
        if isinstance(copy, Scored):
            copy = replace(copy, merge_seconds=0.0)
        self._record.add(errand.member.id, errand.purpose, errand.stage, copy, copied_from=owner)
        self._answered.append((errand.then, copy))

    def _settle(self) -> None:
        """Call whoever has an answer, which may make them want more."""
        while self._answered:
            then, evaluation = self._answered.popleft()
            then(evaluation)
