"""The candidates of a search: page by page, on a front, and what sets the best apart."""

from itertools import combinations
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from evomerge.report import charts
from evomerge.report.population import STATES, front, importance, lineage, population
from evomerge.service.access import requires
from evomerge.service.api.shapes import LARGEST, Cursor, SearchName
from evomerge.service.context import Here
from evomerge.service.overview import standing
from evomerge.service.pages.rendering import PageRoute, page
from evomerge.store import Sort

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_SHOWN = 12  # coordinates whose importance is drawn


@router.get("/searches/{name}/population", dependencies=[requires("read")])
def show_population(
    request: Request,
    here: Here,
    name: SearchName,
    state: Literal["open", "scored", "failed", "infeasible"] | None = None,
    generation: Annotated[int | None, Query(ge=0, le=LARGEST)] = None,
    sort: Sort = "standing",
    order: Literal["descending", "ascending"] = "descending",
    cursor: Cursor = None,
) -> Response:
    """A page of candidates."""
    found = population(here.store, name, state, generation, sort, order == "descending", cursor, 50)
    points, matter = front(here.store, name), importance(here.store, name)
    objectives = list(points[0].values) if points else []
    return page(
        request,
        "population.html",
        at=standing(here.store, name),
        found=found,
        tasks=list(here.store.search(name).job["tasks"]),
        chosen={"state": state, "generation": generation, "sort": sort, "order": order},
        cursor=cursor,
        states=STATES,
        points=[one for one in points if one.on_front or one.label],
        objectives=objectives,
        fronts=[charts.front(points, *pair) for pair in combinations(objectives, 2)],
        matter=matter,
        importance=charts.importance(matter[:_SHOWN]) if matter else None,
        lineage=lineage(here.store, name),
    )
