"""A disk that is full and a store that cannot be written: it is said in one line, nothing is lost,
and with room again the search comes to the same end."""

import ctypes
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest
from psycopg import sql

from evomerge.store import Coordinator, Store
from tests.faults.conftest import Databases
from tests.faults.driver import AtWrite, Process
from tests.faults.searching import assert_refused, assert_whole, conduct, finish, sized
from tests.postgres import Server
from tests.running import Log, log, query, url

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def undisturbed(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Log:
    """What the job's search writes."""
    store = url(tmp_path_factory.mktemp("undisturbed") / "store.db")
    finish(job, store)
    return log(store)


class Unprivileged:
    """The process, if it is root's, has no right to write what is marked as read-only."""

    def __call__(self) -> None:
        if os.geteuid() != 0:
            return
        libc = ctypes.CDLL(None, use_errno=True)
        # linux/capability.h: version 3, this process; (effective, permitted, inheritable) twice.
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if libc.capset(header, none) != 0:
            raise OSError(ctypes.get_errno(), "capset")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB; skipped where none can be mounted."""
    point = tmp_path / "disk"
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(point)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here: that takes root, and mount")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


@pytest.mark.parametrize("number", [4, 9, 20, 33, 46][:: sized(1, 2)])
def test_search_whose_disk_fills_up_says_so_and_resumes_with_room(
    job: Path, undisturbed: Log, disk: Path, number: int
) -> None:
    store, filler = url(disk / "store.db"), disk / "filler"
    process = conduct(job, store, AtWrite(number, "begun", SIGSTOP))
    assert process.stops()
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    process.send(SIGCONT)
    assert_refused(process.end(), "store.db", "full", "make room")
    filler.unlink()
    assert_whole(store)
    finish(job, store)
    assert log(store) == undisturbed


def test_search_on_a_full_disk_is_refused_before_models_are_loaded(job: Path, disk: Path) -> None:
    (disk / "filler").write_bytes(bytes(free(disk) - 40_000))
    end = conduct(job, url(disk / "store.db")).end()
    assert_refused(end, "store.db", "No space left on device")
    assert [file.name for file in disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("megabytes", [10, 5])  # too many; too many twice, in log and file
def test_backup_without_room_is_refused_and_leaves_nothing(
    disk: Path, tmp_path: Path, megabytes: int
) -> None:
    original = url(tmp_path / "store.db")
    with (
        Store(original, create=True) as store,
        Coordinator.launch(store, "one", 7, {}, {}, [], []) as coordinator,
    ):
        coordinator.log("note", "x" * 1_000_000 * megabytes)
    end = Process(["db", "backup", "--store", original, "-o", disk / "copy.db"]).end()
    assert_refused(end, "copy.db", "make room")
    assert list(disk.iterdir()) == []


def free(disk: Path) -> int:
    """How many bytes a disk has room for."""
    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize


@pytest.mark.parametrize("number", [4, 20, 46][:: sized(1, 2)])
def test_search_that_cannot_write_any_more_says_so_and_resumes_when_it_can(
    job: Path, undisturbed: Log, tmp_path: Path, number: int
) -> None:
    store = tmp_path / "store.db"
    process = conduct(job, url(store), AtWrite(number, "begun", SIGSTOP))
    assert process.stops()
    size = store.with_name("store.db-wal").stat().st_size  # no file can grow beyond that
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    process.send(SIGCONT)
    assert_refused(process.end(), "store.db", "disk I/O error", "its disk is full or broken")
    assert_whole(url(store))
    finish(job, url(store))
    assert log(store) == undisturbed


@pytest.mark.parametrize("what", ["file", "folder", "both"])
def test_read_only_file_is_shown_and_not_resumed_until_it_can_be_written(
    job: Path, undisturbed: Log, tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    store = folder / "store.db"
    assert conduct(job, url(store), AtWrite(30, "committed")).end().code == -SIGKILL
    query(store, "SELECT 1")
    if what != "folder":
        for file in folder.iterdir():
            file.chmod(0o444)
    if what != "file":
        folder.chmod(0o555)
    try:
        end = conduct(job, url(store), Unprivileged()).end()
        shown = Process(["show", "tiny", "--store", url(store)], Unprivileged()).end()
    finally:
        folder.chmod(0o755)
        for file in folder.iterdir():
            file.chmod(0o644)
    assert_refused(end, "store.db", "writable")
    assert shown.code == 0, shown.err
    assert "candidates" in shown.out
    finish(job, url(store))
    assert log(store) == undisturbed


def test_read_only_server_is_shown_and_not_resumed_until_it_can_be_written(
    job: Path, undisturbed: Log, postgres: Server
) -> None:
    store = Databases(postgres).fresh()
    assert conduct(job, store, AtWrite(30, "committed")).end().code == -SIGKILL
    name = sql.Identifier(store.rpartition("/")[2])
    setting = "ALTER DATABASE {} SET default_transaction_read_only = {}"
    postgres.execute(sql.SQL(setting).format(name, sql.SQL("on")))
    end = conduct(job, store).end()
    assert_refused(end, "read-only", "a server that can be written")
    shown = Process(["show", "tiny", "--store", store]).end()
    assert shown.code == 0, shown.err
    postgres.execute(sql.SQL(setting).format(name, sql.SQL("off")))
    finish(job, store)
    assert log(store) == undisturbed
