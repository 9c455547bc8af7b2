"""Fixtures that several folders of tests share."""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.clusters import Nodes
from tests.postgres import Server
from tests.running import evomerge_, url


def pytest_configure() -> None:
    """Look through everything that is loaded, which takes a third of a second, ten times less often
    than Python would."""
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, 10 * old)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server, one for each process that runs tests. Whoever stops it starts it again.

    Skipped where it is not installed, but never in CI.
    """
    server = Server()
    yield server
    server.remove()


@pytest.fixture
def postgres_url(postgres: Server) -> str:
    """The URL of a database of the test's own, with nothing in it."""
    return postgres.database()


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    """A Ray cluster, one for each process that runs tests."""
    started = Nodes()
    yield started
    started.remove()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three random models that fit together (base, a, b), and one of another depth (deep)."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny.write_model(folder / "base", seed=0)
    return {
        "base": base,
        "a": tiny.write_model(folder / "a", seed=1, near=base),
        "b": tiny.write_model(folder / "b", seed=2, near=base),
        "deep": tiny.write_model(folder / "deep", seed=3, layers=5),
    }


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def fresh_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a store without searches, one for each kind of database; a file is not there yet.

    A test that asks for it is run on both, on a server in the slow suite.
    """
    if request.param == "sqlite":
        return url(tmp_path / "store.db")
    server: Server = request.getfixturevalue("postgres")
    return server.store()


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """A job that searches the zoo in seconds."""
    return tiny.write_job(tmp_path)


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a finished search 'tiny' over two tasks, never exported, its job.yaml beside it,
    and what the run said in run.json and run.log.

    Shared by all: copy it before anything is written to it.
    """
    folder = tmp_path_factory.mktemp("searched")
    tiny.write_task(folder / "task", train=30)
    tiny.write_task(folder / "reading", source="ja_transcription")
    tasks = [{"task": "task"}, {"task": "reading", "weight": 0.5}]
    optimizer = {"name": "cma-es", "population": 4, "sigma0": 0.3}  # far enough to be half good
    job = tiny.write_job(folder, tasks=tasks, optimizer=optimizer, budget={"candidates": 8})
    end = evomerge_("run", job, "--store", url(folder / "store.db"), "--json")
    assert end.code == 0, end.err
    (folder / "run.json").write_text(end.out)
    (folder / "run.log").write_text(end.err)
    return folder / "store.db"


@pytest.fixture(scope="session")
def exported(searched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the winner of `searched` was exported to, the store.db that knows it beside
    it, and what the command said in export.json."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copyfile(searched, folder / "store.db")
    store = url(folder / "store.db")
    end = evomerge_("export", "tiny", "-o", folder / "out", "--store", store, "--json")
    assert end.code == 0, end.err
    (folder / "export.json").write_text(end.out)
    return folder / "out"
