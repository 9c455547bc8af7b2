"""What is found out of a job in a process of its own: nothing of it outlives its time."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge.errors import EvomergeError, InputError
from evomerge.service import checking
from tests.running import PATIENCE


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """The processes of a check that goes on for ever: itself, and one that it has started."""
    script, pids = tmp_path / "python", tmp_path / "pids"
    script.write_text(
        f"#!/bin/sh\nsleep 600 &\necho $$ $! > {pids}.new\nmv {pids}.new {pids}\nwait\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))

    def found() -> list[int]:
        deadline = time.monotonic() + PATIENCE
        while not pids.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return [int(pid) for pid in pids.read_text().split()]

    return found


def are_gone(pids: list[int]) -> bool:
    """Whether none of these processes runs, after a while."""
    deadline = time.monotonic() + PATIENCE
    while any(is_at_work(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_at_work(pid: int) -> bool:
    """Whether a process runs; one that nobody has asked for its end yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_what_takes_too_long_is_ended_with_all_that_it_has_started(
    started: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checking._SECONDS, "plan", 0.5)
    with pytest.raises(InputError, match="plan: it took longer than"):
        checking.find_out("plan", {}, "sqlite:///none.db")
    assert are_gone(started())


def test_what_is_being_found_out_ends_when_the_server_does(
    started: Callable[[], list[int]],
) -> None:
    said: list[EvomergeError] = []

    def find_out() -> None:
        try:
            checking.find_out("check", {}, "sqlite:///none.db")
        except EvomergeError as error:
            said.append(error)

    asking = threading.Thread(target=find_out)
    asking.start()
    pids = started()
    checking.end_all()
    asking.join()
    assert are_gone(pids)
    assert "check of a job ended unexpectedly: exit code -9" in str(said[0])


@pytest.mark.slow
def test_process_that_the_server_leaves_behind_ends_by_itself() -> None:
    theirs, ours = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "evomerge.service.checking", "plan", str(theirs)],
        stdin=subprocess.PIPE,  # on which the job never comes
        env={**os.environ, "EVOMERGE_STORE": "sqlite:///none.db"},
        pass_fds=(theirs,),
        start_new_session=True,
    ) as process:
        os.close(theirs)
        os.close(ours)
        assert process.wait(PATIENCE) == -signal.SIGKILL
