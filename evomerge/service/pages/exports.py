"""Exports of candidates, and their files. The seal of a test split is opened here, asked twice."""

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Request, Response

from evomerge.errors import NotFound
from evomerge.report.candidate import candidate
from evomerge.service import exports, steering
from evomerge.service.access import requires
from evomerge.service.api.shapes import (
    REPOSITORY,
    Asking,
    CandidateId,
    SearchName,
    SubmissionId,
)
from evomerge.service.context import Here
from evomerge.service.exports import Export, File
from evomerge.service.overview import standing
from evomerge.service.pages.rendering import PageRoute, page, seen

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/exports", dependencies=[requires("read")])
def list_all(request: Request, here: Here) -> Response:
    """Of all searches, the latest first."""
    return page(request, "exports.html", found=exports.exports(here.queue))


@router.get("/searches/{name}/exports/{id}", dependencies=[requires("read")])
def show_export(request: Request, here: Here, name: SearchName, id: SubmissionId) -> Response:
    """How it stands; its files, and what its report claims."""
    found = exports.export(here.queue, name, id)
    files = _files(here, found)
    text = None if found.recipe_only else here.store.report(found.candidate)
    report: dict[str, Any] | None = None if text is None else json.loads(text)
    return page(
        request,
        "export.html",
        at=standing(here.store, name),
        found=found,
        files=files,
        bytes=sum(file.size for file in files),
        report=report,
        repository=REPOSITORY,
    )


@router.get("/searches/{name}/candidates/{id}/export", dependencies=[requires("read")])
def ask(request: Request, here: Here, name: SearchName, id: CandidateId) -> Response:
    """What an export would do, before anything is done."""
    return _asked(request, here, name, id)


@router.post("/searches/{name}/candidates/{id}/export")
def export(
    asker: Asking,
    name: SearchName,
    id: CandidateId,
    what: Annotated[Literal["recipe", "model"], Form()],
    sure: Annotated[Literal["", "yes"], Form()] = "",
) -> Response:
    """The recipe, or the whole model; for a model whose report there is not yet, the seal of the
    test split is opened, which is asked once more. sure: what was answered."""
    here = asker.here
    recipe_only = what == "recipe"
    opens = not recipe_only and here.store.report(id) is None
    if opens and not sure:
        return _asked(asker.request, here, name, id, again=True)
    one = steering.export(asker, name, id, recipe_only, unseal=opens)
    return seen("searches", name, "exports", one.id)


@router.post("/searches/{name}/exports/{id}/cancel")
def cancel(asker: Asking, name: SearchName, id: SubmissionId) -> Response:
    """See steering."""
    steering.cancel_export(asker, name, id)
    return seen("searches", name, "exports", id)


@router.post("/searches/{name}/exports/{id}/push", dependencies=[requires("admin")])
def push(
    asker: Asking,
    name: SearchName,
    id: SubmissionId,
    repository: Annotated[str, Form(pattern=REPOSITORY)],
    private: Annotated[Literal["", "yes"], Form()] = "",
) -> Response:
    """Upload what was exported to a repository of the hub."""
    found = exports.export(asker.here.queue, name, id)
    one = steering.push(asker, name, found.candidate, repository, private == "yes")
    return seen("searches", name, "exports", one.id)


def _asked(request: Request, here: Here, name: str, id: int, again: bool = False) -> Response:
    found = candidate(here.store, name, id)
    return page(request, "ask.html", at=standing(here.store, name), found=found, again=again)


def _files(here: Here, found: Export) -> list[File]:
    """None before it is finished."""
    try:
        return exports.files(here.settings.data, found)
    except NotFound:
        return []
