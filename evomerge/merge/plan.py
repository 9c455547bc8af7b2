"""The plan of a merge: for every output tensor its inputs, method and parameters.

Made from a recipe and the headers of its models; no value is read here. Both sinks compute a
tensor by `compute`, so that what is scored is what is shipped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from evomerge.errors import ModelError, RecipeError
from evomerge.merge import methods
from evomerge.merge.checkpoint import Checkpoint, Header
from evomerge.recipe import Recipe, Slice, Source, resolve


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor.

    inputs: (model, tensor name) of each; base: likewise, for methods that need one.
    per_model: parameters of each input; shared: those of the merge. `compute_dtype` is what
    inputs are cast to (None: left as they are), `dtype` what the output is.
    """

    name: str
    shape: tuple[int, ...]
    inputs: tuple[tuple[str, str], ...]
    base: tuple[str, str] | None
    per_model: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any]
    compute_dtype: torch.dtype | None
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the output's values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """A whole merge.

    layers: (model, layer) that each output layer's place in the config follows.
    config_from, tokenizer_from: the models that give config.json and the tokenizer's files.
    seed: of stochastic masks.
    """

    recipe: Recipe
    tensors: tuple[TensorPlan, ...]
    layers: tuple[tuple[str, int], ...]
    config_from: str
    tokenizer_from: str
    seed: int

    @property
    def bytes(self) -> int:
        """Size of the merged model's values."""
        return sum(tensor.bytes for tensor in self.tensors)


class Inputs(Protocol):
    """Where the values come from: files, or memory."""

    def tensor(self, model: str, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        """A model's tensor, cast to `dtype` unless it is None."""
        ...

    def task_vector(
        self, model: tuple[str, str], base: tuple[str, str], dtype: torch.dtype | None
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
    if not values:  # the base alone
        return _cast(base, plan.dtype, out)
    direct = out if out is not None and out.dtype == plan.dtype == values[0].dtype else None
    key = (seed, plan.name)
    merged = methods.merge(method, base, values, plan.per_model, plan.shared, key, direct)
    return merged if direct is not None else _cast(merged, plan.dtype, out)


def _cast(value: torch.Tensor | None, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    if value is None:
        raise RecipeError("a merge of no model and no base is nothing: name a model")
    cast = value.to(dtype)
    return cast if out is None else out.copy_(cast)


def make_plan(recipe: Recipe, models: Mapping[str, Checkpoint], seed: int = 0) -> Plan:
    """Lay a recipe over its models (opened, by their names in the recipe).

    Raises RecipeError for a layer range outside a model or a missing parameter, ModelError for
    models that do not fit together.
    """
    slices = recipe.slices or (_whole(recipe, models),)
    builder = _Builder(recipe, models)
    for position, part in enumerate(slices):
        builder.add(part, first=position == 0, last=position == len(slices) - 1)
    first_source = slices[0].sources[0].model
    config_from = recipe.base_model or first_source
    tokenizer_from = _tokenizer_source(recipe, models, config_from)
    return Plan(
        recipe, tuple(builder.tensors), tuple(builder.layers), config_from, tokenizer_from, seed
    )


def _whole(recipe: Recipe, models: Mapping[str, Checkpoint]) -> Slice:
    entries = recipe.models or ()
    depths = {entry.model: models[entry.model].layout.layers for entry in entries}
    if recipe.base_model is not None:
        depths[recipe.base_model] = models[recipe.base_model].layout.layers
    if len(set(depths.values())) > 1:
        one, *others = depths
        other = next(name for name in others if depths[name] != depths[one])
        raise ModelError(
            f"'{one}' has {depths[one]} layers and '{other}' {depths[other]}: "
            "they do not fit together: choose layers with 'slices'"
        )
    sources = tuple(
        Source.model_construct(
            model=entry.model,
            layer_range=(0, depths[entry.model]),
            parameters=entry.parameters,
        )
        for entry in entries
    )
    return Slice.model_construct(sources=sources, base_model=None, parameters={})


@dataclass
class _Builder:
    """Collects the tensor plans of one slice after the other."""

    recipe: Recipe
    models: Mapping[str, Checkpoint]
    tensors: list[TensorPlan] = field(default_factory=list)
    layers: list[tuple[str, int]] = field(default_factory=list)

    def add(self, part: Slice, first: bool, last: bool) -> None:
        signature = self.recipe.signature
        base_name = part.base_model or self.recipe.base_model
        sources, base = self._split(part, base_name if signature.base else None)
        reference = part.sources[0]
        self._check_ranges(part.sources)
        layout = self.models[reference.model].layout
        offset = len(self.layers) - reference.layer_range[0]
        for name, place in layout.places.items():
            if place.layer is None:
                wanted = first if layout.before_layers(name) else last
                if wanted:
                    self._tensor(name, name, part, sources, base, 0.0, 0)
            elif reference.layer_range[0] <= place.layer < reference.layer_range[1]:
                index = place.layer - reference.layer_range[0]
                t = index / (reference.length - 1) if reference.length > 1 else 1.0
                name_out = place.template.format(place.layer + offset)
                self._tensor(name_out, name, part, sources, base, t, index)
        self.layers += [(reference.model, n) for n in range(*reference.layer_range)]

    def _split(self, part: Slice, base: str | None) -> tuple[list[Source], Source | None]:
        """The sources that take part, and the base's range. The base counts as a source only for
        methods that merge models themselves (slerp), and comes first there."""
        if base is None:
            return list(part.sources), None
        listed = [source for source in part.sources if source.model == base]
        others = [source for source in part.sources if source.model != base]
        own = listed[0] if listed else part.sources[0].model_copy(update={"model": base})
        if not self.recipe.signature.task_vectors:
            return [own, *others], None
        return others, own

    def _check_ranges(self, sources: Sequence[Source]) -> None:
        for source in sources:
            depth = self.models[source.model].layout.layers
            if source.layer_range[1] > depth:
                raise RecipeError(
                    f"layer_range {list(source.layer_range)} is outside '{source.model}', which "
                    f"has {depth} layers: end at {depth} at most"
                )

    def _tensor(
        self,
        name: str,
        reference_name: str,
        part: Slice,
        sources: Sequence[Source],
        base: Source | None,
        t: float,
        index: int,
    ) -> None:
        recipe = self.recipe
        scopes = (part.parameters, recipe.parameters)
        template = self.models[part.sources[0].model].layout.places[reference_name].template

        def located(source: Source) -> tuple[str, str]:
            return source.model, template.format(source.layer_range[0] + index)

        signature = recipe.signature
        low, high = signature.models
        if not low <= len(sources) <= high:
            raise RecipeError(
                f"'{recipe.merge_method}' merges {low if low == high else f'at least {low}'} "
                f"models, the recipe names {len(sources)}"
            )
        inputs = tuple(located(source) for source in sources)
        base_input = located(base) if base else None
        headers = self._headers(inputs + ((base_input,) if base_input else ()))
        per_model = tuple(
            {
                key: self._value(key, default, (source.parameters, *scopes), name, t, source.model)
                for key, default in signature.per_model.items()
            }
            for source in sources
        )
        shared = {
            key: self._value(key, default, scopes, name, t, None)
            for key, default in signature.shared.items()
        }
        self._check_normalized(name, per_model, shared)
        compute_dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
        out_dtype = getattr(torch, recipe.out_dtype) if recipe.out_dtype else None
        own = headers[-1].dtype if base_input else headers[0].dtype
        self.tensors.append(
            TensorPlan(
                name,
                headers[0].shape,
                inputs,
                base_input,
                per_model,
                shared,
                compute_dtype,
                out_dtype or compute_dtype or own,
            )
        )

    def _headers(self, inputs: Sequence[tuple[str, str]]) -> list[Header]:
        headers: list[Header] = []
        for model, name in inputs:
            header = self.models[model].headers.get(name)
            if header is None:
                raise ModelError(
                    f"'{model}' has no tensor '{name}', which '{inputs[0][0]}' has: "
                    "they do not fit together"
                )
            if headers and header.shape != headers[0].shape:
                raise ModelError(
                    f"tensor '{name}' is {list(headers[0].shape)} in '{inputs[0][0]}' and "
                    f"{list(header.shape)} in '{model}': they do not fit together"
                )
            headers.append(header)
        return headers

    def _value(
        self,
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

    def _check_normalized(
        self, name: str, per_model: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]
    ) -> None:
        if self.recipe.merge_method == "linear" and shared["normalize"]:
            total = sum(parameters["weight"] for parameters in per_model)
            if abs(total) < 1e-8:
                raise RecipeError(
                    f"the weights of tensor '{name}' sum to {total:g} and cannot be normalized: "
                    "change them or set normalize: false"
                )


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
