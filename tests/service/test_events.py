"""Live events: everybody is told everything, once and in order, whoever comes and goes."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from evomerge.errors import NotFound
from evomerge.fitness.results import Failed
from evomerge.service import events
from evomerge.service.api import live
from evomerge.service.events import Broadcaster, Listener
from evomerge.store import Coordinator, NewCandidate, Queue, Store, Tokens
from tests.running import PATIENCE, url
from tests.service.serving import Listening, Served, behind_socket, listening, served

JOB: dict[str, Any] = {"budget": {"candidates": 1000}}
LISTENERS, EVALUATIONS = 200, 40


@dataclass
class Writer:
    """A search 'one' of so many candidates, which are evaluated one by one."""

    coordinator: Coordinator
    count: int = 0

    def evaluate(self) -> None:
        self.count += 1
        self.coordinator.record(self.count, "train", 0, Failed("broken"))
        self.coordinator.flush()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(url(tmp_path / "store.db"), create=True) as opened:
        yield opened


@pytest.fixture
def writer(store: Store) -> Iterator[Writer]:
    with Coordinator.launch(store, "one", 0, JOB, {}, [], []) as held:
        new = [NewCandidate(i, None, np.zeros(1), None, None) for i in range(300)]
        held.open_generation(1, "proposed", None, new)
        yield Writer(held)


async def told_to(listener: Listener, *, until: int) -> list[tuple[str, Any, str | None]]:
    """(event, data, id) up to the news of this evaluation."""
    found = []
    async with asyncio.timeout(PATIENCE):
        while (event := await listener.next(PATIENCE)) is not None:
            data = json.loads(event.raw_data or "null")
            found.append((event.event or "", data, event.id))
            if event.event == "news" and data["evaluations"][-1:] == _ending(data, until):
                break
    return found


def _ending(data: dict[str, Any], id: int) -> list[Any]:
    return [one for one in data["evaluations"] if one["id"] >= id][-1:] or [None]


def evaluated(found: list[tuple[str, Any, str | None]]) -> list[int]:
    return [one["id"] for kind, data, _ in found if kind == "news" for one in data["evaluations"]]


# --- in this process -----------------------------------------------------------------------------


def test_a_listener_begins_with_the_state_and_hears_what_is_new(
    store: Store, writer: Writer
) -> None:
    async def listen() -> None:
        writer.evaluate()
        async with Broadcaster(store).listening("one") as listener:
            first = await listener.next(PATIENCE)
            assert first is not None
            assert first.event == "state"
            assert json.loads(first.raw_data or "")["state"] == "running"
            await asyncio.to_thread(writer.evaluate)
            await asyncio.to_thread(writer.coordinator.log, "note", "for <all>")
            await asyncio.to_thread(writer.evaluate)
            found = await told_to(listener, until=3)
        assert evaluated(found) == [2, 3]  # the first was there before
        lines = [line for kind, data, _ in found if kind == "news" for line in data["lines"]]
        assert [line["text"] for line in lines] == ["for <all>"]

    asyncio.run(listen())


@pytest.mark.slow
@pytest.mark.parametrize("patience", [1, 4])
def test_whoever_comes_back_again_and_again_misses_nothing_and_hears_nothing_twice(
    store: Store, writer: Writer, patience: int
) -> None:
    total = 40

    async def listen() -> list[int]:
        broadcaster, heard, last = Broadcaster(store), list[int](), "0-0"
        writing = asyncio.to_thread(lambda: [writer.evaluate() for _ in range(total)])
        task = asyncio.create_task(writing)
        async with asyncio.timeout(PATIENCE), broadcaster.listening("one"):  # who stays
            while len(heard) < total:
                async with broadcaster.listening("one", last) as listener:
                    for _ in range(patience):
                        event = await listener.next(1)
                        if event is not None and event.id is not None:
                            data = json.loads(event.raw_data or "")
                            heard += [one["id"] for one in data.get("evaluations", ())]
                            last = event.id
        await task
        return heard

    assert asyncio.run(listen()) == list(range(1, total + 1))


def test_whoever_missed_too_much_is_told_to_begin_anew(
    store: Store, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_AGAIN", 5)

    async def listen(after: str) -> str | None:
        async with Broadcaster(store).listening("one", after) as listener:
            event = await listener.next(PATIENCE)
            return event and event.event

    for _ in range(6):
        writer.evaluate()
    assert asyncio.run(listen("0-0")) == "reset"
    assert asyncio.run(listen("0-1")) == "news"
    assert asyncio.run(listen("0-6")) == "state"


def test_whoever_does_not_keep_up_is_disconnected(store: Store, writer: Writer) -> None:
    async def listen() -> None:
        broadcaster = Broadcaster(store)
        async with broadcaster.listening("one") as slow, broadcaster.listening("one") as quick:
            for number in range(150):
                event = events.ServerSentEvent(event="state", raw_data=str(number))
                slow.put(event)
                quick.put(event)
                while await quick.next(0.0) is not None:
                    pass
            assert slow.is_closed
            assert await slow.next(PATIENCE) is None
            assert not quick.is_closed

    asyncio.run(listen())


def test_the_store_is_read_only_while_somebody_listens(store: Store, writer: Writer) -> None:
    async def listen() -> None:
        broadcaster = Broadcaster(store)
        async with broadcaster.listening("one"):
            reading = broadcaster._reading
            assert reading is not None
            assert not reading.done()
        async with asyncio.timeout(PATIENCE):
            await reading
        assert broadcaster.listeners == 0

    asyncio.run(listen())


def test_the_queue_is_heard_of_too(store: Store) -> None:
    queue = Queue(store)

    async def listen() -> list[Any]:
        broadcaster, found = Broadcaster(store), []
        async with broadcaster.listening(None) as listener:
            one = await asyncio.to_thread(_submit, queue)
            found.append(await listener.next(PATIENCE))
            await asyncio.to_thread(queue.change, one, state="paused")
            found.append(await listener.next(PATIENCE))
        return [json.loads(event.raw_data)["queued"] for event in found if event is not None]

    assert asyncio.run(listen()) == ["queued", "paused"]


def _submit(queue: Queue) -> int:
    return queue.submit("search", "new", {}, by="anna").id


def test_nobody_listens_to_a_search_that_is_not_there(store: Store) -> None:
    async def listen() -> None:
        broadcaster = Broadcaster(store)
        with pytest.raises(NotFound):
            async with broadcaster.listening("other"):
                pass
        assert broadcaster.listeners == 0

    asyncio.run(listen())


# --- over HTTP -----------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, store: Store, writer: Writer) -> Iterator[Served]:
    with served(tmp_path) as found:  # over the same file
        yield found


@asynccontextmanager
async def stream(address: str, path: str, **headers: str) -> AsyncIterator[asyncio.StreamReader]:
    """A response, from its first line on."""
    parts = urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    lines = [f"GET /api/v1{path} HTTP/1.1", f"Host: {parts.netloc}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    try:
        yield reader
    finally:
        writer.close()


async def heard(reader: asyncio.StreamReader, until: int) -> list[int]:
    """The evaluations that a stream tells of, up to this one."""
    found: list[int] = []
    while until not in found:
        line = (await reader.readline()).decode()
        assert line, found  # the stream has ended
        if line.startswith("data: {") and '"evaluations": [' in line:
            found += [one["id"] for one in json.loads(line[6:])["evaluations"]]
    return found


@pytest.mark.slow
def test_two_hundred_listeners_hear_everything_at_once(server: Served, writer: Writer) -> None:
    broadcaster = server.context.broadcaster

    async def crowd(address: str) -> list[list[int]]:
        ready = asyncio.Semaphore(0)

        async def one() -> list[int]:
            async with stream(address, "/searches/one/events") as reader:
                while not (await reader.readline()).startswith(b"event: state"):
                    pass
                ready.release()
                return await heard(reader, EVALUATIONS)

        tasks = [asyncio.create_task(one()) for _ in range(LISTENERS)]
        for _ in tasks:
            await ready.acquire()
        assert broadcaster.listeners == LISTENERS
        assert threading.active_count() < 40  # not one for each
        for _ in range(EVALUATIONS):
            await asyncio.to_thread(writer.evaluate)
            await asyncio.sleep(0.02)
        return await asyncio.gather(*tasks)

    with listening(server.app) as address:
        for told in asyncio.run(asyncio.wait_for(crowd(address), PATIENCE)):
            assert told == list(range(1, EVALUATIONS + 1))


def test_a_stream_goes_on_from_the_last_event_that_was_heard(
    server: Served, writer: Writer
) -> None:
    for _ in range(5):
        writer.evaluate()

    async def listen(address: str) -> list[int]:
        path, last = "/searches/one/events", {"Last-Event-ID": "0-3"}
        async with stream(address, path, **last) as reader:
            return await heard(reader, 5)

    with listening(server.app) as address:
        assert asyncio.run(asyncio.wait_for(listen(address), PATIENCE)) == [4, 5]


def test_streams_end_with_the_server(server: Served) -> None:
    async def listen(found: Listening) -> bytes:
        async with stream(found.address, "/events") as reader:
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            found.stop()
            return await reader.readuntil(b"0\r\n\r\n")

    with behind_socket(server.app) as found:
        assert asyncio.run(asyncio.wait_for(listen(found), PATIENCE))


def test_a_token_that_is_revoked_hears_nothing_more(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_RECHECK", 0.05)
    tokens = Tokens(server.store)
    _, secret = tokens.create("anna", ["read"])

    async def listen(address: str) -> bytes:
        bearer = {"Authorization": f"Bearer {secret}"}
        async with stream(address, "/events", **bearer) as reader:
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            await asyncio.to_thread(tokens.revoke, "anna")
            return await reader.readuntil(b"0\r\n\r\n")

    with listening(server.app) as address:
        assert asyncio.run(asyncio.wait_for(listen(address), PATIENCE))


def test_a_stream_of_nothing_is_refused_before_it_begins(server: Served) -> None:
    told = server.client.get("/api/v1/searches/other/events")
    assert (told.status_code, told.json()["error"]["code"]) == (404, "not_found")
    assert told.json() == server.client.get("/api/v1/searches/other").json()
    wrong = {"Last-Event-ID": "yesterday"}
    assert server.refused(422, "GET", "/searches/one/events", headers=wrong) == "invalid"


def test_nobody_has_more_streams_than_anybody_needs(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_EACH", 2)

    async def listen(address: str) -> None:
        for _ in range(2):  # what was closed does not count
            async with AsyncExitStack() as opened:
                for path in ("/events", "/searches/one/events"):
                    reader = await opened.enter_async_context(stream(address, path))
                    assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
                reader = await opened.enter_async_context(stream(address, "/events"))
                assert b" 503 " in await reader.readline()
            while server.context.broadcaster._seats:
                await asyncio.sleep(0.01)

    with listening(server.app) as address:
        asyncio.run(asyncio.wait_for(listen(address), PATIENCE))
