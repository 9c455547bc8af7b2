"""The plan of a merge: for every output tensor its inputs, method and parameters.

Made from a recipe and the headers of its models; no value is read here. Both sinks compute a
tensor by `compute`, so that what is scored is what is shipped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch

from evomerge.errors import ModelError, RecipeError
from evomerge.layout import Place
from evomerge.merge import methods
from evomerge.merge.checkpoint import Checkpoint, Header
from evomerge.recipe import Recipe, Slice, Source, resolve


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor.

    inputs: (model, tensor name) of each; base: likewise, for methods that need one.
    per_model: parameters of each input; shared: those of the merge. `compute_dtype` is what
    inputs are cast to, `dtype` what the output is.
    """

    name: str
    shape: tuple[int, ...]
    inputs: tuple[tuple[str, str], ...]
    base: tuple[str, str] | None
    per_model: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any]
    compute_dtype: torch.dtype
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the output's values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """A whole merge.

    layers: (model, layer) that each output layer's place in the config follows.
    head: the output has a head of its own, not tied to the embeddings.
    config_from, tokenizer_from: the models that give config.json and the tokenizer's files.
    seed: of stochastic masks.
    """

    recipe: Recipe
    tensors: tuple[TensorPlan, ...]
    layers: tuple[tuple[str, int], ...]
    head: bool
    config_from: str
    tokenizer_from: str
    seed: int

    @property
    def bytes(self) -> int:
        """Size of the merged model's values."""
        return sum(tensor.bytes for tensor in self.tensors)


class Inputs(Protocol):
    """Where the values come from: files, or memory. spare: the formulas' working memory."""

    spare: methods.Spare

    def tensor(self, model: str, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A model's tensor, cast to `dtype`."""
        ...

    def task_vector(
        self, model: tuple[str, str], base: tuple[str, str], dtype: torch.dtype
    ) -> torch.Tensor:
        """A model's tensor minus the base's, both cast first."""
        ...


def compute(
    plan: TensorPlan, method: str, inputs: Inputs, seed: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The values of one output tensor, in its dtype; written to `out`, of any dtype, if given."""
    dtype, base = plan.compute_dtype, None
    if plan.base is not None:
        base = inputs.tensor(*plan.base, dtype)
        values = [inputs.task_vector(source, plan.base, dtype) for source in plan.inputs]
    else:
        values = [inputs.tensor(*source, dtype) for source in plan.inputs]
    if base is not None and not values:
        return _cast(base, plan.dtype, out)
    direct = out if out is not None and out.dtype == plan.dtype == dtype else None
    call = methods.Call(
        base, values, plan.per_model, plan.shared, (seed, plan.name), direct, inputs.spare
    )
    merged = methods.merge(method, call)
    return merged if direct is not None else _cast(merged, plan.dtype, out)


def _cast(value: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    cast = value.to(dtype)
    return cast if out is None else out.copy_(cast)


def make_plan(recipe: Recipe, models: Mapping[str, Checkpoint], seed: int = 0) -> Plan:
    """Lay a recipe over its models (opened, by their names in the recipe).

    Raises RecipeError for a layer range outside a model or a missing parameter, ModelError for
    models that do not fit together.
    """
    slices = recipe.slices or (_whole(recipe, models),)
    config_from = recipe.base_model or slices[0].sources[0].model
    builder = _Builder(recipe, models, config_from)
    for position, part in enumerate(slices):
        builder.add(part, first=position == 0, last=position == len(slices) - 1)
    return Plan(
        recipe,
        tuple(builder.tensors),
        tuple(builder.layers),
        builder.head,
        config_from,
        _tokenizer_source(recipe, models, config_from),
        seed,
    )


def _whole(recipe: Recipe, models: Mapping[str, Checkpoint]) -> Slice:
    """`models` as one slice over all layers; as in mergekit, a base not listed comes last."""
    entries = {entry.model: entry.parameters for entry in recipe.models or ()}
    if recipe.base_model is not None:
        entries.setdefault(recipe.base_model, {})
    depths = {name: models[name].layout.layers for name in entries}
    one, *others = depths
    for other in others:
        if depths[other] != depths[one]:
            raise ModelError(
                f"'{one}' has {depths[one]} layers and '{other}' {depths[other]}: "
                "they do not fit together: choose layers with 'slices'"
            )
    # Built without validation: a model without layers has an empty range.
    sources = tuple(
        Source.model_construct(model=name, layer_range=(0, depths[name]), parameters=parameters)
        for name, parameters in entries.items()
    )
    return Slice.model_construct(sources=sources, base_model=None, parameters={})


@dataclass(frozen=True)
class _Spot:
    """Where one output tensor stands: its name in the output, its place in the first source, the
    layer's number inside the slice, and t, the position that gradients are taken at."""

    name: str
    place: Place
    index: int
    t: float


class _Builder:
    """Collects the tensor plans of one slice after the other."""

    def __init__(self, recipe: Recipe, models: Mapping[str, Checkpoint], config_from: str) -> None:
        self.tensors: list[TensorPlan] = []
        self.layers: list[tuple[str, int]] = []
        self.head = False
        self._recipe = recipe
        self._models = models
        self._config_from = config_from

    def add(self, part: Slice, first: bool, last: bool) -> None:
        """Plan a slice; the first one brings the embeddings, the last one norm and head."""
        sources, base = self._split(part)
        self._check_sources(part.sources, sources)
        self._check_fits(part.sources[0].model)
        for spot in self._spots(part.sources, first, last):
            self.tensors.append(self._tensor(spot, part, sources, base))
            self.head |= spot.place.module == "head"
        reference = part.sources[0]
        self.layers += [(reference.model, n) for n in range(*reference.layer_range)]

    def _split(self, part: Slice) -> tuple[list[Source], Source | None]:
        """The sources that are merged, and the base's. The base is one of the merged for methods
        on models themselves (slerp), and comes first there."""
        signature = self._recipe.signature
        if not signature.base:
            return list(part.sources), None
        name = part.base_model or self._recipe.base_model
        base = next((source for source in part.sources if source.model == name), None)
        if base is None:
            raise RecipeError(
                f"base_model '{name}' is not among a slice's sources: list it with its layer_range"
            )
        others = [source for source in part.sources if source is not base]
        return (others, base) if signature.task_vectors else ([base, *others], None)

    def _check_sources(self, listed: Sequence[Source], merged: Sequence[Source]) -> None:
        low, high = self._recipe.signature.models
        if not low <= len(merged) <= high:
            wanted = f"{low}" if low == high else f"at least {low}"
            raise RecipeError(
                f"'{self._recipe.merge_method}' merges {wanted} models, the base aside where it "
                f"is subtracted; the recipe names {len(merged)}"
            )
        for source in listed:
            depth = self._models[source.model].layout.layers
            if source.layer_range[1] > depth:
                raise RecipeError(
                    f"layer_range {list(source.layer_range)} is outside '{source.model}', which "
                    f"has {depth} layers: end at {depth} at most"
                )

    def _check_fits(self, name: str) -> None:
        """The layers that a slice brings have to be made like those that the config describes."""
        if name == self._config_from:
            return
        ours, theirs = (_made(self._models[n]) for n in (self._config_from, name))
        if ours != theirs:
            template, shape = min(ours ^ theirs)
            raise ModelError(
                f"'{template}' is not {list(shape)} both in '{self._config_from}' and in '{name}': "
                "their layers do not fit together"
            )

    def _spots(self, sources: Sequence[Source], first: bool, last: bool) -> Iterator[_Spot]:
        """The slice's output tensors in the order of its first source. A tensor that only another
        source has is an error, unless it is a head, which may be tied where it is missing."""
        reference = sources[0]
        start, end = reference.layer_range
        places = dict(self._models[reference.model].layout.places)
        for name, place in self._models[self._config_from].layout.places.items():
            if place.module == "head":  # loaders expect it, whatever the last slice has
                places.setdefault(name, place)
        templates = {place.template for place in places.values()}
        for source in sources[1:]:
            for name, place in self._models[source.model].layout.places.items():
                if place.template in templates:
                    continue
                if place.module != "head":
                    raise ModelError(
                        f"'{source.model}' has the tensor '{name}', which '{reference.model}' "
                        "lacks: they do not fit together"
                    )
                places.setdefault(name, place)
        offset = len(self.layers) - start
        for name, place in places.items():
            if place.layer is None:
                if first if place.module == "embeddings" else last:
                    yield _Spot(name, place, 0, 0.0)
            elif start <= place.layer < end:
                index = place.layer - start
                t = index / (reference.length - 1) if reference.length > 1 else 1.0
                yield _Spot(place.template.format(place.layer + offset), place, index, t)

    def _tensor(
        self, spot: _Spot, part: Slice, sources: Sequence[Source], base: Source | None
    ) -> TensorPlan:
        recipe, signature = self._recipe, self._recipe.signature
        inputs = tuple(self._located(source, spot) for source in sources)
        base_input = None if base is None else self._located(base, spot)
        headers = self._headers((*inputs, *([base_input] if base_input else [])))
        self._check_shape(spot, headers[0])
        scopes = (part.parameters, recipe.parameters)
        per_model = tuple(
            {
                key: _value(key, default, (source.parameters, *scopes), own, spot.t, model)
                for key, default in signature.per_model.items()
            }
            for source, (model, own) in zip(sources, inputs, strict=True)
        )
        shared = {
            key: _value(key, default, scopes, spot.name, spot.t, None)
            for key, default in signature.shared.items()
        }
        if recipe.merge_method == "linear" and shared["normalize"]:
            _check_total(spot.name, [parameters["weight"] for parameters in per_model])
        stored = reduce(torch.promote_types, (header.dtype for header in headers))
        dtype = _dtype(recipe.dtype) or stored
        return TensorPlan(
            spot.name,
            headers[0].shape,
            inputs,
            base_input,
            per_model,
            shared,
            dtype,
            _dtype(recipe.out_dtype) or dtype,
        )

    def _check_shape(self, spot: _Spot, header: Header) -> None:
        """Outside the layers, the first and the last slice may be of different models."""
        own = self._models[self._config_from].headers.get(spot.name)
        if spot.place.layer is None and own is not None and own.shape != header.shape:
            raise ModelError(
                f"tensor '{spot.name}' is {list(own.shape)} in '{self._config_from}' and "
                f"{list(header.shape)} in the merge: the models do not fit together"
            )

    def _located(self, source: Source, spot: _Spot) -> tuple[str, str]:
        """The input's tensor: of the same place, or the embeddings in the place of a tied head."""
        name = spot.place.template.format(source.layer_range[0] + spot.index)
        model = self._models[source.model]
        if spot.place.module == "head" and name not in model.headers:
            embeddings = [n for n, p in model.layout.places.items() if p.module == "embeddings"]
            if len(embeddings) == 1:
                return source.model, embeddings[0]
        return source.model, name

    def _headers(self, inputs: Sequence[tuple[str, str]]) -> list[Header]:
        headers: list[Header] = []
        for model, name in inputs:
            header = self._models[model].headers.get(name)
            if header is None:
                raise ModelError(
                    f"'{model}' has no tensor '{name}', which the merge needs: "
                    "the models do not fit together"
                )
            if headers and header.shape != headers[0].shape:
                raise ModelError(
                    f"tensor '{name}' is {list(headers[0].shape)} in '{inputs[0][0]}' and "
                    f"{list(header.shape)} in '{model}': they do not fit together"
                )
            headers.append(header)
        return headers


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


def _made(model: Checkpoint) -> set[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a model's layers, whatever their number."""
    places = model.layout.places.items()
    return {(p.template, model.headers[n].shape) for n, p in places if p.layer is not None}


def _check_total(name: str, weights: Sequence[float]) -> None:
    if abs(sum(weights)) < 1e-8:
        raise RecipeError(
            f"the weights of tensor '{name}' sum to 0 and cannot be normalized: "
            "change them or set normalize: false"
        )


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _tokenizer_source(recipe: Recipe, models: Mapping[str, Checkpoint], config_from: str) -> str:
    source = recipe.tokenizer_source
    if source is None or source == "base":
        return config_from
    if source == "union":
        hashes = {m.files.get("tokenizer.json"): name for name, m in models.items()}
        if len(hashes) > 1:
            raise RecipeError(
                "tokenizer_source: union: the models' tokenizers differ, and joining them is not "
                "supported yet: name one model"
            )
        return config_from
    name = source.removeprefix("model:")
    if name not in models:
        raise RecipeError(
            f"tokenizer_source: '{source}' is no model of the recipe: give base or one of them"
        )
    return name
