"""Generations, one after the other: ask, decode, open, evaluate, tell, review.

Whatever is in the store already is not done again, so the same code launches and resumes. Order
is what makes that exact: a generation is committed before work on it starts, and the optimizer is
told in slot order.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np

from evomerge.errors import SearchFailed
from evomerge.executor import Executor, Request
from evomerge.fitness.results import Evaluation, Failed, Scored
from evomerge.fitness.task import Split
from evomerge.guard.review import Review, Used, budget_spent, review
from evomerge.optimizer import Optimizer
from evomerge.optimizer import build as build_optimizer
from evomerge.search import Interrupted, Status, Watcher
from evomerge.search.record import Member, Record
from evomerge.search.setting import Examples, Setting
from evomerge.seeds import generator
from evomerge.store import Coordinator, NewCandidate


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
    """A search under way. record: what it has done so far."""

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
        self._executor = executor
        self._asked_to_stop = asked_to_stop
        self._hours_before = coordinator.search.active_seconds / 3600
        self._started = time.monotonic()
        self._examples_before = self.record.examples_used
        self._fresh = 0  # candidates that this process scored, stages counted apart
        self._incumbent: Member | None = None
        self._mean: float | None = None  # plain score of the last complete generation
        self._gap: float | None = None

    def score_baselines(self) -> None:
        """Generation 0: every baseline on all of train, outside the budget."""
        if 0 not in self.record.members:
            new = [
                NewCandidate(slot, name, None, recipe.to_dict(), self.setting.recipe_sha(recipe))
                for slot, (name, recipe) in enumerate(self.setting.baselines().items())
            ]
            self.record.open(0, "baselines", None, new)
        for member in self.record.members[0]:
            found = self.evaluate([member], "full", self.setting.train)[member.id]
            if isinstance(found, Failed):
                raise SearchFailed(f"baseline '{member.label}' cannot be scored: {found.reason}")
            self.watcher.baseline(member.name, found)
        if not self.record.is_told(0):
            self.coordinator.close_generation(0, {}, None)

    def optimize(self) -> Optimizer:
        """Propose and score generations until a limit is reached; say which in the store."""
        setting, space = self.setting, self.setting.space
        optimizer = build_optimizer(
            setting.job.optimizer, space.start, space.sigma, setting.job.seed
        )
        number = 1
        while True:
            stored = self.record.kind(number) == "proposed"
            reason = None if stored else self._stop_reason(optimizer)
            if reason is not None:
                break
            self._generation(number, optimizer, stored)
            number += 1
        if self.coordinator.search.stop_reason != reason:
            self.coordinator.stop(reason)
        self.watcher.stopped(reason)
        return optimizer

    def _stop_reason(self, optimizer: Optimizer) -> str | None:
        return budget_spent(self.setting.job.budget, self._used()) or optimizer.stop_reason()

    def _generation(self, number: int, optimizer: Optimizer, stored: bool) -> None:
        record, step_size = self.record, optimizer.step_size
        asked = optimizer.ask()
        if not stored:
            new = [record.proposal(slot, genotype) for slot, genotype in enumerate(asked)]
            record.open(number, "proposed", step_size, new)
        members = record.members[number]
        genotypes = np.stack([m.genotype for m in members if m.genotype is not None])
        if not np.array_equal(asked, genotypes):
            text = f"generation {number}: proposals differ from the stored ones, which stand"
            self.coordinator.log("replay", text)
            self.watcher.note(text)
        told = self._told(members, self._race(number, members, step_size))
        optimizer.tell(genotypes, np.array([told[m.id] for m in members]))
        verdict = self._review(members)
        if not record.is_told(number):
            document = None if verdict is None else asdict(verdict)
            self.coordinator.close_generation(number, told, document)
        self.watcher.generation(self._status(number, len(members), len(members), step_size))

    def _race(self, number: int, members: Sequence[Member], step_size: float) -> list[list[int]]:
        """Score a generation stage by stage; gives the ids that took part in each stage."""
        racing = [m for m in members if m.feasible]
        keep = self.setting.job.staging.keep if self.setting.job.staging else ()
        started = []
        for stage, examples in enumerate(self._stages(number)):
            started.append([m.id for m in racing])

            def landed(done: int, of: int = len(racing)) -> None:
                self.watcher.progress(self._status(number, done, of, step_size))

            found = self.evaluate(racing, "train", examples, stage=stage, landed=landed)
            reasons = [e.reason for e in found.values() if isinstance(e, Failed)]
            if racing and len(reasons) == len(racing):
                raise SearchFailed(
                    f"every candidate of generation {number} failed, the first one by: {reasons[0]}"
                )
            racing = [m for m in racing if isinstance(found[m.id], Scored)]
            if stage < len(keep):
                ranked = self._ranked(racing, stage + 1)
                kept = {m.id for m in ranked[: keep[stage]]}
                racing = [m for m in racing if m.id in kept]
        return started

    def _ranked(self, racing: Sequence[Member], stages: int) -> list[Member]:
        return sorted(racing, key=lambda m: -self.record.fitness_in_race(m.id, stages))

    def _stages(self, number: int) -> list[Examples]:
        """The examples of each stage of a generation: the whole driving set, or a random subset
        of it that is shared by the generation and drawn anew for the next one."""
        setting = self.setting
        if setting.job.staging is None:
            return [setting.driving]
        stages: list[Examples] = [{} for _ in setting.job.staging.stages]
        for index, (task, driving) in enumerate(setting.driving.items()):
            order = generator(setting.job.seed, f"subset {index}", number).permutation(driving)
            start = 0
            for stage, end in enumerate(setting.job.staging.stages):
                stages[stage][task] = order[start:end]
                start = end
        return stages

    def _told(self, members: Sequence[Member], stages: Sequence[Sequence[int]]) -> dict[int, float]:
        """What the optimizer is told, by id: the fitness, or ranks when scores come from different
        numbers of examples. Failed and infeasible candidates rank worst."""
        reached = {id: stage for stage, ids in enumerate(stages) for id in ids}
        scored = [id for id in reached if self.record.on_train(id) is not None]
        told = {id: self.record.fitness(id) for id in scored}
        if len(stages) > 1:
            ranked = sorted(scored, key=lambda id: (reached[id], told[id]))
            told = {id: float(rank) for rank, id in enumerate(ranked)}
        worst = min(told.values(), default=0.0) - 1.0
        return {m.id: told.get(m.id, worst) for m in members}

    def _review(self, members: Sequence[Member]) -> Review | None:
        """Find the incumbent among those that were scored to the end, and its gap."""
        record, weights = self.record, self.setting.weights
        last = len(self.setting.job.staging.stages) - 1 if self.setting.job.staging else 0
        scored = [m for m in members if isinstance(record.evaluation(m.id, "train", last), Scored)]
        plain = [record.scored(m.id).score(weights) for m in scored]
        self._mean = float(np.mean(plain)) if plain else None
        for m in scored:
            best = self._incumbent
            if best is None or record.fitness(m.id) > record.fitness(best.id):
                self._incumbent = m
        if self._incumbent is None or not all(len(e) for e in self.setting.monitor.values()):
            return None
        owner = self._incumbent
        found = self.evaluate([owner], "monitor", self.setting.monitor)[owner.id]
        if isinstance(found, Failed):
            return None
        verdict = review(owner.id, record.scored(owner.id), found, weights)
        self._gap = verdict.gap
        return verdict

    def evaluate(
        self,
        members: Sequence[Member],
        purpose: str,
        examples: Examples,
        stage: int = 0,
        split: Split = "train",
        landed: Callable[[int], None] = lambda done: None,
    ) -> dict[int, Evaluation]:
        """Evaluations by id, recorded as they land; those in the store are not made again.

        Raises Interrupted after recording, once the search was asked to stop.
        """
        record, found = self.record, {}
        requests = []
        for member in members:
            stored = record.evaluation(member.id, purpose, stage)
            if stored is not None:
                found[member.id] = stored
            else:
                requests.append(Request(member.id, record.recipe(member), split, examples))
        for request, evaluation in self._executor.evaluate(requests):
            record.add(request.candidate, purpose, stage, evaluation)
            found[request.candidate] = evaluation
            self._fresh += purpose == "train"
            landed(len(found))
            if self._asked_to_stop():
                raise Interrupted
        return found

    def _used(self) -> Used:
        hours = self._hours_before + (time.monotonic() - self._started) / 3600
        return Used(len(self.record.proposed), self.record.examples_used, hours)

    def _status(self, number: int, done: int, population: int, step_size: float) -> Status:
        best = self._incumbent
        score = None if best is None else self.record.scored(best.id).score(self.setting.weights)
        used = self._used()
        return Status(
            number,
            done,
            population,
            score,
            None if best is None else self.record.fitness(best.id),
            self._mean,
            step_size,
            self._gap,
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
        return min(left)
