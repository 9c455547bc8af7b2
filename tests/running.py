"""Running evomerge from tests, in this process or in one of its own, and what a search wrote."""

import contextlib
import io
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

import evomerge.cli

PATIENCE = 120  # seconds until a process that hangs is given up

Log = dict[str, list[tuple[Any, ...]]]

# All that a search did, without what is allowed to differ between two runs of it: times, epochs,
# ids, and where other searches of the store already knew a baseline.
_LOG = {
    "search": """SELECT seed, job, state, stop_reason, verdict FROM search WHERE id = :search""",
    "models": """SELECT name, uri, sha256, files FROM model WHERE search_id = :search
        ORDER BY name""",
    "splits": """SELECT task, split, content, n FROM split WHERE search_id = :search
        ORDER BY task, split""",
    "generations": """SELECT number, kind, step_size, told_at IS NOT NULL, review, optimizer,
            ask, tell
        FROM generation WHERE search_id = :search
        ORDER BY number""",
    "candidates": """SELECT generation, slot, label, state, reason, genotype, recipe,
        recipe_sha, fitness, told, objectives, violation FROM candidate
        WHERE search_id = :search
        ORDER BY generation, slot""",
    "evaluations": """SELECT generation, slot, purpose, stage, evaluation.state,
            evaluation.reason, copied_from
        FROM evaluation JOIN candidate ON candidate.id = candidate_id
        WHERE search_id = :search
        ORDER BY generation, slot, purpose, stage""",
    "scores": """SELECT generation, slot, purpose, stage, task, n, mean, truncated, blob
        FROM score JOIN evaluation ON evaluation.id = evaluation_id
        JOIN candidate ON candidate.id = candidate_id
        WHERE search_id = :search
        ORDER BY generation, slot, purpose, stage, task""",
    "ledger": """SELECT kind, content, subject, entry FROM ledger WHERE search_id = :search
        ORDER BY id""",
    "replays": """SELECT text FROM event WHERE search_id = :search AND kind = 'replay'""",
}
# Keys of the store's documents whose values are ids of candidates.
_IDS = {"winner", "best_parent", "finalists", "incumbent", "front", "candidate"}


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


def log(store: Path | str, search: str = "tiny") -> Log:
    """All that a search did, bit for bit; of a SQLite file, or of a store's URL."""
    address = url(store) if isinstance(store, Path) else store
    engine = create_engine(address.replace("postgresql:", "postgresql+psycopg:"))
    try:
        with engine.connect() as connection:
            named = "SELECT id FROM search WHERE name = :name"
            id = connection.execute(text(named), {"name": search}).scalar_one()
            own = {"search": id}
            ids = "SELECT id, generation, slot FROM candidate WHERE search_id = :search"
            places = {
                row.id: (row.generation, row.slot) for row in connection.execute(text(ids), own)
            }
            rows = {part: connection.execute(text(sql), own).all() for part, sql in _LOG.items()}
    finally:
        engine.dispose()
    return {
        part: [tuple(_placed(row._mapping, search, places)) for row in found]
        for part, found in rows.items()
    }


def _placed(
    row: Mapping[str, Any], search: str, places: dict[int, tuple[int, int]]
) -> Iterator[Any]:
    """The values of a row, with candidates' places for their ids."""

    def placed(value: Any) -> Any:
        return [places[id] for id in value] if isinstance(value, list) else places.get(value)

    for column, value in row.items():
        if column == "copied_from":
            yield placed(value)
        elif column == "subject":
            owner, _, id = value.rpartition("/")
            yield placed(int(id)) if owner == search else value
        elif column in ("job", "review", "verdict", "entry") and value is not None:
            document = json.loads(value)
            found = {k: placed(v) if k in _IDS else v for k, v in document.items()}
            yield found | {"name": None, "search": None}  # they may differ between two runs, too
        else:
            yield value
