"""Which tensors share coefficients, and the filters that say so in a recipe.

A group is a run of layers, or a module of one, or what stands before or after the layers; filters
divide each further. Knows tensors' names and places alone.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from evomerge.errors import JobError
from evomerge.layout import Layout, Place

_T = TypeVar("_T")
Per = Literal["model", "layer", "module", "slice"]
# In order, the first that is part of a tensor's name decides; None catches every name.
Filters = tuple[tuple[str | None, str], ...]

_BEFORE, _AFTER = "embeddings", "final norm and head"
_OF_MLP = re.compile(r"mlp|ffn|feed_?forward|(^|_)ff(_|$)")
_OF_ATTENTION = re.compile(r"attn|attention")
_LATER = re.compile(r"2$|after|final")


@dataclass(frozen=True)
class Groups:
    """members: the tensors of each group, by its name; filters: what finds a tensor's group. A
    name that is none of the members' falls to the last group."""

    members: Mapping[str, Sequence[str]]
    filters: Filters

    @classmethod
    def of(
        cls, layout: Layout, per: Per, granularity: int = 1, filters: Sequence[str] = ()
    ) -> "Groups":
        """Divide a model, or one part of it.

        per: 'model' (one group, 'all'); 'layer' (runs of `granularity` layers; embeddings; final
        norm and head); 'module' (the same, with attention and MLP of each run apart, norms with
        what they stand at); 'slice' (runs of layers, the first with the embeddings, the last with
        final norm and head). filters: in each of these, the tensors whose names contain one, by
        the first that they contain, are a group of their own.

        Groups come in the order of the layers, whatever the order of the files. Raises JobError
        where layers are not known, and when the granularity does not divide their number.
        """
        if per != "model":
            _check_layers(layout, per, granularity)
        modules = _modules(layout) if per == "module" else {}
        found: dict[tuple[int, str, int], tuple[str, list[str]]] = {}
        for name, place in layout.places.items():
            rank, label = 0, "all"
            if per != "model":
                rank, label = _stretch(place, per, layout.layers, granularity)
            if place.layer is not None and per == "module":
                label = f"{label} {modules[place.template]}"
            own = next((i for i, text in enumerate(filters) if text in name), len(filters))
            label_of_own = f"{label} {filters[own]}" if own < len(filters) else label
            found.setdefault((rank, label, own), (label_of_own, []))[1].append(name)
        members = dict(found[key] for key in sorted(found))
        if per == "model":
            last = list(members)[-1]
            named = [(text, f"all {text}") for text in filters if f"all {text}" in members]
            return cls(members, (*named, (None, last)))
        return cls(members, _filters(members))


def written(filters: Sequence[tuple[str | None, _T]], value: Callable[[_T], float]) -> Any:
    """A parameter as a recipe says it, from the value of what each filter finds: a number where
    that is one for all tensors."""
    if filters[0][0] is None:
        return value(filters[0][1])
    return [
        {"value": value(found)} if text is None else {"filter": text, "value": value(found)}
        for text, found in filters
    ]


def _check_layers(layout: Layout, per: Per, granularity: int) -> None:
    if not layout.layers:
        reason = layout.unclear or "it has none"
        raise JobError(
            f"space.per: '{per}' needs layers, which the tensors' names do not tell ({reason}): "
            "give per: model, or the part of the model that is merged, such as part: text_decoder"
        )
    if layout.layers % granularity:
        raise JobError(
            f"space.granularity: {granularity} does not divide the model's {layout.layers} layers"
        )


def _stretch(place: Place, per: Per, layers: int, granularity: int) -> tuple[int, str]:
    """Where a tensor's run of layers, or what stands before or after them, comes, and its name."""
    before = place.module == "embeddings"
    layer = place.layer
    if layer is None:
        if per != "slice":
            return (-1, _BEFORE) if before else (layers, _AFTER)
        layer = 0 if before else layers - 1
    first = layer // granularity * granularity
    last = first + granularity - 1
    return first, f"layer {first}" if granularity == 1 else f"layers {first}-{last}"


def _modules(layout: Layout) -> dict[str, str]:
    """The module of each template inside the layers, attention or MLP, norms at what they serve."""
    places = {place.template: place for place in layout.places.values() if place.layer is not None}
    start = len(f"{layout.prefix}.{{}}.")
    norms = [template[start:] for template, place in places.items() if place.module == "norms"]
    found = {t: place.module for t, place in places.items() if place.module != "norms"}
    beside = {template[start:]: module for template, module in found.items()}
    return found | {f"{layout.prefix}.{{}}.{norm}": _of_norm(norm, norms, beside) for norm in norms}


def _of_norm(norm: str, norms: Sequence[str], beside: Mapping[str, str]) -> str:
    """Whether a norm goes with attention or with the MLP: with what stands in the same folder; by
    its name where both do; with attention where that does not tell."""
    owner = norm.rpartition(".")[0]
    folder = owner[: owner.rfind(".") + 1]
    neighbours = {module for name, module in beside.items() if name.startswith(folder)}
    if len(neighbours) == 1:
        return neighbours.pop()
    if _OF_MLP.search(owner):
        return "mlp"
    if _OF_ATTENTION.search(owner):
        # Norms after attention come before the MLP, unless another one is named for that.
        alone = "post" in owner and not any(map(_OF_MLP.search, norms))
        return "mlp" if alone else "attention"
    return "mlp" if _LATER.search(owner) else "attention"


def _filters(members: Mapping[str, Sequence[str]]) -> Filters:
    owners = {name: group for group, names in members.items() for name in names}
    last = list(members)[-1]
    plain = list(_under("", owners))
    while plain and plain[-1][1] == last:
        plain.pop()
    plain.append((None, last))
    found = plain
    # The beginning of one name may stand inside another: such names come in full, the longest
    # first, since no name contains a longer one.
    whole: set[str] = set()
    while wrong := {name for name in owners if _group_of(name, found) != owners[name]}:
        whole |= wrong
        ahead = sorted(whole, key=lambda name: (-len(name), name))
        found = [*((name, owners[name]) for name in ahead), *plain]
    return tuple(found)


def _group_of(name: str, filters: Iterable[tuple[str | None, str]]) -> str:
    return next(group for text, group in filters if text is None or text in name)


def _under(prefix: str, owners: Mapping[str, str]) -> Iterator[tuple[str | None, str]]:
    """Filters for the names that begin with a prefix: one if all are of one group, else those of
    the next words. A group that has several of these words comes last, by the prefix itself."""
    if prefix and len(set(owners.values())) == 1:
        yield prefix, next(iter(owners.values()))
        return
    words: dict[str, dict[str, str]] = {}
    for name, group in owners.items():
        word, dot, _ = name[len(prefix) :].partition(".")
        words.setdefault(prefix + word + dot, {})[name] = group
    pure = Counter(next(iter(g)) for w in words.values() if len(g := set(w.values())) == 1)
    commonest, count = pure.most_common(1)[0] if pure else ("", 0)
    rest = commonest if prefix and count > 1 else None
    for longer, named in words.items():
        if set(named.values()) != {rest}:
            yield from _under(longer, named)
    if rest is not None:
        yield prefix, rest
