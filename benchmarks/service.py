"""What a server takes at 10,000 candidates: `make bench-service`.

`evomerge serve`, a process of its own, over the store of benchmarks.store. It is asked, one thing
after another, for every page and every other thing that it answers to GET; and once more while a
process records results and many listen to what it tells.
"""

import argparse
import asyncio
import http.client
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import lru_cache
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.report import Report, arguments, published
from benchmarks.store import (
    EXAMPLES,
    FIRST,
    NAME,
    POPULATION,
    REPLY,
    REVIEW,
    SAMPLES,
    TASK,
    fill,
    setting,
)
from benchmarks.store import results as random_results
from evomerge.fitness.results import Scored
from evomerge.store import Coordinator, NewCandidate, Outcome, Store

SECOND = "beside"  # a search to compare with
GOAL = 300  # milliseconds until a page is there
SHOWN = 12  # paths, the slowest, that have a row of their own
RATE = 50  # results a second
LISTENERS = 200
LANDING = 5.0  # seconds that events may take
LOG = "2026-01-01 00:00:00,000 INFO evomerge: generation 1: best 0.41\n" * 5_000

# What stands for the parameters of a path; the id is a candidate's, exports have ids of their own.
FILLED = {"name": NAME, "id": str(FIRST), "file": "mergekit_config.yml"}
# What is asked of a path, where that is not the path alone.
QUERIES = {
    "/searches/{name}/population": ("", "?sort=score", "?sort=seconds&state=scored"),
    "/searches/{name}/candidates/{id}": ("", f"?other={FIRST}"),
    "/api/v1/searches/{name}/candidates": ("", "?sort=score", "?sort=examples", "?limit=200"),
    "/api/v1/searches/{name}/candidates/{id}/comparison": ("", f"?other={FIRST}"),
    "/compare": ("", f"?name={NAME}&name={SECOND}"),
    "/api/v1/compare": (f"?name={NAME}&name={SECOND}",),
}
_SPAWN = multiprocessing.get_context("spawn")


@dataclass
class Answers:
    """To one path: milliseconds until each was there, the bytes of the last. cpu: milliseconds of
    the server for each, on average, which mean something while it does nothing else."""

    milliseconds: list[float] = field(default_factory=list)
    size: int = 0
    cpu: float = 0.0

    def __str__(self) -> str:
        return " / ".join(f"{value:.0f}" for value in self.of())

    def of(self) -> tuple[float, float, float]:
        """Median, 95th percentile, most."""
        median, p95 = np.percentile(self.milliseconds, (50, 95))
        return float(median), float(p95), max(self.milliseconds)


@dataclass(frozen=True)
class Serving:
    """A server at work."""

    address: str
    process: int
    log: Path

    def cpu(self) -> float:
        """Seconds so far, of all of its threads."""
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """MB that it has in memory."""
        pages = int(Path(f"/proc/{self.process}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def complaints(self) -> list[str]:
        """Lines of its log that tell of trouble."""
        lines = self.log.read_text().splitlines()
        return [line for line in lines if re.search(r"WARNING|ERROR|Traceback|locked", line)]


@contextmanager
def serving(url: str, folder: Path) -> Iterator[Serving]:
    """`evomerge serve` over a store, asked by this machine alone."""
    log = folder / "server.log"
    options = ["--port", "0", "--data", folder / "data", "--root", folder]
    command = [Path(sys.executable).with_name("evomerge"), "serve", "--store", url, *options]
    with log.open("w") as output:
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output)
    try:
        yield Serving(_announced(log, process), process.pid, log)
    finally:
        process.terminate()
        process.wait()


def _announced(log: Path, process: "subprocess.Popen[bytes]") -> str:
    """The address that a server tells of once it listens there."""
    while process.poll() is None:
        if found := re.search(r"^evomerge serves .* on (http\S+)$", log.read_text(), re.MULTILINE):
            return found[1]
        time.sleep(0.1)
    raise RuntimeError(f"the server ended: {log.read_text()}")


def asked(address: str, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """Status and content of an answer."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    headers = {} if body is None else {"Content-Type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def export(address: str) -> str:
    """Have a recipe exported; gives the number of the export."""
    path = f"/api/v1/searches/{NAME}/exports"
    status, content = asked(address, "POST", path, {"candidate": FIRST, "recipe_only": True})
    if status != 202:
        raise RuntimeError(content.decode())
    number = json.loads(content)["submission"]["id"]
    while (one := json.loads(asked(address, "GET", f"{path}/{number}")[1])["submission"])[
        "state"
    ] in ("queued", "running"):
        time.sleep(0.2)
    if one["state"] != "finished":
        raise RuntimeError(one["error"])
    return str(number)


def paths(url: str, folder: Path, exported: str) -> list[str]:
    """Everything that a server answers to GET, streams of events left out, by its routes."""
    from fastapi.sse import EventSourceResponse
    from starlette.routing import Mount, Route

    from evomerge.service.app import create_app
    from evomerge.service.scheduler import Scheduler
    from evomerge.service.settings import Settings

    settings = Settings(url, data=folder / "data", roots=(folder,))
    with Store(url) as store:
        routes = create_app(settings, store, Scheduler(settings, store)).routes
    found = []
    for route in routes:
        if isinstance(route, Mount):
            found.append(f"{route.path}/pages.css")
        elif not isinstance(route, Route) or "GET" not in (route.methods or ()):
            continue
        elif getattr(route, "response_class", None) is not EventSourceResponse:
            values = FILLED | ({"id": exported} if "/exports/" in route.path else {})
            path = re.sub(r"{(\w+)(:\w+)?}", lambda match: values[match[1]], route.path)  # noqa: B023
            found += [path + query for query in QUERIES.get(route.path, ("",))]
    return found


def time_answers(server: Serving, listed: Sequence[str], rounds: int) -> dict[str, Answers]:
    """To each path, all of them in turn, over one connection as browsers keep it."""
    found = {path: Answers() for path in listed}
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=60)
    for path in listed:  # what is loaded and compiled once
        _time_answer(connection, path, Answers())
    for _, (path, answers) in itertools.product(range(rounds), found.items()):
        before = server.cpu()
        _time_answer(connection, path, answers)
        answers.cpu += 1000 * (server.cpu() - before) / rounds
    connection.close()
    return found


def _time_answer(connection: http.client.HTTPConnection, path: str, answers: Answers) -> None:
    started = time.perf_counter()
    connection.request("GET", path)
    answer = connection.getresponse()
    content = answer.read()
    answers.milliseconds.append(1000 * (time.perf_counter() - started))
    answers.size = len(content)
    if answer.status != 200:
        raise RuntimeError(f"GET {path} gave {answer.status}: {content[:200]!r}")


def write(url: str, ready: Any, stop: Event, found: "Queue[Any]") -> None:
    """Record RATE results a second, told and reviewed generation by generation, until told to stop;
    hand over how many, the latest by how many seconds, and what went wrong."""
    random = np.random.Generator(np.random.PCG64(1))
    written, late, errors = 0, 0.0, list[str]()
    with Store(url) as store, Coordinator.take_over(store, NAME) as coordinator:
        last = max(one.number for one in store.generations(coordinator.search.id))
        ready.release()
        started = time.monotonic()
        for number in itertools.count(last + 1):
            if stop.is_set():
                break
            new = [
                NewCandidate(slot, None, random.random(64), {"n": "x" * 3000}, f"{number}-{slot}")
                for slot in range(POPULATION)
            ]
            try:
                ids = coordinator.open_generation(number, "proposed", 0.1, new)
                for id in ids:
                    wait = started + written / RATE - time.monotonic()
                    late = max(late, -wait)
                    time.sleep(max(0.0, wait))
                    scores = random_results(random)
                    replies = {TASK: dict.fromkeys(range(SAMPLES), REPLY)}
                    scored = Scored({TASK: scores}, 0.1, 1.0, replies)
                    coordinator.record(id, "train", 0, scored, scores.mean)
                    written += 1
                coordinator.close_generation(number, dict.fromkeys(ids, Outcome(0.4)), REVIEW)
            except Exception as error:  # what kind it is, is the figure
                errors.append(f"{type(error).__name__}: {error}")
                break
    found.put({"written": written, "latest": late, "errors": errors})


def listen(address: str, count: int, ready: Any, stop: Event, found: "Queue[Any]") -> None:
    """Listen with so many connections until told to stop; hand over what they heard."""
    found.put(asyncio.run(_listen(address, count, ready, stop)))


async def _listen(address: str, count: int, ready: Any, stop: Event) -> dict[str, Any]:
    heard: list[list[int]] = [[] for _ in range(count)]
    late: list[float] = []
    reads = list[int]()

    async def one(own: list[int]) -> None:
        parts = urlsplit(address)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**22)
        path = f"/api/v1/searches/{NAME}/events"
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
        while line := await reader.readline():
            if line.startswith(b"event: state") and not own:
                ready.release()
                break
        while line := await reader.readline():
            if line.startswith(b"data: ") and (told := _told(line)):
                now = time.time()
                own += [id for id, _ in told]
                late.extend(now - at for _, at in told)
                if own is heard[0]:
                    reads.append(len(told))

    tasks = [asyncio.create_task(one(own)) for own in heard]
    while not stop.is_set():
        await asyncio.sleep(0.1)
    ended = sum(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    p50, p95 = np.percentile(late, (50, 95)) if late else (0.0, 0.0)
    return {
        "heard": [len(set(own)) for own in heard],
        "twice": sum(len(own) - len(set(own)) for own in heard),
        "disconnected": ended,
        "events": len(reads),
        "late": [float(p50), float(p95), max(late, default=0.0)],
    }


@lru_cache(maxsize=64)
def _told(line: bytes) -> tuple[tuple[int, float], ...]:
    """The evaluations of an event, with the time at which each was recorded; many are told it."""
    evaluations = json.loads(line[6:]).get("evaluations", ())
    return tuple(
        (e["id"], datetime.fromisoformat(e["recorded_at"]).timestamp()) for e in evaluations
    )


@contextmanager
def under_load(url: str, server: Serving, listeners: int) -> Iterator[dict[str, Any]]:
    """A process that records, and another that listens; at the end it holds what they found."""
    ready, stop_writing, stop_listening = _SPAWN.Semaphore(0), _SPAWN.Event(), _SPAWN.Event()
    wrote: Queue[Any] = _SPAWN.Queue()
    heard: Queue[Any] = _SPAWN.Queue()
    crowd = (server.address, listeners, ready, stop_listening, heard)
    listening = _SPAWN.Process(target=listen, args=crowd)
    writing = _SPAWN.Process(target=write, args=(url, ready, stop_writing, wrote))
    listening.start()
    for _ in range(listeners):
        ready.acquire()
    writing.start()
    ready.acquire()
    found: dict[str, Any] = {}
    try:
        began, cpu = time.monotonic(), server.cpu()
        yield found
        found["cpu"] = (server.cpu() - cpu) / (time.monotonic() - began)
    finally:
        stop_writing.set()
        found |= wrote.get(timeout=60)
        time.sleep(LANDING)
        stop_listening.set()
        found |= heard.get(timeout=60)
        for process in (writing, listening):
            process.join()
    found["lost"] = sum(found["written"] - count for count in found["heard"])


def fill_both(url: str, folder: Path, count: int) -> None:
    """The large search, and one that has only begun."""
    opened = setting(folder)
    fill(url, opened, count)
    with Store(url) as store:
        document, models, splits = opened.document(), opened.new_models(), opened.new_splits()
        names = opened.space.coordinates
        Coordinator.launch(store, SECOND, 0, document, {}, models, splits, names).close()


def measure(url: str, folder: Path, count: int, rounds: int, idle: float) -> dict[str, Any]:
    """Every figure. idle: seconds of listening while nothing else is asked."""
    fill_both(url, folder, count)
    with serving(url, folder) as server:
        (folder / "data" / "logs").mkdir(parents=True, exist_ok=True)
        (folder / "data" / "logs" / f"{NAME}.log").write_text(LOG)
        listed = paths(url, folder, export(server.address))
        memory = [server.memory()]
        quiet = time_answers(server, listed, rounds)
        memory.append(server.memory())
        with under_load(url, server, LISTENERS) as told:
            time.sleep(idle)
        memory.append(server.memory())
        with under_load(url, server, LISTENERS) as both:
            busy = time_answers(server, listed, _fewer(rounds))
        memory.append(server.memory())
        complaints = server.complaints()
    return {
        "quiet": {path: asdict(one) for path, one in quiet.items()},
        "busy": {path: asdict(one) for path, one in busy.items()},
        "events": told,
        "events while asked": both,
        "memory": memory,
        "complaints": complaints,
    }


def report(found: dict[str, Any], count: int, rounds: int) -> Report:
    """The table."""
    quiet, busy = (
        {path: Answers(**one) for path, one in found[key].items()} for key in ("quiet", "busy")
    )
    load = os.getloadavg()[0]
    slowest = sorted(quiet, key=lambda path: quiet[path].cpu, reverse=True)
    rows = [
        (f"`{_shortened(path)}`", str(quiet[path]), f"{quiet[path].cpu:.0f}", str(busy[path]))
        for path in slowest[:SHOWN]
    ]
    rest = slowest[SHOWN:]
    most = [
        " / ".join(f"{value:.0f}" for value in np.max([answers[p].of() for p in rest], axis=0))
        for answers in (quiet, busy)
    ]
    cpu = max(quiet[path].cpu for path in rest)
    rows.append((f"the other {len(rest)}, at most", most[0], f"{cpu:.0f}", most[1]))
    alone, both = told = found["events"], found["events while asked"]
    late, often, lost, used = (
        [" / ".join(f"{1000 * value:.0f}" for value in one["late"]) for one in told],
        [f"{one['events'] * RATE / one['written']:.1f}" for one in told],
        [f"{one['lost']} of {one['written'] * LISTENERS:,}" for one in told],
        [f"{one['cpu']:.2f} cores" for one in told],
    )
    rows += [
        ("a result is heard of after, ms", late[0], "", late[1]),
        ("live updates a second (goal: 5)", often[0], "", often[1]),
        ("of these are lost (goal: none)", lost[0], "", lost[1]),
        ("the server takes", used[0], "", used[1]),
        ("its memory", f"{found['memory'][2]:.0f} MB", "", f"{found['memory'][3]:.0f} MB"),
        (
            "errors, of locks or others (goal: none)",
            str(len(alone["errors"])),
            "",
            str(len([*both["errors"], *found["complaints"]])),
        ),
    ]
    return Report(
        "bench-service",
        f"a server at {count:,} candidates",
        (f"asked for (goal: {GOAL} ms)", "quiet, ms", "CPU, ms", "while writing, ms"),
        rows,
        (
            f"SQLite, {count:,} candidates of {EXAMPLES} examples. Every path but streams, the "
            f"costliest {SHOWN} by name (…: searches/NAME): median / 95th percentile / most of "
            f"{rounds} answers, while writing of {_fewer(rounds)}, by the clock, on two cores that "
            "the server shares with whoever asks, writes and listens.",
            "CPU: the server's for one answer while it is quiet. Load average of the machine at "
            f"the end: {load:.0f}; where others used it too, the clock says little.",
            f"While writing: a process records {RATE} results a second and {LISTENERS} connections "
            "listen to them; of the rows below, quiet: nothing else is asked for then.",
        ),
        {**found, "candidates": count, "cores": len(os.sched_getaffinity(0)), "load": load},
    )


def _fewer(rounds: int) -> int:
    """While writing, as the store grows meanwhile."""
    return max(2, rounds // 4)


def _shortened(path: str) -> str:
    return path.replace(f"searches/{NAME}", "…")


def main(given: Sequence[str] | None = None) -> int:
    parser = arguments("benchmarks.service", __doc__)
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=20, help="answers to each path")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds of listening alone")
    options = parser.parse_args(given)
    return published(options, "bench-service", ["docs/performance.md"], lambda: _measured(options))


def _measured(options: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        url = f"sqlite:///{folder}/store.db"
        found = measure(url, folder, options.candidates, options.rounds, options.idle)
    return report(found, options.candidates, options.rounds)


if __name__ == "__main__":
    sys.exit(main())
