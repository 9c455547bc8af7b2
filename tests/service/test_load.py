"""A crowd: hundreds listen, some of them slowly, others ask, and a process of its own writes."""

import asyncio
import multiprocessing
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from evomerge.fitness.results import Failed
from evomerge.store import Coordinator, NewCandidate, Store
from tests.running import PATIENCE, url
from tests.service.serving import Served, listening, served
from tests.service.test_events import heard, stream

pytestmark = pytest.mark.slow

LISTENERS, EVALUATIONS = 200, 100
SLOW, QUICK = 5, 10
LINE = "a long line " * 2_000
ASKED = ("/", "/metrics", "/api/v1/searches", "/api/v1/searches/one/log", "/workers")
EVENTS = "/searches/one/events"

_SPAWN = multiprocessing.get_context("spawn")


def write(store_url: str, begin: Event, line: str) -> None:
    """Record EVALUATIONS results, each of which lands alone, and after each a line of the log."""
    with Store(store_url) as store, Coordinator.take_over(store, "one") as coordinator:
        new = [NewCandidate(i, None, np.zeros(1), None, None) for i in range(EVALUATIONS)]
        ids = coordinator.open_generation(1, "proposed", None, new)
        assert begin.wait(PATIENCE)
        for id in ids:
            coordinator.record(id, "train", 0, Failed("broken"))
            coordinator.flush()
            coordinator.log("note", line)


class Writer:
    """A process that writes once it is told to begin."""

    def __init__(self, store_url: str, line: str) -> None:
        self._begin = _SPAWN.Event()
        self._process = _SPAWN.Process(target=write, args=(store_url, self._begin, line))
        self._process.start()

    def begin(self) -> None:
        self._begin.set()

    def ended(self) -> int | None:
        """How it ended: 0, unless something was locked, or else was wrong."""
        self._process.join(PATIENCE)
        return self._process.exitcode


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    """Of a store with a search that nobody conducts yet."""
    with Store(url(tmp_path / "store.db"), create=True) as store:
        Coordinator.launch(store, "one", 0, {"budget": {"candidates": 1000}}, {}, [], []).close()
        with served(tmp_path) as found:
            yield found


async def begun(reader: asyncio.StreamReader) -> None:
    """Wait until a stream has told how things stand."""
    while not (await reader.readline()).startswith(b"event: state"):
        pass


async def ask(address: str, until: Sequence["asyncio.Task[list[int]]"]) -> set[int]:
    """The statuses of answers to requests that follow each other as long as tasks go on."""
    found = set[int]()
    async with httpx.AsyncClient(base_url=address, timeout=PATIENCE) as client:
        while not all(task.done() for task in until):
            for path in ASKED:
                found.add((await client.get(path)).status_code)
    return found


def test_two_hundred_listeners_hear_all_that_a_process_writes_while_others_ask(
    server: Served,
) -> None:
    writer = Writer(server.settings.store, "a line")

    async def crowd(address: str) -> tuple[list[list[int]], set[int]]:
        ready = asyncio.Semaphore(0)

        async def one() -> list[int]:
            async with stream(address, EVENTS) as reader:
                await begun(reader)
                ready.release()
                return await heard(reader, EVALUATIONS)

        tasks = [asyncio.create_task(one()) for _ in range(LISTENERS)]
        for _ in tasks:
            await ready.acquire()
        writer.begin()
        statuses = await ask(address, tasks)
        return await asyncio.gather(*tasks), statuses

    with listening(server.app) as address:
        told, statuses = asyncio.run(asyncio.wait_for(crowd(address), PATIENCE))
    assert told == [list(range(1, EVALUATIONS + 1))] * LISTENERS
    assert statuses == {200}  # nothing was busy either
    assert writer.ended() == 0


@asynccontextmanager
async def wide_stream(
    address: str, room: int
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.Transport]]:
    """Of events whose lines are long. room: bytes that the system holds until they are read."""
    parts = urlsplit(address)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    connection.connect((parts.hostname, parts.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=2**24)
    writer.write(f"GET /api/v1{EVENTS} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
    try:
        await begun(reader)
        yield reader, writer.transport
    finally:
        writer.close()


def test_whoever_reads_slowly_holds_nobody_up_and_misses_nothing(server: Served) -> None:
    writer = Writer(server.settings.store, LINE)

    async def crowd(address: str) -> tuple[list[list[int]], list[list[int]]]:
        async with AsyncExitStack() as streams:
            rooms = [4096] * SLOW + [2**18] * QUICK
            opened = [await streams.enter_async_context(wide_stream(address, n)) for n in rooms]
            slow, quick = opened[:SLOW], opened[SLOW:]
            for _, transport in slow:
                transport.pause_reading()  # the server can send them nothing more
            writer.begin()
            first = await asyncio.gather(*(heard(reader, EVALUATIONS) for reader, _ in quick))
            for _, transport in slow:
                transport.resume_reading()
            return first, await asyncio.gather(*(heard(r, EVALUATIONS) for r, _ in slow))

    with listening(server.app) as address:
        quick, slow = asyncio.run(asyncio.wait_for(crowd(address), PATIENCE))
    assert quick == [list(range(1, EVALUATIONS + 1))] * QUICK
    assert slow == [list(range(1, EVALUATIONS + 1))] * SLOW
    assert writer.ended() == 0
