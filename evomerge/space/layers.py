"""Layer space: which layers of which parents stand in the output, in which order.

The data-flow search of Sakana (arXiv 2403.13187, section 3.2) without residual scales: all layers
of all parents in order, the whole row repeated; coordinate i switches slot i on when it is above
one half. A slot's layer keeps its parent's tensors. The first slot's parent gives the embeddings,
the last slot's the final norm and the head, as in mergekit.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from evomerge.job import Space as SpaceSection
from evomerge.recipe import Recipe
from evomerge.space import Genotype, Infeasible, Models

_SIGMA = 1 / 6  # of Sakana's search


@dataclass(frozen=True)
class LayerStack:
    """d = repeats x (layers of all parents)."""

    slots: tuple[tuple[str, int], ...]
    max_layers: int
    models: Models
    sigma: float = _SIGMA

    KEYS: ClassVar = {"repeats", "max_layers"}

    @classmethod
    def from_section(cls, section: SpaceSection, models: Models) -> "LayerStack":
        """`max_layers` defaults to one and a half times the deepest parent."""
        row = [
            (name, layer)
            for name, path in models.parents.items()
            for layer in range(models.layouts[path].layers)
        ]
        deepest = max(models.layouts[path].layers for path in models.parents.values())
        limit = section.max_layers or deepest + deepest // 2
        return cls(tuple(row * (section.repeats or 1)), limit, models)

    @property
    def names(self) -> tuple[str, ...]:
        """Such as 'slot 3: ops layer 3'."""
        return tuple(f"slot {i}: {name} layer {n}" for i, (name, n) in enumerate(self.slots))

    @property
    def start(self) -> Genotype:
        """The first parent alone: its first pass two steps on, every other slot one step off."""
        first = next(iter(self.models.parents))
        depth = self.models.layouts[self.models.parents[first]].layers
        start = np.full(len(self.slots), 0.5 - self.sigma)
        start[:depth] = 0.5 + 2 * self.sigma
        return start

    def decode(self, genotype: Genotype) -> Recipe | Infeasible:
        """Infeasible without any layer, or with more than `max_layers`."""
        used = [slot for slot, value in zip(self.slots, genotype, strict=True) if value > 0.5]
        if not used:
            return Infeasible("no layer is switched on")
        if len(used) > self.max_layers:
            return Infeasible(f"{len(used)} layers are more than max_layers {self.max_layers}")
        slices = [
            {"sources": [{"model": self.models.parents[name], "layer_range": [start, end]}]}
            for name, start, end in _runs(used)
        ]
        recipe: dict[str, Any] = {
            "merge_method": "passthrough",
            "slices": slices,
            "dtype": self.models.dtype,
        }
        return Recipe.from_dict(recipe)


def _runs(used: list[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """Consecutive layers of one parent as (parent, start, end), half open."""
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(used), 1) if b != (a[0], a[1] + 1))]
    return [
        (used[start][0], used[start][1], used[end - 1][1] + 1)
        for start, end in pairwise([*cuts, len(used)])
    ]
