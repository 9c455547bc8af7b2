"""Whether a server is alive, ready, and what it is; for machines that look after it."""

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

import evomerge
from evomerge.errors import StoreError, StoreUnavailable
from evomerge.service.access import requires
from evomerge.service.context import Here
from evomerge.service.metrics import CONTENT_TYPE
from evomerge.service.problems import Problem, declared

router = APIRouter(tags=["health"])


@dataclass(frozen=True)
class Health:
    """The server answers."""

    status: str


@dataclass(frozen=True)
class Readiness:
    """The server can be used. leads: whether it works off the queue; of several servers of a store
    one does, and the others stand by."""

    status: str
    leads: bool


@dataclass(frozen=True)
class Version:
    """api: of the paths."""

    version: str
    api: str


# The one route that has the model of all problems, which the others name.
@router.get("/healthz", responses={400: {"model": Problem, **declared(public=True)[400]}})
async def healthz() -> Health:
    """Whether the process is alive."""
    return Health("ok")


@router.get("/readyz", responses=declared(503, public=True))
def readyz(here: Here) -> Readiness:
    """Whether its store can be read."""
    try:
        here.queue.all("running")
    except StoreError as error:  # whatever it is, nobody is served until somebody has looked
        raise StoreUnavailable(str(error)) from None
    return Readiness("ok", here.scheduler.leads)


@router.get("/version", responses=declared(public=True))
async def version() -> Version:
    """Which evomerge this is."""
    return Version(evomerge.__version__, "v1")


@router.get(
    "/metrics",
    dependencies=[requires("read")],
    response_class=Response,
    responses=declared() | {200: {"content": {CONTENT_TYPE: {}}, "description": "Metrics."}},
)
def metrics(here: Here) -> Response:
    """What is measured, in Prometheus' text format."""
    return Response(here.metrics.text(), media_type=CONTENT_TYPE)


@router.get("/api/v1/openapi.json", dependencies=[requires("read")], include_in_schema=False)
def schema(request: Request) -> dict[str, Any]:
    """The API itself, as OpenAPI describes it."""
    found: dict[str, Any] = request.app.openapi()
    return found
