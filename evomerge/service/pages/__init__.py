"""The dashboard: pages for people, one module for each kind of thing that there is.

Rendered here, from the values of evomerge.report and what the API says of the rest; whatever a page
has done goes through steering, as the API's routes do. Without scripts everything works but what
refreshes itself. Nothing of a test split is shown before its seal was opened: no page reads more
than the stored reports.
"""

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from evomerge.service.pages import (
    admin,
    candidates,
    entrance,
    exports,
    guard,
    lists,
    populations,
    rendering,
    searches,
    submitting,
)

STATIC = "/static"


def install(app: FastAPI) -> None:
    """All pages, and the files that they load; and pages for people of what no route answers."""
    app.add_exception_handler(HTTPException, rendering.unrouted)
    for part in (
        searches,
        populations,
        candidates,
        guard,
        exports,
        submitting,
        lists,
        admin,
        entrance,
    ):
        app.include_router(part.router)
    app.mount(STATIC, rendering.Files())
