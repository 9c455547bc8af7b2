"""Residual-stream scales folded into a stack of layers, as an ordinary passthrough recipe.

A slot is a layer of a parent and a scale s that the residual stream is multiplied by before it
(arXiv 2403.13187, section 3.2). A block h + f(norm(h)) sees only the direction of h, so with c the
product of the scales so far the same function is computed by a stream that is left alone: what a
slot adds to it is divided by c, and a negative c turns the sign of the norms' weights. The last
slot's c, which nothing divides any more, is taken out by the final norm but for its sign. Exact up
to the norms' epsilon. Which tensors these are is a table of architectures; what is not in it is
refused. Knows nothing of values.

Embeddings, final norm and head are those of the models that the first and the last slot are of, as
in any passthrough recipe, or a given model's: then it stands beside those two layers in a `linear`
recipe, in which every weight is 0 or what its tensor is scaled by.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from evomerge.errors import ModelError
from evomerge.layout import Layout
from evomerge.recipe import Recipe
from evomerge.space import Infeasible

BOUND = 8.0
"""The product of scales stays in [1/BOUND, BOUND] in magnitude, where the epsilon is not felt."""

_DIGITS = 9  # of a factor in a recipe: finer than float32, and s times 1/s is 1


@dataclass(frozen=True)
class Slot:
    """A layer of a model (its path), and what the residual stream is multiplied by before it."""

    model: str
    layer: int
    scale: float = 1.0


@dataclass(frozen=True)
class Fold:
    """The tensors that carry c, the product of scales up to a slot, as parts of their names.

    written: what makes a slot's output, divided by c. read: the weights on a stream that no norm
    comes before, multiplied by c. signed: the norms before sub-layers, multiplied by the sign of c.
    final: the norm after the last layer, likewise. unsigned: why a sign cannot be carried, or ''.
    """

    written: tuple[str, ...]
    signed: tuple[str, ...]
    final: str
    read: tuple[str, ...] = ()
    unsigned: str = ""


_LLAMA = Fold(
    written=(".o_proj.", ".down_proj"),  # fused experts have no dot after it
    signed=(".input_layernorm.weight", ".post_attention_layernorm.weight"),
    final="model.norm.weight",
)
_ONE_NORM = Fold(_LLAMA.written, _LLAMA.signed[:1], _LLAMA.final)
_MIXTRAL = Fold((".o_proj.", ".w2."), _LLAMA.signed, _LLAMA.final)
# The norm comes after a sub-layer, which reads the stream as it is: through these weights alone.
_NORM_AFTER = Fold(
    written=(".post_attention_layernorm.weight", ".post_feedforward_layernorm.weight"),
    signed=(),
    final="model.norm.weight",
    read=tuple(f".{name}_proj.weight" for name in ("q", "k", "v", "gate", "up")),
)
_ONE_PLUS = Fold(_LLAMA.written, (), _LLAMA.final, unsigned="its norms multiply by 1 + w")

# By model_type; of several, the first whose tensors a model has. A line is added together with a
# model of that type in tests/merge/test_layer_space.py.
_FOLDS: dict[str, tuple[Fold, ...]] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
            *("phi3", "smollm3", "granite", "olmoe", "glm", "seed_oss", "ernie4_5", "deepseek_v3"),
        ),
        (_LLAMA,),
    ),
    "mixtral": (_MIXTRAL, _LLAMA),  # experts are called w1 to w3 in most files, not in all
    **dict.fromkeys(("cohere", "cohere2"), (_ONE_NORM,)),  # attention and MLP share a norm
    **dict.fromkeys(("olmo2", "olmo3"), (_NORM_AFTER,)),
    "glm4": (  # norms before and after each sub-layer
        Fold(
            written=(".post_self_attn_layernorm.weight", ".post_mlp_layernorm.weight"),
            signed=_LLAMA.signed,
            final=_LLAMA.final,
        ),
    ),
    **dict.fromkeys(("gemma", "nemotron"), (_ONE_PLUS,)),
    "olmo": (Fold(_LLAMA.written, (), "", unsigned="its norms have no weights"),),
    # LayerNorm: the weights carry the sign, the biases stay as they are.
    "stablelm": (_LLAMA, _ONE_NORM),  # one norm where attention and MLP are parallel
    "starcoder2": (Fold((".o_proj.", ".mlp.c_proj."), _LLAMA.signed, _LLAMA.final),),
    "phi": (
        Fold((".self_attn.dense.", ".mlp.fc2."), _LLAMA.signed[:1], "model.final_layernorm.weight"),
    ),
    "gpt_neox": (
        Fold(
            written=(".attention.dense.", ".mlp.dense_4h_to_h."),
            signed=_LLAMA.signed,
            final="gpt_neox.final_layer_norm.weight",
        ),
    ),
    "gpt2": (
        Fold((".attn.c_proj.", ".mlp.c_proj."), (".ln_1.weight", ".ln_2.weight"), "ln_f.weight"),
    ),
}

FOLDABLE = tuple(sorted(_FOLDS))
"""The values of model_type that scales can be folded into."""

_POST_NORM = "it normalises the residual stream itself after each sub-layer"
_ONE_PLUS_AFTER = "its norms after the sub-layers multiply by 1 + w, which no scale of w divides"
_INEXACT = {
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), _ONE_PLUS_AFTER),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "distilbert", "electra"), _POST_NORM),
}


def fold_of(config: Mapping[str, Any], layout: Layout) -> Fold:
    """How scales are folded into models of this kind.

    config: of the model, or the language part of it. Raises ModelError, with the reason, where
    that is not exact, not known to be exact, or the model lacks tensors that its kind has.
    """
    kind = str(config.get("model_type"))
    if kind in _INEXACT:
        raise ModelError(f"scales cannot be folded into a model of type '{kind}': {_INEXACT[kind]}")
    if kind not in _FOLDS:
        raise ModelError(
            f"scales cannot be folded into a model of type '{kind}': whether that is exact was "
            f"never checked; it is for {', '.join(FOLDABLE)}"
        )
    if not layout.layers:
        reason = layout.unclear or "it has none"
        raise ModelError(f"scales cannot be folded: the model's layers cannot be told: {reason}")
    missing = [_missing(fold, layout) for fold in _FOLDS[kind]]
    for fold, part in zip(_FOLDS[kind], missing, strict=True):
        if part is None:
            return fold
    raise ModelError(
        f"scales cannot be folded into this model of type '{kind}': {missing[0]}, which such "
        "models have"
    )


@dataclass(frozen=True)
class Ends:
    """Where embeddings, final norm and head come from, whatever layers they stand beside.

    model: its path. layouts: of every model, by path.
    """

    model: str
    layouts: Mapping[str, Layout]

    def beside(self, run: "_Run", model: str, values: list[dict[str, Any]]) -> dict[str, Any]:
        """A model's layer as a source beside another's: of its number, if there is one, as in some
        architectures the layers are made differently."""
        layer = min(run.start, self.layouts[model].layers - 1)
        return _source(_Run(model, layer, layer + 1, 1.0), "weight", values)


@dataclass(frozen=True)
class _Run:
    """Layers [start, end) of a model, under one product of scales."""

    model: str
    start: int
    end: int
    factor: float


def stack(
    slots: Sequence[Slot],
    fold: Fold | None = None,
    dtype: str | None = None,
    ends: Ends | None = None,
) -> Recipe | Infeasible:
    """The recipe of the slots in order, scales folded in; dtype is the recipe's.

    fold: needed where a slot is scaled. ends: by default those of the first and the last slot's
    models. Neighbouring layers of one model with the same product of scales make one slice, and a
    product of 1 writes nothing. Infeasible without slots, and where the product is 0, not finite,
    outside [1/BOUND, BOUND] in magnitude, or negative in an architecture that cannot carry a sign.
    """
    if not slots:
        return Infeasible("no layer is chosen")
    product, products = 1.0, []
    for number, slot in enumerate(slots):
        product *= slot.scale
        reason = _unfit(product, fold)
        if reason:
            where = f"slot {number} ('{slot.model}' layer {slot.layer}, scale {slot.scale:g})"
            return Infeasible(f"{where}: the scales up to it multiply to {product:.4g}, {reason}")
        products.append(_rounded(product))
    runs = _runs(slots, products)
    shared = {} if dtype is None else {"dtype": dtype}
    if ends is None or runs[0].model == runs[-1].model == ends.model:
        return Recipe.from_dict(
            {"merge_method": "passthrough", "slices": _own_ends(runs, fold), **shared}
        )
    return Recipe.from_dict(
        {
            "merge_method": "linear",
            "slices": _given_ends(runs, fold, ends),
            "base_model": ends.model,  # gives config and tokenizer
            "parameters": {"weight": 1.0, "normalize": False},
            **shared,
        }
    )


def _runs(slots: Sequence[Slot], products: Sequence[float]) -> list[_Run]:
    # In a run of consecutive layers of one model, a layer's index minus its position is the same.
    runs = groupby(range(len(slots)), lambda i: (slots[i].model, slots[i].layer - i, products[i]))
    found = []
    for (model, offset, factor), positions in runs:
        first, *rest = positions
        last = rest[-1] if rest else first
        found.append(_Run(model, first + offset, last + offset + 1, factor))
    return found


def _own_ends(runs: Sequence[_Run], fold: Fold | None) -> list[dict[str, Any]]:
    """The slices of a passthrough recipe."""
    last = len(runs) - 1
    return [
        _slice(_source(run, "scale", _scales(fold, run.factor, ending=i == last)))
        for i, run in enumerate(runs)
    ]


def _given_ends(runs: Sequence[_Run], fold: Fold | None, ends: Ends) -> list[dict[str, Any]]:
    """The slices of a linear recipe, in which the ends' model stands beside the first and the last
    layer, unless these are its own: of it, only what is outside the layers counts. Not both are
    its own."""
    cut = _cut_off(runs, ends.model)
    last, slices = len(cut) - 1, []
    for i, run in enumerate(cut):
        own = run.model == ends.model
        scales = _scales(fold, run.factor, ending=own and i == last)
        if own or i not in (0, last):
            slices.append(_slice(_source(run, "weight", scales)))
            continue
        inside = {"filter": f"{ends.layouts[run.model].prefix}.", "value": 1.0}
        layer = _source(run, "weight", [*scales, inside, {"value": 0.0}])
        signs = []
        if i == last and fold is not None and run.factor < 0:
            signs = [{"filter": fold.final, "value": -1.0}]
        outside = {"filter": f"{ends.layouts[ends.model].prefix}.", "value": 0.0}
        beside = ends.beside(run, ends.model, [*signs, outside, {"value": 1.0}])
        slices.append(_slice(layer, beside))
    if cut[0].model == ends.model:
        # Of the last slice's sources mergekit 0.1.5 merges as many into final norm and head as the
        # first slice has: with one alone, both would be the last layer's model times 0.
        slices[0]["sources"].append(ends.beside(cut[0], cut[last].model, [{"value": 0.0}]))
    return slices


def _cut_off(runs: Sequence[_Run], model: str) -> list[_Run]:
    """The runs with the first and the last layer as runs of their own, where another model stands
    beside them: so even one of a single layer can."""
    *before, last = runs
    if last.model != model and last.end - last.start > 1:
        last_alone = replace(last, start=last.end - 1)
        before, last = [*before, replace(last, end=last.end - 1)], last_alone
    first, *rest = [*before, last]
    if {first.model, last.model} != {model} and first.end - first.start > 1:
        return [replace(first, end=first.start + 1), replace(first, start=first.start + 1), *rest]
    return [first, *rest]


def _slice(*sources: dict[str, Any]) -> dict[str, Any]:
    return {"sources": list(sources)}


def _source(run: _Run, parameter: str, values: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"model": run.model, "layer_range": [run.start, run.end]}
    return {**found, "parameters": {parameter: values}} if values else found


def _unfit(product: float, fold: Fold | None) -> str:
    """Why a product of scales cannot be folded, or ''."""
    if fold is None:
        return "" if product == 1 else "and how they are folded was not said"
    if not math.isfinite(product):
        return "which is not a finite number"
    if not 1 / BOUND <= abs(_rounded(product)) <= BOUND:
        return f"outside [1/{BOUND:g}, {BOUND:g}] in magnitude"
    if product < 0 and fold.unsigned:
        return f"and the sign cannot be folded into this architecture: {fold.unsigned}"
    return ""


def _scales(fold: Fold | None, factor: float, ending: bool) -> list[dict[str, Any]]:
    """The filters of a run: its parts are all that is scaled. ending: its model gives the final
    norm."""
    if fold is None or factor == 1:
        return []
    values = dict.fromkeys(fold.written, _rounded(1 / factor))
    values |= dict.fromkeys(fold.read, factor)
    if factor < 0:
        values |= dict.fromkeys((*fold.signed, *([fold.final] if ending else [])), -1.0)
    return [{"filter": part, "value": value} for part, value in values.items()]


def _rounded(factor: float) -> float:
    return float(f"{factor:.{_DIGITS}g}")


def _missing(fold: Fold, layout: Layout) -> str | None:
    """What of a fold a model lacks, in words, or None."""
    if fold.final and not any(fold.final in name for name in layout.places):
        return f"no tensor is called '{fold.final}'"
    for layer in range(layout.layers):
        names = [name for name, place in layout.places.items() if place.layer == layer]
        for part in (*fold.written, *fold.read, *fold.signed):
            if not any(part in name for name in names):
                return f"no tensor of layer {layer} has '{part}' in its name"
    return None
