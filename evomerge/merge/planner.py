"""From a recipe and its opened models to a plan: which tensors there are, and what each is made of.

Reads names, shapes, dtypes and configs; no value. Tensors of different models belong together when
they stand in the same place of the same part, whatever stands before their names.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from evomerge.errors import ModelError, RecipeError
from evomerge.layout import Layout, Place
from evomerge.merge.checkpoint import Checkpoint, Header
from evomerge.merge.methods import result_dtype
from evomerge.merge.plan import COPY, AimPlan, Input, Located, Plan, TensorPlan
from evomerge.merge.statistics import ACTIVATION_MEAN, Statistics
from evomerge.merge.tokenizer import vocabulary_size
from evomerge.merge.vocabulary import Vocabulary, plan_vocabulary
from evomerge.recipe import Filtered, ModelEntry, Part, Recipe, Slice, Source, resolve

# Tensors that follow from the config: not every saved model has them.
_DERIVED = ("rotary_emb.inv_freq", "position_ids", "masked_bias")


def make_plan(
    recipe: Recipe,
    models: Mapping[str, Checkpoint],
    seed: int = 0,
    *,
    allow_crimes: bool = False,
    truncate: bool = False,
    statistics: Mapping[str, Statistics] | None = None,
) -> Plan:
    """Lay a recipe over its models (opened, by their names in the recipe).

    allow_crimes: models of different architectures may be merged, as far as their tensors fit.
    truncate: embeddings of different heights are cut to the lowest one. statistics: of the models
    that the recipe needs them of, which are the bases under `aim`.
    Raises RecipeError for a layer range outside a model or a missing parameter, ModelError for
    models that do not fit together.
    """
    named = recipe.model_names()
    donor = _donor(recipe, models)
    _check_kinds(recipe, models, donor, allow_crimes)
    settings = recipe.vocabulary
    vocabulary = None
    if settings is not None:
        ordered = {name: models[name] for name in named}
        vocabulary = plan_vocabulary(settings, ordered, donor)
    builder = _Builder(recipe, models, donor, vocabulary, truncate, statistics or {})
    merged = recipe.parts(models[donor].parts)
    for name in models[donor].parts:
        if name in merged:
            builder.merge(name, merged[name])
        else:
            builder.copy(name)
    return Plan(
        recipe,
        tuple(builder.tensors),
        {name: tuple(layers) for name, layers in builder.layers.items()},
        builder.head,
        donor,
        vocabulary,
        seed,
        (*recipe.skipped_layers(), *builder.notes, *_without_aim(builder.unmeasured)),
    )


def _donor(recipe: Recipe, models: Mapping[str, Checkpoint]) -> str:
    """The model that gives the config: the base, or else the first one; with `modules` the first
    of them that has all these parts."""
    named = recipe.model_names()
    ranked = [*([recipe.base_model] if recipe.base_model else []), *named]
    wanted = set(recipe.modules or ())
    return next((name for name in ranked if wanted <= models[name].parts.keys()), ranked[0])


def _check_kinds(
    recipe: Recipe, models: Mapping[str, Checkpoint], donor: str, allow_crimes: bool
) -> None:
    """Language models are merged with their like, plain state dicts with theirs."""
    plain = {name for name, model in models.items() if model.plain}
    if plain and len(plain) < len(models):
        other = next(name for name in models if name not in plain)
        raise ModelError(
            f"'{min(plain)}' is a plain state dict and '{other}' a language model: "
            "they do not fit together"
        )
    if plain and recipe.vocabulary is not None:
        raise RecipeError(f"'{min(plain)}' is a plain state dict: a merge of it has no tokenizer")
    kinds = {name: _architectures(model) for name, model in models.items()}
    for name, found in kinds.items():
        if not (allow_crimes or found & kinds[donor]):
            raise ModelError(
                f"'{name}' is {min(found)} and '{donor}' {min(kinds[donor])}: they do not fit "
                "together; --allow-crimes merges them as far as their tensors fit"
            )


def _architectures(model: Checkpoint) -> set[str]:
    """What a model is, and what its language part is."""
    configs = [model.config, model.config.get("text_config") or {}]
    keys = ("model_type", "_class_name")
    return {str(config[key]) for config in configs for key in keys if key in config} or {"?"}


@dataclass(frozen=True)
class _Spot:
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
class _Stretch:
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


class _Builder:
    """Collects the tensor plans of one part after the other."""

    def __init__(
        self,
        recipe: Recipe,
        models: Mapping[str, Checkpoint],
        donor: str,
        vocabulary: Vocabulary | None,
        truncate: bool,
        statistics: Mapping[str, Statistics],
    ) -> None:
        self.tensors: list[TensorPlan] = []
        self.layers: dict[str, list[tuple[str, int]]] = {}
        self.head = False
        self.notes: list[str] = []
        self.unmeasured: list[str] = []
        self._recipe = recipe
        self._models = models
        self._donor = donor
        self._vocabulary = vocabulary
        self._truncate = truncate
        self._statistics = statistics

    def merge(self, part: str, made: Part) -> None:
        """Plan a part as the recipe says."""
        self._check_layered(part, made)
        slices = made.slices or (self._whole(part, made.models or ()),)
        self.layers[part] = []
        for position, one in enumerate(slices):
            self._add(part, made, one, position == 0, position == len(slices) - 1)

    def copy(self, part: str) -> None:
        """Plan a part that the recipe does not name: it stays as the donor has it."""
        model = self._models[self._donor]
        layout = model.parts[part]
        self.layers[part] = [(self._donor, layer) for layer in range(layout.layers)]
        for name in layout.places:
            self.tensors.append(self._copied(name, Input(self._donor, name), model.headers[name]))
        self.notes.append(
            f"part '{part}' ({len(layout.places)} tensors) is copied from '{self._donor}': "
            "the recipe does not name it"
        )

    def _layout(self, model: str, part: str) -> Layout:
        """A model's layout of a part; a model of one part only is that part."""
        parts = self._models[model].parts
        if part not in parts and len(parts) > 1:
            raise ModelError(
                f"'{model}' has no part '{part}', only {', '.join(parts)}: "
                f"it does not fit together with '{self._donor}'"
            )
        return parts.get(part) or next(iter(parts.values()))

    def _check_layered(self, part: str, made: Part) -> None:
        """Layers have to be known where they matter: in slices and gradients."""
        if not (made.slices or _has_gradients(self._recipe, made)):
            return
        names = [s.model for one in made.slices or () for s in one.sources]
        names += [entry.model for entry in made.models or ()]
        for name in names:
            layout = self._layout(name, part)
            one_of_many = len(self._models[name].parts) > 1 and not made.slices
            if layout.unclear or not (layout.layers or one_of_many):
                reason = layout.unclear or "it has none"
                raise ModelError(
                    f"'{name}': its layers cannot be told ({reason}): use 'models', without lists "
                    "as gradients over the layers"
                )

    def _whole(self, part: str, entries: Sequence[ModelEntry]) -> Slice:
        """`models` as one slice over all layers; as in mergekit, a base not listed comes last."""
        listed = {entry.model: entry.parameters for entry in entries}
        if self._recipe.base_model is not None:
            listed.setdefault(self._recipe.base_model, {})
        depths = {name: self._layout(name, part).layers for name in listed}
        one, *others = depths
        for other in others:
            if depths[other] != depths[one]:
                raise ModelError(
                    f"'{one}' has {depths[one]} layers and '{other}' {depths[other]}: "
                    "they do not fit together: choose layers with 'slices'"
                )
        if self._recipe.aim is not None and self._recipe.signature.base == "none":
            # A base that is not listed is only there for aim.
            depths = {entry.model: depths[entry.model] for entry in entries}
        # Built without validation: a model without layers has an empty range.
        sources = tuple(
            Source.model_construct(model=name, layer_range=(0, depth), parameters=listed[name])
            for name, depth in depths.items()
        )
        return Slice.model_construct(sources=sources, base_model=None, parameters={})

    def _add(self, part: str, made: Part, one: Slice, first: bool, last: bool) -> None:
        """Plan a slice; the first one brings the embeddings, the last one norm and head."""
        sources, base = self._split(one)
        aim_base = self._aim_base(one)
        self._check_sources(part, [*one.sources, *([aim_base] if aim_base else [])], sources)
        self._check_fits(part, one.sources[0].model)
        scopes = (one.parameters, made.parameters, self._recipe.parameters)
        stretch = _Stretch(part, tuple(sources), base, self._base_name(one), aim_base, scopes)
        for spot in self._spots(part, one.sources, first, last):
            self.tensors.append(self._tensor(stretch, spot))
            self.head |= spot.place.module == "head"
        reference = one.sources[0]
        self.layers[part] += [(reference.model, n) for n in range(*reference.layer_range)]

    def _base_name(self, one: Slice) -> str | None:
        return one.base_model or self._recipe.base_model

    def _split(self, one: Slice) -> tuple[list[Source], Source | None]:
        """The sources that are merged, and the base's. The base is one of the merged for methods
        on models themselves (slerp), and comes first there."""
        signature, name = self._recipe.signature, self._base_name(one)
        if signature.base == "none" or (signature.base == "optional" and name is None):
            return list(one.sources), None
        base = next((source for source in one.sources if source.model == name), None)
        if base is None:
            raise RecipeError(
                f"base_model '{name}' is not among a slice's sources: list it with its layer_range"
            )
        others = [source for source in one.sources if source is not base]
        return (others, base) if signature.task_vectors else ([base, *others], None)

    def _aim_base(self, one: Slice) -> Source | None:
        """The base's layers under `aim`: as listed, else those with the sources' numbers."""
        name = self._base_name(one)
        if self._recipe.aim is None or name is None:
            return None
        if name not in self._statistics:
            raise RecipeError(
                f"aim: there are no statistics of the base '{name}': `evomerge merge` measures them"
            )
        for source in one.sources:
            if source.model == name:
                return source
        ranges = {source.layer_range for source in one.sources}
        if len(ranges) > 1:
            raise RecipeError(
                f"aim: the sources of a slice differ in layer_range and base_model '{name}' is not "
                "among them: list it with its layer_range"
            )
        return Source.model_construct(model=name, layer_range=ranges.pop(), parameters={})

    def _check_sources(self, part: str, listed: Sequence[Source], merged: Sequence[Source]) -> None:
        low, high = self._recipe.signature.models
        if not low <= len(merged) <= high:
            wanted = f"{low}" if low == high else f"at least {low}"
            raise RecipeError(
                f"'{self._recipe.merge_method}' merges {wanted} models, the base aside where it "
                f"is subtracted; the recipe names {len(merged)}"
            )
        for source in listed:
            depth = self._layout(source.model, part).layers
            if source.layer_range[1] > depth:
                raise RecipeError(
                    f"layer_range {list(source.layer_range)} is outside '{source.model}', which "
                    f"has {depth} layers: end at {depth} at most"
                )

    def _check_fits(self, part: str, name: str) -> None:
        """The layers that a slice brings have to be made like those that the config describes."""
        if name == self._donor:
            return
        ours, theirs = (self._made(part, model) for model in (self._donor, name))
        if ours != theirs:
            key, shape = min(ours ^ theirs)
            raise ModelError(
                f"'{key}' of the layers is not {list(shape)} both in '{self._donor}' and in "
                f"'{name}': their layers do not fit together"
            )

    def _made(self, part: str, name: str) -> set[tuple[str, tuple[int, ...]]]:
        """What a model's layers hold, whatever their number."""
        model, index = self._models[name], self._layout(name, part).index
        return {
            (key, model.headers[tensor].shape)
            for (layer, key), tensor in index.items()
            if layer is not None and not key.endswith(_DERIVED)
        }

    def _spots(
        self, part: str, sources: Sequence[Source], first: bool, last: bool
    ) -> Iterator[_Spot]:
        """The slice's output tensors in the order of its first source. A tensor that only another
        source has is an error, unless it is a head, which may be tied where it is missing."""
        reference = sources[0]
        start, end = reference.layer_range
        own = self._layout(reference.model, part)
        named = self._layout(self._donor, part)
        places = {at: own.places[name] for at, name in own.index.items()}
        for at, name in named.index.items():
            if named.places[name].module == "head":  # loaders expect it, whatever the slice has
                places.setdefault(at, named.places[name])
        keys = {key for _, key in places}
        for source in sources[1:]:
            self._add_missing(part, source.model, reference.model, places, keys)
        templates = {key: named.places[name].template for (_, key), name in named.index.items()}
        offset = len(self.layers[part]) - start
        for (layer, key), place in places.items():
            template = templates.get(key, place.template)
            if layer is None:
                if first if place.module == "embeddings" else last:
                    yield _Spot(template, place, key, 0, 0.0)
            elif start <= layer < end:
                index = layer - start
                t = index / (reference.length - 1) if reference.length > 1 else 1.0
                yield _Spot(template.format(layer + offset), place, key, index, t)

    def _add_missing(
        self,
        part: str,
        model: str,
        reference: str,
        places: dict[tuple[int | None, str], Place],
        keys: set[str],
    ) -> None:
        layout = self._layout(model, part)
        for at, name in layout.index.items():
            if at[1] in keys:
                continue
            if layout.places[name].module == "head":
                places.setdefault(at, layout.places[name])
            elif name.endswith(_DERIVED):
                self.notes.append(f"tensor '{name}' of '{model}' is left out: it is derived")
            else:
                raise ModelError(
                    f"'{model}' has the tensor '{name}', which '{reference}' "
                    "lacks: they do not fit together"
                )

    def _located(self, part: str, source: Source, spot: _Spot) -> Located | None:
        """The input's tensor: of the same place, or the embeddings in the place of a tied head."""
        layer = None if spot.place.layer is None else source.layer_range[0] + spot.index
        layout = self._layout(source.model, part)
        name = layout.index.get((layer, spot.key))
        if name is None and spot.place.module == "head" and spot.name.endswith("weight"):
            name = self._embeddings(source.model, layout)
        return None if name is None else (source.model, name)

    def _embeddings(self, name: str, layout: Layout) -> str | None:
        """The embeddings of tokens, if it is clear which they are."""
        model = self._models[name]
        found = [
            tensor
            for tensor, place in layout.places.items()
            if place.module == "embeddings"
            and model.headers[tensor].shape[:1] == (vocabulary_size(model.config),)
        ]
        return found[0] if len(found) == 1 else None

    def _tensor(self, stretch: _Stretch, spot: _Spot) -> TensorPlan:
        sources, base, scopes = stretch.sources, stretch.base, stretch.scopes
        listed = [*sources, *([base] if base else [])]  # the base comes last
        found = [self._located(stretch.part, source, spot) for source in listed]
        if not self._is_merged(spot, found):
            return self._kept(spot, found)
        located = self._all_found(spot, listed, found)
        headers = [self._models[model].headers[name] for model, name in located]
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

    def _aim(
        self,
        stretch: _Stretch,
        spot: _Spot,
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
                self.unmeasured.append(spot.name)
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

    def _is_merged(self, spot: _Spot, found: Sequence[Located | None]) -> bool:
        """Buffers are not: masks, counters, what follows from the config."""
        if spot.name.endswith(_DERIVED):
            return False
        dtypes = [self._models[at[0]].headers[at[1]].dtype for at in found if at]
        return any(dtype.is_floating_point for dtype in dtypes)

    def _kept(self, spot: _Spot, found: Sequence[Located | None]) -> TensorPlan:
        """A buffer of the first source that has it."""
        model, name = next(at for at in found if at)
        header = self._models[model].headers[name]
        self.notes.append(f"tensor '{spot.name}' is no weight: copied from '{model}'")
        return self._copied(spot.name, Input(model, name), header)

    def _copied(self, name: str, source: Input, header: Header) -> TensorPlan:
        dtype = header.dtype
        if dtype.is_floating_point and not header.packed:  # codes mean nothing in another dtype
            dtype = _dtype(self._recipe.out_dtype) or _dtype(self._recipe.dtype) or dtype
        return TensorPlan(name, header.shape, COPY, (source,), None, (), {}, dtype, dtype)

    def _all_found(
        self, spot: _Spot, listed: Sequence[Source], found: Sequence[Located | None]
    ) -> list[Located]:
        located: list[Located] = []
        for source, at in zip(listed, found, strict=True):
            if at is None:
                raise ModelError(
                    f"'{source.model}' has no tensor '{spot.name}', which the merge needs: "
                    "the models do not fit together"
                )
            header = self._models[source.model].headers[at[1]]
            if header.packed:
                raise ModelError(
                    f"tensor '{at[1]}' of '{source.model}' is quantised: merge the models as they "
                    "were before"
                )
            located.append(at)
        return located

    def _fitted(
        self, stretch: _Stretch, spot: _Spot, located: Sequence[Located]
    ) -> tuple[tuple[Input, ...], tuple[int, ...]]:
        """The inputs in one shape, and that shape: rows of tokens in the output's order."""
        shapes = [self._models[model].headers[name].shape for model, name in located]
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
        self, spot: _Spot, located: Sequence[Located], shapes: Sequence[tuple[int, ...]]
    ) -> bool:
        """Whether rows are tokens: of the embeddings of tokens, not of positions, and of heads."""
        if spot.place.module not in ("embeddings", "head"):
            return False
        sizes = [vocabulary_size(self._models[model].config) for model, _ in located]
        same = [s[:1] == (size,) for s, size in zip(shapes, sizes, strict=True)]
        if self._vocabulary is not None and any(same) and not all(same):
            (model, name), shape = next(
                (at, s) for at, s, fits in zip(located, shapes, same, strict=True) if not fits
            )
            raise ModelError(
                f"tensor '{name}' of '{model}' has {shape[0]} rows and its config.json counts "
                f"{vocabulary_size(self._models[model].config)} tokens: correct vocab_size"
            )
        return all(same)

    def _one_shape(
        self, spot: _Spot, located: Sequence[Located], shapes: Sequence[tuple[int, ...]]
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
        own = self._models[self._donor].headers.get(spot.name)
        free = self._vocabulary or self._truncate or spot.place.layer is not None
        if own is not None and own.shape != shapes[0] and not free:
            # The first and the last slice may be of different models.
            raise ModelError(
                f"tensor '{spot.name}' is {list(own.shape)} in '{self._donor}' and "
                f"{list(shapes[0])} in the merge: the models do not fit together"
            )
        return shapes[0]


def _without_aim(names: Sequence[str]) -> Iterator[str]:
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield (
            f"aim: '{names[0]}'{others} are merged without it: the activations that enter them "
            "could not be measured"
        )


def _owners(rows: Any, located: Sequence[Located]) -> tuple[Located, ...]:
    return () if rows is None else tuple(located)


def _has_gradients(recipe: Recipe, made: Part) -> bool:
    scopes = [recipe.parameters, made.parameters]
    scopes += [entry.parameters for entry in made.models or ()]
    return any(_is_gradient(value) for scope in scopes for value in scope.values())


def _is_gradient(value: Any) -> bool:
    """Lists are gradients, and so are the values of a list of filters that are lists."""
    if not isinstance(value, list):
        return False
    if value and isinstance(value[0], Filtered):
        return any(isinstance(entry.value, list) for entry in value)
    return len(value) > 1


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
            if density < 1 and not epsilon < density < 1 - epsilon:
                raise RecipeError(
                    f"density {density} and epsilon {epsilon} of tensor '{name}': "
                    "density - epsilon and density + epsilon have to be inside (0, 1)"
                )


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
