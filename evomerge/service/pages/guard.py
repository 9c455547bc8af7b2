"""What keeps the claim of a search true."""

from fastapi import APIRouter, Request, Response

from evomerge.report.guard import guard
from evomerge.service.access import requires
from evomerge.service.api.shapes import SearchName
from evomerge.service.context import Here
from evomerge.service.overview import standing
from evomerge.service.pages.rendering import PageRoute, page

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/searches/{name}/guard", dependencies=[requires("read")])
def show_guard(request: Request, here: Here, name: SearchName) -> Response:
    """Splits, looks, contamination, the seal."""
    found = guard(here.store, name)
    opened = {one.task for one in found.openings}
    at = standing(here.store, name)
    return page(request, "guard.html", at=at, found=found, opened=opened)
