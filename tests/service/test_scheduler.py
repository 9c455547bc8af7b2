"""The scheduler: what waits is worked off in its order, by processes that may end at any time."""

import contextlib
import http.server
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import InputError
from evomerge.job import Job
from evomerge.service import checking, webhook
from evomerge.service import scheduler as scheduling
from evomerge.service.child import limited
from evomerge.service.folders import export_folder, log_file
from evomerge.service.scheduler import Scheduler, devices
from evomerge.service.settings import Settings
from evomerge.store import NOT_BEGUN, Coordinator, Queue, Store, Submission
from tests import tiny
from tests.running import PATIENCE, url


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of a server whose store and data are the test's own."""
    return Settings(
        url(tmp_path / "store.db"),
        data=tmp_path / "server",
        roots=(tmp_path, tiny.ROOT),
        webhook_hosts=("127.0.0.1",),
    )


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    """The store, without searches."""
    with Store(settings.store, create=True) as opened:
        yield opened


@pytest.fixture
def queue(store: Store) -> Queue:
    """Its queue."""
    return Queue(store)


@pytest.fixture
def scheduler(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scheduler]:
    """Not started yet; stopped in the end."""
    monkeypatch.setattr("evomerge.service.scheduler._TICK", 0.05)
    made = Scheduler(settings, store)
    yield made
    made.stop(timeout=0)


def document(folder: Path, **changes: Any) -> dict[str, Any]:
    """Of a job that searches in a second, and has two candidates."""
    smaller = {"space": {"preset": "global_task_arithmetic"}, "budget": {"candidates": 4}}
    folder.mkdir(exist_ok=True)
    return Job.from_file(tiny.write_job(folder, **(smaller | changes))).document()


def eventually(happened: Callable[[], bool]) -> None:
    """Wait until something has happened."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def becomes(queue: Queue, one: Submission, state: str) -> Submission:
    """Wait until a submission has this state."""
    eventually(lambda: queue.get(one.id).state in (state, "failed"))
    found = queue.get(one.id)
    assert found.state == state, found.error
    return found


def under_way(scheduler: Scheduler, queue: Queue, store: Store, folder: Path) -> Submission:
    """A search 'one' that would go on for long, and has begun."""
    job = document(folder / "job", name="one", budget={"candidates": 2000})
    one = queue.submit("search", "one", job, by="ada")
    scheduler.start()
    eventually(lambda: any(row.state == "running" for row in store.searches()))
    return one


class Listener:
    """An HTTP server that hears what is posted to it. answers: its status, then 204."""

    def __init__(self, *answers: int) -> None:
        self.heard: list[dict[str, Any]] = []
        left = iter(answers)
        listener = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                listener.heard.append(json.loads(body))
                self.send_response(next(left, 204))
                self.send_header("Location", listener.url)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook?k=v"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    """Takes what it hears."""
    made = Listener()
    yield made
    made.close()


HERE = ("127.0.0.1",)


def goes_on(seconds: float) -> bool:
    """Waits for nothing and does not give up."""
    return False


@pytest.mark.slow
def test_search_and_its_export_are_worked_off_and_told_of(
    scheduler: Scheduler,
    queue: Queue,
    store: Store,
    settings: Settings,
    tmp_path: Path,
    listener: Listener,
) -> None:
    job = document(tmp_path / "job", name="one")
    one = queue.submit("search", "one", job, by="ada", webhook=listener.url)
    scheduler.start()
    found = becomes(queue, one, "finished")
    row = store.search("one")
    assert row.state == "finished"
    assert row.verdict is not None
    assert (found.result or {})["winner"] == row.verdict["winner"]
    assert "generation 1" in log_file(settings.data, "one").read_text()
    eventually(lambda: (queue.get(one.id).result or {}).get("webhook") == "taken")
    assert [told["state"] for told in listener.heard] == ["finished"]
    assert listener.heard[0]["result"]["stop_reason"] == row.stop_reason

    export = queue.submit("export", "one", {}, by="ada")
    push = queue.submit("push", "one", {"repository": "ada/one"}, by="ada")
    scheduler.wake()
    done = becomes(queue, export, "finished")
    folder = export_folder(settings.data, "one", row.verdict["winner"])
    assert done.result == {"candidate": row.verdict["winner"], "folder": str(folder)}
    assert (folder / "evomerge_report.json").is_file()
    eventually(lambda: queue.get(push.id).state == "failed")
    assert "no token for the hub: set HF_TOKEN" in (queue.get(push.id).error or "")


@pytest.mark.slow
@pytest.mark.parametrize("is_stuck", [False, True])
def test_export_under_way_that_is_cancelled_leaves_nothing_and_keeps_no_other_waiting(
    is_stuck: bool,
    exported: Path,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("evomerge.service.scheduler._TICK", 0.05)
    if is_stuck:
        monkeypatch.setattr("evomerge.service.scheduler._GRACE", 0.2)
    shutil.copyfile(exported.parent / "store.db", tmp_path / "store.db")
    with Store(settings.store) as store:
        queue, scheduler, winner = Queue(store), Scheduler(settings, store), _winner(store)
        folder = export_folder(settings.data, "tiny", winner)
        one, other = (queue.submit("export", "tiny", {}, by="ada") for _ in range(2))
        scheduler.start()
        try:
            eventually(lambda: any(folder.parent.glob(".*.partial")))
            if is_stuck:
                os.kill(scheduler.running[one.id], signal.SIGSTOP)
            queue.change(one.id, state="cancelled")
            eventually(lambda: one.id not in scheduler.running)
            if not is_stuck:
                log = log_file(settings.data, "tiny").read_text()
                assert "cancelled; nothing of it is left" in log
                assert "Traceback" not in log
            assert not folder.exists()
            becomes(queue, other, "finished")
            assert queue.get(one.id).state == "cancelled"
            assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        finally:
            scheduler.stop()


def _winner(store: Store) -> int:
    verdict = store.search("tiny").verdict
    assert verdict is not None
    return int(verdict["winner"])


def wrong(queue: Queue, name: str, workers: int = 1, **more: Any) -> Submission:
    """A search whose process finds out at once that it cannot begin."""
    job = {"name": name, "executor": {"kind": "ray", "workers": workers}}
    return queue.submit("search", name, job, by="ada", **more)


@pytest.mark.slow
def test_search_that_cannot_begin_has_failed_with_its_reason(
    scheduler: Scheduler, queue: Queue, settings: Settings, listener: Listener
) -> None:
    one = wrong(queue, "one", webhook=listener.url)
    scheduler.start()
    eventually(lambda: queue.get(one.id).state == "failed")
    found = queue.get(one.id)
    assert (found.error or "").startswith("search 'one': ")
    assert found.error is not None
    assert found.error in log_file(settings.data, "one").read_text()
    eventually(lambda: len(listener.heard) == 1)
    assert listener.heard[0] == {
        "submission": one.id,
        "kind": "search",
        "search": "one",
        "state": "failed",
        "error": found.error,
        "result": None,
        "ended_at": found.ended_at,
    }
    queue.resume("one", "ada")
    scheduler.wake()
    eventually(lambda: (queue.get(one.id).started_at or "") > (found.started_at or ""))
    eventually(lambda: queue.get(one.id).state == "failed")


@pytest.mark.slow
def test_one_search_at_a_time_goes_by_priority(scheduler: Scheduler, queue: Queue) -> None:
    ids = [wrong(queue, name, priority=p).id for name, p in (("a", 0), ("b", 0), ("c", 5))]
    scheduler.start()
    eventually(lambda: len(queue.all("failed")) == 3)
    begun = sorted(queue.all(), key=lambda one: one.started_at or "")
    assert [one.id for one in begun] == [ids[2], ids[0], ids[1]]
    for before, after in itertools.pairwise(begun):
        assert (before.ended_at or "") <= (after.started_at or "")


@pytest.mark.slow
def test_search_that_finds_no_room_is_not_overtaken(
    settings: Settings, store: Store, queue: Queue
) -> None:
    scheduler = Scheduler(replace(settings, searches=3, devices=4), store)
    large, larger, small = (wrong(queue, name, n) for name, n in (("a", 3), ("b", 9), ("c", 1)))
    scheduler.start()
    try:
        eventually(lambda: large.id in scheduler.running)
        pid = scheduler.running[large.id]
        os.kill(pid, signal.SIGSTOP)
        for _ in range(3):
            scheduler.wake()
            time.sleep(0.1)
        assert set(scheduler.running) == {large.id}
        os.kill(pid, signal.SIGCONT)
        eventually(lambda: len(queue.all("failed")) == 3)
    finally:
        scheduler.stop(timeout=0)
    ends, begins = queue.get(larger.id).ended_at, queue.get(small.id).started_at
    assert (ends or "") <= (begins or "")  # alone, what needs more than there is may have it all


@pytest.mark.slow
def test_paused_search_goes_on_when_it_is_resumed_under_other_limits(
    scheduler: Scheduler, queue: Queue, store: Store, tmp_path: Path
) -> None:
    one = under_way(scheduler, queue, store, tmp_path)
    queue.pause("one", "bob")
    eventually(lambda: store.search("one").state == "stopped")
    eventually(lambda: not scheduler.running)
    assert queue.get(one.id).state == "paused"
    row = store.search("one")
    limit = sum(store.progress().get(row.id, NOT_BEGUN).candidates.values()) + 4
    queue.resume("one", "bob", [f"budget.candidates={limit}"])
    becomes(queue, one, "finished")
    assert store.search("one").job["budget"]["candidates"] == limit
    queue.extend("one", "bob", [f"budget.candidates={limit + 4}"])
    scheduler.wake()
    eventually(lambda: (queue.get(one.id).result or {}).get("refused") is not None)
    found = queue.get(one.id)
    assert (found.state, found.overrides) == ("finished", ())
    assert "'one' is finished, its looks are spent" in (found.result or {})["refused"]


@pytest.mark.slow
def test_stopped_search_names_who_asked_and_has_a_winner(
    scheduler: Scheduler, queue: Queue, store: Store, tmp_path: Path
) -> None:
    one = under_way(scheduler, queue, store, tmp_path)
    queue.stop("one", "bob")
    found = becomes(queue, one, "finished")
    assert (found.result or {})["stop_reason"] == "asked to stop by bob"
    assert store.search("one").verdict is not None


def test_process_that_dies_is_started_again_and_given_up_without_progress(
    scheduler: Scheduler, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.service.scheduler._RETRY_PAUSE", 0.0)
    one = wrong(queue, "one")
    scheduler.start()
    killed: set[int] = set()
    while queue.get(one.id).state != "failed":
        for pid in scheduler.running.values():
            if pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        time.sleep(0.01)
    error = queue.get(one.id).error or ""
    assert "begun 3 times without getting anywhere: its process ended by signal 9" in error
    assert len(killed) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answers", "said", "attempts"),
    [
        ((), None, 1),
        ((503, 429), None, 3),
        ((503,) * 9, "it answered 503", 4),
        ((404,), "it answered 404", 1),
        ((307,), "it answered 307", 1),  # a redirect might lead anywhere
    ],
)
def test_webhook_is_called_again_where_that_may_help(
    answers: tuple[int, ...], said: str | None, attempts: int
) -> None:
    listener = Listener(*answers)
    try:
        assert webhook.post(listener.url, {"k": "ü"}, goes_on, HERE) == said
        assert listener.heard == [{"k": "ü"}] * attempts
    finally:
        listener.close()
    if not answers:
        assert webhook.post(listener.url, {}, goes_on, HERE) == "Connection refused"
        assert webhook.post(listener.url, {}, lambda seconds: True, HERE) == "there was no time"


@pytest.mark.parametrize("begins", [b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nX: "])
def test_webhook_that_never_comes_to_an_end_is_given_up(
    begins: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.service.webhook._TIMEOUT", 0.3)
    with socket.create_server((HERE[0], 0)) as server:

        def drip() -> None:
            with server.accept()[0] as connection, contextlib.suppress(OSError):
                connection.sendall(begins)
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.05)

        dripping = threading.Thread(target=drip)
        dripping.start()
        address = f"http://{HERE[0]}:{server.getsockname()[1]}/"
        pauses = iter([False, True])  # gives up after the first attempt
        said = webhook.post(address, {}, lambda _: next(pauses), HERE)
        dripping.join()
    assert said == "it has not answered within 0.3 seconds"


def test_webhook_that_was_slow_says_nothing_of_a_later_end(
    scheduler: Scheduler, queue: Queue, listener: Listener
) -> None:
    one = wrong(queue, "one", webhook=listener.url)
    queue.begin(one.id)
    first = queue.end(one.id, "finished", (), None, {"winner": 1})
    queue.change(one.id, state="queued")
    queue.begin(one.id)
    time.sleep(0.002)  # times are of milliseconds
    second = queue.end(one.id, "finished", (), None, {"winner": 2})
    scheduler._call(first, listener.url)
    assert queue.get(one.id).result == {"winner": 2}
    scheduler._call(second, listener.url)
    assert queue.get(one.id).result == {"winner": 2, "webhook": "taken"}


@pytest.mark.slow
def test_failure_after_an_end_that_was_told_is_told_too(
    scheduler: Scheduler, queue: Queue, listener: Listener
) -> None:
    one = wrong(queue, "one", webhook=listener.url)
    queue.begin(one.id)
    first = queue.end(one.id, "finished", (), None, {"winner": 1})
    queue.add_result(first, {"webhook": "taken"})
    queue.change(one.id, state="queued")
    scheduler.start()
    eventually(lambda: len(listener.heard) == 1)
    assert (listener.heard[0]["state"], listener.heard[0]["result"]) == ("failed", None)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "[::1]",
        "[::]",
        "[fe80::1]",
        "[fd00::1]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::a00:1]",
        "[2002:7f00:1::]",
    ],
)
def test_webhook_in_the_network_of_the_server_is_refused(host: str) -> None:
    address = f"http://{host}/hook"
    with pytest.raises(InputError, match=r"in the server's own network: .* --webhook-host"):
        webhook.check(address)
    webhook.check(address, [host])


def test_webhook_at_an_address_of_the_internet_is_not() -> None:
    for host in ("8.8.8.8", "[2606:4700::1111]", "[64:ff9b::808:808]", "hooks.example"):
        webhook.check(f"https://{host}/hook")


def test_name_that_means_this_machine_when_it_is_called_is_refused(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda _, *more, **given: look_up(HERE[0], *more, **given)
    )
    address = listener.url.replace("127.0.0.1", "hooks.example")
    webhook.check(address)
    said = webhook.post(address, {}, goes_on)
    assert said is not None
    assert said.startswith("'hooks.example' is in the server's own network")  # no more of it
    assert listener.heard == []
    assert webhook.post(address, {}, goes_on, ["hooks.example"]) is None


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc/passwd",
        "ftp://x/",
        "http:///x",
        "https://a:b@x/",
        "http://x:y/",
        "x",
        "http://\n",
    ],
)
def test_address_that_is_none_of_a_webhook_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="webhook"):
        webhook.check(address)


def test_log_that_is_too_long_goes_on_as_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.service.scheduler._LOG_BYTES", 5)
    log = tmp_path / "one.log"
    with log.open("ab", buffering=0) as written:
        written.write(b"123456")
        scheduling._bound(log)
        written.write(b"789")
    scheduling._bound(log)
    assert (log.read_bytes(), (tmp_path / "one.log.1").read_bytes()) == (b"789", b"123456")


def test_log_that_cannot_be_kept_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.service.scheduler._LOG_BYTES", 5)
    log = tmp_path / "one.log"
    log.write_bytes(b"123456")
    (tmp_path / "one.log.1").mkdir()
    with pytest.raises(OSError, match="directory"):
        scheduling._bound(log)
    assert log.read_bytes() == b""


def test_trouble_with_one_keeps_no_other_waiting(
    scheduler: Scheduler, queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    troubled, other = (queue.begin(wrong(queue, name).id) for name in ("one", "two"))
    assert troubled is not None
    assert other is not None
    for one in (troubled, other):
        process = subprocess.Popen(["true"], stdin=subprocess.PIPE)
        process.wait()
        scheduler._children[one.id] = scheduling._Child(one, process, tmp_path / "log", 1)
    get = Queue.get

    def fail(self: Queue, id: int) -> Submission:
        if id == troubled.id:
            raise OSError("a fault")
        return get(self, id)

    with monkeypatch.context() as fault:
        fault.setattr(Queue, "get", fail)
        scheduler._reap()
        assert set(scheduler.running) == {troubled.id}
    assert queue.get(other.id).state == "queued"
    scheduler._reap()
    assert not scheduler.running
    assert queue.get(troubled.id).state == "queued"


def test_second_scheduler_stands_by_until_the_first_ends(
    scheduler: Scheduler, settings: Settings, store: Store
) -> None:
    scheduler.start()
    eventually(lambda: scheduler.leads)
    second = Scheduler(settings, store)
    second.start()
    try:
        second.wake()
        time.sleep(0.1)
        assert not second.leads
        scheduler.stop()
        second.wake()
        eventually(lambda: second.leads)
    finally:
        second.stop()


def test_job_of_a_server_takes_no_more_devices_than_it_may() -> None:
    on_ray = {"executor": {"kind": "ray"}, "engine": {"tensor_parallel": 2}}
    assert limited(on_ray, (), 8)["executor"]["workers"] == 4
    assert limited(on_ray, ("executor.workers=3",), 8)["executor"]["workers"] == 3
    assert limited(on_ray, ("executor.workers=9",), 8)["executor"]["workers"] == 4
    assert limited(on_ray, (), None) == on_ray
    assert limited({"engine": {}}, (), 8) == {"engine": {}}


@pytest.mark.parametrize(
    ("executor", "expected"),
    [(None, 2), ({"kind": "ray"}, 8), ({"kind": "ray", "workers": 3}, 6)],
)
def test_devices_of_a_search_are_workers_times_those_of_each(
    executor: dict[str, Any] | None, expected: int
) -> None:
    job = {"engine": {"tensor_parallel": 2}} | ({} if executor is None else {"executor": executor})
    assert devices("search", job, 8) == expected


def test_devices_of_a_search_are_those_under_its_latest_overrides(
    scheduler: Scheduler, queue: Queue
) -> None:
    one = wrong(queue, "one", 1)
    queue.pause("one", "ada")
    assert scheduler._devices(one) == 1
    assert scheduler._devices(queue.resume("one", "ada", ["executor.workers=5"])) == 5


def test_devices_of_a_search_that_has_begun_are_those_of_its_job_as_it_was_changed(
    scheduler: Scheduler, queue: Queue, store: Store
) -> None:
    job = {"name": "one", "executor": {"kind": "ray", "workers": 1}}
    one = queue.submit("search", "one", job, by="ada")
    changed = {"name": "one", "executor": {"kind": "ray", "workers": 5}}
    queue.begin(one.id)
    with Coordinator.launch(store, "one", 7, changed, {}, [], [], submission=one.id):
        assert scheduler._devices(one) == 5


@pytest.mark.slow
def test_no_folder_of_the_server_stands_in_for_a_library(
    scheduler: Scheduler,
    queue: Queue,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "evomerge").mkdir()
    (tmp_path / "evomerge" / "__init__.py").write_text("raise SystemExit('an impostor')")
    monkeypatch.chdir(tmp_path)
    one = wrong(queue, "one")
    scheduler.start()
    eventually(lambda: queue.get(one.id).state == "failed")
    assert (queue.get(one.id).error or "").startswith("search 'one': ")
    with pytest.raises(InputError, match=r"^the job: "):
        checking.find_out("plan", {}, settings.store)
