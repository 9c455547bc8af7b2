"""Where a tensor stands in a model, worked out from its name alone.

Knows nothing of values, shapes, files or architectures: a layer is the part of a name with a
number in it that all layers share (`model.layers.3.`, `transformer.h.3.`), and a part of a
multi-part model is told by the words that its names begin with (`vision_tower.`, `decoder.`).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

_NUMBERED = re.compile(r"^(?P<prefix>(?:[^.]+\.)*?[^.\d]+)\.(?P<index>\d+)\.(?P<rest>.+)$")

# Parts of models, by a word that a name begins with; named as in mergekit's recipes.
_PARTS = {
    "language_model": "text_decoder",
    "text_model": "text_decoder",
    "text_encoder": "text_encoder",
    "vision_tower": "vision_tower",
    "vision_encoder": "vision_tower",
    "visual": "vision_tower",
    "vision_model": "vision_model",
    "audio_tower": "audio_tower",
    "audio_encoder": "audio_tower",
    "qformer": "qformer",
    "encoder": "encoder",
    "decoder": "decoder",
}
# These may stand inside another part, as in `visual.merger.`.
_PROJECTORS = {
    "multi_modal_projector",
    "mm_projector",
    "connector",
    "merger",
    "deepstack_merger_list",
}

_HEAD = re.compile(
    r"lm_head|embed_out|predictions\.|vocab_|final_logits_bias|classifier\."
    r"|(^|\.)(head|output|output_layer|decoder|score|proj_out)\.(weight|bias)$"
)
_EMBEDDINGS = re.compile(
    r"embed|\bwte\b|\bwpe\b|rotary|pos_emb|class_token|cls_token|patch_conv|project_in"
    r"|(^|\.)(shared|conv1|conv2|ln_pre|layernorm_pre|pre_layrnorm)\."
)
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)")
_ATTENTION = re.compile(r"attn|attention|mixer|mamba")


@dataclass(frozen=True)
class Place:
    """One tensor's place.

    layer: index of its layer, None outside the layers.
    module: in a layer 'attention' (whatever mixes tokens), 'mlp' or 'norms'. Outside also 'head',
    and 'embeddings', which is all that stands before the layers; the rest stands after them.
    template: the name with the layer index replaced by '{}'; the name itself outside layers.
    """

    layer: int | None
    module: str
    template: str


@dataclass(frozen=True)
class Layout:
    """A model's tensors in order: `layers` counts them, `places` maps each name to its place.

    prefix: what stands before a layer's index, such as 'model.layers'; '' without layers.
    unclear: why the names do not tell the layers, '' where they do. No place is in a layer then:
    good enough for merging whole models, not for anything that depends on layers.
    """

    layers: int
    prefix: str
    places: dict[str, Place]
    unclear: str = ""

    @cached_property
    def index(self) -> dict[tuple[int | None, str], str]:
        """Each tensor's name by its layer and what it is called there: the same in every model
        made alike, whatever stands before the layers' and the other tensors' names."""
        found: dict[tuple[int | None, str], str] = {}
        for name, place in self.places.items():
            key = _after(name, self.prefix)
            if place.layer is not None:
                key = place.template.removeprefix(f"{self.prefix}.{{}}.")
            at = (place.layer, key)
            found[at if at not in found else (place.layer, name)] = name
        return found


def _after(name: str, prefix: str) -> str:
    """A name without the leading words that it shares with the layers' prefix."""
    words, shared = name.split("."), prefix.split(".")
    same = 0
    while same < min(len(words), len(shared)) - 1 and words[same] == shared[same]:
        same += 1
    return ".".join(words[same:])


def infer(names: Iterable[str]) -> Layout:
    """Work out the layout of a model, or of one part of it, with these tensor names."""
    names = list(names)
    stacks = _stacks(names)
    unclear = _doubt(stacks)
    if not stacks or unclear:
        return Layout(0, "", {name: Place(None, _outside(name), name) for name in names}, unclear)
    prefix = max(stacks, key=lambda prefix: len(stacks[prefix]))
    found: dict[str, Place] = {}
    for name in names:
        match = stacks[prefix].get(name)
        if match is None:
            found[name] = Place(None, _outside(name), name)
        else:
            template = f"{prefix}.{{}}.{match['rest']}"
            found[name] = Place(int(match["index"]), _inside(match["rest"]), template)
    return Layout(len(_indices(stacks[prefix])), prefix, found)


def split(names: Iterable[str]) -> dict[str, Layout]:
    """The parts of a model with these tensor names, each with its layout.

    A model with one stack of layers is one part, 'default'. Others have parts such as
    'text_decoder', 'vision_tower' and 'multi_modal_projector', or 'encoder', 'decoder' and
    'shared'. Each tensor belongs to one part; what no part claims goes to the text decoder, or
    is shared where there is none.
    """
    names = list(names)
    claims = {name: _claim(name) for name in names}
    if not {"encoder", "decoder"} <= _layered(claims):  # one alone is the whole model
        claims = {n: "" if c in ("encoder", "decoder") else c for n, c in claims.items()}
    layered = _layered(claims)
    if len(layered) < 2:
        return {"default": infer(names)}
    text = [prefix for prefix in _stacks(names) if _claim(f"{prefix}.") == "text_decoder"]
    if text and all(".encoder." in prefix for prefix in text):  # two towers, as in CLIP
        claims = {n: "text_encoder" if c == "text_decoder" else c for n, c in claims.items()}
    decodes = not layered & {"encoder", "decoder"} and (
        "" in layered or "text_decoder" in claims.values()
    )
    rest = "text_decoder" if decodes else "shared"
    members: dict[str, list[str]] = {}
    for name, part in claims.items():
        members.setdefault(part or rest, []).append(name)
    return {part: infer(own) for part, own in members.items()}


def _claim(name: str) -> str:
    """The part that a name's words tell, '' where they tell none."""
    match = _NUMBERED.match(name)
    words = (match["prefix"] if match else name.rpartition(".")[0]).split(".")
    if not _PROJECTORS.isdisjoint(words):
        return "multi_modal_projector"
    return next((_PARTS[word] for word in words if word in _PARTS), "")


def _layered(claims: Mapping[str, str]) -> set[str]:
    """The claimed parts that have numbered layers."""
    return {
        part for part in set(claims.values()) if _stacks(n for n, c in claims.items() if c == part)
    }


def _stacks(names: Iterable[str]) -> dict[str, dict[str, re.Match[str]]]:
    """The names in each run of numbered modules, by what stands before the number. Numbered single
    operations (`mlp.0.weight`, `mlp.2.weight`) are steps inside a module and no layers."""
    found: dict[str, dict[str, re.Match[str]]] = {}
    for name in names:
        match = _NUMBERED.match(name)
        if match:
            found.setdefault(match["prefix"], {})[name] = match
    return {
        prefix: matches
        for prefix, matches in found.items()
        if any("." in match["rest"] for match in matches.values())
    }


def _indices(stack: Mapping[str, re.Match[str]]) -> set[int]:
    return {int(match["index"]) for match in stack.values()}


def _doubt(stacks: Mapping[str, Mapping[str, re.Match[str]]]) -> str:
    """Why none of the stacks can be taken for the layers; '' where one can, or there is none."""
    first, second = [*sorted(stacks, key=lambda p: -len(stacks[p])), "", ""][:2]
    if second and 2 * len(stacks[second]) >= len(stacks[first]):
        return (
            f"two parts of the model are numbered alike ('{first}.*' and '{second}.*'): "
            "which of them holds the layers is ambiguous"
        )
    if not first:
        return ""
    layers: dict[int, set[str]] = {}
    for match in stacks[first].values():
        layers.setdefault(int(match["index"]), set()).add(match["rest"])
    missing = sorted(set(range(max(layers))) - layers.keys())
    if missing:
        return f"layers {missing} of '{first}.*' are missing: the model is incomplete"
    for index, own in layers.items():
        if len(layers) > 1 and not any(own & layers[i] for i in layers if i != index):
            return f"'{first}.{index}' is made like no other of '{first}.*': these are no layers"
    return ""


def _outside(name: str) -> str:
    """The module of a tensor that is in no layer."""
    if _HEAD.search(name):
        return "head"
    return "embeddings" if _EMBEDDINGS.search(name) else _inside(name)


def _inside(rest: str) -> str:
    """The module of a tensor, from its name inside the layer."""
    owner = rest.lower().rsplit(".", 1)[0]  # without 'weight' or 'bias'
    if _NORM.search(owner.rsplit(".", 1)[-1]):
        return "norms"
    return "attention" if _ATTENTION.search(owner) else "mlp"
