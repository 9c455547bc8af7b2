"""Conducting searches as a user does whose processes die, and what must hold at the end."""

import os
from pathlib import Path
from typing import Protocol

from sqlalchemy import create_engine, inspect, text

from tests.faults.driver import Dice, Fault, Process
from tests.running import Ended

SMALL = os.environ.get("EVOMERGE_FAULTS") == "small"


class Stores(Protocol):
    """Where stores can be made."""

    def fresh(self) -> str:
        """The URL of a new one, with nothing in it."""
        ...

    def copy(self, store: str) -> str:
        """The URL of a copy of one that nobody has open."""
        ...


def sized(full: int, small: int) -> int:
    """How much of something is done: all of it, or less in CI (EVOMERGE_FAULTS=small)."""
    return small if SMALL else full


def engine_url(store: str) -> str:
    """A store's URL as SQLAlchemy takes it."""
    return store.replace("postgresql:", "postgresql+psycopg:")


def rows(store: str, sql: str) -> list[tuple[object, ...]]:
    """What a query gives; nothing while there is no such store or table."""
    path = Path(store.removeprefix("sqlite:///"))
    if store.startswith("sqlite") and not path.exists():
        return []
    engine = create_engine(engine_url(store))
    try:
        with engine.connect() as connection:
            if not inspect(connection).has_table("search"):
                return []
            return [tuple(row) for row in connection.execute(text(sql))]
    finally:
        engine.dispose()


def conduct(
    job: Path, store: str, *faults: Fault, name: str = "tiny", real: bool = False
) -> Process:
    """Start what a user would: launch if nothing was launched, else resume.

    real: models are really scored.
    """
    faults = faults if real else (Dice(), *faults)
    if (name,) in rows(store, "SELECT name FROM search"):
        return Process(["resume", name, "--store", store], *faults)
    return Process(["run", job, f"name={name}", "--store", store], *faults)


def finish(job: Path, store: str, name: str = "tiny", real: bool = False) -> None:
    """Conduct a search to its end, undisturbed from now on, and see that the store is whole."""
    end = conduct(job, store, name=name, real=real).end()
    assert end.code == 0, end
    assert_whole(store)


def assert_whole(store: str) -> None:
    """`evomerge db check` finds nothing."""
    end = Process(["db", "check", "--store", store]).end()
    assert end.code == 0, end.out + end.err


def assert_refused(end: Ended, *words: str) -> None:
    """It failed with one line that has these words, and says what to do."""
    assert end.code in (1, 2), end
    assert "Traceback" not in end.err
    line = end.err.splitlines()[-1]
    assert line.startswith("evomerge: ")
    for word in words:
        assert word in line
