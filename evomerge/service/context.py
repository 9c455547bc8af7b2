"""What every route of a server has at hand."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from evomerge.service.events import Broadcaster
from evomerge.service.idempotency import Answers
from evomerge.service.metrics import Metrics
from evomerge.service.scheduler import Scheduler
from evomerge.service.settings import Settings
from evomerge.store import Queue, Store


@dataclass(frozen=True)
class Context:
    """Of one server. answers: what was said to requests with a key, see idempotency."""

    settings: Settings
    store: Store
    queue: Queue
    scheduler: Scheduler
    broadcaster: Broadcaster
    answers: Answers
    metrics: Metrics


def _of(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


# A parameter of this type is given the context.
Here = Annotated[Context, Depends(_of)]
