"""One candidate of a search."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from evomerge.report import charts, compare
from evomerge.report.candidate import candidate, recipe, samples
from evomerge.service.access import requires
from evomerge.service.api.shapes import LARGEST, CandidateId, SearchName
from evomerge.service.context import Here
from evomerge.service.overview import standing
from evomerge.service.pages.rendering import PageRoute, page

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/searches/{name}/candidates/{id}", dependencies=[requires("read")])
def show_candidate(
    request: Request,
    here: Here,
    name: SearchName,
    id: CandidateId,
    other: Annotated[int | None, Query(ge=1, le=LARGEST)] = None,
    replies: Annotated[int, Query(ge=1, le=500)] = 8,
) -> Response:
    """Everything about it. other: a candidate to compare its recipe with; replies: how many."""
    found = candidate(here.store, name, id)
    kept = samples(here.store, name, id, replies + 1)
    return page(
        request,
        "candidate.html",
        at=standing(here.store, name),
        found=found,
        other=other,
        difference=None if other is None else _difference(here, name, id, found.recipe, other),
        samples=kept[:replies],
        more=len(kept) > replies,
        drawn={
            "gains": charts.intervals(found.comparisons) if found.comparisons else None,
            "heatmap": charts.heatmap(found.coefficients) if found.coefficients else None,
            "path": charts.path(found.path) if found.path else None,
        },
    )


def _difference(here: Here, name: str, id: int, ours: str | None, other: int) -> list[str]:
    """The lines of a unified diff from the other's recipe; in words where there is none."""
    theirs = recipe(here.store, name, other)
    for one, of in ((ours, id), (theirs, other)):
        if one is None:
            return [f"candidate {of} is infeasible and has no recipe"]
    names = f"candidate {other}", f"candidate {id}"
    return compare.recipes(theirs or "", ours or "", names).splitlines()
