"""Generations, one after the other: ask, decode, open, evaluate, tell, review.

Whatever is in the store already is not done again, so the same code launches and resumes. Order
is what makes that exact: a generation is committed before work on it starts, and the optimizer is
told in slot order.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from evomerge.errors import SearchFailed
from evomerge.executor import Executor, Request
from evomerge.fitness.results import Evaluation, Failed, Scored, Scores
from evomerge.fitness.task import Split
from evomerge.guard.review import Review, Used, budget_spent, review
from evomerge.optimizer import Genotypes, Optimizer
from evomerge.optimizer import build as build_optimizer
from evomerge.recipe import Recipe
from evomerge.search import Interrupted, Status, Watcher
from evomerge.search.setting import Examples, Setting
from evomerge.seeds import generator
from evomerge.store import CandidateRow, Coordinator, GenerationRow, NewCandidate


def conduct(
    setting: Setting,
    coordinator: Coordinator,
    watcher: Watcher,
    asked_to_stop: Callable[[], bool],
) -> None:
    """Run a search to its end, from wherever it is. See `launch`."""
    from evomerge.search.finals import decide

    watcher.opened(setting)
    executor = setting.executor()
    try:
        run = Run(setting, coordinator, executor, watcher, asked_to_stop)
        run.score_baselines()
        optimizer = run.optimize()
        coordinator.finish("finished", decide(run, optimizer))
    except SearchFailed as error:
        coordinator.stop(str(error))
        coordinator.finish("failed", None)
        raise
    finally:
        executor.close()


@dataclass(frozen=True)
class Member:
    """A candidate as the loop sees it. recipe: None if infeasible."""

    id: int
    slot: int
    label: str | None
    genotype: Genotypes | None
    recipe: Recipe | None
    recipe_sha: str | None


class Run:
    """A search under way: what is stored, and the means to add to it."""

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
        self._executor = executor
        self._asked_to_stop = asked_to_stop
        store, search = coordinator.store, coordinator.search.id
        self.members: dict[int, list[Member]] = {}
        for row in store.candidates(search):
            self.members.setdefault(row.generation, []).append(self._member(row))
        self._stored_generations = {g.number: g for g in store.generations(search)}
        self._evaluations: dict[tuple[int, str, int], Evaluation] = {}
        for e in store.evaluations(search, ("train", "monitor", "full", "validation")):
            self._evaluations[e.candidate, e.purpose, e.stage] = (
                Failed(e.reason or "", e.seconds)
                if e.scores is None
                else Scored(e.scores, e.merge_seconds, e.seconds)
            )
        self._hours_before = coordinator.search.active_seconds / 3600
        self._started = time.monotonic()
        self._fresh = 0  # candidates scored by this process
        self.incumbent: int | None = None
        self.generation_mean: float | None = None
        self._gap: float | None = None

    def score_baselines(self) -> None:
        """Generation 0: every baseline on all of train, outside the budget."""
        if 0 not in self.members:
            new = [
                NewCandidate(slot, name, None, recipe.to_dict(), self.setting.recipe_sha(recipe))
                for slot, (name, recipe) in enumerate(self.setting.baselines().items())
            ]
            self.open(0, "baselines", None, new)
        for member in self.members[0]:
            found = self.evaluate([member], "full", self.setting.train)[member.id]
            if isinstance(found, Failed):
                raise SearchFailed(f"baseline '{member.label}' cannot be scored: {found.reason}")
            self.watcher.baseline(str(member.label), found)
        if not self._is_told(0):
            self.coordinator.close_generation(0, {}, None)

    def optimize(self) -> Optimizer:
        """Propose and score generations until a limit is reached; say which in the store."""
        setting, space = self.setting, self.setting.space
        optimizer = build_optimizer(
            setting.job.optimizer, space.start, space.sigma, setting.job.seed
        )
        number = 1
        while True:
            stored = self._stored_generations.get(number)
            if stored is None or stored.kind != "proposed":
                reason = self._stop_reason(optimizer)
                if reason is not None:
                    break
            self._generation(number, optimizer, stored)
            number += 1
        if self.coordinator.search.stop_reason != reason:
            self.coordinator.stop(reason)
        self.watcher.stopped(reason)
        return optimizer

    def _stop_reason(self, optimizer: Optimizer) -> str | None:
        return budget_spent(self.setting.job.budget, self.used()) or optimizer.stop_reason()

    def _generation(self, number: int, optimizer: Optimizer, stored: GenerationRow | None) -> None:
        step_size = optimizer.step_size
        asked = optimizer.ask()
        if stored is None:
            self.open(
                number,
                "proposed",
                step_size,
                [self.proposal(slot, genotype) for slot, genotype in enumerate(asked)],
            )
        members = self.members[number]
        genotypes = np.stack([m.genotype for m in members if m.genotype is not None])
        if not np.array_equal(asked, genotypes):
            self.coordinator.log(
                "replay", f"generation {number}: proposals differ from the stored ones, which stand"
            )
        told = self._told(self._race(number, members, step_size), members)
        optimizer.tell(genotypes, np.array([told[m.id] for m in members]))
        verdict = self._reviewed(members)
        if not self._is_told(number):
            document = None if verdict is None else asdict(verdict)
            self.coordinator.close_generation(number, told, document)
        self.watcher.generation(self._status(number, len(members), len(members), step_size))

    def proposal(self, slot: int, genotype: Genotypes, label: str | None = None) -> NewCandidate:
        """A genotype, decoded."""
        recipe = self.setting.space.decode(genotype)
        if isinstance(recipe, Recipe):
            sha = self.setting.recipe_sha(recipe)
            return NewCandidate(slot, label, genotype, recipe.to_dict(), sha)
        return NewCandidate(slot, label, genotype, None, None, recipe.reason)

    def open(
        self, number: int, kind: str, step_size: float | None, new: Sequence[NewCandidate]
    ) -> None:
        """Commit a generation."""
        ids = self.coordinator.open_generation(number, kind, step_size, new)
        self.members[number] = [
            Member(
                id,
                c.slot,
                c.label,
                c.genotype,
                None if c.recipe is None else Recipe.from_dict(c.recipe),
                c.recipe_sha,
            )
            for id, c in zip(ids, new, strict=True)
        ]

    def _race(self, number: int, members: Sequence[Member], step_size: float) -> list[list[int]]:
        """Score a generation stage by stage; gives the ids that took part in each stage."""
        racing = [m for m in members if m.recipe is not None]
        stages = self._stages(number)
        keep = self.setting.job.staging.keep if self.setting.job.staging else ()
        started = []
        for stage, examples in enumerate(stages):
            started.append([m.id for m in racing])

            def landed(done: int, of: int = len(racing)) -> None:
                self.watcher.progress(self._status(number, done, of, step_size))

            found = self.evaluate(racing, "train", examples, stage=stage, landed=landed)
            if all(isinstance(e, Failed) for e in found.values()) and found:
                reasons = [e.reason for e in found.values() if isinstance(e, Failed)]
                raise SearchFailed(
                    f"every candidate of generation {number} failed, the first one by: {reasons[0]}"
                )
            if stage < len(keep):
                alive = [m for m in racing if isinstance(found[m.id], Scored)]
                ranked = sorted(alive, key=lambda m: -self.fitness(m.id))
                kept = {m.id for m in ranked[: keep[stage]]}
                racing = [m for m in racing if m.id in kept]
        return started

    def _stages(self, number: int) -> list[Examples]:
        """The examples of each stage of a generation: the whole driving set, or a random subset
        of it that is shared by the generation and drawn anew for the next one."""
        setting = self.setting
        if setting.job.staging is None:
            return [setting.driving]
        stages: list[Examples] = [{} for _ in setting.job.staging.stages]
        for index, (task, driving) in enumerate(setting.driving.items()):
            random = generator(setting.job.seed, f"subset {index}", number)
            order = random.permutation(driving)
            start = 0
            for stage, end in enumerate(setting.job.staging.stages):
                stages[stage][task] = order[start:end]
                start = end
        return stages

    def _told(self, stages: Sequence[Sequence[int]], members: Sequence[Member]) -> dict[int, float]:
        """What the optimizer is told, by id: the fitness, or ranks when scores come from different
        numbers of examples. Failed and infeasible candidates rank worst."""
        reached = {id: stage for stage, ids in enumerate(stages) for id in ids}
        fitness = {id: self.fitness(id) for id in reached if self.scored_on_train(id) is not None}
        if len(stages) > 1:
            ranked = sorted(fitness, key=lambda id: (reached[id], fitness[id]))
            fitness = {id: float(rank) for rank, id in enumerate(ranked)}
        worst = min(fitness.values(), default=0.0) - 1.0
        return {m.id: fitness.get(m.id, worst) for m in members}

    def _reviewed(self, members: Sequence[Member]) -> Review | None:
        """Find the incumbent, and its gap to the monitor slice."""
        last = len(self.setting.job.staging.stages) - 1 if self.setting.job.staging else 0
        complete = [m for m in members if (m.id, "train", last) in self._evaluations]
        scored = [m for m in complete if self.scored_on_train(m.id) is not None]
        plain = [self._train(m.id).score(self.setting.weights) for m in scored]
        self.generation_mean = float(np.mean(plain)) if plain else None
        for m in scored:
            if self.incumbent is None or self.fitness(m.id) > self.fitness(self.incumbent):
                self.incumbent = m.id
        if self.incumbent is None or not all(len(e) for e in self.setting.monitor.values()):
            return None
        owner = self._find(self.incumbent)
        found = self.evaluate([owner], "monitor", self.setting.monitor)[owner.id]
        if isinstance(found, Failed):
            return None
        verdict = review(owner.id, self._train(owner.id), found, self.setting.weights)
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
        todo = [m for m in members if (m.id, purpose, stage) not in self._evaluations]
        requests = [Request(m.id, m.recipe, split, examples) for m in todo if m.recipe is not None]
        done = len(members) - len(todo)
        for request, evaluation in self._executor.evaluate(requests):
            key = (request.candidate, purpose, stage)
            self._evaluations[key] = evaluation
            self.coordinator.record(*key, evaluation, self._new_fitness(key, evaluation))
            done += 1
            self._fresh += purpose == "train"
            landed(done)
            if self._asked_to_stop():
                raise Interrupted
        return {m.id: self._evaluations[m.id, purpose, stage] for m in members}

    def _new_fitness(self, key: tuple[int, str, int], evaluation: Evaluation) -> float | None:
        """What an evaluation makes of its candidate's fitness: that on the driving examples, or,
        for those who are never scored on these alone, on all of train."""
        id, purpose, _ = key
        if isinstance(evaluation, Failed) or purpose not in ("train", "full"):
            return None
        if purpose == "train":
            return self.fitness(id)
        if (id, "train", 0) in self._evaluations:
            return None
        return evaluation.fitness(self.setting.weights, self.setting.job.shaping)

    def scored_on_train(self, id: int) -> Scored | None:
        """A candidate's driving examples, all stages joined; None if one of them failed."""
        parts: list[Scored] = []
        while (evaluation := self._evaluations.get((id, "train", len(parts)))) is not None:
            if isinstance(evaluation, Failed):
                return None
            parts.append(evaluation)
        if len(parts) < 2:
            return parts[0] if parts else None
        tasks = {t: Scores.joined([part.tasks[t] for part in parts]) for t in parts[0].tasks}
        return Scored(tasks, sum(p.merge_seconds for p in parts), sum(p.seconds for p in parts))

    def _train(self, id: int) -> Scored:
        found = self.scored_on_train(id)
        if found is None:
            raise SearchFailed(f"candidate {id} has no train scores: the store is incomplete")
        return found

    def fitness(self, id: int) -> float:
        """On the driving examples it was scored on."""
        return self._train(id).fitness(self.setting.weights, self.setting.job.shaping)

    def proposed(self) -> list[Member]:
        """Every candidate that the optimizer proposed, in order."""
        return [
            m for number in sorted(self.members) for m in self.members[number] if m.label is None
        ]

    def _find(self, id: int) -> Member:
        return next(m for m in self.proposed() if m.id == id)

    def _is_told(self, number: int) -> bool:
        stored = self._stored_generations.get(number)
        return stored is not None and stored.told

    def _member(self, row: CandidateRow) -> Member:
        recipe = self.coordinator.store.recipe(row.id)
        return Member(
            row.id,
            row.slot,
            row.label,
            row.genotype,
            None if recipe is None else Recipe.from_dict(recipe),
            row.recipe_sha,
        )

    def used(self) -> Used:
        """What of the budget is spent."""
        examples = sum(
            sum(len(scores) for scores in evaluation.tasks.values())
            for (_, purpose, _), evaluation in self._evaluations.items()
            if purpose in ("train", "monitor") and isinstance(evaluation, Scored)
        )
        hours = self._hours_before + (time.monotonic() - self._started) / 3600
        return Used(len(self.proposed()), examples, hours)

    def _status(self, number: int, done: int, population: int, step_size: float) -> Status:
        best = None if self.incumbent is None else self._train(self.incumbent)
        weights = self.setting.weights
        return Status(
            number,
            done,
            population,
            None if best is None else best.score(weights),
            None if best is None else best.fitness(weights, self.setting.job.shaping),
            self.generation_mean,
            step_size,
            self._gap,
            self.used(),
            self._seconds_left(population - done),
        )

    def _seconds_left(self, remaining_here: int) -> float | None:
        """From the pace of this process, for whichever limit of the budget comes first."""
        elapsed = time.monotonic() - self._started
        if not self._fresh:
            return None
        used, budget = self.used(), self.setting.job.budget
        pace = elapsed / self._fresh
        left = []
        if budget.candidates is not None:
            left.append(
                max(remaining_here, budget.candidates - used.candidates + remaining_here) * pace
            )
        if budget.example_evaluations is not None:
            per_example = elapsed / max(1, used.example_evaluations)
            left.append(max(0, budget.example_evaluations - used.example_evaluations) * per_example)
        if budget.hours is not None:
            left.append(max(0.0, budget.hours - used.hours) * 3600)
        return min(left)
