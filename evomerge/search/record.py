"""What a search has done so far, in memory and in the store at once.

A generation is committed before anybody hears of it. An evaluation is remembered, then handed to
the coordinator, which may write it a moment later; what follows from it is written after it. What
was written before a crash is read back at the start, so that nobody else has to ask where a result
came from.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.coordinates import Genotype
from evomerge.errors import SearchFailed
from evomerge.fitness.objective import Objective
from evomerge.fitness.results import Evaluation, Failed, Scored, Scores
from evomerge.recipe import Recipe
from evomerge.search.setting import Setting
from evomerge.store import (
    NOWHERE,
    CandidateRow,
    Coordinator,
    GenerationRow,
    NewCandidate,
    Placement,
    uncollected,
)

_COUNTED = ("train", "monitor")  # purposes that the budget of example evaluations pays for

TwinKey = tuple[str, str, str]  # what evaluations have in common that find the same


@dataclass(frozen=True)
class Member:
    """A candidate of a generation. genotype: None for baselines."""

    id: int
    slot: int
    label: str | None
    genotype: Genotype | None
    recipe_sha: str | None

    @property
    def feasible(self) -> bool:
        """Whether its genotype means a model."""
        return self.recipe_sha is not None

    @property
    def name(self) -> str:
        """For people."""
        return self.label or f"candidate {self.id}"


class Record:
    """Members by generation, their evaluations, and figures derived from them.

    objective: what fitness means; the search sets it anew once the baselines are scored, which it
    may refer to, and `rates` from then on. latest_new: the last generation in which a recipe was
    proposed for the first time, 0 before there is one.
    """

    def __init__(self, setting: Setting, coordinator: Coordinator) -> None:
        self._setting = setting
        self._coordinator = coordinator
        self._recipes: dict[str, Recipe] = {}  # by hash: of candidates that are not told yet
        self._evaluations: dict[tuple[int, str, int], Evaluation] = {}
        self._twins: dict[TwinKey, tuple[int, Scored]] = {}
        self._fitness: dict[int, float] = {}
        self._joined: dict[int, dict[int, Scored]] = {}  # by id and number of stages
        self.objective: Objective = setting.objective
        self.rates = False
        self.examples_used = 0
        self.device_seconds = 0.0
        self.members: dict[int, list[Member]] = {}
        self._by_id: dict[int, Member] = {}
        self.proposed: list[Member] = []
        self.latest_new = 0
        self._recipes_proposed: set[str] = set()
        store, search = coordinator.store, coordinator.search.id
        self._generations = {g.number: g for g in store.generations(search)}
        with uncollected():
            for row in store.candidates(search):
                self._add_member(row.generation, _member(row))
            for e in store.evaluations(search, ("train", "monitor", "full", "validation")):
                found = (
                    Failed(e.reason or "", e.seconds)
                    if e.scores is None
                    else Scored(e.scores, e.merge_seconds, e.seconds)
                )
                key = e.candidate, e.purpose, e.stage
                self._remember(key, found, e.gpus, e.copied_from is not None)

    @property
    def earlier(self) -> list[GenerationRow]:
        """Generations that optimizers had proposed, as they were in the store at the start."""
        return [row for row in self._generations.values() if row.kind == "proposed"]

    def is_told(self, number: int) -> bool:
        """Whether a generation was complete in the store at the start."""
        stored = self._generations.get(number)
        return stored is not None and stored.told

    def open(
        self,
        number: int,
        kind: str,
        step_size: float | None,
        new: Sequence[NewCandidate],
        optimizer: Mapping[str, Any] | None = None,
        ask: int | None = None,
    ) -> list[Member]:
        """Commit a generation."""
        ids = self._coordinator.open_generation(number, kind, step_size, new, optimizer, ask)
        for id, c in zip(ids, new, strict=True):
            self._add_member(number, Member(id, c.slot, c.label, c.genotype, c.recipe_sha))
        return self.members[number]

    def proposal(self, slot: int, genotype: Genotype, label: str | None = None) -> NewCandidate:
        """A genotype, decoded."""
        recipe = self._setting.space.decode(genotype)
        if isinstance(recipe, Recipe):
            sha = self._setting.recipe_sha(recipe)
            self._recipes[sha] = recipe
            return NewCandidate(slot, label, genotype, recipe.to_dict(), sha)
        return NewCandidate(slot, label, genotype, None, None, recipe.reason)

    def recipe(self, member: Member) -> Recipe:
        """As stored. Raises SearchFailed for an infeasible candidate."""
        if member.recipe_sha is None:
            raise SearchFailed(f"{member.name} is infeasible and has no recipe")
        found = self._recipes.get(member.recipe_sha)
        if found is None:
            found = Recipe.from_dict(self._coordinator.store.recipe(member.id) or {})
            self._recipes[member.recipe_sha] = found
        return found

    def forget(self, members: Sequence[Member]) -> None:
        """Hold no longer what can be had again: there may be many, and few are asked for."""
        for member in members:
            self._recipes.pop(member.recipe_sha or "", None)
            self._joined.pop(member.id, None)

    def evaluation(self, id: int, purpose: str, stage: int = 0) -> Evaluation | None:
        """What was found, or None."""
        return self._evaluations.get((id, purpose, stage))

    def twin(self, key: TwinKey) -> tuple[int, Scored] | None:
        """A candidate with the same recipe that was scored on the same examples, and what was
        found: to score it again would give the same."""
        return self._twins.get(key)

    def add(
        self,
        id: int,
        purpose: str,
        stage: int,
        evaluation: Evaluation,
        copied_from: int | None = None,
        placement: Placement = NOWHERE,
    ) -> None:
        """Write an evaluation down; of a twin, whose it is."""
        self._remember((id, purpose, stage), evaluation, placement.gpus, copied_from is not None)
        fitness = self._new_fitness(id, purpose, evaluation)
        self._coordinator.record(id, purpose, stage, evaluation, fitness, copied_from, placement)

    def on_train(self, id: int, stages: int | None = None) -> Scored | None:
        """The driving examples a candidate was scored on, the first `stages` or all stages joined;
        None if one failed or there are none."""
        parts: list[Scored] = []
        while len(parts) != stages and (evaluation := self.evaluation(id, "train", len(parts))):
            if isinstance(evaluation, Failed):
                return None
            parts.append(evaluation)
        if len(parts) < 2:
            return parts[0] if parts else None
        joined = self._joined.setdefault(id, {})
        if len(parts) not in joined:
            tasks = {t: Scores.joined([part.tasks[t] for part in parts]) for t in parts[0].tasks}
            merging, seconds = sum(p.merge_seconds for p in parts), sum(p.seconds for p in parts)
            joined[len(parts)] = Scored(tasks, merging, seconds)
        return joined[len(parts)]

    def scored(self, id: int, stages: int | None = None) -> Scored:
        """`on_train` of a candidate that has it. Raises SearchFailed."""
        found = self.on_train(id, stages)
        if found is None:
            raise SearchFailed(f"candidate {id} has no train scores: the store is incomplete")
        return found

    def fitness(self, id: int) -> float:
        """On the driving examples that a candidate was scored on. Raises SearchFailed."""
        if id not in self._fitness:
            self._fitness[id] = self.objective.fitness(self.scored(id))
        return self._fitness[id]

    def rank(self, id: int) -> tuple[float, float]:
        """What puts candidates in order: whoever breaks the constraints less, then the fitter."""
        return -self.objective.violation(self.scored(id)), self.fitness(id)

    def _new_fitness(self, id: int, purpose: str, evaluation: Evaluation) -> float | None:
        """What an evaluation makes of its candidate's fitness: that on the driving examples, or,
        for those who are never scored on these alone, on all of train."""
        if isinstance(evaluation, Failed) or not self.rates:
            return None
        if purpose == "train":
            return self.fitness(id)
        if purpose == "full" and self.evaluation(id, "train") is None:
            return self.objective.fitness(evaluation)
        return None

    def _remember(
        self, key: tuple[int, str, int], evaluation: Evaluation, gpus: float, copied: bool
    ) -> None:
        if isinstance(evaluation, Scored):
            evaluation = replace(evaluation, replies={})  # they are in the store
        self._evaluations[key] = evaluation
        id, purpose, _ = key
        if purpose == "train":
            self._fitness.pop(id, None)
        if copied:
            return
        self.device_seconds += evaluation.seconds * gpus
        if isinstance(evaluation, Failed):
            return
        if purpose in _COUNTED:
            self.examples_used += sum(len(scores) for scores in evaluation.tasks.values())
        sha = self._by_id[id].recipe_sha
        if sha is not None:
            split = "validation" if purpose == "validation" else "train"
            examples = {task: scores.examples for task, scores in evaluation.tasks.items()}
            self._twins.setdefault(twin_key(sha, split, examples), (id, evaluation))

    def _add_member(self, number: int, member: Member) -> None:
        self.members.setdefault(number, []).append(member)
        self._by_id[member.id] = member
        if member.label is not None:
            return
        self.proposed.append(member)
        if member.recipe_sha is not None and member.recipe_sha not in self._recipes_proposed:
            self._recipes_proposed.add(member.recipe_sha)
            self.latest_new = number


def twin_key(recipe_sha: str, split: str, examples: Mapping[str, NDArray[np.uint32]]) -> TwinKey:
    """What evaluations of this recipe on these examples have in common."""
    digest = hashlib.sha256()
    for task, positions in examples.items():
        digest.update(f"{task}/{len(positions)}/".encode() + positions.tobytes())
    return recipe_sha, split, digest.hexdigest()


def _member(row: CandidateRow) -> Member:
    return Member(row.id, row.slot, row.label, row.genotype, row.recipe_sha)
