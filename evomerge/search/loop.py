"""The search under way: ask, decode, open, evaluate, tell, review.

Whatever is in the store already is not done again, so the same code launches and resumes. Order
is what makes that exact: a generation is committed before work on it starts, the optimizer is told
in slot order, and what it is asked and told in turn is in the store. In the synchronous mode a
generation is proposed when the one before is told; in the asynchronous mode whenever a device has
nothing to do, or, where it merges ahead, nothing to do next.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from evomerge.errors import SearchFailed, StaleCoordinator, StoreUnavailable
from evomerge.executor import Executor
from evomerge.fitness.results import Evaluation, Failed, Scored, troubles
from evomerge.fitness.task_file import Split
from evomerge.guard.review import stop_reason, warning
from evomerge.optimizer import Asked, Optimizer, Told
from evomerge.search import Status, Watcher
from evomerge.search.flow import Flow, Wanted
from evomerge.search.generation import Generation
from evomerge.search.known import known
from evomerge.search.pace import Pace
from evomerge.search.race import Examples, Values
from evomerge.search.record import Member, Record
from evomerge.search.setting import Setting
from evomerge.search.standing import Standing
from evomerge.store import Coordinator, NewCandidate, Outcome, Wish

_WITHOUT_NEWS = 20  # generations; a converged distribution of choices may still find something


def conduct(
    setting: Setting,
    coordinator: Coordinator,
    executor: Executor,
    watcher: Watcher,
    asked_to_stop: Callable[[], bool],
) -> None:
    """Run a search to its end, from wherever it is. See `launch`."""
    from evomerge.search.finals import decide

    watcher.opened(setting)
    try:
        with _unsearched(), _devices_saved(coordinator, executor):
            run = Run(setting, coordinator, executor, watcher, asked_to_stop)
            run.score_baselines()
            coordinator.finish("finished", decide(run, run.optimize()))
    except SearchFailed as error:
        coordinator.stop(str(error))
        coordinator.finish("failed", None)
        raise


@contextmanager
def _devices_saved(coordinator: Coordinator, executor: Executor) -> Iterator[None]:
    """At the end, however it comes, where the time of devices went is written down; unless nothing
    may be, or can be, written any more."""
    try:
        yield
    except (StaleCoordinator, StoreUnavailable):
        raise
    except Exception:  # a second Ctrl-C is none: it is to end at once
        coordinator.save_devices(executor.devices())
        raise
    coordinator.save_devices(executor.devices())


@contextmanager
def _unsearched() -> Iterator[None]:
    """Meanwhile the garbage collector leaves alone what is there already, all of the packages and
    models: a fifth of a second each time, as often as there are some hundred new candidates."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Run:
    """A search under way. record: what it has done so far; standing: who leads."""

    def __init__(
        self,
        setting: Setting,
        coordinator: Coordinator,
        executor: Executor,
        watcher: Watcher,
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self.setting = setting
        self.coordinator = coordinator
        self.watcher = watcher
        self.record = Record(setting, coordinator)
        self.standing = Standing(setting, self.record)
        self._executor = executor
        self._asked_to_stop = asked_to_stop
        self._flow = Flow(self.record, executor, self._heard, self._is_to_pause)
        self._pace = Pace(setting, self.record, coordinator.search.active_seconds / 3600)
        self._open: dict[int, Generation] = {}  # by number
        self._proposed = 0  # generations
        self._moment = 0  # the last place in the log of asks and tells
        self._reason: str | None = None  # why no further generation is proposed

    def score_baselines(self) -> None:
        """Generation 0: every baseline on all of train, outside the budget. What fitness means is
        settled then, as it may refer to them."""
        record = self.record
        if 0 not in record.members:
            new = [
                NewCandidate(slot, name, None, recipe.to_dict(), self.setting.recipe_sha(recipe))
                for slot, (name, recipe) in enumerate(self.setting.baselines().items())
            ]
            record.open(0, "baselines", None, new)
        self._take_over_known()
        scored: dict[str, Scored] = {}
        failed: dict[str, Failed] = {}

        def landed(member: Member, found: Evaluation) -> None:
            if isinstance(found, Failed):
                failed[member.name] = found
                return
            scored[member.name] = found
            self.watcher.baseline(member.name, found)
            for text in troubles(found.tasks):
                self.watcher.note(f"{member.name}: {text}")

        self._evaluate(record.members[0], "full", self.setting.train, landed=landed)
        for member in record.members[0]:  # whoever landed first
            if member.name in failed:
                reason = failed[member.name].reason
                raise SearchFailed(f"baseline '{member.name}' cannot be scored: {reason}")
        for task in self.setting.tasks:
            if all(one.tasks[task].void for one in scored.values()):
                why = "; ".join(troubles({task: next(iter(scored.values())).tasks[task]}))
                raise SearchFailed(f"task '{task}' can tell nothing apart: {why}")
        record.objective, record.rates = self.setting.objective.against(scored), True
        outcomes = self.standing.measure_from(scored)
        if not record.is_told(0):
            rated = {m.id: record.objective.fitness(scored[m.name]) for m in record.members[0]}
            self.coordinator.rate(rated)
            self.coordinator.close_generation(0, outcomes, None)

    def _take_over_known(self) -> None:
        """Write down for baselines what other searches of this store found of the same recipes."""
        taken = []
        for member in self.record.members[0]:
            if self.record.evaluation(member.id, "full", 0) is None and member.recipe_sha:
                found = known(self.setting, self.coordinator, member.recipe_sha)
                if found is not None:
                    candidate, scored = found
                    self.record.add(member.id, "full", 0, scored, copied_from=candidate)
                    taken.append(member.name)
        if taken:
            text = f"scored on train by an earlier search already: {', '.join(taken)}"
            self.coordinator.log("known", text)
            self.watcher.note(text)

    def optimize(self) -> Optimizer:
        """Propose and score generations until a limit is reached; say which in the store."""
        optimizer = self._replayed()
        self._pace.begin()
        self._flow.run(lambda: self._propose(optimizer))
        reason = self._reason
        if self.coordinator.search.stop_reason != reason:
            self.coordinator.stop(reason)
        self.watcher.stopped(reason or "")
        return optimizer

    def _propose(self, optimizer: Optimizer) -> bool:
        """Commit a new generation and have it scored, if it is time for one."""
        if self._open and self.setting.job.mode == "synchronous":
            return False
        self._reason = self._reason or self._wish_to_stop() or self._stop_reason(optimizer)
        if self._reason is not None:
            return False
        self._proposed, self._moment = self._proposed + 1, self._moment + 1
        step_size, asked = optimizer.step_size, optimizer.ask()
        new = [self.record.proposal(slot, genotype) for slot, genotype in enumerate(asked)]
        number, ask = self._proposed, self._moment
        self.record.open(number, "proposed", step_size, new, self._proposer, ask)
        self._begin(self._generation(number, step_size, partial(self._close, optimizer)))
        return True

    def _generation(
        self, number: int, step_size: float | None, over: Callable[[Generation], None]
    ) -> Generation:
        members, setting = self.record.members[number], self.setting
        return Generation(number, members, step_size, setting, self.standing, self._flow, over)

    def _begin(self, generation: Generation) -> None:
        self._open[generation.number] = generation
        generation.begin()

    def _close(self, optimizer: Optimizer, generation: Generation) -> None:
        """Everything of a generation is known: write that down, and tell it."""
        del self._open[generation.number]
        self._moment += 1
        values, outcomes, review = self._concluded(generation)
        number, size = generation.number, len(generation.members)
        text = warning(self.standing.reviews)
        self.coordinator.close_generation(number, outcomes, review, self._moment, text)
        self.coordinator.save_devices(self._executor.devices())
        if text is not None:
            self.watcher.note(text)
        self.watcher.generation(self._status(generation, size, size))
        optimizer.tell(generation.genotypes, values)

    def _concluded(
        self, generation: Generation
    ) -> tuple[Values, dict[int, Outcome], dict[str, Any] | None]:
        """What the optimizer is told of a generation, how its candidates came out, and what may be
        said after it, as it is stored: None before there is an incumbent."""
        standing = self.standing
        outcomes, values = standing.outcomes(generation.members, generation.reached)
        complete = standing.take(generation.members)
        owner = standing.incumbent
        monitor = None if owner is None else self.record.evaluation(owner.id, "monitor")
        review = standing.review(complete, monitor if isinstance(monitor, Scored) else None)
        self.record.forget(generation.members)
        return values, outcomes, review

    def _replayed(self) -> Optimizer:
        """The optimizer brought to where the stored log of asks and tells ends; generations that
        were not told by then are scored on. What another optimizer proposed is told alone."""
        optimizer, stored = self.setting.optimizer(), self.record.earlier
        close = partial(self._close, optimizer)
        generations = {
            row.number: self._generation(
                row.number, row.step_size, close if row.tell is None else lambda _: None
            )
            for row in stored
        }
        log: dict[int, tuple[int, Asked | Told]] = {}  # by place: of which generation, and what
        for row in sorted(stored, key=lambda row: row.tell or math.inf):
            generation, number = generations[row.number], row.number
            # Of old stores it is not known who proposed.
            if row.ask is not None and row.optimizer in (None, self._proposer):
                log[row.ask] = number, Asked(generation.genotypes)
            if row.tell is not None:
                generation.begin()
                self._flow.run()
                values, _, _ = self._concluded(generation)
                log[row.tell] = number, Told(generation.genotypes, values)
        self._proposed = len(stored)
        self._moment = max([0, *(max(row.ask or 0, row.tell or 0) for row in stored)])
        entries = [log[place] for place in sorted(log)]
        differs = optimizer.replay([entry for _, entry in entries])
        if differs is not None:
            text = (
                f"generation {entries[differs][0]}: proposals differ from the stored ones, which "
                "stand"
            )
            self.coordinator.log("replay", text)
            self.watcher.note(text)
        for row in stored:
            if row.tell is None:
                self._begin(generations[row.number])
        return optimizer

    @property
    def _proposer(self) -> dict[str, Any]:
        return self.setting.job.optimizer.model_dump(mode="json", exclude_none=True)

    def _is_to_pause(self) -> bool:
        return self._asked_to_stop() or self._wished("pause") is not None

    def _wish_to_stop(self) -> str | None:
        wish = self._wished("stop")
        return None if wish is None else f"asked to stop by {wish.by}"

    def _wished(self, kind: str) -> Wish | None:
        wish = self.coordinator.wished()
        return wish if wish is not None and wish.kind == kind else None

    def _stop_reason(self, optimizer: Optimizer) -> str | None:
        job = self.setting.job
        return (
            stop_reason(job.stop, job.budget, self._pace.used, self.standing.reviews)
            or optimizer.stop_reason()
            or self._exhausted()
        )

    def _exhausted(self) -> str | None:
        """Whether the proposed generations end in a long row without any new recipe. Such
        generations cost no examples, so that a budget of these alone would never be spent."""
        if self._proposed - self.record.latest_new < _WITHOUT_NEWS:
            return None
        return f"the space is exhausted: no new recipe in the last {_WITHOUT_NEWS} generations"

    def evaluate(
        self,
        members: Sequence[Member],
        purpose: str,
        examples: Examples,
        split: Split = "train",
    ) -> dict[int, Evaluation]:
        """Evaluations by id; those in the store are not made again.

        Raises Interrupted once the search was asked to stop, and what was under way is recorded.
        """
        found: dict[int, Evaluation] = {}
        self._evaluate(members, purpose, examples, split, lambda m, e: found.update({m.id: e}))
        return found

    def _evaluate(
        self,
        members: Sequence[Member],
        purpose: str,
        examples: Examples,
        split: Split = "train",
        landed: Callable[[Member, Evaluation], None] = lambda member, found: None,
    ) -> None:
        for member in members:
            then = partial(landed, member)
            self._flow.want(Wanted(0, member, purpose, 0, split, examples, then))
        self._flow.run()

    def _heard(self) -> None:
        if self._open:
            oldest = self._open[min(self._open)]
            self.watcher.progress(self._status(oldest, *oldest.progress))

    def _status(self, generation: Generation, done: int, population: int) -> Status:
        reviews = self.standing.reviews
        return Status(
            generation.number,
            done,
            population,
            reviews[-1].shrunk if reviews else None,
            self.standing.mean,
            generation.step_size,
            reviews[-1].gap if reviews else None,
            self.standing.hypervolume,
            self._pace.used,
            self._pace.seconds_left(sum(one.missing for one in self._open.values())),
        )
