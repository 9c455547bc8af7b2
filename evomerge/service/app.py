"""The app of a server: its API, its live events and its pages, put together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import to_thread
from fastapi import FastAPI

import evomerge
from evomerge.service import access, api, middleware, pages, problems
from evomerge.service.context import Context
from evomerge.service.events import Broadcaster
from evomerge.service.idempotency import Answers
from evomerge.service.metrics import Metrics
from evomerge.service.scheduler import Scheduler
from evomerge.service.settings import Settings
from evomerge.store import Queue, Store

# Requests at work at the same time; fewer than the connections that a store opens at most.
_THREADS = 12


def create_app(settings: Settings, store: Store, scheduler: Scheduler) -> FastAPI:
    """Of a store that is open and a scheduler that is started elsewhere."""
    broadcaster = Broadcaster(store)
    metrics = Metrics(store, scheduler, broadcaster)
    context = Context(settings, store, Queue(store), scheduler, broadcaster, Answers(), metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        to_thread.current_default_thread_limiter().total_tokens = _THREADS
        yield
        broadcaster.close()

    app = FastAPI(
        title="evomerge",
        summary="Searches for the best way to merge language models.",
        version=evomerge.__version__,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,  # see api: with a scope, like all that is not public
        lifespan=lifespan,
        generate_unique_id_function=lambda route: route.name,
        # Two shapes of one thing would be two things to whoever reads the schema.
        separate_input_output_schemas=False,
    )
    app.state.context = context
    access.install(app, settings, store)
    problems.install(app)
    metrics.install(app)
    middleware.install(app, settings)
    api.install(app)
    pages.install(app)
    return app
