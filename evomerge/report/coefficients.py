"""What a recipe takes of each model and where, as a table; of a merge of layers, their order.

Knows recipes alone: which tensors a filter meets is a matter of the models.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.recipe import Filtered, ModelEntry, Parameters, Part, Recipe, Slice, Source, resolve

_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(?P<index>\d+)\.?(?P<rest>.*)$")


@dataclass(frozen=True)
class Coefficients:
    """parameter: its name in the recipe: weight, or t, the share of the second of two models. rows:
    the models. columns: groups of tensors from the input on, such as 'layer 3'; 'rest' is what no
    other column holds. values: (rows, columns), None where a recipe says nothing of it."""

    parameter: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class _Merge:
    """Models that are merged into the same tensors. where: for people. sliced: whether these are
    layers, by the models' own. scopes: parameters of what they stand in, from narrow to wide."""

    where: str
    sliced: bool
    entries: Sequence[ModelEntry | Source]
    scopes: Sequence[Parameters]


@dataclass(frozen=True)
class _Column:
    """A group of tensors: by the text in their names, None for any; at a position of the slice, for
    gradients."""

    filter: str | None
    position: float = 0.0


def coefficients(recipe: Recipe, names: Mapping[str, str]) -> Coefficients | None:
    """None where models are not weighed against each other. names: of the models, by what they are
    in the recipe."""
    signature = recipe.signature
    merges = [m for m in _merges(recipe) if not m.sliced or len(_counted(recipe, m)) > 1]
    if "weight" in signature.per_model:
        parameter = "weight"
    elif "t" in signature.shared:
        parameter = "t"
    else:
        return None
    rows: dict[str, dict[str, float | None]] = {}
    columns: list[str] = []
    for merge in merges:
        entries = _weighed(recipe, merge)
        if parameter == "t":
            entries = [entry for entry in entries if entry.model != recipe.base_model]
        for column in _columns(parameter, entries, merge.scopes):
            values = {
                names.get(entry.model, entry.model): _value(parameter, entry, merge, column)
                for entry in entries
            }
            label = _label(merge, column)
            if _is_new(label, values, columns, rows):
                columns.append(label)
                for model, value in values.items():
                    rows.setdefault(model, {})[label] = value
    if not rows:
        return None
    if columns == ["rest"]:
        rows, columns = {model: {"all": own["rest"]} for model, own in rows.items()}, ["all"]
    table = tuple(tuple(own.get(column) for column in columns) for own in rows.values())
    return Coefficients(parameter, tuple(rows), tuple(columns), table)


def path(recipe: Recipe, names: Mapping[str, str]) -> tuple[tuple[str, int], ...] | None:
    """The source and the layer there of each layer, from the input on; where several are merged
    into one, all of their names. None where nothing is said of layers."""
    found: list[tuple[str, int]] = []
    for merge in _merges(recipe):
        counted = _counted(recipe, merge)
        if not counted:
            return None
        name = " + ".join(names.get(one.model, one.model) for one in counted)
        start, end = counted[0].layer_range
        found += [(name, layer) for layer in range(start, end)]
    return tuple(found)


def _merges(recipe: Recipe) -> list[_Merge]:
    bodies: Mapping[str, Recipe | Part] = recipe.modules or {"": recipe}
    found: list[_Merge] = []
    for name, body in bodies.items():
        own = f"{name}:" if name else ""
        scopes = [body.parameters, *([recipe.parameters] if name else [])]
        if body.models is not None:
            found.append(_Merge(own, False, body.models, scopes))
        start = 0
        for piece in body.slices or ():
            where, within = f"{own} {_layers(piece, start)}".strip(), [piece.parameters, *scopes]
            found.append(_Merge(where, True, piece.sources, within))
            start += piece.sources[0].length
    return found


def _layers(piece: Slice, start: int) -> str:
    length = piece.sources[0].length
    return f"layer {start}" if length == 1 else f"layers {start}-{start + length - 1}"


def _weighed(recipe: Recipe, merge: _Merge) -> list[ModelEntry | Source]:
    """Without a base that others are measured from."""
    apart = recipe.base_model if recipe.signature.task_vectors else None
    return [entry for entry in merge.entries if entry.model != apart]


def _counted(recipe: Recipe, merge: _Merge) -> list[Source]:
    """Of a slice, the sources of its layers."""
    sources = [entry for entry in _weighed(recipe, merge) if isinstance(entry, Source)]
    return [one for one in sources if _counts(one, merge)] or sources


def _counts(source: Source, merge: _Merge) -> bool:
    """Whether anything of the layers is the source's. Where another's layer stands between its own
    neighbours, all of the weight is switched by one filter: what it meets are the layers."""
    columns = _columns("weight", [source], merge.scopes)
    values = {c.filter: _value("weight", source, merge, c) for c in columns}
    filters = [key for key in values if key is not None]
    if len(filters) == 1 and set(values.values()) <= {0.0, 1.0}:
        return values[filters[0]] != 0
    return any(value != 0 for value in values.values())


def _columns(
    parameter: str, entries: Sequence[ModelEntry | Source], scopes: Sequence[Parameters]
) -> list[_Column]:
    """What recipes tell apart, in their order; the norms, which mostly go with what stands beside
    them, after that, and the rest last."""
    found: dict[_Column, None] = {}
    for entry in entries:
        given: Any = next(
            (one[parameter] for one in (entry.parameters, *scopes) if parameter in one), None
        )
        parts = given if isinstance(given, list) and isinstance(given[0], Filtered) else None
        for filter, value in [(p.filter, p.value) for p in parts] if parts else [(None, given)]:
            steps = len(value) if isinstance(value, list) else 1
            for i in range(steps):
                found[_Column(filter, i / max(1, steps - 1))] = None
    return sorted(found, key=lambda one: (one.filter is None, "norm" in (one.filter or "")))


def _value(
    parameter: str, entry: ModelEntry | Source, merge: _Merge, column: _Column
) -> float | None:
    scopes = [entry.parameters, *merge.scopes]
    found = resolve(parameter, scopes, column.filter or "", column.position)
    return None if found is None else float(found)


def _label(merge: _Merge, column: _Column) -> str:
    if column.filter is None:
        own = "" if merge.sliced else "rest"
    else:
        met = _LAYER.search(column.filter)
        own = column.filter.strip(".").rsplit(".", 1)[-1]
        if met is not None:
            own = f"layer {met['index']} {met['rest'].strip('.')}".strip()
    at = f" at {column.position:.0%}" if column.position else ""
    return f"{merge.where} {own}{at}".strip()


def _is_new(
    label: str,
    values: Mapping[str, float | None],
    columns: Sequence[str],
    rows: Mapping[str, Mapping[str, float | None]],
) -> bool:
    """Whether a column says what no other part of the same layer does."""
    layer = re.match(r"(.*layers? [\d-]+) .", label)
    if label in columns or layer is None:
        return label not in columns
    parts = [column for column in columns if column.startswith(f"{layer.group(1)} ")]
    return not any(
        all(rows.get(model, {}).get(part) == value for model, value in values.items())
        for part in parts
    )
