"""What a job maximises: one number, or several, and what a candidate must keep.

Knows what the tasks' scores add up to; nothing of recipes, optimizers or stores.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import JobError, nearest
from evomerge.fitness.results import Scored, Scores, weighted_mean
from evomerge.job import Constraint, Job

# Shares of a best parent's score under 10% would outweigh every other task.
LEAST_REFERENCE = 0.1

_ROUNDING = 1e-6  # scores are float32, a drop is decimal: what they lose breaks no constraint

# What is told of candidates that break a constraint, and of those without a result: below every
# value that scores, lengths and sizes can have, and the same in each generation, as some optimizers
# compare candidates of several.
_BROKEN = -1e18
_WITHOUT_RESULT = -3e18

_LENGTHS = ("length", "latency")
_SIZES = ("layers", "parameters", "latency")


@dataclass(frozen=True)
class Size:
    """Of a merged model: its layers, and the values in its tensors."""

    layers: int
    parameters: int


@dataclass(frozen=True)
class Objective:
    """What is climbed, what is reported, and what must be kept; higher is better everywhere.

    names: of several objectives; empty for one. weights: the tasks' shares, by name. generating:
    the tasks that are answered by generating, which alone have a length. models: the parents, and
    'base' if there is one; references: their results on all of train, by model and task, empty
    until `against`.
    """

    kind: Literal["mean", "worst", "relative", "pareto"]
    names: tuple[str, ...]
    constraints: tuple[Constraint, ...]
    weights: Mapping[str, float]
    shaping: float
    generating: frozenset[str]
    models: frozenset[str]
    references: Mapping[str, Mapping[str, Scores]] = field(default_factory=dict)

    @classmethod
    def from_job(
        cls, job: Job, weights: Mapping[str, float], generating: Collection[str]
    ) -> "Objective":
        """What a job asks for, over tasks with these weights.

        Raises JobError for what these tasks cannot give.
        """
        _check_objectives(job, weights, generating)
        _check_constraints(job, weights)
        return cls(
            job.objective,
            job.objectives,
            job.constraints,
            dict(weights),
            job.shaping,
            frozenset(generating),
            frozenset({*job.parents, *(["base"] if job.base is not None else [])}),
        )

    def against(self, baselines: Mapping[str, Scored]) -> "Objective":
        """The same with what `relative` and constraints compare with: of the baselines' results on
        all of train, by name, those of the parents and the base."""
        return replace(self, references={name: baselines[name].tasks for name in self.models})

    @property
    def needs_size(self) -> bool:
        """Whether `values` asks for the size of the model."""
        return any(name in _SIZES for name in self.names)

    def fitness(self, scored: Scored) -> float:
        """The scalar that is maximised, shaping included.

        mean and pareto: the weighted mean of the tasks; worst: the least of those with a weight;
        relative: the weighted mean of each as a share of the best source model's score on it on
        all of train, which counts as 10% if it is below that.
        """
        return self._aggregate({t: s.fitness(self.shaping) for t, s in scored.tasks.items()})

    def score(self, scored: Scored) -> float:
        """The same without shaping: what is reported."""
        return self._aggregate({task: s.mean for task, s in scored.tasks.items()})

    def shares(self, scored: Scored) -> dict[str, float]:
        """Weights of the tasks under which the mean score, in [0, 1], is what this objective sees
        of a candidate: of worst, its worst task alone; of relative, the weights over what the
        scores are shares of."""
        if self.kind == "relative":
            best = self._best_references()
            return {task: weight / best[task] for task, weight in self.weights.items()}
        if self.kind == "worst":
            worst = min(self._counted, key=lambda task: scored.tasks[task].mean)
            return {task: float(task == worst) for task in self.weights}
        return dict(self.weights)

    def values(
        self, scored: Scored, size: Size | None = None, shaped: bool = True
    ) -> tuple[float, ...]:
        """Of each objective, in the job's order; with one alone its fitness.

        Lengths, sizes and latency are negated. shaped: scores are as in `fitness`, for an
        optimizer; else plain, for a front that is shown. size: see `needs_size`.
        """
        if not self.names:
            return (self.fitness(scored) if shaped else self.score(scored),)
        return tuple(self._value(name, scored, size, shaped) for name in self.names)

    def violation(self, scored: Scored) -> float:
        """By how much a candidate breaks the constraints, summed; 0 where all hold.

        scored: on examples of train. The models that it is held against count on the same ones.
        """
        total = 0.0
        for constraint in self.constraints:
            ours = scored.tasks[constraint.task]
            theirs = self._reference(constraint.of)[constraint.task].only(ours.examples)
            missing = theirs.mean - constraint.drop - ours.mean
            total += missing if missing > _ROUNDING else 0.0
        return total

    @property
    def _counted(self) -> list[str]:
        """The tasks with a weight."""
        return [task for task, weight in self.weights.items() if weight > 0]

    def _aggregate(self, values: Mapping[str, float]) -> float:
        if self.kind == "worst":
            return min(values[task] for task in self._counted)
        if self.kind == "relative":
            best = self._best_references()
            return weighted_mean({t: value / best[t] for t, value in values.items()}, self.weights)
        return weighted_mean(values, self.weights)

    def _best_references(self) -> dict[str, float]:
        """The best source model's score on each task."""
        if not self.references:
            raise ValueError("the source models' scores are not known yet: see Objective.against")
        return {
            task: max(LEAST_REFERENCE, *(found[task].mean for found in self.references.values()))
            for task in self.weights
        }

    def _reference(self, model: str) -> Mapping[str, Scores]:
        if model not in self.references:
            raise ValueError(f"the scores of '{model}' are not known yet: see Objective.against")
        return self.references[model]

    def _value(self, name: str, scored: Scored, size: Size | None, shaped: bool) -> float:
        if name == "score":
            return self.fitness(scored) if shaped else self.score(scored)
        if name.startswith("task:"):
            scores = scored.tasks[name.removeprefix("task:")]
            return scores.fitness(self.shaping) if shaped else scores.mean
        if name == "length":
            return -self._length(scored)
        if size is None:
            raise ValueError(f"objective '{name}' needs the size of the model")
        if name == "layers":
            return -float(size.layers)
        if name == "parameters":
            return -float(size.parameters)
        return -self._length(scored) * size.parameters

    def _length(self, scored: Scored) -> float:
        """The mean over the tasks that generate, each counting alike, of a reply's tokens."""
        # In the tasks' order: that of a set is another in each process, and sums depend on it.
        replies = [scores for task, scores in scored.tasks.items() if task in self.generating]
        return float(np.mean([scores.tokens.mean(dtype=np.float64) for scores in replies]))


def merit(
    values: Sequence[Sequence[float] | None], violations: Sequence[float], objectives: int
) -> NDArray[np.float64]:
    """What ranks candidates under constraints (Deb 2000): (n,) of one objective, else
    (n, objectives).

    Whoever holds the constraints keeps its values. Whoever breaks them is below all of those in
    every objective, the more the further; None, a candidate without a result, is below all others.
    Every number is finite.
    """
    found = np.full((len(values), objectives), _WITHOUT_RESULT)
    for row, of_one, violation in zip(found, values, violations, strict=True):
        if of_one is None or not np.isfinite([*of_one, violation]).all():
            continue
        row[:] = of_one if violation == 0 else _BROKEN * (1 + violation / (1 + violation))
    return found[:, 0] if objectives == 1 else found


def _check_objectives(job: Job, weights: Mapping[str, float], generating: Collection[str]) -> None:
    tasks = {f"task:{name}" for name in weights}
    for name in job.objectives:
        if name.startswith("task:") and name not in tasks:
            raise JobError(f"objectives: '{name}' is unknown: {nearest(name, tasks)}")
        if name in _LENGTHS and not generating:
            raise JobError(
                f"objectives: '{name}': every task is teacher-forced, so no reply has a length: "
                f"leave '{name}' out, or set teacher_forced: false in a task file"
            )


def _check_constraints(job: Job, weights: Mapping[str, float]) -> None:
    for i, constraint in enumerate(job.constraints):
        if constraint.task not in weights:
            raise JobError(
                f"constraints[{i}].task: '{constraint.task}' is unknown: "
                f"{nearest(constraint.task, weights)}"
            )
