"""What a search's objective makes of the scores of several tasks, from stored means alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from evomerge.fitness.objective import LEAST_REFERENCE
from evomerge.fitness.results import weighted_mean
from evomerge.guard.estimates import Estimate, combined
from evomerge.search.summary import task_weights
from evomerge.store import MeanRow, SearchRow, Store


@dataclass(frozen=True)
class Baseline:
    """What a search is measured against, with its means on all of train by task; none before it is
    scored. parent: whether it is a model that is merged, or the base."""

    candidate: int
    name: str
    parent: bool
    means: Mapping[str, MeanRow] = field(compare=False)


@dataclass(frozen=True)
class Weighing:
    """Of one search. weights: the job's, by task, for a weighted mean in [0, 1]; of relative,
    divided by what the scores are shares of. worst: only the worst task counts.

    See Objective.shares, whose weights are these; it asks for examples where means will do.
    """

    weights: Mapping[str, float]
    worst: bool
    baselines: tuple[Baseline, ...]

    @classmethod
    def of(cls, store: Store, row: SearchRow) -> "Weighing":
        """Of a stored search."""
        sources = {*row.job["parents"], *(["base"] if "base" in row.job else [])}
        rows = store.candidates(row.id, generation=0, with_genotypes=False)
        means = store.means(row.id, "full", [c.id for c in rows])
        baselines = tuple(
            Baseline(c.id, str(c.label), c.label in sources, means.get(c.id, {})) for c in rows
        )
        weights = task_weights(store, row)
        if row.job["objective"] == "relative":
            parents = [one.means for one in baselines if one.parent and one.means]
            weights = {
                task: weight / max([LEAST_REFERENCE, *(means[task].mean for means in parents)])
                for task, weight in weights.items()
            }
        return cls(weights, row.job["objective"] == "worst", baselines)

    def mean(self, means: Mapping[str, float]) -> float:
        """Over the tasks."""
        return weighted_mean(means, self._counted(means))

    def estimate(self, means: Mapping[str, MeanRow]) -> Estimate:
        """The same with its interval."""
        pairs = {task: (mean.mean, mean.n) for task, mean in means.items()}
        return combined(pairs, self._counted({task: mean for task, (mean, _) in pairs.items()}))

    def _counted(self, means: Mapping[str, float]) -> Mapping[str, float]:
        if not self.worst:
            return self.weights
        having = [task for task in means if self.weights[task]]
        worst = min(having, key=means.__getitem__)
        return {task: float(task == worst) for task in self.weights}
