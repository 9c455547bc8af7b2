"""Weight space: mixing coefficients per parent and per group of tensors.

A coordinate is one parameter (weight, density) of one parent in one group, scaled linearly to its
bounds; bounds may be negative, and weights are never forced to sum to 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from evomerge.errors import JobError
from evomerge.job import Bounds
from evomerge.job import Space as SpaceSection
from evomerge.layout import Layout, Place
from evomerge.recipe import METHODS, Recipe
from evomerge.space import Genotype, Models

_SEARCHABLE = ("weight", "density")
_DECIMALS = 6  # of a coefficient in a recipe: finer than any merge can feel, and readable


@dataclass(frozen=True)
class Group:
    """Tensors that share coefficients.

    filters: substrings of tensor names; of all groups, the first with one that is part of a
    tensor's name owns the tensor.
    """

    name: str
    filters: tuple[str, ...]


@dataclass(frozen=True)
class WeightSpace:
    """Coordinates in order: parameter by parameter, parent by parent, group by group."""

    method: str
    shared: dict[str, Any]
    bounds: dict[str, Bounds]
    groups: tuple[Group, ...]
    models: Models
    sigma: float

    KEYS: ClassVar = {"method", "per", "granularity", "normalize", *_SEARCHABLE}

    @classmethod
    def from_section(cls, section: SpaceSection, models: Models) -> "WeightSpace":
        """Raises JobError when the method does not fit the section or the job has no base."""
        method = section.method
        if method is None or section.per is None:
            raise JobError("space: a weight space needs 'method' and 'per' (model, layer, module)")
        signature = METHODS[method]
        if "weight" not in signature.per_model:
            raise JobError(f"space.method: '{method}' has no weights to search: see presets")
        if signature.base == "required" and models.base is None:
            raise JobError(f"base is missing: '{method}' merges differences from a base model")
        bounds = {p: getattr(section, p) for p in _SEARCHABLE if getattr(section, p) is not None}
        for parameter in bounds:
            if parameter not in signature.per_model:
                raise JobError(f"space.{parameter}: '{method}' has no such parameter")
        if "weight" not in bounds:
            raise JobError("space.weight is missing: give its bounds, such as [-0.5, 1.5]")
        density = bounds.get("density")
        if density is not None and not (density.low > 0 and density.high <= 1):
            raise JobError(
                f"space.density: [{density.low}, {density.high}] leaves (0, 1]: "
                "it is the share that is kept"
            )
        shared = {} if section.normalize is None else {"normalize": section.normalize}
        groups = make_groups(models.layouts[models.first], section.per, section.granularity or 1)
        return cls(method, shared, bounds, groups, models, sigma=0.15)

    @property
    def names(self) -> tuple[str, ...]:
        """Such as 'ops: layers 3 attention weight'."""
        return tuple(
            f"{parent}: {group.name} {parameter}"
            for parameter in self.bounds
            for parent in self.models.parents
            for group in self.groups
        )

    @property
    def start(self) -> Genotype:
        """Each coefficient at its bounds' start, or in their middle."""
        per_parameter = len(self.models.parents) * len(self.groups)
        return np.repeat([_unit(bounds) for bounds in self.bounds.values()], per_parameter)

    def decode(self, genotype: Genotype) -> Recipe:
        """Always feasible: every point of the cube is a merge."""
        table = np.asarray(genotype).reshape(len(self.bounds), len(self.models.parents), -1)
        models = []
        for column, path in enumerate(self.models.parents.values()):
            parameters = {
                parameter: self._values(bounds, table[row, column])
                for row, (parameter, bounds) in enumerate(self.bounds.items())
            }
            models.append({"model": path, "parameters": parameters})
        recipe: dict[str, Any] = {"merge_method": self.method, "models": models}
        if METHODS[self.method].base == "required":
            recipe["base_model"] = self.models.base
        return Recipe.from_dict({**recipe, "parameters": self.shared, "dtype": self.models.dtype})

    def _values(self, bounds: Bounds, units: Genotype) -> Any:
        scaled = np.round(bounds.low + units * (bounds.high - bounds.low), _DECIMALS)
        # Rounding may step over a bound, and gives -0.0, which a + 0.0 turns into 0.0.
        values = [float(v) + 0.0 for v in np.clip(scaled, bounds.low, bounds.high)]
        if len(self.groups) == 1:
            return values[0]
        return [
            {"filter": pattern, "value": value}
            for group, value in zip(self.groups, values, strict=True)
            for pattern in group.filters
        ]


def _unit(bounds: Bounds) -> float:
    if bounds.start is None:
        return 0.5
    return (bounds.start - bounds.low) / (bounds.high - bounds.low)


def make_groups(layout: Layout, per: str, granularity: int) -> tuple[Group, ...]:
    """Divide a model's tensors into groups.

    per: 'model' (one group), 'layer' (blocks of `granularity` layers; embeddings; final norm and
    head) or 'module' (attention and MLP of each block; all norms; embeddings; head). Their order
    depends on the layers alone, not on how the files list the tensors.
    Raises JobError when the granularity does not divide the number of layers.
    """
    if per == "model":
        return (Group("all", ("",)),)
    if layout.layers == 0 or layout.layers % granularity:
        raise JobError(
            f"space.granularity: {granularity} does not divide the model's {layout.layers} layers"
        )
    members: dict[str, list[str]] = {}
    label = _layer_label if per == "layer" else _module_label
    for name, place in layout.places.items():
        members.setdefault(label(place, granularity), []).append(name)

    def rank(key: str) -> tuple[bool, bool, float, str]:
        layer = layout.places[members[key][0]].layer
        block = math.inf if layer is None else layer // granularity
        # Norms first: a norm inside an attention block would otherwise be caught by its filter.
        return key != "norms", key != "embeddings", block, key

    return _with_filters([(key, members[key]) for key in sorted(members, key=rank)])


def _block(layer: int, granularity: int) -> str:
    first = layer // granularity * granularity
    last = first + granularity - 1
    return f"layer {first}" if granularity == 1 else f"layers {first}-{last}"


def _layer_label(place: Place, granularity: int) -> str:
    if place.layer is not None:
        return _block(place.layer, granularity)
    return "embeddings" if place.module == "embeddings" else "final norm and head"


def _module_label(place: Place, granularity: int) -> str:
    if place.layer is None or place.module == "norms":
        return place.module
    return f"{_block(place.layer, granularity)} {place.module}"


def _with_filters(members: Sequence[tuple[str, list[str]]]) -> tuple[Group, ...]:
    """Give each group filters that catch its own tensors and none of another group's, except
    norms, which stand first and have theirs already."""
    groups = []
    for label, names in members:
        others = [
            name for other, theirs in members if other not in (label, "norms") for name in theirs
        ]
        groups.append(Group(label, tuple(_filters(names, others))))
    return tuple(groups)


def _filters(names: Sequence[str], others: Sequence[str]) -> list[str]:
    if all("norm" in name for name in names) and not any("norm" in name for name in others):
        return ["norm"]
    found: list[str] = []
    for name in names:
        if any(pattern in name for pattern in found):
            continue
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            pattern = ".".join(parts[:length]) + ("." if length < len(parts) else "")
            if not any(pattern in other for other in others):
                break
        found.append(pattern)
    return found
