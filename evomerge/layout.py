"""Where a tensor stands in a model, worked out from its name alone.

Knows nothing of values, shapes, files or architectures: a layer is the part of a name with a
number in it that all layers share (`model.layers.3.`, `transformer.h.3.`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from evomerge.errors import ModelError

_NUMBERED = re.compile(r"^(?P<prefix>(?:[^.]+\.)*?[^.\d]+)\.(?P<index>\d+)\.(?P<rest>.+)$")

_EMBEDDING_WORDS = ("embed", "wte", "wpe", "word_embeddings")
_HEAD_WORDS = ("lm_head", "embed_out")
_NORM_WORDS = ("norm", "ln_", "layernorm")
_ATTENTION_WORDS = ("attn", "attention")


@dataclass(frozen=True)
class Place:
    """One tensor's place.

    layer: index of its layer, None outside the layers.
    module: 'attention', 'mlp' or 'norms' (also the final norm), 'embeddings', 'head'.
    template: the name with the layer index replaced by '{}'; the name itself outside layers.
    """

    layer: int | None
    module: str
    template: str


@dataclass(frozen=True)
class Layout:
    """A model's tensors in order: `layers` counts them, `places` maps each name to its place.

    prefix: what stands before a layer's index, such as 'model.layers'; '' without layers.
    """

    layers: int
    prefix: str
    places: dict[str, Place]


def infer(names: Iterable[str]) -> Layout:
    """Work out the layout of a model with these tensor names.

    Raises ModelError when several parts of the model are numbered and none holds most tensors,
    or when layer numbers are missing.
    """
    names = list(names)
    matches = {name: _NUMBERED.match(name) for name in names}
    counts: dict[str, int] = {}
    for match in matches.values():
        if match:
            counts[match["prefix"]] = counts.get(match["prefix"], 0) + 1
    prefix = _main_prefix(counts)
    places: dict[str, Place] = {}
    indices: set[int] = set()
    for name, match in matches.items():
        if match and match["prefix"] == prefix:
            index = int(match["index"])
            indices.add(index)
            template = f"{prefix}.{{}}.{match['rest']}"
            places[name] = Place(index, _module(match["rest"]), template)
        else:
            places[name] = Place(None, _module(name), name)
    if indices != set(range(len(indices))):
        missing = sorted(set(range(max(indices))) - indices)
        raise ModelError(f"layers {missing} of '{prefix}.*' are missing: the model is incomplete")
    return Layout(len(indices), prefix, places)


def _main_prefix(counts: dict[str, int]) -> str:
    if not counts:
        return ""
    ranked = sorted(counts, key=lambda prefix: -counts[prefix])
    if len(ranked) > 1 and counts[ranked[1]] == counts[ranked[0]]:
        raise ModelError(
            f"two parts of the model are numbered alike ('{ranked[0]}.*' and '{ranked[1]}.*'): "
            "which of them holds the layers is ambiguous"
        )
    return ranked[0]


def _module(rest: str) -> str:
    """The module of a tensor, from its name inside the layer (or its whole name outside)."""
    lowered = rest.lower()
    if any(word in lowered for word in _HEAD_WORDS):
        return "head"
    if any(word in lowered for word in _EMBEDDING_WORDS):
        return "embeddings"
    owner = lowered.rsplit(".", 1)[0]  # without 'weight' or 'bias'
    if any(word in owner.rsplit(".", 1)[-1] for word in _NORM_WORDS):
        return "norms"
    if any(word in owner for word in _ATTENTION_WORDS):
        return "attention"
    return "mlp"
