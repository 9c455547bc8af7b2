"""What went wrong, in one line: of plain data that pydantic refuses, and of any exception.

Knows no file format: the models that describe one are handed in.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from evomerge.errors import nearest

Model = type[BaseModel]

_ALIKE = 0.8  # of two keys, by difflib: all but a letter or two
_SCALARS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
}


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks; of an OSError only what went wrong."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())


def without_password(url: str) -> str:
    """A URL as it may be shown, whatever system it is of, and whether or not it is well formed.
    Passwords stand before the host, or, of PostgreSQL, in the query."""
    # Not one pattern for both ends: of text that somebody made for that, it would take minutes.
    end = url.rfind("@")
    begins = re.compile(r"(?<=://)[^:/@]*:").search(url, 0, max(end, 0))
    before_host = url if begins is None else f"{url[: begins.end()]}***{url[end:]}"
    return re.sub(r"([?&](?:ssl)?password=)[^&]*", r"\1***", before_host)


def explain(error: ValidationError, model: Model, refused: Mapping[str, str] | None = None) -> str:
    """The first problem of a pydantic error in one line: the key, the value, the remedy.

    Unknown keys come first: a misspelt key that is required is also missing. model: what the data
    was checked against. refused: remedies for unknown keys that must not be taken for misspelt.
    """
    problems = error.errors()
    places = [_follow(model, problem["loc"]) for problem in problems]
    unknown = [i for i, problem in enumerate(problems) if problem["type"] == "extra_forbidden"]
    if unknown:
        place = places[unknown[0]]
        return _line(place.steps, f"unknown key: {_remedy_for_key(place, model, refused or {})}")
    # The branch of a union that the value comes nearest to fails deepest inside the value.
    steps = places[0].steps
    inside = [place for place in places if place.steps[: len(steps)] == steps]
    place = max(inside, key=lambda place: len(place.steps))
    alike = [problems[i] for i, other in enumerate(places) if other.steps == place.steps]
    if alike[0]["type"] in ("union_tag_not_found", "union_tag_invalid"):
        return _of_tag(alike[0], place)
    return _line(place.steps, _text(alike), place.models)


@dataclass(frozen=True)
class _Place:
    """Where in the data a problem is.

    steps: keys and indices that lead there. holders: the models that may hold the last of them;
    models: those that may describe what stands there. chosen: of each union on the way, by the
    fields that lead to it, the models that the data chose.
    """

    steps: tuple[str | int, ...]
    holders: tuple[Model, ...]
    models: tuple[Model, ...]
    chosen: Mapping[tuple[str, ...], tuple[Model, ...]]


def _follow(model: Model, location: Sequence[str | int]) -> _Place:
    """The place of a pydantic location, which has a step of its own for every union: the branch."""
    steps: list[str | int] = []
    fields: tuple[str, ...] = ()
    chosen: dict[tuple[str, ...], tuple[Model, ...]] = {}
    holders: list[Any] = []
    here: list[Any] = [model]
    at_union = False
    for part in location:
        if at_union:
            named = [kind for kind in _models(here) if _is_named(kind, str(part))]
            here = named or [kind for kind in here if not _is_model(kind)]
            chosen[fields] = tuple(named)
            at_union = False
            continue
        steps.append(part)
        if _models(here):
            fields = (*fields, str(part))
        holders, here = here, [inner for kind in here for inner in _inside(kind, part)]
        at_union = len(here) > 1
    return _Place(tuple(steps), _models(holders), _models(here), chosen)


def _is_named(model: Model, branch: str) -> bool:
    """Whether pydantic means this model by the name of a branch: its tag, its class, or its class
    in the brackets of its validators."""
    literals = (
        f.annotation for f in _fields(model).values() if get_origin(f.annotation) is Literal
    )
    tags = {tag for literal in literals for tag in get_args(literal)}
    return branch in tags or re.findall(r"\w+", branch)[-1:] == [model.__name__]


def _inside(kind: Any, step: str | int) -> Iterator[Any]:
    """What may stand under a key or an index of a value."""
    if _is_model(kind):
        field = _fields(kind).get(str(step))
        yield from _branches(field.annotation) if field else ()
    elif get_args(kind):
        yield from _branches(get_args(kind)[-1 if get_origin(kind) is dict else 0])


def _branches(annotation: Any) -> Iterator[Any]:
    """What a value may be: one kind, or those of a union, None aside, as pydantic counts them."""
    if get_origin(annotation) is Annotated:
        yield from _branches(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for branch in get_args(annotation):
            yield from _branches(branch)
    elif annotation is not type(None):
        yield annotation


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _models(kinds: Iterable[Any]) -> tuple[Model, ...]:
    return tuple(kind for kind in kinds if _is_model(kind))


def _fields(model: Model) -> dict[str, FieldInfo]:
    """The fields of a model, by the keys of the data."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _line(steps: Sequence[str | int], text: str, models: Iterable[Model] = ()) -> str:
    """The text behind its key, `a.b[0]: text`; one that begins with a key of the model that stands
    there goes on from it, `a.b[0].key: ...`."""
    key = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    begins = re.match(r"(\w+)[.:[]", text)
    goes_on = begins and any(begins[1] in _fields(model) for model in models)
    text = f"{key}{'.' if goes_on else ': '}{text}".removeprefix(".") if key else text
    return " ".join(text.split())


def _text(alike: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong and the remedy, of problems that share a place: the branches of a union."""
    problem = alike[0]
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return "required, and missing"
    if kind == "too_short":
        return f"{context['actual_length']} given: give at least {context['min_length']}"
    remedies = dict.fromkeys(_remedy(problem) for problem in alike)
    return f"{problem['input']!r}: {' or '.join(remedies)}"


def _of_tag(problem: Mapping[str, Any], place: _Place) -> str:
    """The line for a union whose branch could not be told by its tag."""
    key = problem["ctx"]["discriminator"].strip("'")
    tags = [tag for model in place.models for tag in get_args(_fields(model)[key].annotation)]
    tag = problem["ctx"].get("tag")
    if tag is not None:
        return _line((*place.steps, key), f"'{tag}' is unknown: {nearest(tag, tags)}")
    known = {name for model in place.models for name in _fields(model)}
    for name in map(str, problem["input"]):
        if name not in known:
            return _line((*place.steps, name), f"unknown key: {nearest(name, known)}")
    return _line((*place.steps, key), f"required, and missing: {nearest('', tags)}")


def _remedy(problem: Mapping[str, Any]) -> str:
    if problem["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return "give keys and their values"
    if problem["type"] in ("tuple_type", "list_type"):
        return "give a list"
    kind = problem["type"].split("_")[0]
    if kind in _SCALARS and problem["type"].endswith(("_type", "_parsing", "_from_float")):
        return f"give {_SCALARS[kind]}"
    message: str = problem["msg"]
    return message[0].lower() + message[1:]


def _remedy_for_key(place: _Place, model: Model, refused: Mapping[str, str]) -> str:
    """Where a key belongs that is known elsewhere; else the nearest of those known here."""
    key = str(place.steps[-1])
    if key in refused:
        return refused[key]
    homes = [path for name, path in _homes(model, (), place.chosen) if name == key]
    known = {name for holder in place.holders for name in _fields(holder)}
    here = [path[-1] for path in homes if path and path[-1] in known]
    if get_close_matches(key, here, cutoff=_ALIKE):  # the section that has it was misspelt
        return nearest(key, here)
    if homes:
        home = min(homes, key=len)
        return f"it belongs to '{'.'.join(home)}'" if home else "it belongs to the top level"
    return nearest(key, known)


def _homes(
    model: Model, path: tuple[str, ...], chosen: Mapping[tuple[str, ...], tuple[Model, ...]]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every key of a model and of the models inside it, with the path of what holds it."""
    for name, field in _fields(model).items():
        yield name, path
        inner = (*path, name)
        for found in chosen.get(inner) or _models_in(field.annotation):
            yield from _homes(found, inner, chosen)


def _models_in(annotation: Any) -> Iterator[Model]:
    if _is_model(annotation):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
