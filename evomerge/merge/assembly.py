"""What one output tensor is made of: the tensors of its sources that stand in the same place, in
one shape, with the parameters that hold there.

Reads names, shapes, dtypes and configs; no value. Knows nothing of how a recipe is cut into slices:
see `planner`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from evomerge.errors import ModelError, RecipeError
from evomerge.layout import Layout, Place
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.methods import result_dtype
from evomerge.merge.plan import COPY, AimPlan, Input, Located, TensorPlan
from evomerge.merge.statistics import ACTIVATION_MEAN, Statistics
from evomerge.merge.tokenizer import vocabulary_size
from evomerge.merge.vocabulary import Vocabulary
from evomerge.recipe import Recipe, Source, resolve

# Tensors that follow from the config: not every saved model has them.
DERIVED = ("rotary_emb.inv_freq", "position_ids", "masked_bias")


@dataclass(frozen=True)
class Parents:
    """The models of a merge, opened, by their names in the recipe. donor: the one that gives the
    config."""

    models: Mapping[str, Checkpoint]
    donor: str

    def layout(self, model: str, part: str) -> Layout:
        """A model's layout of a part; a model of one part only is that part. Raises ModelError."""
        parts = self.models[model].parts
        if part not in parts and len(parts) > 1:
            raise ModelError(
                f"'{model}' has no part '{part}', only {', '.join(parts)}: "
                f"it does not fit together with '{self.donor}'"
            )
        return parts.get(part) or next(iter(parts.values()))


@dataclass(frozen=True)
class Spot:
    """Where one output tensor stands.

    name: in the output. place: that of the slice's first source. key: what the tensor is called
    in every model (see Layout.index). index: the layer's number inside the slice. t: the position
    that gradients are taken at.
    """

    name: str
    place: Place
    key: str
    index: int
    t: float


@dataclass(frozen=True)
class Stretch:
    """A slice of one part. sources: those that are merged; base: the one that is subtracted;
    base_name: the base model, whatever the method does with it; aim_base: the layers of it that
    the result is drawn back to, under `aim`; scopes: of parameters, narrow to wide, without the
    sources' own."""

    part: str
    sources: tuple[Source, ...]
    base: Source | None
    base_name: str | None
    aim_base: Source | None
    scopes: tuple[Mapping[str, Any], ...]


class Assembler:
    """Plans tensors one by one. notes: what is copied, a line each."""

    def __init__(
        self,
        recipe: Recipe,
        parents: Parents,
        vocabulary: Vocabulary | None,
        truncate: bool,
        statistics: Mapping[str, Statistics],
    ) -> None:
        self.notes: list[str] = []
        self._unmeasured: list[str] = []
        self._recipe = recipe
        self._parents = parents
        self._vocabulary = vocabulary
        self._truncate = truncate
        self._statistics = statistics

    def merged(self, stretch: Stretch, spot: Spot) -> TensorPlan:
        """What stands at a spot. Raises ModelError for inputs that do not fit together, RecipeError
        for parameters without a value, or with values that cannot be merged by."""
        sources, base, scopes = stretch.sources, stretch.base, stretch.scopes
        listed = [*sources, *([base] if base else [])]  # the base comes last
        found = [self._located(stretch.part, source, spot) for source in listed]
        if any(found) and not self._is_merged(spot, found):
            return self._kept(spot, found)
        located = self._all_found(spot, listed, found)
        headers = [self._parents.models[model].headers[name] for model, name in located]
        inputs, shape = self._fitted(stretch, spot, located)
        signature, method = self._recipe.signature, self._recipe.merge_method
        per_model = tuple(
            {
                key: _value(key, default, (source.parameters, *scopes), name, spot.t, model)
                for key, default in signature.per_model.items()
            }
            for source, (model, name) in zip(sources, located, strict=False)
        )
        shared = {
            key: _value(key, default, scopes, spot.name, spot.t, None)
            for key, default in signature.shared.items()
        }
        _check_values(spot.name, method, per_model, shared)
        if method == "multislerp" and len(sources) == 1:
            method, base = COPY, None  # alone it is its own mean, and no rounding away from it
        stored = reduce(torch.promote_types, (header.dtype for header in headers))
        dtype = _dtype(self._recipe.dtype) or stored
        return TensorPlan(
            spot.name,
            shape,
            method,
            inputs[: len(sources)],
            inputs[-1] if base else None,
            per_model,
            shared,
            dtype,
            _dtype(self._recipe.out_dtype) or result_dtype(method, dtype),
            self._aim(stretch, spot, located, inputs, shape),
        )

    def copied(self, name: str, at: Located) -> TensorPlan:
        """A model's tensor as it is, in the recipe's dtype; codes and integers keep their own."""
        model, own = at
        header = self._parents.models[model].headers[own]
        dtype = header.dtype
        if dtype.is_floating_point and not header.packed:  # codes mean nothing in another dtype
            dtype = _dtype(self._recipe.out_dtype) or _dtype(self._recipe.dtype) or dtype
        return TensorPlan(name, header.shape, COPY, (Input(*at),), None, (), {}, dtype, dtype)

    def without_aim(self) -> Iterator[str]:
        """A note if `aim` could not be applied everywhere."""
        names = self._unmeasured
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield (
                f"aim: '{names[0]}'{others} are merged without it: the activations that enter them "
                "could not be measured"
            )

    def _located(self, part: str, source: Source, spot: Spot) -> Located | None:
        """The input's tensor: of the same place, or the embeddings in the place of a tied head."""
        layer = None if spot.place.layer is None else source.layer_range[0] + spot.index
        layout = self._parents.layout(source.model, part)
        name = layout.index.get((layer, spot.key))
        if name is None and spot.place.module == "head" and spot.name.endswith("weight"):
            name = self._embeddings(source.model, layout)
        return None if name is None else (source.model, name)

    def _embeddings(self, name: str, layout: Layout) -> str | None:
        """The embeddings of tokens, if it is clear which they are."""
        model = self._parents.models[name]
        found = [
            tensor
            for tensor, place in layout.places.items()
            if place.module == "embeddings"
            and model.headers[tensor].shape[:1] == (vocabulary_size(model.config),)
        ]
        return found[0] if len(found) == 1 else None

    def _aim(
        self,
        stretch: Stretch,
        spot: Spot,
        located: Sequence[Located],
        inputs: Sequence[Input],
        shape: tuple[int, ...],
    ) -> AimPlan | None:
        """How a tensor is drawn back to the base's; None for one whose inputs are not known."""
        setting, base = self._recipe.aim, stretch.aim_base
        if setting is None or base is None:
            return None
        at = self._located(stretch.part, base, spot)
        activation = at and self._statistics[base.model].get(ACTIVATION_MEAN, at[1])
        if at is None or activation is None:
            if len(shape) > 1 and spot.place.module != "embeddings":
                self._unmeasured.append(spot.name)
            return None
        if at in located:
            return AimPlan(inputs[located.index(at)], setting.omega, activation)
        fitted, common = self._fitted(stretch, spot, [*located, at])
        if common != shape:
            raise ModelError(
                f"tensor '{at[1]}' of '{at[0]}' has {common[0]} rows and the merge {shape[0]}: "
                "aim needs a base with the same rows"
            )
        return AimPlan(fitted[-1], setting.omega, activation)

    def _is_merged(self, spot: Spot, found: Sequence[Located | None]) -> bool:
        """Buffers are not: masks, counters, what follows from the config."""
        if spot.name.endswith(DERIVED):
            return False
        headers = [self._parents.models[at[0]].headers[at[1]] for at in found if at]
        return any(header.dtype.is_floating_point or header.packed for header in headers)

    def _kept(self, spot: Spot, found: Sequence[Located | None]) -> TensorPlan:
        """A buffer of the first source that has it."""
        at = next(at for at in found if at)
        self.notes.append(f"tensor '{spot.place.template}' is no weight: copied from '{at[0]}'")
        return self.copied(spot.name, at)

    def _all_found(
        self, spot: Spot, listed: Sequence[Source], found: Sequence[Located | None]
    ) -> list[Located]:
        located: list[Located] = []
        for source, at in zip(listed, found, strict=True):
            if at is None:
                raise ModelError(
                    f"'{source.model}' has no tensor '{spot.name}', which the merge needs: "
                    "the models do not fit together"
                )
            header = self._parents.models[source.model].headers[at[1]]
            if header.packed:
                raise ModelError(
                    f"tensor '{at[1]}' of '{source.model}' is quantised: merge the models as they "
                    "were before"
                )
            located.append(at)
        return located

    def _fitted(
        self, stretch: Stretch, spot: Spot, located: Sequence[Located]
    ) -> tuple[tuple[Input, ...], tuple[int, ...]]:
        """The inputs in one shape, and that shape: rows of tokens in the output's order."""
        shapes = [self._parents.models[model].headers[name].shape for model, name in located]
        if self._has_tokens(spot, located, shapes):
            if self._vocabulary is not None:
                names = [model for model, _ in located]
                heights = {m: shape[0] for m, shape in zip(names, shapes, strict=True)}
                rows = self._vocabulary.rows(names, stretch.base_name, heights)
                inputs = [Input(m, n, rows[m], _owners(rows[m], located)) for m, n in located]
                shapes = [(self._vocabulary.size, *shape[1:]) for shape in shapes]
                return tuple(inputs), self._one_shape(spot, located, shapes)
            if self._truncate:
                lowest = min(shape[0] for shape in shapes)
                shapes = [(lowest, *shape[1:]) for shape in shapes]
        shape = self._one_shape(spot, located, shapes)
        return tuple(Input(model, name) for model, name in located), shape

    def _has_tokens(
        self, spot: Spot, located: Sequence[Located], shapes: Sequence[tuple[int, ...]]
    ) -> bool:
        """Whether rows are tokens: of the embeddings of tokens, not of positions, and of heads."""
        if spot.place.module not in ("embeddings", "head"):
            return False
        sizes = [vocabulary_size(self._parents.models[model].config) for model, _ in located]
        same = [s[:1] == (size,) for s, size in zip(shapes, sizes, strict=True)]
        if self._vocabulary is not None and any(same) and not all(same):
            (model, name), shape = next(
                (at, s) for at, s, fits in zip(located, shapes, same, strict=True) if not fits
            )
            raise ModelError(
                f"tensor '{name}' of '{model}' has {shape[0]} rows and its config.json counts "
                f"{vocabulary_size(self._parents.models[model].config)} tokens: correct vocab_size"
            )
        return all(same)

    def _one_shape(
        self, spot: Spot, located: Sequence[Located], shapes: Sequence[tuple[int, ...]]
    ) -> tuple[int, ...]:
        for (model, name), shape in zip(located, shapes, strict=True):
            if shape != shapes[0]:
                remedy = ""
                if shape[1:] == shapes[0][1:] and spot.place.module in ("embeddings", "head"):
                    remedy = ": for models with different tokens give a tokenizer_source"
                raise ModelError(
                    f"tensor '{name}' is {list(shapes[0])} in '{located[0][0]}' and "
                    f"{list(shape)} in '{model}': they do not fit together{remedy}"
                )
        own = self._parents.models[self._parents.donor].headers.get(spot.name)
        free = self._vocabulary or self._truncate or spot.place.layer is not None
        if own is not None and own.shape != shapes[0] and not free:
            # The first and the last slice may be of different models.
            raise ModelError(
                f"tensor '{spot.name}' is {list(own.shape)} in '{self._parents.donor}' and "
                f"{list(shapes[0])} in the merge: the models do not fit together"
            )
        return shapes[0]


def _owners(rows: Any, located: Sequence[Located]) -> tuple[Located, ...]:
    return () if rows is None else tuple(located)


def _value(
    key: str,
    default: Any,
    scopes: Sequence[Mapping[str, Any]],
    tensor: str,
    t: float,
    model: str | None,
) -> Any:
    value = resolve(key, scopes, tensor, t)
    if value is None:
        value = default
    if value is None:
        of = f" of model '{model}'" if model else ""
        raise RecipeError(f"'{key}'{of} has no value for tensor '{tensor}': give one")
    return value


def _check_values(
    name: str, method: str, per_model: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]
) -> None:
    """What no parameter alone shows."""
    key = {"linear": "normalize", "multislerp": "normalize_weights"}.get(method)
    if key and shared[key] and abs(sum(p["weight"] for p in per_model)) < 1e-8:
        raise RecipeError(
            f"the weights of tensor '{name}' sum to 0 and cannot be normalized: "
            f"change them or set {key}: false"
        )
    if method.startswith("della"):
        for parameters in per_model:
            density, epsilon = parameters["density"], parameters["epsilon"]
            if density < 1 and not abs(epsilon) < density < 1 - abs(epsilon):
                raise RecipeError(
                    f"density {density} and epsilon {epsilon} of tensor '{name}': "
                    "density - epsilon and density + epsilon have to be inside (0, 1)"
                )


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
