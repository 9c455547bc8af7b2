"""A new search: a form with a live check, or a job file as it is, one of mergekit-evolve's too."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

import yaml
from fastapi import APIRouter, Form, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from evomerge.errors import EvomergeError, JobError
from evomerge.job import Optimizer
from evomerge.service import catalogue, checking, confine, steering
from evomerge.service.access import Refused, requires
from evomerge.service.api.shapes import Asking
from evomerge.service.context import Here
from evomerge.service.pages.rendering import PageRoute, page, seen
from evomerge.service.problems import explained
from evomerge.service.redaction import redacted
from evomerge.service.steering import Asker

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_OPTIMIZERS = get_args(Optimizer.model_fields["name"].annotation)


class Filled(BaseModel):
    """The form as it was filled in. action: which button was pressed. by: which of the two forms
    there are. parents: a line for each,
    NAME: MODEL. tasks: chosen from the list; other_tasks: a line for each. more: further keys of
    the job, as YAML. document: the job file as it was pasted."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    action: Literal["submit", "plan", "check", "write"] = "plan"
    by: Literal["form", "document"] = "form"
    name: str = ""
    parents: str = ""
    base: str = ""
    preset: str = "per_layer_task_arithmetic"
    tasks: tuple[str, ...] = ()
    other_tasks: str = ""
    optimizer: str = "auto"
    candidates: str = "200"
    hours: str = ""
    seed: str = "0"
    more: str = ""
    document: str = ""
    priority: int = Field(0, ge=-1000, le=1000)
    webhook: str = Field("", max_length=1000)


@router.get("/new", dependencies=[requires("run")])
def ask(request: Request, here: Here) -> Response:
    """The form, empty."""
    return _page(request, here, Filled())


@router.post("/new")
def answer(asker: Asking, filled: Annotated[Filled, Form()]) -> Response:
    """Submit the job; or tell what it means, or what it takes; or write it out as a job file."""
    try:
        if filled.action == "submit":
            hook = filled.webhook.strip() or None
            one = steering.submit(asker, _document(filled), filled.priority, hook)
            return seen("searches", one.search)
        if filled.action == "write":
            written = filled.model_copy(update={"by": "document", "document": _written(filled)})
            return _page(asker.request, asker.here, written)
        found = _found_out(asker, filled.action, filled)
    except Refused:
        raise
    except EvomergeError as error:
        # Of a check it is what was asked for.
        status = explained(asker.request, error)[0] if filled.action == "submit" else 200
        return _page(asker.request, asker.here, filled, redacted(str(error)), status=status)
    return _page(asker.request, asker.here, filled, found=found)


def _page(
    request: Request,
    here: Here,
    filled: Filled,
    trouble: str | None = None,
    found: dict[str, Any] | None = None,
    status: int = 200,
) -> Response:
    return page(
        request,
        "new.html",
        status,
        filled=filled,
        trouble=trouble,
        checked=found,
        spaces=catalogue.spaces(),
        tasks=catalogue.tasks(here.settings.roots),
        optimizers=_OPTIMIZERS,
        roots=here.settings.roots,
    )


def _found_out(asker: Asker, what: Literal["plan", "check"], filled: Filled) -> dict[str, Any]:
    here = asker.here
    job = confine.submitted(_document(filled), here.settings.roots, is_admin=asker.is_admin)
    return checking.find_out(what, job.document(), here.store.url)


def _written(filled: Filled) -> str:
    document = _document(filled)
    if isinstance(document, str):
        return document
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def _document(filled: Filled) -> dict[str, Any] | str:
    """The job that is meant, not looked at yet. Raises JobError for lines that mean nothing."""
    if filled.by == "document":
        return filled.document
    parents = {name: {"model": model} for name, model in _parents(filled.parents)}
    tasks = [*filled.tasks, *_lines(filled.other_tasks)]
    limits = {"candidates": filled.candidates, "hours": filled.hours}
    found: dict[str, Any] = {
        "name": filled.name.strip(),
        "seed": _number("seed", filled.seed or "0"),
        "parents": parents,
        "space": {"preset": filled.preset},
        "tasks": [{"task": task} for task in tasks],
        "optimizer": {"name": filled.optimizer},
        "budget": {
            key: _number(f"budget.{key}", text) for key, text in limits.items() if text.strip()
        },
    }
    if filled.base.strip():
        found["base"] = {"model": filled.base.strip()}
    return found | (confine.loaded(filled.more) if filled.more.strip() else {})


def _parents(text: str) -> Iterator[tuple[str, str]]:
    """By name; a line without one has the last part of the model's."""
    named: set[str] = set()
    for line in _lines(text):
        name, colon, model = line.partition(": ")
        if not colon:
            name, model = line.rstrip("/").rsplit("/", 1)[-1], line
        if name.strip() in named:
            raise JobError(
                f"parents: '{name.strip()}' is there twice: give each a name, NAME: MODEL"
            )
        named.add(name.strip())
        yield name.strip(), model.strip()


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _number(key: str, text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        raise JobError(f"{key}: '{text}' is no number: correct it") from None
    return int(found) if found.is_integer() else found
