"""Search spaces: what a point of the unit cube means as a merge recipe.

Only this package knows what a coordinate means; it knows nothing of scores, optimizers or tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import JobError
from evomerge.job import Space as SpaceSection
from evomerge.layout import Layout
from evomerge.recipe import Recipe

Genotype = NDArray[np.float64]


@dataclass(frozen=True)
class Infeasible:
    """A genotype that means no model; it ranks worst."""

    reason: str


class Space(Protocol):
    """What is searched.

    names: what each of the d coordinates is, for people. start: (d,) in [0, 1], where a search
    begins. sigma: the first step size, in units of the cube.
    """

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def start(self) -> Genotype: ...
    @property
    def sigma(self) -> float: ...

    def decode(self, genotype: Genotype) -> Recipe | Infeasible:
        """The recipe that a genotype, (d,) in [0, 1], means. Pure: equal in, equal out."""
        ...


@dataclass(frozen=True)
class Models:
    """The models that a space speaks of.

    parents: model path by name, in the job's order; base: path of the base model, if any;
    layouts: by model path; dtype: what the merged tensors are stored as.
    """

    parents: Mapping[str, str]
    base: str | None
    layouts: Mapping[str, Layout]
    dtype: str

    @property
    def first(self) -> str:
        """The model that gives config and tokenizer: the base, or else the first parent."""
        return self.base or next(iter(self.parents.values()))


def build(section: SpaceSection, models: Models) -> Space:
    """The space of a job's section. Raises JobError when a needed key is missing or misplaced."""
    from evomerge.space.layers import LayerStack
    from evomerge.space.weight import WeightSpace

    if section.kind is None:
        raise JobError("space.kind is missing: give 'weight' or 'layers', or a preset")
    kind: type[WeightSpace | LayerStack] = LayerStack if section.kind == "layers" else WeightSpace
    unused = set(section.model_dump(exclude_none=True)) - {"preset", "kind"} - kind.KEYS
    if unused:
        raise JobError(f"space.{min(unused)}: has no meaning in a space of kind '{section.kind}'")
    return kind.from_section(section, models)


def baselines(models: Models) -> dict[str, Recipe]:
    """What every search is measured against, by name: each parent, the base, plain averages.

    The parents' names come first, in the job's order.
    """
    found = {name: _alone(path) for name, path in models.parents.items()}
    entries = [{"model": path, "parameters": {"weight": 1.0}} for path in models.parents.values()]
    average = {"merge_method": "linear", "models": entries, "dtype": models.dtype}
    if models.base is not None:
        found["base"] = _alone(models.base)
    found["uniform average"] = Recipe.from_dict(average)
    if models.base is not None:
        vectors = {"models": entries, "base_model": models.base, "dtype": models.dtype}
        found["task arithmetic"] = Recipe.from_dict({"merge_method": "task_arithmetic", **vectors})
        found["ties"] = Recipe.from_dict(
            {"merge_method": "ties", **vectors, "parameters": {"density": 0.5}}
        )
    return found


def _alone(path: str) -> Recipe:
    return Recipe.from_dict({"merge_method": "passthrough", "models": [{"model": path}]})
