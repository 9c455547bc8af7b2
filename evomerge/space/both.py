"""Both: weight merges inside a layer order.

The parents, all of one depth, are merged layer by layer as a weight space says; a layer space over
that merge, as if it were a model of its own, says which of its layers stand in the output, in which
order. Each slot of the order is the merge of one layer across the parents, with that layer's
coefficients, so a recipe has all parents in every slice. Knows neither how coefficients nor how
orders are encoded.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from evomerge.coordinates import Coordinate, Genotype, When
from evomerge.errors import JobError
from evomerge.job import BothSpace
from evomerge.recipe import Recipe, resolve
from evomerge.space import Infeasible, Models, Space

_At = tuple[int | None, str]  # a tensor's place in every model, see Layout.index

_MERGE = "merge"  # what the merged model is called in the names of the order's coordinates


@dataclass(frozen=True)
class Both:
    """The coordinates of `weights`, then those of `order`."""

    weights: Space
    order: Space
    models: Models

    @classmethod
    def from_section(cls, section: BothSpace, models: Models) -> "Both":
        """Raises JobError for parents of different depths, and for what a merge of layers cannot
        be: of one part, of a chosen parent, or with scales of the residual stream."""
        from evomerge.space import build

        ours = models.layouts[models.first].layers
        for path, layout in models.layouts.items():
            if not layout.layers:
                reason = layout.unclear or "it has none"
                raise JobError(
                    f"space: the layers of '{path}' cannot be told: {reason}: take kind: weight"
                )
            if layout.layers != ours:
                raise JobError(
                    f"space: '{path}' has {layout.layers} layers and '{models.first}' {ours}: only "
                    "those of one depth are merged layer by layer: use kind: layers"
                )
        if section.weight.part is not None:
            raise JobError(
                f"space.weight.part: '{section.weight.part}' alone has no layer order here: leave "
                "it out"
            )
        if section.layers.form == "depth_wise" and not section.layers.removable:
            raise JobError(
                "space.layers.form: depth_wise chooses a parent for each layer, and here each is a "
                "merge of all: give removable: true to leave layers out, or choose another form"
            )
        if section.layers.scales != "none":
            raise JobError(
                f"space.layers.scales: '{section.layers.scales}' is folded into layers that are "
                "copied, and here they are merged: give none"
            )
        one = replace(models, parents={_MERGE: models.first}, base=None)
        return cls(build(section.weight, models), build(section.layers, one), models)

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        """Named as in their own spaces, behind 'weight: ' and 'layers: '."""
        weights, order = self.weights.coordinates, self.order.coordinates
        return (
            *_prefixed("weight: ", weights, 0),
            *_prefixed("layers: ", order, len(weights)),
        )

    @property
    def sigma(self) -> float:
        """The smaller of the two."""
        return min(self.weights.sigma, self.order.sigma)

    def decode(self, genotype: Genotype) -> Recipe | Infeasible:
        """Infeasible where one of the two is."""
        cut = len(self.weights.coordinates)
        weights, order = self.weights.decode(genotype[:cut]), self.order.decode(genotype[cut:])
        if isinstance(weights, Infeasible):
            return weights
        if isinstance(order, Infeasible):
            return order
        return _Restacked(weights, self.models).in_order(_layers(order))


def _prefixed(prefix: str, coordinates: Sequence[Coordinate], before: int) -> Iterator[Coordinate]:
    """Coordinates that `before` others stand before."""
    for one in coordinates:
        when = one.when and When(one.when.coordinate + before, one.when.choices)
        yield replace(one, name=prefix + one.name, when=when)


def _layers(order: Recipe) -> list[int]:
    """The layers that an order has, one after the other."""
    ranges = [one.sources[0].layer_range for one in order.slices or ()]
    return [layer for start, end in ranges for layer in range(start, end)]


class _Restacked:
    """A merge whose layers are put in another order, each with the parameters that it has there."""

    def __init__(self, merge: Recipe, models: Models) -> None:
        self._merge = merge
        self._entries = {entry.model: entry.parameters for entry in merge.models or ()}
        if merge.base_model is not None:
            self._entries.setdefault(merge.base_model, {})
        # What depends on the tensor is said anew by each slice: there, layers have other numbers.
        self._by_tensor = {k: v for k, v in merge.parameters.items() if isinstance(v, list)}
        self._names = {model: models.layouts[model].index for model in self._entries}
        self._all: dict[_At, str] = {}
        self._inside: dict[int, list[_At]] = {}
        self._before: list[_At] = []
        self._after: list[_At] = []
        # The output's names are the base's, or else the first model's.
        for model in sorted(self._names, key=lambda model: model != merge.base_model):
            for at, name in self._names[model].items():
                if at not in self._all:
                    self._all[at] = name
                    module = models.layouts[model].places[name].module
                    outside = self._before if module == "embeddings" else self._after
                    home = outside if at[0] is None else self._inside.setdefault(at[0], [])
                    home.append(at)

    def in_order(self, layers: Sequence[int]) -> Recipe:
        """The recipe with these layers, at least one. Consecutive layers that are merged alike
        make one slice; the first has the embeddings, the last the final norm and the head."""
        alike = {layer: self._inner_values(layer) for layer in set(layers)}
        breaks = [
            i
            for i, (one, other) in enumerate(pairwise(layers), 1)
            if other != one + 1 or alike[one] != alike[other]
        ]
        slices = []
        for start, end in pairwise([0, *breaks, len(layers)]):
            tensors = list(self._inside[layers[start]])
            tensors += self._before if start == 0 else []
            tensors += self._after if end == len(layers) else []
            slices.append(self._slice((layers[start], layers[end - 1] + 1), tensors))
        plain = {k: v for k, v in self._merge.parameters.items() if k not in self._by_tensor}
        whole = self._merge.to_dict()
        del whole["models"]
        return Recipe.from_dict({**whole, "slices": slices, "parameters": plain})

    def _inner_values(self, layer: int) -> list[dict[str, Any]]:
        """Every parameter of a layer's tensors, by what they are called in any layer."""
        tensors = self._inside[layer]
        return [
            {at[1]: value for at, _, value in self._values(owner, parameter, tensors)}
            for owner, parameters in self._scopes()
            for parameter in parameters
        ]

    def _scopes(self) -> list[tuple[str | None, Mapping[str, Any]]]:
        """The parameters of each model, and, for None, those of the merge that differ by tensor."""
        return [*self._entries.items(), (None, self._by_tensor)]

    def _values(
        self, owner: str | None, parameter: str, tensors: Sequence[_At]
    ) -> list[tuple[_At, str, Any]]:
        """The names of tensors and the values of a parameter for them."""
        names = self._all if owner is None else self._names[owner]
        scope = self._by_tensor if owner is None else self._entries[owner]
        if any(at not in names for at in tensors):  # a tied head goes by the embeddings' name
            tensors = list(dict.fromkeys([*tensors, *self._before]))
        found = [(at, names[at]) for at in tensors if at in names]
        return [(at, name, resolve(parameter, [scope], name, 0.0)) for at, name in found]

    def _slice(self, layers: tuple[int, int], tensors: Sequence[_At]) -> dict[str, Any]:
        written = [
            (owner, {p: _written(self._values(owner, p, tensors)) for p in parameters})
            for owner, parameters in self._scopes()
        ]
        *sources, (_, shared) = written
        return {
            "sources": [
                {"model": model, "layer_range": layers, "parameters": parameters}
                for model, parameters in sources
            ],
            "parameters": shared,
        }


def _written(values: Sequence[tuple[_At, str, Any]]) -> Any:
    """A parameter of one slice: a number where it is the same for all tensors, else filters that
    find each tensor's whatever the number of its layer, and the commonest for the rest."""
    ((commonest, count),) = Counter(value for *_, value in values).most_common(1)
    if count == len(values):
        return commonest
    # What filters are made of: no name contains one that is longer.
    whole = [(key if layer is not None else name, name, v) for (layer, key), name, v in values]
    rarer = [key for key, _, value in whole if value != commonest]
    found: list[tuple[str, Any]] = []
    for key, name, value in sorted(whole, key=lambda one: -len(one[0])):
        # One of the commonest needs a filter where another tensor's would catch it.
        ahead = value != commonest or any(other in name for other in rarer)
        if not ahead or any(text in name for text, _ in found):
            continue
        others = [
            other
            for _, other, theirs in whole
            if theirs != value and not any(text in other for text, _ in found)
        ]
        ends = [match.end() for match in re.finditer(r"\.", key)]
        prefixes = (key[:end] for end in ends)
        fits = (text for text in prefixes if not any(text in other for other in others))
        found.append((next(fits, key), value))
    return [*({"filter": text, "value": v} for text, v in found), {"value": commonest}]
