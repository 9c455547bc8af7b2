"""The command line in processes of their own, and what befalls them.

Processes are forked from a server that has loaded the package once (see `warm`), so that hundreds
of them can be started, killed and replaced. What befalls one is said as faults: callables that it
runs before the command. The package itself knows nothing of them.
"""

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Literal

import numpy as np
from sqlalchemy import Connection as SqlConnection

import evomerge.cli
from evomerge.executor import Request
from evomerge.fitness.results import Evaluation, Failed, Scored, Scores
from evomerge.search.setting import Setting
from evomerge.seeds import generator
from evomerge.store.database import Database
from tests import tiny
from tests.running import PATIENCE, Ended

Fault = Callable[[], None]


@dataclass(frozen=True)
class AtWrite:
    """The process sends a signal to itself at its n-th write to the store, counted from 1.

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

        watch_writes(count)


class Dice:
    """The process scores by rolling dice that depend on recipe and example alone.

    A search then takes a fraction of a second. Some recipes fail, as real ones may.
    """

    def __call__(self) -> None:
        Setting.executor = lambda setting: _Rolling(setting)


@dataclass(frozen=True)
class _Rolling:
    """An Executor, see there."""

    setting: Setting

    def evaluate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Evaluation]]:
        for request in requests:
            yield request, self._evaluated(request)

    def _evaluated(self, request: Request) -> Evaluation:
        recipe = json.dumps(request.recipe.to_dict(), sort_keys=True)
        skill = generator(0, recipe.replace(str(tiny.ZOO), "")).random()
        if skill < 0.1:
            return Failed("the dice say so", 0.5)
        tasks = {}
        for task, examples in request.examples.items():
            size = self.setting.sizes[task][request.split]
            luck = generator(0, f"{request.split} of {task}").random(size)[examples]
            n = len(examples)
            right, sure = (luck < skill).astype(np.float32), -luck.astype(np.float32)
            none = np.zeros(n, bool)
            tasks[task] = Scores(examples, right, sure, none, np.full(n, 3, np.uint32), none)
        return Scored(tasks, 0.25, 0.5)

    def close(self) -> None:
        """It holds nothing."""


class Process:
    """A command that runs in a process of its own, from construction on."""

    def __init__(self, arguments: Sequence[str | Path], *faults: Fault) -> None:
        self._output = Path(tempfile.mkdtemp())
        self._first_write, theirs = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(
            target=_run, args=([*map(str, arguments)], faults, self._output, theirs)
        )
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
        self._process.join(PATIENCE)
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


def watch_writes(reach: Callable[[str], None]) -> None:
    """Have a function called at each moment of each write from now on, see AtWrite."""
    original = Database.write

    @contextmanager
    def write(database: Database) -> Iterator[SqlConnection]:
        reach("begun")
        with original(database) as connection:
            yield connection
            reach("written")
        reach("committed")

    Database.write = write


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.faults.warm"])
