"""Weight space: mixing coefficients per parent and per group of tensors.

A coordinate is one parameter of one parent in one group, or of all parents where the method has
one for the whole merge (lambda, t). Bounds may be negative, and weights are never forced to sum to
1. Where several methods are given, the first coordinate chooses one, and those that only others
take are inactive.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomerge.coordinates import Coordinate, Genotype, When, choice, placed
from evomerge.errors import JobError, RecipeError
from evomerge.job import Range, WeightSpace
from evomerge.layout import Layout
from evomerge.recipe import Recipe
from evomerge.signatures import METHODS
from evomerge.space import Models
from evomerge.space.groups import Groups, written
from evomerge.space.parts import layouts_in, parts_of

_SIGMA = 0.15
_DELLA = ("density", "epsilon")

# What a candidate gets: the same as every other, or the values of coordinates, found by filters.
_Value = float | bool | tuple[tuple[str | None, int], ...]


@dataclass(frozen=True)
class _Form:
    """The recipe of one method, with positions of coordinates in the place of numbers.

    models: each model's path and parameters; shared: those of the whole merge.
    """

    method: str
    models: tuple[tuple[str, Mapping[str, _Value]], ...]
    shared: Mapping[str, _Value]
    base_model: str | None
    part: str | None
    dtype: str

    def filled(self, values: Sequence[float]) -> Recipe:
        """The recipe with the values of all coordinates."""
        merged: dict[str, Any] = {
            "models": [
                {"model": path, "parameters": _written(parameters, values)}
                for path, parameters in self.models
            ]
        }
        recipe = {
            "merge_method": self.method,
            **({"modules": {self.part: merged}} if self.part else merged),
            **({"base_model": self.base_model} if self.base_model else {}),
            "parameters": _written(self.shared, values),
            "dtype": self.dtype,
        }
        return Recipe.from_dict(recipe)


def _written(parameters: Mapping[str, _Value], values: Sequence[float]) -> dict[str, Any]:
    return {
        name: written(value, values.__getitem__) if isinstance(value, tuple) else value
        for name, value in parameters.items()
    }


@dataclass(frozen=True)
class Weights:
    """ranges: of each coordinate's values, None for the choice of the method."""

    coordinates: tuple[Coordinate, ...]
    ranges: tuple[Range | None, ...]
    forms: tuple[_Form, ...]
    sigma: float = _SIGMA

    @classmethod
    def from_section(cls, section: WeightSpace, models: Models) -> "Weights":
        """Raises JobError where a method does not fit the parameters or the models, and where
        nothing is left to search."""
        _check_parameters(section)
        for method in section.methods:
            _check_models(method, models)
        layouts = layouts_in(models, section.part)
        _check_filters(section.filters, layouts.values())
        groups = {
            path: Groups.of(layout, section.per, section.granularity, section.filters)
            for path, layout in layouts.items()
        }
        axes = _Axes(section, models, groups)
        if not axes.coordinates:
            raise JobError(_nothing_searched(section))
        forms = tuple(_form(method, section, models, groups, axes) for method in section.methods)
        return cls(tuple(axes.coordinates), tuple(axes.ranges), forms)

    def decode(self, genotype: Genotype) -> Recipe:
        """Always a recipe; that weights which are to be normalized sum to 0 shows in the merge."""
        units = np.asarray(genotype).reshape(len(self.coordinates)).tolist()
        chosen = choice(units[0], len(self.forms)) if len(self.forms) > 1 else 0
        values = [
            0.0 if bounds is None else bounds.value(unit)
            for bounds, unit in zip(self.ranges, units, strict=True)
        ]
        return self.forms[chosen].filled(values)


class _Axes:
    """The coordinates of a section, and where they are found: parameter by parameter, parent by
    parent, group by group. positions: by parameter, model path (None: of the whole merge), group.
    """

    def __init__(self, section: WeightSpace, models: Models, groups: Mapping[str, Groups]) -> None:
        self.coordinates: list[Coordinate] = []
        self.ranges: list[Range | None] = []
        self.positions: dict[tuple[str, str | None, str], int] = {}
        methods = section.methods
        self._methods = len(methods)
        if len(methods) > 1:
            start = placed(0, len(methods))
            self.coordinates.append(Coordinate("method", start, len(methods), ordered=False))
            self.ranges.append(None)
        for parameter, bounds in section.parameters.items():
            if not isinstance(bounds, Range):
                continue
            try:
                start = bounds.start_unit(len(models.parents))
            except ValueError as error:
                raise JobError(f"space.{parameter}: {error}: widen them or give a number") from None
            own = [i for i, method in enumerate(methods) if parameter in METHODS[method].per_model]
            for number, (name, path) in enumerate(models.parents.items()):
                if own and not (number == 0 and bounds.first is not None):
                    prefix = f"{name}: "
                    self._add(parameter, path, prefix, groups[path].members, bounds, start, own)
            shared = [i for i, method in enumerate(methods) if parameter in METHODS[method].shared]
            if shared:
                members = dict.fromkeys(label for one in groups.values() for label in one.members)
                self._add(parameter, None, "", members, bounds, start, shared)

    def _add(
        self,
        parameter: str,
        path: str | None,
        prefix: str,
        labels: Iterable[str],
        bounds: Range,
        start: float,
        takers: Sequence[int],
    ) -> None:
        """takers: the methods, by number, that the coordinates matter to."""
        when = When(0, frozenset(takers)) if len(takers) < self._methods else None
        for label in labels:
            self.positions[parameter, path, label] = len(self.coordinates)
            self.coordinates.append(Coordinate(f"{prefix}{label} {parameter}", start, when=when))
            self.ranges.append(bounds)


def _form(
    method: str,
    section: WeightSpace,
    models: Models,
    groups: Mapping[str, Groups],
    axes: _Axes,
) -> _Form:
    signature, base_model, part = METHODS[method], _base_model(method, models), section.part
    paths = list(models.parents.values())
    ranked = [*([base_model] if base_model else []), *paths]
    # As in the merge: the model that the output takes its config and its tensors' names from.
    donor = next((p for p in ranked if part is None or part in parts_of(models, p)), None)
    if donor is None:
        raise JobError(
            f"space.part: none of the models that '{method}' merges has the part '{part}': name "
            "one that has among the parents, or as the base of a method that has one"
        )

    def value(parameter: str, path: str | None) -> _Value:
        bounds = section.parameters[parameter]
        if not isinstance(bounds, Range):
            return bounds
        if path == paths[0] and bounds.first is not None:
            return bounds.first
        filters = groups[path or donor].filters
        return tuple((text, axes.positions[parameter, path, label]) for text, label in filters)

    given = section.parameters
    own = {
        path: {name: value(name, path) for name in signature.per_model if name in given}
        for path in paths
    }
    shared = {name: value(name, None) for name in signature.shared if name in given}
    return _Form(method, tuple(own.items()), shared, base_model, part, models.dtype)


def _base_model(method: str, models: Models) -> str | None:
    """What a recipe's base_model is. Methods between two models call the first of them so: the
    first of two parents, or the base beside a single parent."""
    signature, parents = METHODS[method], list(models.parents.values())
    if signature.base == "none":
        return None
    if not signature.task_vectors and signature.models[1] == len(parents) == 2:
        return parents[0]
    return models.base


def _check_models(method: str, models: Models) -> None:
    """Whether a job has as many models as a method merges. Raises JobError."""
    signature, base = METHODS[method], _base_model(method, models)
    low, high = signature.models
    merged = list(models.parents.values())
    if base is not None and signature.base == "required" and not signature.task_vectors:
        merged = list(dict.fromkeys([base, *merged]))
    if len(merged) > high or (len(merged) < low and (base or signature.base != "required")):
        wanted = f"{low}" if low == high else f"at least {low}"
        raise JobError(
            f"parents: {len(models.parents)} given: '{method}' merges {wanted} models, a base "
            "counted where it is not subtracted"
        )
    if signature.base == "required" and base is None:
        why = "merges differences from a base model" if signature.task_vectors else "needs one"
        raise JobError(
            f"base: required, and missing: '{method}' {why}: name the model that the parents were "
            "fine-tuned from"
        )


def _check_parameters(section: WeightSpace) -> None:
    given = section.parameters
    for name, value in given.items():
        takers = [m for m in section.methods if name in _taken(m)]
        if not takers:
            known = ", ".join(_taken(section.methods[0])) or "none"
            raise JobError(
                f"space.{name}: '{section.methods[0]}' has no such parameter: it takes {known}"
            )
        for method in takers:
            _check_values(name, value, method)
    for method in section.methods:
        for name, default in _taken(method).items():
            if default is None and name not in given:
                raise JobError(
                    f"space.{name} is missing: '{method}' needs it: give its bounds, such as "
                    "[0, 1], or a value"
                )
        if method.startswith("della"):
            _check_della(method, given)


def _check_filters(filters: Iterable[str], layouts: Collection[Layout]) -> None:
    """Each has to find something, at least in one of the models. Raises JobError."""
    for text in filters:
        if not any(text in name for layout in layouts for name in layout.places):
            raise JobError(
                f"space.filters: '{text}' is part of no tensor's name: leave it out, or give what "
                "is, such as mlp"
            )


def _check_values(name: str, value: Range | float | bool, method: str) -> None:
    """Every value that a parameter may take has to be one that recipes allow. Raises JobError."""
    values: list[float | bool] = [value] if not isinstance(value, Range) else []
    if isinstance(value, Range):
        values = [value.low, value.high]
        if value.first is not None:
            if name not in METHODS[method].per_model:
                raise JobError(f"space.{name}.first: '{method}' has one {name} for all parents")
            values.append(value.first)
    for one in values:
        probe = {"merge_method": method, "models": [{"model": "a"}], "base_model": "b"}
        try:
            Recipe.from_dict({**probe, "parameters": {name: one}}, "space")
        except RecipeError as error:
            raise JobError(str(error).replace("space: parameters.", "space.")) from None


def _check_della(method: str, given: Mapping[str, Range | float | bool]) -> None:
    """Kept with a chance of density +- epsilon, which has to be one. Raises JobError."""
    density, epsilon = (_ends(given.get(name, _taken(method)[name])) for name in _DELLA)
    largest = max(map(abs, epsilon))
    if set(density) != {1.0} and not (largest < min(density) and max(density) < 1 - largest):
        raise JobError(
            f"space.density: [{min(density)}, {max(density)}] and epsilon up to {largest}: "
            f"'{method}' needs density - epsilon and density + epsilon inside (0, 1)"
        )


def _ends(value: Any) -> tuple[float, ...]:
    if not isinstance(value, Range):
        return (value,)
    return (value.low, value.high, *([] if value.first is None else [value.first]))


def _nothing_searched(section: WeightSpace) -> str:
    method, fields = section.methods[0], type(section).model_fields.values()
    names = {*type(section).model_fields, *(field.alias for field in fields)}
    open_to = [
        name
        for name, default in _taken(method).items()
        if name in names and not isinstance(default, bool)
    ]
    if open_to:
        return f"space.{open_to[0]}: nothing is searched: give bounds, such as [0.1, 0.9]"
    return (
        f"space.method: '{method}' has no coefficients to search: merge with it by `evomerge "
        "merge`, or give several methods to choose from"
    )


def _taken(method: str) -> dict[str, Any]:
    """A method's parameters with their defaults, None for those that have to be given."""
    return {**METHODS[method].per_model, **METHODS[method].shared}
