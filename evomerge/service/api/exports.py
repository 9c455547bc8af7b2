"""Exports of a search, their files, and pushing them to the hub."""

from typing import Annotated

from fastapi import APIRouter, Header, Path, Response
from fastapi.responses import FileResponse
from pydantic import Field

from evomerge.service import exports, steering
from evomerge.service.access import requires
from evomerge.service.api.shapes import (
    LARGEST,
    REPOSITORY,
    Asking,
    Body,
    SearchName,
    SubmissionId,
)
from evomerge.service.context import Here
from evomerge.service.exports import Export, File
from evomerge.service.overview import standing
from evomerge.service.problems import declared

router = APIRouter(prefix="/searches/{name}", tags=["exports"])

CandidateNumber = Annotated[
    int | None, Field(ge=1, le=LARGEST, description="Of a candidate; default: the winner.")
]


class NewExport(Body):
    """What is to be exported."""

    candidate: CandidateNumber = None
    recipe_only: bool = Field(
        False, description="Write the recipe alone; the test split stays sealed."
    )
    unseal: bool = Field(
        False,
        description="Open the sealed test split for this candidate, which a whole model is read "
        "on once; needs the scope 'unseal'.",
    )


class NewPush(Body):
    """What is to be uploaded, and where to."""

    candidate: CandidateNumber = None
    repository: str = Field(
        pattern=REPOSITORY, description="OWNER/NAME; it is made where there is none."
    )
    private: bool = Field(True, description="Of a repository that is made.")


@router.get("/exports", dependencies=[requires("read")], responses=declared(404))
def list_exports(here: Here, name: SearchName) -> list[Export]:
    """Exports and pushes, the latest first."""
    standing(here.store, name)
    return exports.exports(here.queue, name)


@router.post("/exports", status_code=202, responses=declared(404, 409, 413))
def submit_export(asker: Asking, name: SearchName, new: NewExport) -> Export:
    """Put an export into the queue."""
    return Export.of(steering.export(asker, name, new.candidate, new.recipe_only, new.unseal))


@router.post(
    "/pushes", status_code=202, dependencies=[requires("admin")], responses=declared(404, 409, 413)
)
def submit_push(asker: Asking, name: SearchName, new: NewPush) -> Export:
    """Put an upload into the queue, of what was exported or will be by then."""
    return Export.of(steering.push(asker, name, new.candidate, new.repository, new.private))


@router.get("/exports/{id}", dependencies=[requires("read")], responses=declared(404))
def show_export(here: Here, name: SearchName, id: SubmissionId) -> Export:
    """How an export or a push stands."""
    return exports.export(here.queue, name, id)


@router.delete("/exports/{id}", responses=declared(404, 409))
def cancel_export(asker: Asking, name: SearchName, id: SubmissionId) -> Export:
    """Cancel an export or a push that has not ended; of one under way nothing is left but the seal
    that it may have opened."""
    return Export.of(steering.cancel_export(asker, name, id))


@router.get("/exports/{id}/files", dependencies=[requires("read")], responses=declared(404))
def list_files(here: Here, name: SearchName, id: SubmissionId) -> list[File]:
    """What was written."""
    return exports.files(here.settings.data, exports.export(here.queue, name, id))


@router.get(
    "/exports/{id}/files/{file:path}",
    dependencies=[requires("read")],
    response_class=FileResponse,
    responses=declared(404)
    | {
        200: {"content": {"*/*": {}}, "description": "The file."},
        206: {"content": {"*/*": {}}, "description": "The range of it that was asked for."},
        304: {"description": "It is what the client has."},
        416: {"description": "There is no such range."},
    },
)
def read_export_file(
    here: Here,
    name: SearchName,
    id: SubmissionId,
    file: Annotated[str, Path(max_length=1000, description="As the list of files has it.")],
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """One file, or a range of it."""
    path = exports.file(here.settings.data, exports.export(here.queue, name, id), file)
    found = FileResponse(path, filename=path.name, stat_result=path.stat())
    etag = found.headers["etag"]
    if etag in {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}:
        return Response(status_code=304, headers={"etag": etag})
    return found
