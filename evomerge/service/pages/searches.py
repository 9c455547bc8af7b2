"""All searches, one search, its log, and what it is told to do."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import HTMLResponse

from evomerge.errors import InputError, NotFound
from evomerge.report import charts
from evomerge.report.failures import failures
from evomerge.report.history import History, history
from evomerge.report.page import report
from evomerge.report.words import LIMITS
from evomerge.search import summary
from evomerge.search.changes import LOOKS
from evomerge.service import exports, steering
from evomerge.service.access import requires
from evomerge.service.api.shapes import LARGEST, Asking, Cursor, Priority, SearchName
from evomerge.service.context import Here
from evomerge.service.folders import log_file
from evomerge.service.logs import log_part
from evomerge.service.overview import State, overviews, standing
from evomerge.service.pages.rendering import PageRoute, page, seen
from evomerge.store import NOT_BEGUN, SearchRow, Store, consistent

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_LOG = 60_000  # bytes of a log that a page shows
# Of a report, which brings a style of its own: it may load nothing and run nothing.
_CONFINED = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; sandbox"
)
_STATES = ("running", "queued", "paused", "finished", "failed", "cancelled")


@router.get("/", dependencies=[requires("read")])
def list_searches(
    request: Request, here: Here, state: State | None = None, cursor: Cursor = None
) -> Response:
    """All searches at a glance."""
    found = overviews(here.store, state, cursor)
    return page(
        request,
        "searches.html",
        found=found,
        state=state,
        states=_STATES,
        cursor=cursor,
        address=here.settings.public_url or str(request.base_url).rstrip("/"),
    )


@router.get("/searches/{name}", dependencies=[requires("read")])
def show_search(request: Request, here: Here, name: SearchName) -> Response:
    """One search; of one that waits in the queue, its job."""
    at = standing(here.store, name)
    try:
        here.store.search(name)
    except NotFound:
        submission = here.queue.of(name)
        job = {} if submission is None else submission.document
        return page(request, "queued.html", at=at, job=job, **_steering(at.state, job))
    went, found, row = _seen_at_once(here.store, name)
    return page(
        request,
        "search.html",
        at=at,
        found=found,
        went=went,
        job=row.job,
        versions=row.versions,
        estimates=summary.ESTIMATES,
        drawn={
            "fitness": charts.fitness(went),
            "gap": charts.gap(went),
            "step_size": charts.step_size(went),
        },
        exported=exports.exports(here.queue, name),
        looks=_looks(row.job),
        **_steering(at.state, row.job),
    )


@consistent
def _seen_at_once(store: Store, name: str) -> tuple[History, Mapping[str, Any], SearchRow]:
    """How a search went, what `show` says of it, and its row."""
    return history(store, name), summary.show(store, name), store.search(name)


@router.get("/searches/{name}/report", dependencies=[requires("read")])
def read_report(
    here: Here,
    name: SearchName,
    candidate: Annotated[int | None, Query(ge=1, le=LARGEST)] = None,
) -> Response:
    """The report that can be sent on, of the winner or another candidate."""
    headers = {"Content-Security-Policy": _CONFINED}
    return HTMLResponse(report(here.store, name, candidate), headers=headers)


@router.get("/searches/{name}/log", dependencies=[requires("read")])
def show_log(request: Request, here: Here, name: SearchName) -> Response:
    """The end of what the processes that work on it say."""
    at = standing(here.store, name)
    part = log_part(log_file(here.settings.data, name), None, _LOG)
    return page(request, "log.html", at=at, part=part, begun=_has_begun(here, name))


@router.get("/searches/{name}/failures", dependencies=[requires("read")])
def show_failures(request: Request, here: Here, name: SearchName) -> Response:
    """What went wrong, by cause."""
    found = failures(here.store, name)
    row = here.store.search(name)
    states = here.store.progress().get(row.id, NOT_BEGUN).candidates
    return page(
        request,
        "failures.html",
        at=standing(here.store, name),
        found=found,
        proposed=sum(states.values()),
    )


@router.post("/searches/{name}/pause")
def pause(asker: Asking, name: SearchName) -> Response:
    """See steering."""
    steering.pause(asker, name)
    return seen("searches", name)


@router.post("/searches/{name}/stop")
def stop(asker: Asking, name: SearchName) -> Response:
    """See steering."""
    steering.stop(asker, name)
    return seen("searches", name)


@router.post("/searches/{name}/resume")
def resume(asker: Asking, name: SearchName) -> Response:
    """See steering."""
    steering.resume(asker, name)
    return seen("searches", name)


@router.post("/searches/{name}/cancel")
def cancel(asker: Asking, name: SearchName) -> Response:
    """See steering."""
    steering.cancel(asker, name)
    return seen("searches", name)


@router.post("/searches/{name}/prioritize")
def prioritize(asker: Asking, name: SearchName, priority: Annotated[Priority, Form()]) -> Response:
    """See steering."""
    steering.prioritize(asker, name, priority)
    return seen("searches", name)


@router.post("/searches/{name}/extend")
def extend(
    asker: Asking,
    name: SearchName,
    candidates: Annotated[str, Form(max_length=20)] = "",
    example_evaluations: Annotated[str, Form(max_length=20)] = "",
    hours: Annotated[str, Form(max_length=20)] = "",
    gpu_hours: Annotated[str, Form(max_length=20)] = "",
    validation_looks: Annotated[str, Form(max_length=20)] = "",
) -> Response:
    """Other limits than those of its budget, more looks at validation; what was left as it is
    stays."""
    job = asker.here.store.search(name).job
    given = dict(zip(LIMITS, (candidates, example_evaluations, hours, gpu_hours), strict=True))
    changes = [
        f"budget.{limit}={text.strip()}"
        for limit, text in given.items()
        if text.strip() and text.strip() != _written(job["budget"].get(limit))
    ]
    if validation_looks.strip() not in ("", str(_looks(job))):
        changes.append(f"{LOOKS}={validation_looks.strip()}")
    if not changes:
        raise InputError(f"search '{name}': every limit is what it was: raise one of them")
    steering.extend(asker, name, changes)
    return seen("searches", name)


def _has_begun(here: Here, name: str) -> bool:
    try:
        here.store.search(name)
    except NotFound:
        return False
    return True


def _steering(state: State, job: dict[str, Any]) -> dict[str, Any]:
    """What a search in this state may be told, and its limits as a form shows them; of one that
    has finished, the looks alone may be more."""
    budget, limits = job.get("budget", {}), () if state == "finished" else LIMITS
    return {
        "limits": {limit: _written(budget.get(limit)) for limit in limits},
        "may": {
            "pause": state in ("running", "queued"),
            "prioritize": state == "queued",
            "stop": state in ("running", "paused"),
            "resume": state in ("paused", "failed"),
            "extend": state in ("running", "paused", "finished", "failed"),
        },
    }


def _looks(job: Mapping[str, Any]) -> int:
    looks: int = job["guard"]["validation_looks"]
    return looks


def _written(limit: float | None) -> str:
    return "" if limit is None else f"{limit:g}" if limit < 1e6 else f"{limit:.0f}"
