"""Searches: submitted, listed, steered; and how one went."""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import Field

from evomerge.errors import NotFound
from evomerge.report.failures import Failure, failures
from evomerge.report.history import History, history
from evomerge.report.population import FrontPoint, Importance, Lineage, front, importance, lineage
from evomerge.search import summary
from evomerge.service import steering
from evomerge.service.access import requires
from evomerge.service.api.shapes import (
    Asking,
    Body,
    Cursor,
    JobDocument,
    Overrides,
    Priority,
    SearchName,
)
from evomerge.service.context import Here
from evomerge.service.folders import log_file
from evomerge.service.logs import LogPart, log_part
from evomerge.service.overview import MOST, Asked, Overviews, Standing, State, overviews, standing
from evomerge.service.problems import declared

router = APIRouter(prefix="/searches", tags=["searches"])

_REVIEWED = ("train", "monitor", "gap", "standard_error", "shrunk")


class NewSearch(Body):
    """A search to be run."""

    job: JobDocument
    priority: Priority = 0
    webhook: str | None = Field(
        None,
        max_length=1000,
        description="An address, http(s)://..., that is told by POST when it finishes or fails.",
    )


class Place(Body):
    """Where in the queue a search is to stand."""

    priority: Priority


class Changes(Body):
    """What is to be different from here on: see `evomerge resume`."""

    overrides: Overrides = ()


class Extension(Body):
    """More of what a search may spend."""

    overrides: Annotated[Overrides, Field(min_length=1)]


@dataclass(frozen=True)
class Detail:
    """Everything about how a search stands. job: with every default written out. summary: what
    `evomerge show --json` says; None before it has begun."""

    name: str
    state: State
    submission: Asked | None
    place: int | None
    job: dict[str, Any]
    summary: dict[str, Any] | None


@dataclass(frozen=True)
class Gap:
    """After one generation: what the incumbent scores on the train examples that drive the search,
    and on the monitor slice; their difference, and its standard error. shrunk: its score with the
    luck of the best taken out. None where it is not known."""

    generation: int
    incumbent: int
    train: float | None
    monitor: float | None
    gap: float | None
    standard_error: float | None
    shrunk: float | None


@dataclass(frozen=True)
class Costs:
    """See `summary.show`: what was spent, where the time of each device went, in seconds, and of
    all together."""

    budget: dict[str, Any]
    seconds_left: float | None
    devices: list[dict[str, Any]]
    time: dict[str, Any]


@router.get("", dependencies=[requires("read")], responses=declared())
def list_searches(
    here: Here,
    state: Annotated[State | None, Query(description="Of these alone.")] = None,
    cursor: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=MOST)] = 50,
) -> Overviews:
    """All searches, those in the queue included, the latest first."""
    return overviews(here.store, state, cursor, limit)


@router.post("", status_code=201, responses=declared(409, 413))
def submit_search(asker: Asking, new: NewSearch, response: Response) -> Asked:
    """Put a search into the queue."""
    one = steering.submit(asker, new.job, new.priority, new.webhook)
    response.headers["Location"] = f"{asker.request.url.path}/{one.search}"
    return Asked.of(one)


@router.get("/{name}", dependencies=[requires("read")], responses=declared(404))
def show_search(here: Here, name: SearchName) -> Detail:
    """How a search stands."""
    at = standing(here.store, name)
    try:
        row = here.store.search(name)
    except NotFound:
        submission = here.queue.of(name)
        job = {} if submission is None else submission.document
        return Detail(name, at.state, at.submission, at.place, job, None)
    found = summary.show(here.store, name)
    return Detail(name, at.state, at.submission, at.place, row.job, found)


@router.patch("/{name}", responses=declared(404, 409, 413))
def prioritize_search(asker: Asking, name: SearchName, place: Place) -> Asked:
    """Give a search another place in the queue."""
    return Asked.of(steering.prioritize(asker, name, place.priority))


@router.delete("/{name}", responses=declared(404, 409))
def cancel_search(asker: Asking, name: SearchName) -> Asked:
    """Take a search out of the queue that has not begun."""
    return Asked.of(steering.cancel(asker, name))


@router.post("/{name}/pause", responses=declared(404, 409))
def pause_search(asker: Asking, name: SearchName) -> Standing:
    """Have what is under way land, and nothing begun, as Ctrl-C does: it can be resumed."""
    return steering.pause(asker, name)


@router.post("/{name}/stop", responses=declared(404, 409))
def stop_search(asker: Asking, name: SearchName) -> Standing:
    """Open no further generation: the finals follow, and a winner is named."""
    return steering.stop(asker, name)


@router.post("/{name}/resume", responses=declared(404, 409, 413))
def resume_search(asker: Asking, name: SearchName, changes: Changes | None = None) -> Standing:
    """Go on with a search that is paused or has failed, or with a finished one that is allowed more
    looks."""
    return steering.resume(asker, name, () if changes is None else changes.overrides)


@router.post("/{name}/extend", responses=declared(404, 409, 413))
def extend_search(asker: Asking, name: SearchName, extension: Extension) -> Standing:
    """Go on under other limits; one that runs is paused for that, and goes on by itself."""
    return steering.extend(asker, name, extension.overrides)


@router.get("/{name}/history", dependencies=[requires("read")], responses=declared(404))
def show_history(here: Here, name: SearchName) -> History:
    """Generation by generation: scores with their intervals, baselines, alerts, budget."""
    return history(here.store, name)


@router.get("/{name}/front", dependencies=[requires("read")], responses=declared(404))
def show_front(here: Here, name: SearchName) -> list[FrontPoint]:
    """Of several objectives the candidates that no other beats in all of them, and baselines."""
    return list(front(here.store, name))


@router.get("/{name}/lineage", dependencies=[requires("read")], responses=declared(404))
def show_lineage(here: Here, name: SearchName) -> Lineage:
    """Who led when, and which parents are winners of other searches."""
    return lineage(here.store, name)


@router.get("/{name}/importance", dependencies=[requires("read")], responses=declared(404))
def show_importance(here: Here, name: SearchName) -> list[Importance]:
    """How much each coordinate sets the best candidates apart from the others."""
    return list(importance(here.store, name))


@router.get("/{name}/gap", dependencies=[requires("read")], responses=declared(404))
def show_gap(here: Here, name: SearchName) -> list[Gap]:
    """How far train flatters, generation by generation."""
    row = here.store.search(name)
    return [
        Gap(g.number, g.review["incumbent"], *map(g.review.get, _REVIEWED))
        for g in here.store.generations(row.id)
        if g.review
    ]


@router.get("/{name}/costs", dependencies=[requires("read")], responses=declared(404))
def show_costs(here: Here, name: SearchName) -> Costs:
    """What was spent, and where the time of the devices went."""
    found = summary.show(here.store, name)
    return Costs(found["budget"], found["seconds_left"], found["devices"], found["time"])


@router.get("/{name}/failures", dependencies=[requires("read")], responses=declared(404))
def show_failures(here: Here, name: SearchName) -> list[Failure]:
    """What went wrong, grouped by cause."""
    return list(failures(here.store, name))


@router.get("/{name}/log", dependencies=[requires("read")], responses=declared(404))
def show_log(
    here: Here,
    name: SearchName,
    offset: Annotated[
        int | None,
        Query(ge=0, le=2**53, description="In bytes; default: the last part of it."),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1_000_000, description="In bytes.")] = 100_000,
) -> LogPart:
    """A part of what the processes that work on a search say, in whole lines."""
    standing(here.store, name)
    return log_part(log_file(here.settings.data, name), offset, limit)
