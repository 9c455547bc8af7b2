"""One process conducts a search: who dies is replaced, who lives is not, who wakes up late is
refused."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import update

from evomerge.errors import SearchBusy, StaleCoordinator, StoreError
from evomerge.store import Coordinator, Store, lease, schema

HOLDER = """
import sys
from evomerge.store import Coordinator, Store
with Store(sys.argv[1]) as store, Coordinator.take_over(store, "one") as coordinator:
    print("holds", coordinator.search.epoch, flush=True)
    sys.stdin.readline()
"""

RIVAL = """
import sys
from evomerge.errors import SearchBusy
from evomerge.store import Coordinator, Store
with Store(sys.argv[1]) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        with Coordinator.take_over(store, "one") as coordinator:
            print("holds", coordinator.search.epoch, flush=True)
            sys.stdin.readline()
    except SearchBusy:
        print("busy", flush=True)
"""


@dataclass
class Process:
    """Another process, which is talked to line by line."""

    popen: "subprocess.Popen[str]"

    @property
    def pid(self) -> int:
        return self.popen.pid

    def line(self) -> str:
        """The next one that it writes."""
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().rstrip("\n")

    def go_on(self) -> None:
        """It waits for this."""
        assert self.popen.stdin is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()


@pytest.fixture
def store(fresh_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """With a search 'one' that nobody conducts, and a temporary folder of its own."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with Store(fresh_url, create=True) as opened:
        launched(opened).close()
        yield opened


@pytest.fixture
def start(store: Store) -> Iterator[Callable[[str], Process]]:
    """Start another process on the store; all are killed in the end."""
    started: list[Process] = []

    def start_one(script: str) -> Process:
        popen = subprocess.Popen(
            [sys.executable, "-c", script, store.url],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(Process(popen))
        return started[-1]

    yield start_one
    for process in started:
        process.popen.kill()
        process.popen.__exit__(None, None, None)


def launched(store: Store) -> Coordinator:
    """The search."""
    return Coordinator.launch(store, "one", 7, {}, {}, [], [])


def held_elsewhere(store: Store, seconds: float) -> None:
    """As if a coordinator on another host held the search, for so long by the database's clock."""
    holder = lease.Holder("far", "another boot", 4711, "one.lock", "1:2")
    values = {"holder": holder.as_json(), "lease_until": store.database.clock + seconds}
    with store.database.write() as db:
        db.execute(update(schema.search).values(epoch=schema.search.c.epoch + 1, **values))


def unwanted(text: str) -> None:
    """Who must not be told anything: nothing is waited for."""
    pytest.fail(text)


def lease_until(store: Store) -> float | None:
    """Of the search."""
    with store.database.read() as db:
        found: float | None = db.execute(schema.search.select()).one().lease_until
    return found


@pytest.mark.slow
def test_living_process_is_not_replaced_and_a_killed_one_is_at_once(
    store: Store, start: Callable[[str], Process]
) -> None:
    process = start(HOLDER)
    assert process.line() == "holds 2"
    assert store.search("one").state == "running"
    with pytest.raises(SearchBusy, match=f"'one' is being conducted by process {process.pid} on "):
        Coordinator.take_over(store, "one", unwanted)
    process.kill()
    assert store.search("one").state == "stopped"
    with Coordinator.take_over(store, "one", unwanted) as coordinator:
        assert coordinator.search.epoch == 3
        locks = list(store.database.lock_folder().glob("*one.*.lock"))
        assert len(locks) == 1  # the one of the killed process is removed
    assert list(store.database.lock_folder().glob("*one.*.lock")) == []


@pytest.mark.slow
def test_one_of_several_rivals_wins(store: Store, start: Callable[[str], Process]) -> None:
    rivals = [start(RIVAL) for _ in range(2)]
    assert [rival.line() for rival in rivals] == ["ready"] * 2
    for rival in rivals:
        rival.go_on()
    assert sorted(rival.line() for rival in rivals) == ["busy", "holds 2"]


def test_one_of_many_wins_each_time(store: Store) -> None:
    """Threads stand for processes here: they share nothing but the database and the folder."""
    inside, most, wins = 0, 0, 0
    count = threading.Lock()

    def race() -> None:
        nonlocal inside, most, wins
        with Store(store.url) as own:
            for _ in range(10):
                try:
                    coordinator = Coordinator.take_over(own, "one", unwanted)
                except SearchBusy:
                    continue
                with count:
                    inside, wins = inside + 1, wins + 1
                    most = max(most, inside)
                time.sleep(0)
                with count:
                    inside -= 1
                coordinator.close()

    threads = [threading.Thread(target=race) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert store.search("one").epoch == 1 + wins


@pytest.mark.slow
def test_holder_on_another_host_is_waited_for_until_its_lease_has_run_out(store: Store) -> None:
    told: list[str] = []
    held_elsewhere(store, 0.5)
    assert store.search("one").state == "running"
    with Coordinator.take_over(store, "one", told.append) as coordinator:
        assert coordinator.search.epoch == 3
    assert len(told) == 1
    assert "'one' was held by process 4711 on host far: waiting 30 s at most" in told[0]


def test_nobody_waits_longer_than_a_lease_lasts(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the database's clock has been set back by an hour."""
    monkeypatch.setattr(lease, "LEASE", 0.3)
    monkeypatch.setattr(lease, "_POLL", 0.05)
    held_elsewhere(store, 3600)
    with Coordinator.take_over(store, "one") as coordinator:
        assert coordinator.search.epoch == 3


def test_lease_that_has_run_out_is_taken_over_at_once(store: Store) -> None:
    held_elsewhere(store, -0.001)
    assert store.search("one").state == "stopped"
    Coordinator.take_over(store, "one", unwanted).close()


def test_holder_on_another_host_that_lives_is_refused_with_its_host(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_POLL", 0.02)
    held_elsewhere(store, 20)
    before = lease_until(store)

    def extend(text: str) -> None:
        with store.database.write() as db:
            db.execute(update(schema.search).values(lease_until=store.database.clock + 30))

    with pytest.raises(SearchBusy, match="by process 4711 on host far: wait for it, or stop it"):
        Coordinator.take_over(store, "one", extend)
    assert store.search("one").epoch == 2
    assert (lease_until(store) or 0) > (before or 0)


def test_rival_that_takes_over_first_is_not_taken_for_the_one_waited_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_POLL", 0.02)
    held_elsewhere(store, 20)

    def overtake(text: str) -> None:
        held_elsewhere(store, 0.3)  # and is gone itself

    with Coordinator.take_over(store, "one", overtake) as coordinator:
        assert coordinator.search.epoch == 4


def test_late_writer_is_refused_and_leaves_a_trace(store: Store) -> None:
    late = Coordinator.take_over(store, "one")
    held_elsewhere(store, 30)
    with pytest.raises(StaleCoordinator, match="'one' was taken over by another process"):
        late.log("note", "too late")
    late.close()
    assert lease_until(store) is not None  # the other one's
    ((_, kind, text),) = store.events(1)
    assert kind == "stale"
    assert "a late write of epoch 2, from process" in text


def test_coordinator_that_let_go_writes_no_more(store: Store) -> None:
    coordinator = Coordinator.take_over(store, "one")
    coordinator.close()
    coordinator.close()
    with pytest.raises(StaleCoordinator):
        coordinator.stop("enough")


def test_lease_is_extended_by_every_write(store: Store) -> None:
    with Coordinator.take_over(store, "one") as coordinator:
        with store.database.write() as db:
            db.execute(update(schema.search).values(lease_until=1.0))
        coordinator.log("note", "text")
        assert 0 < (lease_until(store) or 0) - time.time() <= lease.LEASE + 5


def test_lease_is_extended_while_nothing_is_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_HEARTBEAT", 0.01)
    before = set(threading.enumerate())
    with Coordinator.take_over(store, "one"):
        first = lease_until(store) or 0
        while (lease_until(store) or 0) <= first:
            time.sleep(0.01)
    assert lease_until(store) is None
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name == "lease of one"]


def test_heartbeat_never_brings_back_a_lease_that_was_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_HEARTBEAT", 0.001)
    late = Coordinator.take_over(store, "one")
    held_elsewhere(store, -1)
    lost = lease_until(store)
    time.sleep(0.05)
    assert lease_until(store) == lost
    late.close()


def test_launch_that_is_refused_leaves_no_lock(store: Store) -> None:
    before = sorted(store.database.lock_folder().iterdir())
    with pytest.raises(StoreError, match="the name 'one' is taken"):
        launched(store)
    assert sorted(store.database.lock_folder().iterdir()) == before


def test_holder_is_named_in_json(store: Store) -> None:
    with Coordinator.take_over(store, "one"), store.database.read() as db:
        text = db.execute(schema.search.select()).one().holder
        assert set(json.loads(text)) == {"host", "boot", "pid", "lock", "inode"}
