"""The command line in processes of their own, and what befalls them.

Processes are forked from a server that has loaded the package once (see `warm`), so that hundreds
of them can be started, killed and replaced. What befalls one is said as faults: callables that it
runs before the command. The package itself knows nothing of them.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Literal

from sqlalchemy import Connection as SqlConnection

import evomerge.cli
from evomerge.search.setting import Setting
from evomerge.store import writes
from evomerge.store.database import Database
from tests.dice import Rolling
from tests.running import PATIENCE, Ended

Fault = Callable[[], None]


@dataclass(frozen=True)
class AtWrite:
    """The process sends a signal to itself at its n-th write to the store, counted from 1; results
    are written one by one, so that the n-th is the same each time.

    moment: begun: before the transaction; written: after all of its statements, before COMMIT is
    sent; committed: after COMMIT has returned.
    """

    number: int
    moment: Literal["begun", "written", "committed"]
    signal: Signals = SIGKILL

    def __call__(self) -> None:
        seen = 0

        def count(moment: str) -> None:
            nonlocal seen
            seen += moment == "begun"
            if (seen, moment) == (self.number, self.moment):
                os.kill(os.getpid(), self.signal)

        one_by_one()
        watch_writes(count)


class Dice:
    """The process scores by rolling dice, see Rolling."""

    def __call__(self) -> None:
        Setting.executor = lambda setting: Rolling(setting)


class Process:
    """A command that runs in a process of its own, from construction on."""

    def __init__(self, arguments: Sequence[str | Path], *faults: Fault) -> None:
        self._output = Path(tempfile.mkdtemp())
        self._first_write, theirs = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(
            target=_run, args=([*map(str, arguments)], faults, self._output, theirs)
        )
        with _reaping:
            self._process.start()
        theirs.close()
        _started.add(self)

    @property
    def pid(self) -> int:
        """Of the operating system."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def runs(self) -> bool:
        """Whether it has not ended yet."""
        with _reaping:
            return self._process.is_alive()

    def writes(self) -> bool:
        """Wait until it begins its first write; False if it ended without any."""
        assert self._first_write.poll(PATIENCE)
        try:
            return bool(self._first_write.recv_bytes())
        except EOFError:
            return False

    def stops(self) -> bool:
        """Wait until it has been stopped by a signal; False if it ended before."""
        stat, deadline = Path(f"/proc/{self.pid}/stat"), time.monotonic() + PATIENCE
        while self.runs and time.monotonic() < deadline:
            if stat.read_text().rpartition(")")[2].split()[0] == "T":
                return True
            time.sleep(0.001)
        return False

    def send(self, signal: Signals) -> None:
        """Nothing happens where it has ended already."""
        if self.runs:
            os.kill(self.pid, signal)

    def end(self) -> Ended:
        """Wait for its end."""
        wait([self._process.sentinel], PATIENCE)
        if self.runs:
            self._process.kill()
            raise TimeoutError(f"still running after {PATIENCE} s:\n{self._read('err')}")
        ended = Ended(self._process.exitcode or 0, self._read("out"), self._read("err"))
        self._first_write.close()
        shutil.rmtree(self._output)
        _started.discard(self)
        return ended

    def _read(self, name: str) -> str:
        file = self._output / name
        return file.read_text(encoding="utf-8") if file.exists() else ""


def kill_all() -> None:
    """Kill whatever has been started and not waited for."""
    for process in [*_started]:
        process.send(SIGKILL)
        process.end()


_started: set[Process] = set()
# Starting one process asks after all others; an answer that two threads ask for reaches only one.
_reaping = threading.Lock()


def _run(arguments: list[str], faults: Sequence[Fault], output: Path, write: Connection) -> None:
    """What a process does."""
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(output / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    for name in [name for name in os.environ if name.startswith("EVOMERGE_")]:
        del os.environ[name]

    def tell(moment: str) -> None:
        if not write.closed:
            write.send_bytes(b"!")
            write.close()

    watch_writes(tell)
    for fault in faults:
        fault()
    sys.argv = ["evomerge", *arguments]
    evomerge.cli.command()


def one_by_one() -> None:
    """From now on no result waits for others."""
    writes.TOGETHER = 0.0


def watch_writes(reach: Callable[[str], None]) -> None:
    """Have a function called at each moment of each write from now on, see AtWrite."""
    original = Database.write
    turn = threading.RLock()  # nobody is stopped while its other thread holds SQLite's lock

    @contextmanager
    def write(database: Database) -> Iterator[SqlConnection]:
        with turn:
            reach("begun")
            with original(database) as connection:
                yield connection
                reach("written")
            reach("committed")

    Database.write = write


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.faults.warm"])
