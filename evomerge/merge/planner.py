"""From a recipe and its opened models to a plan: which tensors there are, slice by slice.

Reads names, shapes and configs; no value. Tensors of different models belong together when they
stand in the same place of the same part, whatever stands before their names. What each tensor is
made of is found by `assembly`.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from evomerge.errors import ModelError, RecipeError
from evomerge.layout import Place
from evomerge.merge.assembly import DERIVED, Assembler, Parents, Spot, Stretch
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.plan import Plan, TensorPlan
from evomerge.merge.statistics import Statistics
from evomerge.merge.vocabulary import plan_vocabulary
from evomerge.recipe import Filtered, ModelEntry, Part, Recipe, Slice, Source


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
    parents, measured = Parents(models, donor), statistics or {}
    assembler = Assembler(recipe, parents, vocabulary, truncate, measured)
    builder = _Builder(recipe, parents, assembler, measured.keys())
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
        tuple(dict.fromkeys([*recipe.skipped_layers(), *builder.notes, *assembler.without_aim()])),
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


class _Builder:
    """Collects the tensor plans of one part after the other. measured: the models that there are
    statistics of."""

    def __init__(
        self,
        recipe: Recipe,
        parents: Parents,
        assembler: Assembler,
        measured: Collection[str],
    ) -> None:
        self.tensors: list[TensorPlan] = []
        self.layers: dict[str, list[tuple[str, int]]] = {}
        self.head = False
        self.notes = assembler.notes
        self._recipe = recipe
        self._parents = parents
        self._assembler = assembler
        self._measured = measured

    def merge(self, part: str, made: Part) -> None:
        """Plan a part as the recipe says."""
        self._check_layered(part, made)
        slices = made.slices or (self._whole(part, made.models or ()),)
        self.layers[part] = []
        for position, one in enumerate(slices):
            self._add(part, made, one, position == 0, position == len(slices) - 1)

    def copy(self, part: str) -> None:
        """Plan a part that the recipe does not name: it stays as the donor has it."""
        donor = self._parents.donor
        layout = self._parents.layout(donor, part)
        self.layers[part] = [(donor, layer) for layer in range(layout.layers)]
        for name in layout.places:
            self.tensors.append(self._assembler.copied(name, (donor, name)))
        self.notes.append(
            f"part '{part}' ({len(layout.places)} tensors) is copied from '{donor}': "
            "the recipe does not name it"
        )

    def _check_layered(self, part: str, made: Part) -> None:
        """Layers have to be known where they matter: in slices and gradients."""
        if not (made.slices or _has_gradients(self._recipe, made)):
            return
        names = [s.model for one in made.slices or () for s in one.sources]
        names += [entry.model for entry in made.models or ()]
        for name in names:
            layout = self._parents.layout(name, part)
            one_of_many = len(self._parents.models[name].parts) > 1 and not made.slices
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
        depths = {name: self._parents.layout(name, part).layers for name in listed}
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
        stretch = Stretch(part, tuple(sources), base, self._base_name(one), aim_base, scopes)
        for spot in self._spots(part, one.sources, first, last):
            self.tensors.append(self._assembler.merged(stretch, spot))
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
        if name not in self._measured:
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
            depth = self._parents.layout(source.model, part).layers
            if source.layer_range[1] > depth:
                raise RecipeError(
                    f"layer_range {list(source.layer_range)} is outside '{source.model}', which "
                    f"has {depth} layers: end at {depth} at most"
                )

    def _check_fits(self, part: str, name: str) -> None:
        """The layers that a slice brings have to be made like those that the config describes."""
        donor = self._parents.donor
        if name == donor:
            return
        ours, theirs = (self._made(part, model) for model in (donor, name))
        if ours != theirs:
            key, shape = min(ours ^ theirs)
            raise ModelError(
                f"'{key}' of the layers is not {list(shape)} both in '{donor}' and in '{name}': "
                "their layers do not fit together"
            )

    def _made(self, part: str, name: str) -> set[tuple[str, tuple[int, ...]]]:
        """What a model's layers hold, whatever their number."""
        model, index = self._parents.models[name], self._parents.layout(name, part).index
        return {
            (key, model.headers[tensor].shape)
            for (layer, key), tensor in index.items()
            if layer is not None and not key.endswith(DERIVED)
        }

    def _spots(
        self, part: str, sources: Sequence[Source], first: bool, last: bool
    ) -> Iterator[Spot]:
        """The slice's output tensors in the order of its first source. A tensor that only another
        source has is an error, unless it is a head, which may be tied where it is missing."""
        reference = sources[0]
        start, end = reference.layer_range
        own = self._parents.layout(reference.model, part)
        named = self._parents.layout(self._parents.donor, part)
        places = {at: own.places[name] for at, name in own.index.items()}
        keys = {_key(at) for at in places}
        # The donor's too: loaders expect what its config asks for, whatever the slice has.
        others = (self._parents.donor, *(source.model for source in sources[1:]))
        for model in dict.fromkeys(others):
            self._add_missing(part, model, reference.model, places, keys)
        templates = {_key(at): named.places[name].template for at, name in named.index.items()}
        offset = len(self.layers[part]) - start
        for (layer, key), place in places.items():
            template = templates.get(_key((layer, key)), place.template)
            if layer is None:
                if first if place.module == "embeddings" else last:
                    yield Spot(template, place, key, 0, 0.0)
            elif start <= layer < end:
                index = layer - start
                t = index / (reference.length - 1) if reference.length > 1 else 1.0
                yield Spot(template.format(layer + offset), place, key, index, t)

    def _add_missing(
        self,
        part: str,
        model: str,
        reference: str,
        places: dict[tuple[int | None, str], Place],
        keys: set[tuple[bool, str]],
    ) -> None:
        layout = self._parents.layout(model, part)
        for at, name in layout.index.items():
            if _key(at) in keys:
                continue
            if layout.places[name].module == "head":
                places.setdefault(at, layout.places[name])
            elif name.endswith(DERIVED):
                template = layout.places[name].template
                self.notes.append(f"tensor '{template}' of '{model}' is left out: it is derived")
            else:
                raise ModelError(
                    f"'{model}' has the tensor '{name}', which '{reference}' "
                    "lacks: they do not fit together"
                )


def _key(at: tuple[int | None, str]) -> tuple[bool, str]:
    """What a tensor is in any layer, or outside the layers, where the same name is another tensor:
    OPT has a final_layer_norm in each layer and one behind them."""
    layer, key = at
    return layer is None, key


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
