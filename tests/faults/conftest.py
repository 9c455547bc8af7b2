"""Fixtures of the fault tests: stores of both backends, a job, and its search undisturbed."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg import sql

from tests import tiny
from tests.faults.driver import kill_all
from tests.faults.searching import Stores, finish
from tests.postgres import Server
from tests.running import Log, log, url


class Files:
    """Stores in SQLite files. See Stores."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0

    def fresh(self) -> str:
        """See Stores."""
        self._made += 1
        return url(self._folder / f"{self._made}.db")

    def copy(self, store: str) -> str:
        """See Stores."""
        fresh = self.fresh()
        shutil.copyfile(store.removeprefix("sqlite:///"), fresh.removeprefix("sqlite:///"))
        return fresh


class Databases:
    """Stores on a PostgreSQL server. See Stores."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def fresh(self) -> str:
        """See Stores. The server loses nothing that it has confirmed when it is killed."""
        store = self._server.database()
        name = sql.Identifier(store.rpartition("/")[2])
        self._server.execute(sql.SQL("ALTER DATABASE {} SET synchronous_commit = on").format(name))
        return store

    def copy(self, store: str) -> str:
        """See Stores."""
        fresh = self._server.database()
        ours, theirs = (sql.Identifier(it.rpartition("/")[2]) for it in (fresh, store))
        self._server.execute(sql.SQL("DROP DATABASE {}").format(ours))
        self._server.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(ours, theirs))
        return fresh


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A test that fails leaves no process behind."""
    yield
    kill_all()


@pytest.fixture(params=["sqlite", "postgres"], scope="module")
def stores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """Of either backend."""
    if request.param == "sqlite":
        return Files(tmp_path_factory.mktemp("stores"))
    return Databases(request.getfixturevalue("postgres"))


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job with stages, a monitor slice and three looks."""
    folder = tmp_path_factory.mktemp("job")
    tiny.write_task(folder / "task", train=100, validation=60, test=100)
    staging = {"stages": [30, 60], "keep": [2]}
    return tiny.write_job(folder, staging=staging, optimizer={"name": "cma-es", "population": 4})


@pytest.fixture(scope="module")
def finished(job: Path, stores: Stores) -> str:
    """The store of the job's search that nobody disturbed, never exported."""
    store = stores.fresh()
    finish(job, store)
    return store


@pytest.fixture(scope="module")
def undisturbed(finished: str) -> Log:
    """What that search wrote."""
    return log(finished)
