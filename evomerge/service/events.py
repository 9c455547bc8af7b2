"""Live events: one reader of the store, however many listen.

While somebody listens, the store is read five times a second, and what is new goes to everybody
who listens to that search. Events of a search:

    news    {"lines": [...], "evaluations": [...]}, see feed.Line and feed.Evaluated
    state   how it stands, see feed.Pulse: at first, and whenever that has changed
    reset   {}: more was missed than is told again; load it anew

The id of an event says how far its listener has read; whoever comes back with it is told what was
missed. Of all searches together there is `state` alone. A listener that does not keep up is
disconnected, and comes back. Runs in the server's event loop; knows nothing of requests.
"""

import asyncio
import json
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import ParamSpec, TypeVar

from fastapi.sse import ServerSentEvent

from evomerge.errors import EvomergeError, NotFound
from evomerge.service.problems import Busy
from evomerge.store import Store
from evomerge.store.feed import Feed, Mark, News, Pulse

EVENT_ID = r"^[0-9]{1,18}-[0-9]{1,18}$"

P = ParamSpec("P")
T = TypeVar("T")

_INTERVAL = 0.2  # seconds from one read to the next
_REST = 0.05  # seconds between them at least, however long they take
_PATIENCE = 5.0  # seconds before a store that is away is asked again
_EACH = 500  # streams that somebody may have
_BACKLOG = 100  # events that a listener may be behind
_AGAIN = 1000  # lines, and evaluations, that are told again
_AT_ONCE = 1000  # in one event; the rest comes with the next

_log = logging.getLogger(__name__)


class Listener:
    """Somebody who listens."""

    def __init__(self) -> None:
        self.is_closed = False
        self._waiting: deque[ServerSentEvent] = deque()
        self._woken = asyncio.Event()

    async def next(self, timeout: float) -> ServerSentEvent | None:
        """The next event; None where none comes within so many seconds, or it was closed."""
        if not self._waiting and not self.is_closed:
            self._woken.clear()
            try:
                await asyncio.wait_for(self._woken.wait(), timeout)
            except TimeoutError:
                return None
        return self._waiting.popleft() if self._waiting else None

    def put(self, event: ServerSentEvent) -> None:
        """Have it told, or, if it is too far behind, disconnect it."""
        if len(self._waiting) >= _BACKLOG:
            self._waiting.clear()
            self.close()
        elif not self.is_closed:
            self._waiting.append(event)
            self._woken.set()

    def close(self) -> None:
        """There will be no further event."""
        self.is_closed = True
        self._woken.set()


@dataclass
class _Topic:
    """What is listened to. users: listeners, and those that are about to be. mark: read up to here;
    None of all searches, and before it is known. told: the latest state by search."""

    users: int = 0
    listeners: set[Listener] = field(default_factory=set)
    mark: Mark | None = None
    told: dict[str, Pulse] = field(default_factory=dict)

    def publish(self, event: ServerSentEvent) -> None:
        for listener in self.listeners:
            listener.put(event)


class Broadcaster:
    """Of one store; its listeners are in one event loop."""

    def __init__(self, store: Store) -> None:
        self._feed = Feed(store)
        self._topics: dict[str | None, _Topic] = {}
        self._seats: Counter[str] = Counter()  # taken, by whom
        self._reading: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def listeners(self) -> int:
        """How many listen."""
        return sum(len(topic.listeners) for topic in self._topics.values())

    @contextmanager
    def seat(self, who: str) -> Iterator[None]:
        """To be had by whoever listens, for as long. Raises Busy where they have all of theirs."""
        if self._seats[who] >= _EACH:
            raise Busy(f"'{who}' has {_EACH:,} streams of events open: close some")
        self._seats[who] += 1
        try:
            yield
        finally:
            self._seats[who] -= 1
            self._seats += Counter()  # without those that have none

    @asynccontextmanager
    async def listening(
        self, search: str | None, after: str | None = None
    ) -> AsyncIterator[Listener]:
        """A listener as long as the context lasts; after: the id of the last event that it has had,
        which matches EVENT_ID. Raises NotFound for an unknown search, StoreUnavailable."""
        topic, listener = self._topics.setdefault(search, _Topic()), Listener()
        topic.users += 1
        try:
            first = await self._first(search, topic, after)
            # From here on nothing waits: what is published next goes on from where these end.
            for event in first:
                listener.put(event)
            topic.listeners.add(listener)
            if self._is_closed:
                listener.close()
            elif self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read(), name="events")
            yield listener
        finally:
            listener.close()
            topic.listeners.discard(listener)
            topic.users -= 1
            if not topic.users:
                del self._topics[search]

    def close(self) -> None:
        """End all streams, and those that would begin later."""
        self._is_closed = True
        for topic in self._topics.values():
            for listener in topic.listeners:
                listener.close()
        if self._reading is not None:
            self._reading.cancel()

    async def _first(
        self, search: str | None, topic: _Topic, after: str | None
    ) -> list[ServerSentEvent]:
        """What a listener is told before it is one of the topic's."""
        if not topic.told:
            pulses = await _in_thread(self._feed.pulses)
            topic.told = topic.told or _of_topic(search, pulses)
        if search is None:
            return [_state(pulse, None) for pulse in topic.told.values()]
        if search not in topic.told:
            raise NotFound(f"there is no search '{search}': see GET /api/v1/searches")
        if topic.mark is None:
            mark = await _in_thread(self._feed.mark, search)
            topic.mark = topic.mark or mark
        first = [] if after is None else await self._missed(search, topic, _mark(after))
        return [*first, _state(topic.told[search], topic.mark)]

    async def _missed(self, search: str, topic: _Topic, after: Mark) -> list[ServerSentEvent]:
        """What the topic has told since a mark; read until nothing was told meanwhile."""
        missed, read = News((), (), False), after
        while True:
            news = await _in_thread(self._feed.since, search, read, _AGAIN)
            missed = missed.followed_by(news)
            read = missed.end(after)
            told = topic.mark or Mark(0, 0)
            if missed.more or len(missed) > _AGAIN:
                return [ServerSentEvent(event="reset", raw_data="{}", id=_id(told))]
            if read.covers(told):
                missed = missed.until(told)  # the rest is about to be told to all
                return [_news(missed, missed.end(after))] if len(missed) else []

    async def _read(self) -> None:
        """Tell everybody what is new, as long as somebody listens."""
        trouble: str | None = None
        while self._topics:
            marks = {
                search: topic.mark
                for search, topic in self._topics.items()
                if search is not None and topic.mark is not None
            }
            began, interval = time.monotonic(), _INTERVAL
            try:
                self._publish(*await _in_thread(self._look, marks))
                trouble = None
            except Exception as error:  # whatever it is, streams go on once it has passed
                if str(error) != trouble:
                    trouble = str(error)
                    known = isinstance(error, EvomergeError)
                    _log.warning("events: %s", trouble, exc_info=None if known else error)
                interval = _PATIENCE
            await asyncio.sleep(max(_REST, began + interval - time.monotonic()))

    def _look(self, marks: Mapping[str, Mark]) -> tuple[dict[str, Pulse], dict[str, News]]:
        """Blocks."""
        news = {search: self._feed.since(search, mark, _AT_ONCE) for search, mark in marks.items()}
        return self._feed.pulses(), news

    def _publish(self, pulses: Mapping[str, Pulse], news: Mapping[str, News]) -> None:
        for search, topic in self._topics.items():
            new = news.get(search) if search is not None else None
            if new:
                topic.mark = new.end(topic.mark or Mark(0, 0))
                topic.publish(_news(new, topic.mark))
            latest = _of_topic(search, pulses)
            for name, pulse in latest.items():
                if topic.told.get(name) != pulse:
                    topic.publish(_state(pulse, topic.mark))
            topic.told = latest or topic.told


def _of_topic(search: str | None, pulses: Mapping[str, Pulse]) -> dict[str, Pulse]:
    return {name: pulse for name, pulse in pulses.items() if search in (None, name)}


def _state(pulse: Pulse, mark: Mark | None) -> ServerSentEvent:
    id = None if mark is None else _id(mark)
    return ServerSentEvent(event="state", raw_data=json.dumps(asdict(pulse)), id=id)


def _news(news: News, mark: Mark) -> ServerSentEvent:
    document = asdict(news)
    del document["more"]
    return ServerSentEvent(event="news", raw_data=json.dumps(document), id=_id(mark))


def _id(mark: Mark) -> str:
    return f"{mark.line}-{mark.evaluation}"


def _mark(id: str) -> Mark:
    line, evaluation = map(int, id.split("-"))
    return Mark(line, evaluation)


async def _in_thread(read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """In a thread of its own, so that no crowd of requests keeps listeners waiting."""
    return await asyncio.to_thread(read, *args, **kwargs)
