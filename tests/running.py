"""Running evomerge from tests, in this process or in one of its own, and what a search wrote."""

import contextlib
import io
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import evomerge.cli

PATIENCE = 120  # seconds until a process that hangs is given up

Log = dict[str, list[tuple[Any, ...]]]

# All that a search did, without what is allowed to differ between two runs of it: times, epochs.
_LOG = {
    "search": """SELECT seed, job, state, stop_reason, verdict FROM search""",
    "models": """SELECT name, uri, sha256, files FROM model ORDER BY name""",
    "splits": """SELECT task, split, content, n FROM split ORDER BY task, split""",
    "generations": """SELECT number, kind, step_size, told_at IS NOT NULL, review, optimizer
        FROM generation
        ORDER BY number""",
    "candidates": """SELECT id, generation, slot, label, state, reason, genotype, recipe,
        recipe_sha, fitness, told, objectives, violation FROM candidate
        ORDER BY generation, slot""",
    "evaluations": """SELECT candidate_id, purpose, stage, state, reason, copied_from
        FROM evaluation
        ORDER BY candidate_id, purpose, stage""",
    "scores": """SELECT candidate_id, purpose, stage, task, n, mean, truncated, blob
        FROM score JOIN evaluation ON evaluation.id = evaluation_id
        ORDER BY candidate_id, purpose, stage, task""",
    "ledger": """SELECT kind, content, subject, entry FROM ledger ORDER BY id""",
    "replays": """SELECT text FROM event WHERE kind = 'replay'""",
}


@dataclass(frozen=True)
class Ended:
    """A command that came to its end."""

    code: int
    out: str
    err: str


def evomerge_(*arguments: str | Path) -> Ended:
    """Run a command in this process."""
    argv = ["evomerge", *map(str, arguments)]
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", argv)
        try:
            evomerge.cli.main()
        except SystemExit as end:
            code = end.code
    return Ended(int(code or 0), out.getvalue(), err.getvalue())


def start(*arguments: str | Path) -> "subprocess.Popen[str]":
    """Start a command in a process of its own."""
    command = [sys.executable, "-m", "evomerge", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EVOMERGE_")}
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def ended(process: "subprocess.Popen[str]") -> Ended:
    """Wait for a process's end."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Ended(process.returncode, out, err)


def url(database: Path) -> str:
    """Of a SQLite file."""
    return f"sqlite:///{database}"


def query(database: Path, sql: str) -> list[tuple[Any, ...]]:
    """Rows of a read-only connection that lasts as long as the query."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(sql).fetchall()


def count(database: Path, sql: str) -> int:
    """The single number that a query gives; 0 while there is no such database or table."""
    try:
        return int(query(database, sql)[0][0])
    except sqlite3.OperationalError:
        return 0


def wait_for(process: "subprocess.Popen[str]", happened: Callable[[], bool]) -> bool:
    """Poll until something has happened; False when the process ended before that."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return process.poll() is None


def log(database: Path) -> Log:
    """All that the only search of a database did, bit for bit."""
    return {part: query(database, sql) for part, sql in _LOG.items()}
