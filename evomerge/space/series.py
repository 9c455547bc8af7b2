"""Checkpoint series: merges of the checkpoints of one fine-tuning run.

The run begins with the base, where the job names one, and goes on with the parents in their order.
Interpolation: (1 - delta) early + delta late of two checkpoints, as WiSE-FT does between a model
and its fine-tune (arXiv 2109.01903) and 2504.10478 along a run; delta beyond [0, 1] extrapolates.
Soup: a weighted average of all of them (arXiv 2203.05482).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evomerge.coordinates import Coordinate, Genotype, choice, placed
from evomerge.job import Range, SeriesSpace, WeightSpace
from evomerge.recipe import Recipe
from evomerge.space import Models
from evomerge.space.groups import Groups, written
from evomerge.space.weight import Weights

_SIGMA = 1 / 6
_DELTA = Range(low=-0.25, high=1.25, start=0.5)
# Only ratios of shares matter, so none has to be 0, and they never sum to it.
_SHARE = Range(low=0.001, high=1.0, start=0.5)


def series_space(section: SeriesSpace, models: Models) -> "Interpolation | Weights":
    """The space of a section. Raises JobError where groups of layers cannot be made."""
    run = models.parents if models.base is None else {"base": models.base, **models.parents}
    if section.form == "interpolation":
        return Interpolation.from_section(section, replace(models, parents=run, base=None))
    soup = WeightSpace(
        kind="weight",
        method="linear",
        per=section.per,
        granularity=section.granularity,
        weight=_SHARE,
        normalize=True,
    )
    return Weights.from_section(soup, replace(models, parents=run, base=None))


@dataclass(frozen=True)
class Interpolation:
    """Two checkpoints of a run (their paths, in its order), and delta for each group of tensors.

    Of more than two, the first coordinate chooses the early one, any but the last, and the second
    how far towards the end of the rest the late one is: no pair stands in two orders. groups: by
    path.
    """

    run: tuple[str, ...]
    groups: Mapping[str, Groups]
    delta: Range
    dtype: str
    sigma: float = _SIGMA

    @classmethod
    def from_section(cls, section: SeriesSpace, models: Models) -> "Interpolation":
        """The checkpoints are the parents alone."""
        groups = {
            path: Groups.of(models.layouts[path], section.per, section.granularity)
            for path in models.parents.values()
        }
        return cls(tuple(groups), groups, section.delta or _DELTA, models.dtype)

    @property
    def _labels(self) -> list[str]:
        return list(self.groups[self.run[0]].members)

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        """Start between the first checkpoint and the last."""
        choices = len(self.run) - 1
        pair: tuple[Coordinate, ...] = ()
        if choices > 1:
            pair = (
                Coordinate("early", placed(0, choices), choices),
                Coordinate("late", placed(choices - 1, choices), choices),
            )
        start = self.delta.start_unit(len(self.run))
        return (*pair, *(Coordinate(f"{label} delta", start) for label in self._labels))

    def decode(self, genotype: Genotype) -> Recipe:
        """Always feasible."""
        units = np.asarray(genotype).reshape(len(self.coordinates)).tolist()
        labels = self._labels
        early, late = self._pair(units[: len(units) - len(labels)])
        deltas = [self.delta.value(unit) for unit in units[-len(labels) :]]
        shares = (
            (early, [round(1 - delta, 12) + 0.0 for delta in deltas]),
            (late, deltas),
        )
        return Recipe.from_dict(
            {
                "merge_method": "linear",
                "models": [
                    {
                        "model": path,
                        "parameters": {
                            "weight": self._weight(path, dict(zip(labels, own, strict=True)))
                        },
                    }
                    for path, own in shares
                ],
                "parameters": {"normalize": False},
                "dtype": self.dtype,
            }
        )

    def _pair(self, units: Sequence[float]) -> tuple[str, str]:
        """The early and the late checkpoint."""
        if not units:
            return self.run[0], self.run[1]
        choices = len(self.run) - 1
        early, late = (choice(unit, choices) for unit in units)
        later = self.run[early + 1 :]
        return self.run[early], later[late * len(later) // choices]

    def _weight(self, path: str, values: Mapping[str, float]) -> Any:
        """A checkpoint's weight as a recipe says it, from that of each group."""
        return written(self.groups[path].filters, values.__getitem__)
