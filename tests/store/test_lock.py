"""One process per search: the lock holds against others, and dies with its holder."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evomerge.errors import SearchBusy
from evomerge.store.lock import SearchLock, is_held, lock_path

HOLDER = """
import sys, pathlib
from evomerge.errors import SearchBusy
from evomerge.store.lock import SearchLock
try:
    lock = SearchLock(pathlib.Path(sys.argv[1]), "one")
    print("held", flush=True)
    sys.stdin.read()
    lock.release()
except SearchBusy as error:
    print(error, flush=True)
"""

Process = subprocess.Popen[str]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database that locks stand beside; it need not exist."""
    return tmp_path / "store.db"


@pytest.fixture
def holder(database: Path) -> Iterator[Process]:
    """Another process, which holds the lock of search 'one'."""
    with another(database) as process:
        assert line(process) == "held"
        yield process
        process.kill()


def another(database: Path) -> Process:
    """A process that tries to hold the lock."""
    command = [sys.executable, "-c", HOLDER, str(database)]
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def line(process: Process) -> str:
    """The next line that a process writes."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def test_lock_of_another_process_is_refused_with_its_id(database: Path, holder: Process) -> None:
    with pytest.raises(SearchBusy, match=f"'one' is being conducted by process {holder.pid}: "):
        SearchLock(database, "one")
    assert is_held(database, "one")


def test_another_process_is_refused(database: Path) -> None:
    lock = SearchLock(database, "one")
    with another(database) as process:
        assert "is being conducted" in line(process)
    assert is_held(database, "one")
    lock.release()


def test_lock_of_a_killed_process_is_free_at_once(database: Path, holder: Process) -> None:
    holder.kill()
    holder.wait()
    assert lock_path(database, "one").exists()  # it had no time to remove it
    assert not is_held(database, "one")
    SearchLock(database, "one").release()
    assert not lock_path(database, "one").exists()


def test_lock_that_its_process_released_is_free(database: Path, holder: Process) -> None:
    holder.communicate(input="")
    assert not lock_path(database, "one").exists()
    SearchLock(database, "one").release()


def test_locks_of_two_searches_are_apart(database: Path) -> None:
    first, second = SearchLock(database, "one"), SearchLock(database, "two")
    second.release()
    assert is_held(database, "one")
    assert not is_held(database, "two")
    first.release()


def test_release_removes_the_file_and_is_harmless_twice(database: Path) -> None:
    lock = SearchLock(database, "one")
    lock.release()
    assert not lock_path(database, "one").exists()
    successor = SearchLock(database, "one")
    lock.release()
    assert is_held(database, "one")
    successor.release()


def test_lock_is_held_by_one_of_many_that_race_for_it(database: Path) -> None:
    inside, most = 0, 0
    count = threading.Lock()

    def race() -> None:
        nonlocal inside, most
        for _ in range(200):
            try:
                lock = SearchLock(database, "one")
            except SearchBusy:
                continue
            with count:
                inside += 1
                most = max(most, inside)
            time.sleep(0)
            with count:
                inside -= 1
            lock.release()

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert not is_held(database, "one")


def test_asking_whether_it_is_held_never_gets_in_the_way(database: Path) -> None:
    path = lock_path(database, "one")
    path.touch()
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # as is_held does, for a moment
    asker = threading.Timer(0.02, os.close, [descriptor])
    asker.start()
    SearchLock(database, "one").release()
    asker.join()
