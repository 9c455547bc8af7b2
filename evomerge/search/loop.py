"""Generations, one after the other: ask, decode, open, evaluate, tell, review.

Whatever is in the store already is not done again, so the same code launches and resumes. Order
is what makes that exact: a generation is committed before work on it starts, and the optimizer is
told in slot order.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evomerge.errors import SearchFailed
from evomerge.executor import Executor, Request
from evomerge.fitness.results import Evaluation, Failed, Scored, troubles
from evomerge.fitness.task_file import Split
from evomerge.guard.review import Used, stop_reason, warning
from evomerge.optimizer import Asked, Optimizer, Told
from evomerge.search import Interrupted, Status, Watcher, race
from evomerge.search.known import known
from evomerge.search.record import Member, Record
from evomerge.search.setting import Setting
from evomerge.search.standing import Standing
from evomerge.store import Coordinator, NewCandidate

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
        run = Run(setting, coordinator, executor, watcher, asked_to_stop)
        run.score_baselines()
        optimizer = run.optimize()
        coordinator.finish("finished", decide(run, optimizer))
    except SearchFailed as error:
        coordinator.stop(str(error))
        coordinator.finish("failed", None)
        raise


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
        self._hours_before = coordinator.search.active_seconds / 3600
        self._started = time.monotonic()
        self._examples_before = self.record.examples_used
        self._device_seconds_before = self.record.device_seconds
        self._fresh = 0  # candidates that this process scored, stages counted apart

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
        for member in record.members[0]:
            found = self.evaluate([member], "full", self.setting.train)[member.id]
            if isinstance(found, Failed):
                raise SearchFailed(f"baseline '{member.label}' cannot be scored: {found.reason}")
            scored[member.name] = found
            self.watcher.baseline(member.name, found)
            for text in troubles(found.tasks):
                self.watcher.note(f"{member.name}: {text}")
        for task in self.setting.tasks:
            if all(found.tasks[task].void for found in scored.values()):
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
        optimizer, number = self._replayed()
        while (reason := self._stop_reason(optimizer, number - 1)) is None:
            step_size, asked = optimizer.step_size, optimizer.ask()
            new = [self.record.proposal(slot, genotype) for slot, genotype in enumerate(asked)]
            self.record.open(number, "proposed", step_size, new, self._proposer)
            optimizer.tell(*self._generation(number, step_size))
            number += 1
            if self._asked_to_stop():  # nobody asked where nothing was left to score
                raise Interrupted
        if self.coordinator.search.stop_reason != reason:
            self.coordinator.stop(reason)
        self.watcher.stopped(reason)
        return optimizer

    def _replayed(self) -> tuple[Optimizer, int]:
        """The optimizer brought to where the stored generations end, the last of them scored
        first if it was not; and the number of the next one. What another optimizer proposed
        earlier is told alone."""
        setting, record = self.setting, self.record
        optimizer = setting.optimizer()
        log: list[Asked | Told] = []
        owners: list[int] = []
        number = 1
        while record.kind(number) == "proposed":
            told = self._generation(number, record.step_size(number))
            if record.proposer(number) in (None, self._proposer):  # of old stores it is not known
                log.append(Asked(told[0]))
                owners.append(number)
            log.append(Told(*told))
            owners.append(number)
            number += 1
        differs = optimizer.replay(log)
        if differs is not None:
            text = (
                f"generation {owners[differs]}: proposals differ from the stored ones, which stand"
            )
            self.coordinator.log("replay", text)
            self.watcher.note(text)
        return optimizer, number

    @property
    def _proposer(self) -> dict[str, Any]:
        return self.setting.job.optimizer.model_dump(mode="json", exclude_none=True)

    def _stop_reason(self, optimizer: Optimizer, generations: int) -> str | None:
        job = self.setting.job
        return (
            stop_reason(job.stop, job.budget, self._used(), self.standing.reviews)
            or optimizer.stop_reason()
            or self._exhausted(generations)
        )

    def _exhausted(self, generations: int) -> str | None:
        """Whether that many proposed generations end in a long row without any new recipe. Such
        generations cost no examples, so that a budget of these alone would never be spent."""
        if generations - self.record.latest_new < _WITHOUT_NEWS:
            return None
        return f"the space is exhausted: no new recipe in the last {_WITHOUT_NEWS} generations"

    def _generation(self, number: int, step_size: float | None) -> tuple[race.Values, race.Values]:
        """Score an opened generation, or what is missing of it; gives its genotypes and what is
        told of them."""
        members = self.record.members[number]
        genotypes = np.stack([m.genotype for m in members if m.genotype is not None])
        outcomes, told = self.standing.outcomes(members, self._race(number, members, step_size))
        verdict = self._review(members)
        if not self.record.is_told(number):
            self.coordinator.close_generation(number, outcomes, verdict)
            if (text := warning(self.standing.reviews)) is not None:
                self.coordinator.log("gap", text)
                self.watcher.note(text)
            self.watcher.generation(self._status(number, len(members), len(members), step_size))
        return genotypes, told

    def _race(
        self, number: int, members: Sequence[Member], step_size: float | None
    ) -> dict[int, int]:
        """Score a generation stage by stage; gives the last stage that each id took part in."""
        setting, staging = self.setting, self.setting.staging
        racing = [m for m in members if m.feasible]
        stages = [setting.driving]
        if staging is not None:
            stages = race.draw(setting.driving, staging.stages, setting.job.seed, number)
        reached: dict[int, int] = {}
        for stage, examples in enumerate(stages):
            reached |= dict.fromkeys((m.id for m in racing), stage)

            def landed(done: int, of: int = len(racing)) -> None:
                self.watcher.progress(self._status(number, done, of, step_size))

            found = self.evaluate(racing, "train", examples, stage=stage, landed=landed)
            reasons = [e.reason for e in found.values() if isinstance(e, Failed)]
            if racing and len(reasons) == len(racing):
                raise SearchFailed(
                    f"every candidate of generation {number} failed, the first one by: {reasons[0]}"
                )
            racing = [m for m in racing if isinstance(found[m.id], Scored)]
            if staging is not None and stage < len(staging.keep):
                values = self.standing.values(racing, stage + 1)
                kept = sorted(race.order(values)[: staging.keep[stage]])
                racing = [racing[i] for i in kept]
        return reached

    def _review(self, members: Sequence[Member]) -> dict[str, Any] | None:
        """What may be said after a generation, as it is stored; None before there is an
        incumbent."""
        complete, monitor = self.standing.take(members), self.setting.monitor
        owner = self.standing.incumbent
        if owner is None:
            return None
        found: Evaluation | None = None
        if all(len(examples) for examples in monitor.values()):
            found = self.evaluate([owner], "monitor", monitor)[owner.id]
        return self.standing.review(complete, found if isinstance(found, Scored) else None)

    def evaluate(
        self,
        members: Sequence[Member],
        purpose: str,
        examples: race.Examples,
        stage: int = 0,
        split: Split = "train",
        landed: Callable[[int], None] = lambda done: None,
    ) -> dict[int, Evaluation]:
        """Evaluations by id, recorded as they land; those in the store are not made again, and
        those of candidates with the same recipe are made once.

        Raises Interrupted once the search was asked to stop, and what was under way is recorded.
        """
        record, found = self.record, {}
        requests: list[Request] = []
        waiting: dict[str, list[Member]] = {}  # those that another request answers, by recipe
        failed: dict[str, tuple[int, Evaluation]] = {}  # before a crash, and not copied yet
        shas = {member.id: member.recipe_sha or "" for member in members}
        for member in members:
            stored, sha = record.evaluation(member.id, purpose, stage), shas[member.id]
            twin = record.twin(member, split, examples) or failed.get(sha)
            if stored is not None:
                found[member.id] = stored
                if isinstance(stored, Failed):
                    failed.setdefault(sha, (member.id, stored))
            elif twin is not None:
                found[member.id] = self._copied(member, purpose, stage, *twin)
            elif sha in waiting:
                waiting[sha].append(member)
            else:
                waiting[sha] = []
                requests.append(Request(member.id, record.recipe(member), split, examples))
        stopping = False
        wanted = itertools.takewhile(lambda _: not stopping, requests)
        for request, evaluation in self._executor.evaluate(wanted):
            record.add(request.candidate, purpose, stage, evaluation)
            found[request.candidate] = evaluation
            for member in waiting[shas[request.candidate]]:
                found[member.id] = self._copied(
                    member, purpose, stage, request.candidate, evaluation
                )
            self._fresh += purpose == "train"
            landed(len(found))
            stopping = stopping or self._asked_to_stop()
        if stopping:
            raise Interrupted
        return found

    def _copied(
        self, member: Member, purpose: str, stage: int, owner: int, evaluation: Evaluation
    ) -> Evaluation:
        """What was found of a twin, written down for a member too; it took no time."""
        copy = replace(evaluation, seconds=0.0)
        if isinstance(copy, Scored):
            copy = replace(copy, merge_seconds=0.0)
        self.record.add(member.id, purpose, stage, copy, copied_from=owner)
        return copy

    def _used(self) -> Used:
        hours = self._hours_before + (time.monotonic() - self._started) / 3600
        record = self.record
        devices = record.device_seconds / 3600
        return Used(len(record.proposed), record.examples_used, hours, devices)

    def _status(self, number: int, done: int, population: int, step_size: float | None) -> Status:
        reviews, used = self.standing.reviews, self._used()
        return Status(
            number,
            done,
            population,
            reviews[-1].shrunk if reviews else None,
            self.standing.mean,
            step_size,
            reviews[-1].gap if reviews else None,
            self.standing.hypervolume,
            used,
            self._seconds_left(used, population - done),
        )

    def _seconds_left(self, used: Used, open_here: int) -> float | None:
        """From the pace of this process, for whichever limit of the budget comes first."""
        if not self._fresh:
            return None
        elapsed = time.monotonic() - self._started
        budget, left = self.setting.job.budget, []
        if budget.candidates is not None:
            missing = max(0, budget.candidates - used.candidates) + open_here
            left.append(missing * elapsed / self._fresh)
        if budget.example_evaluations is not None:
            pace = elapsed / max(1, used.example_evaluations - self._examples_before)
            left.append(max(0, budget.example_evaluations - used.example_evaluations) * pace)
        if budget.hours is not None:
            left.append(max(0.0, budget.hours - used.hours) * 3600)
        if budget.gpu_hours is not None:
            spent = max(1e-9, self.record.device_seconds - self._device_seconds_before)
            missing_seconds = max(0.0, budget.gpu_hours - used.gpu_hours) * 3600
            left.append(missing_seconds * elapsed / spent)
        return min(left)
