"""A server that is killed loses nothing: the next one goes on with everything, to the same end."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge import search
from evomerge.job import Job
from evomerge.search.setting import Setting
from evomerge.store import Queue, Store, check
from tests import tiny
from tests.golden import quiet
from tests.postgres import Server as Postgres
from tests.processes import descendants
from tests.running import Log, log, url

_PATIENCE = 600  # seconds; three searches load their libraries at once

# A server without its API: three searches at once.
_SERVER = """
import signal, sys, threading
from pathlib import Path
from evomerge.service.scheduler import Scheduler
from evomerge.service.settings import Settings
from evomerge.store import Store

store, data, *roots = sys.argv[1:]
ended = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: ended.set())
with Store(store) as opened:
    settings = Settings(store, data=Path(data), searches=3, roots=tuple(map(Path, roots)))
    scheduler = Scheduler(settings, opened)
    scheduler.start()
    ended.wait()
    scheduler.stop(timeout=300)
"""


class Server:
    """A process that works off a store's queue."""

    def __init__(self, store: str, data: Path) -> None:
        roots = (data.parent, tiny.ZOO)
        command = [sys.executable, "-c", _SERVER, store, *map(str, (data, *roots))]
        self.process = subprocess.Popen(command)

    def end(self, by: signal.Signals) -> None:
        """Send it a signal, and wait for its end."""
        self.process.send_signal(by)
        self.process.wait(_PATIENCE)


@pytest.fixture
def start(fresh_url: str, tmp_path: Path) -> Iterator[Callable[[], Server]]:
    """What starts a server on the store; none is left in the end."""
    servers: list[Server] = []

    def started() -> Server:
        servers.append(Server(fresh_url, tmp_path / "server"))
        return servers[-1]

    yield started
    for server in servers:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


def document(folder: Path, number: int) -> dict[str, Any]:
    """Of a search with enough candidates to be killed in their midst."""
    folder.mkdir(exist_ok=True)
    budget, name = {"candidates": 60}, f"s{number}"
    return Job.from_file(tiny.write_job(folder, name=name, seed=number, budget=budget)).document()


def undisturbed(folder: Path, number: int) -> Log:
    """What that search does in a store of its own."""
    store = url(folder / f"alone{number}.db")
    job = Job.from_dict(document(folder, number), "the job")
    search.launch(Setting.open(job), store, search.Silent(), lambda: False)
    return log(store, f"s{number}")


def eventually(happened: Callable[[], bool]) -> None:
    """Wait until something has happened."""
    deadline = time.monotonic() + _PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; whoever adopted it may not have asked for its end yet."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def children(server: Server) -> list[int]:
    """The processes that a server has started."""
    pid = server.process.pid
    listed = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in listed for child in path.read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize(("end", "many"), [(signal.SIGKILL, 5), (signal.SIGTERM, 1)])
def test_searches_of_a_server_that_ends_go_on_with_the_next_as_if_undisturbed(
    end: signal.Signals, many: int, fresh_url: str, start: Callable[[], Server], tmp_path: Path
) -> None:
    numbers, at_once = range(1, many + 1), min(3, many)
    with Store(fresh_url, create=True) as store:
        queue = Queue(store)
        for number in numbers:
            queue.submit("search", f"s{number}", document(tmp_path, number), by="ada")

        def are_under_way() -> bool:
            """Each of those at once is in the midst of its generations."""
            rows = [row for row in store.searches() if row.state == "running"]
            return len(rows) == at_once and all(len(store.generations(row.id)) > 3 for row in rows)

        server = start()
        eventually(are_under_way)
        pids = children(server)
        assert len(pids) == at_once
        server.end(end)
        eventually(lambda: all(map(is_gone, pids)))
        states = [one.state for one in queue.all()]
        assert states == ["running"] * at_once + ["queued"] * (many - at_once)
        assert {one.attempts for one in queue.all()} == {0}  # those under way got on
        start()
        eventually(lambda: not {"queued", "running"} & {one.state for one in queue.all()})
        assert {one.state for one in queue.all()} == {"finished"}
        epochs = [store.search(f"s{number}").epoch for number in numbers]
        assert epochs == [2] * at_once + [1] * (many - at_once)
    assert check(fresh_url, quiet).violations == ()
    for number in numbers:
        assert log(fresh_url, f"s{number}") == undisturbed(tmp_path, number)


@pytest.mark.slow
def test_server_that_is_killed_at_any_moment_loses_no_submission(
    fresh_url: str, start: Callable[[], Server], tmp_path: Path
) -> None:
    with Store(fresh_url, create=True) as store:
        queue = Queue(store)
        one = queue.submit("search", "s1", document(tmp_path, 1), by="ada")
        for seconds in (0.0, 0.5, 1.0):  # before and while its process is begun
            server = start()
            time.sleep(seconds)
            server.end(signal.SIGKILL)
        queue.change(one.id, attempts=0)
        start()
        eventually(lambda: queue.get(one.id).state == "finished")
    assert log(fresh_url, "s1") == undisturbed(tmp_path, 1)


@pytest.mark.ray
def test_search_on_ray_goes_on_with_the_next_server_and_no_ray_outlives_its_own(
    fresh_url: str,
    start: Callable[[], Server],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    on_ray = {"executor": {"kind": "ray", "workers": 1, "cpus": 0.5}}
    with Store(fresh_url, create=True) as store:
        queue = Queue(store)
        one = queue.submit("search", "s1", document(tmp_path, 1) | on_ray, by="ada")
        server = start()
        eventually(lambda: any(len(store.generations(row.id)) > 3 for row in store.searches()))
        of_ray = descendants(server.process.pid)
        assert any(b"raylet" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in of_ray)
        server.end(signal.SIGKILL)
        eventually(lambda: all(map(is_gone, of_ray)))
        assert queue.get(one.id).state == "running"
        last = start()
        eventually(lambda: queue.get(one.id).state in ("finished", "failed"))
        found = queue.get(one.id)
        assert found.state == "finished", found.error
        assert store.search("s1").epoch == 2
        eventually(lambda: not descendants(last.process.pid))


@pytest.mark.faults
def test_search_outlives_a_restart_of_the_database_under_its_server(
    postgres: Postgres, tmp_path: Path
) -> None:
    address = postgres.store()
    with Store(address) as store:
        queue = Queue(store)
        one = queue.submit("search", "s1", document(tmp_path, 1), by="ada")
        server = Server(address, tmp_path / "server")
        try:
            eventually(lambda: any(len(store.generations(r.id)) > 2 for r in store.searches()))
            postgres.stop()
            time.sleep(3)  # longer than the scheduler's pulse
            postgres.start()
            eventually(lambda: queue.get(one.id).state == "finished")
            assert store.search("s1").epoch == 1  # its process was left alone
        finally:
            server.end(signal.SIGKILL)
    assert log(address, "s1") == undisturbed(tmp_path, 1)
