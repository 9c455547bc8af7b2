"""Search spaces: what a point of the unit cube means as a merge recipe.

Only this package knows what a coordinate means; it knows nothing of scores, optimizers or tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from evomerge.coordinates import Coordinate, Genotype
from evomerge.job import Space as SpaceSection
from evomerge.layout import Layout, split
from evomerge.recipe import Recipe
from evomerge.signatures import METHODS


@dataclass(frozen=True)
class Infeasible:
    """A genotype that means no model; it ranks worst."""

    reason: str


class Space(Protocol):
    """What is searched.

    coordinates: what each of the d coordinates is, and where a search begins. sigma: the first
    step size, in units of the cube.
    """

    @property
    def coordinates(self) -> tuple[Coordinate, ...]: ...
    @property
    def sigma(self) -> float: ...

    def decode(self, genotype: Genotype) -> Recipe | Infeasible:
        """The recipe that a genotype, (d,) in [0, 1], means. Pure: equal in, equal out; what an
        inactive coordinate is changes nothing."""
        ...


@dataclass(frozen=True)
class Models:
    """The models that a space speaks of.

    parents: model path by name, in the job's order; base: path of the base model, if any;
    layouts: by model path. dtype: what the merged tensors are stored as. configs: of each model,
    as in its config.json. sizes: the number of values of each tensor, by model path and name.
    """

    parents: Mapping[str, str]
    base: str | None
    layouts: Mapping[str, Layout]
    dtype: str
    configs: Mapping[str, Mapping[str, Any]]
    sizes: Mapping[str, Mapping[str, int]]

    @cached_property
    def first(self) -> str:
        """The model that gives config and tokenizer: the base, or else the first parent; beside
        models of more parts than these, such as language models that see, the first of those."""
        ordered = [*([self.base] if self.base else []), *self.parents.values()]
        return max(ordered, key=lambda path: len(split(self.layouts[path].places)))


def build(section: SpaceSection, models: Models) -> Space:
    """The space of a job's section. Raises JobError when a needed key is missing or misplaced."""
    from evomerge.job import BothSpace, LayerSpace, SeriesSpace
    from evomerge.space.both import Both
    from evomerge.space.layers import layer_space
    from evomerge.space.series import series_space
    from evomerge.space.weight import Weights

    if isinstance(section, LayerSpace):
        return layer_space(section, models)
    if isinstance(section, BothSpace):
        return Both.from_section(section, models)
    if isinstance(section, SeriesSpace):
        return series_space(section, models)
    return Weights.from_section(section, models)


def baselines(models: Models) -> dict[str, Recipe]:
    """What every search is measured against, by name: each parent, the base, plain merges.

    The parents' names come first, in the job's order. A language model beside models that also
    see is measured as the text decoder of the first of those. What does not fit together is left
    out.
    """
    from evomerge.space.parts import meeting

    parents = list(models.parents.values())
    alone = dict(models.parents) | ({} if models.base is None else {"base": models.base})
    found: dict[str, Recipe] = {}
    for name, path in alone.items():
        part = meeting(models, [models.first, path])
        if part and path != models.first:
            found[name] = _plain(models, part, "linear", [path])
        else:
            whole = {"merge_method": "passthrough", "models": [{"model": path}]}
            found[name] = Recipe.from_dict(whole)
    if len(parents) == 1:
        return found
    part = meeting(models, [models.first, *parents])
    if part is not None:
        found["uniform average"] = _plain(models, part, "linear", parents)
    part = meeting(models, [models.first, *alone.values()])
    if part is not None and models.base is not None:
        found["task arithmetic"] = _plain(models, part, "task_arithmetic", parents)
        found["ties"] = _plain(models, part, "ties", parents, density=0.5)
    return found


def _plain(models: Models, part: str, method: str, paths: Sequence[str], **shared: float) -> Recipe:
    """A merge in which these models weigh alike; in a part, if one is named, of the first model."""
    entries = [{"model": path, "parameters": {"weight": 1.0}} for path in paths]
    recipe: dict[str, Any] = {"merge_method": method, "dtype": models.dtype}
    if METHODS[method].base == "required":
        recipe |= {"base_model": models.base, "parameters": shared}
    elif part and models.first not in paths:  # it gives the other parts, so it has to be named
        entries.append({"model": models.first, "parameters": {"weight": 0.0}})
    recipe |= {"modules": {part: {"models": entries}}} if part else {"models": entries}
    return Recipe.from_dict(recipe)
