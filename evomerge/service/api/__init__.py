"""The API, /api/v1: one module for each kind of thing that there is.

Every route declares the scope that it needs and every status that it answers with. Those that read
the store are plain functions, which FastAPI calls in threads.
"""

from copy import copy

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from fastapi.sse import EventSourceResponse

from evomerge.service.api import candidates, checks, exports, health, lists, live, searches, tokens
from evomerge.service.api.shapes import known_keys

V1 = "/api/v1"


def install(app: FastAPI) -> None:
    """Everything but the pages."""
    app.include_router(health.router)
    for part in (searches, candidates, exports, live, lists, checks, tokens):
        app.include_router(part.router, prefix=V1, dependencies=[Depends(known_keys)])
    for route in [*app.routes]:
        if isinstance(route, APIRoute):
            # What a path takes is for those who may ask: last, though the router's come first.
            route.dependant.dependencies.sort(key=lambda inner: inner.call is known_keys)
            if "GET" in route.methods and route.response_class is not EventSourceResponse:
                app.routes.append(_head(route))


def _head(route: APIRoute) -> APIRoute:
    """Whatever can be got has a head too, by HTTP's rule; the schema needs not say so. Of streams
    there is none: nobody would notice that one is kept open."""
    head = copy(route)
    head.methods, head.include_in_schema = {"HEAD"}, False
    return head
