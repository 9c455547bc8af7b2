"""What there is to search with, and who works: tasks, spaces, workers; and searches compared."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Query

from evomerge.devices import Device
from evomerge.report import compare
from evomerge.report.compare import SideBySide
from evomerge.service import catalogue
from evomerge.service.access import requires
from evomerge.service.api.shapes import NAME
from evomerge.service.catalogue import Space, TaskOrSuite
from evomerge.service.context import Here
from evomerge.service.problems import declared

router = APIRouter(tags=["lists"])


@dataclass(frozen=True)
class Worker(Device):
    """What a search that runs has its candidates evaluated on."""

    search: str


@dataclass(frozen=True)
class Process:
    """A process of this server's: the submission that it works off, and its id in the system."""

    submission: int
    kind: Literal["search", "export", "push"]
    search: str
    pid: int


@dataclass(frozen=True)
class Workers:
    """Who works. leads: whether this server works off the queue. waiting: submissions in it."""

    leads: bool
    waiting: int
    processes: list[Process]
    workers: list[Worker]


@router.get("/tasks", dependencies=[requires("read")], responses=declared())
def list_tasks(here: Here) -> list[TaskOrSuite]:
    """Tasks and suites that a job may name: those that ship with evomerge, and those in folders of
    the server's roots."""
    return catalogue.tasks(here.settings.roots)


@router.get("/spaces", dependencies=[requires("read")], responses=declared())
def list_spaces() -> list[Space]:
    """Presets of spaces that ship with evomerge."""
    return catalogue.spaces()


@router.get("/workers", dependencies=[requires("read")], responses=declared())
def list_workers(here: Here) -> Workers:
    """Processes of this server, and what the searches that run are evaluated on."""
    running = here.scheduler.running
    processes = [
        Process(id, one.kind, one.search, running[id])
        for id, one in here.queue.some(running).items()
    ]
    workers = [
        Worker(**asdict(device), search=row.name)
        for row in here.store.searches()
        if row.state == "running"
        for device in here.store.devices(row.id)
    ]
    return Workers(here.scheduler.leads, len(here.queue.places()), processes, workers)


@router.get("/compare", dependencies=[requires("read")], responses=declared(404))
def compare_searches(
    here: Here,
    name: Annotated[
        list[Annotated[str, Query(pattern=NAME)]],
        Query(min_length=2, max_length=10, description="Of a search; given several times."),
    ],
) -> SideBySide:
    """Searches side by side."""
    return compare.searches(here.store, name)
