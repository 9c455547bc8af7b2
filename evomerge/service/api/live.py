"""Live events, by server-sent events: see events for what is told, and to whom."""

import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from evomerge.service import access
from evomerge.service.access import Principal, requires
from evomerge.service.api.shapes import SearchName
from evomerge.service.context import Here
from evomerge.service.events import EVENT_ID, Listener
from evomerge.service.overview import standing
from evomerge.service.problems import declared

router = APIRouter(tags=["events"])

_RECHECK = 30.0  # seconds, after which a revoked token hears nothing more


async def _of_all(
    here: Here, who: Annotated[Principal, requires("read")]
) -> AsyncIterator[Listener]:
    with here.broadcaster.seat(who.name):
        async with here.broadcaster.listening(None) as listener:
            yield listener


async def _of_search(
    here: Here,
    who: Annotated[Principal, requires("read")],
    name: SearchName,
    last_event_id: Annotated[
        str | None,
        Header(pattern=EVENT_ID, description="Of the last event that was heard: go on from it."),
    ] = None,
) -> AsyncIterator[Listener]:
    await run_in_threadpool(standing, here.store, name)  # which says what there is instead
    with here.broadcaster.seat(who.name):
        async with here.broadcaster.listening(name, last_event_id) as listener:
            yield listener


@router.get(
    "/events",
    response_class=EventSourceResponse,
    responses=declared(),
)
async def follow_searches(
    request: Request, listener: Annotated[Listener, Depends(_of_all)]
) -> AsyncIterator[ServerSentEvent]:
    """How all searches stand, whenever that changes."""
    async for event in _told(request, listener):
        yield event


@router.get(
    "/searches/{name}/events",
    response_class=EventSourceResponse,
    responses=declared(404),
)
async def follow_search(
    request: Request, listener: Annotated[Listener, Depends(_of_search)]
) -> AsyncIterator[ServerSentEvent]:
    """What happens in a search, as it happens."""
    async for event in _told(request, listener):
        yield event


async def _told(request: Request, listener: Listener) -> AsyncIterator[ServerSentEvent]:
    checked = time.monotonic()
    while True:
        event = await listener.next(_RECHECK)
        if event is not None:
            yield event
        elif listener.is_closed:
            return
        if time.monotonic() - checked >= _RECHECK:
            if not await run_in_threadpool(access.still, request, "read"):
                return
            checked = time.monotonic()
