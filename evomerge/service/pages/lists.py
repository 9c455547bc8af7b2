"""Who works, and searches side by side."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from evomerge.report import compare
from evomerge.search import summary
from evomerge.service.access import requires
from evomerge.service.api import lists
from evomerge.service.api.shapes import NAME
from evomerge.service.context import Here
from evomerge.service.pages.rendering import PageRoute, page

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/workers", dependencies=[requires("read")])
def show_workers(request: Request, here: Here) -> Response:
    """Processes of this server, and what searches that run are evaluated on."""
    found = lists.list_workers(here)
    return page(request, "workers.html", found=found, settings=here.settings)


@router.get("/compare", dependencies=[requires("read")])
def compare_searches(
    request: Request,
    here: Here,
    name: Annotated[list[Annotated[str, Query(pattern=NAME)]], Query(max_length=10)] = [],  # noqa: B006
) -> Response:
    """Those that are named; with fewer than two, what there is to choose from."""
    names = list(dict.fromkeys(name))
    found = compare.searches(here.store, names) if len(names) > 1 else None
    return page(
        request,
        "compare.html",
        names=names,
        all=[row.name for row in reversed(here.store.searches())],
        found=found,
        estimates={key: words for key, words in summary.ESTIMATES.items() if key != "test"},
    )
