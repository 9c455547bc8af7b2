"""Whole searches on Ray: the same as without it, whatever happens to workers, nodes and drivers."""

import gc
import json
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from evomerge.job import Job
from evomerge.search import Interrupted, Silent, Status, launch, resume
from evomerge.search.setting import Setting
from evomerge.store import Store
from tests import tiny
from tests.clusters import Head, Nodes, actors, eventually, free_port, is_running
from tests.running import count, ended, evomerge_, log, start, url, wait_for

pytestmark = pytest.mark.ray

SCORED = "SELECT COUNT(*) FROM evaluation"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three generations in stages over models that score in milliseconds."""
    folder = tmp_path_factory.mktemp("job")
    base = tiny.write_model(folder / "base", seed=0)
    for seed, name in enumerate(("a", "b"), 1):
        tiny.write_model(folder / name, seed, near=base)
    return tiny.write_job(
        folder,
        parents={name: {"model": str(folder / name)} for name in ("a", "b")},
        base={"model": str(base)},
        optimizer={"name": "cma-es", "population": 6},
        staging={"stages": [6, 14], "keep": [4]},
        budget={"candidates": 18},
    )


@pytest.fixture(scope="module")
def undisturbed(job: Path) -> dict[str, Any]:
    """What the search does in one process."""
    database = job.parent / "inline.db"
    assert evomerge_("run", job, "--store", url(database)).code == 0
    return done(database)


class Outside(Head):
    """A cluster that may be joined by `ray://`, too. client: by which address."""

    def __init__(self) -> None:
        port = free_port()
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            # For the process that speaks for a client: time to load Ray, and no gRPC in the way
            # when the server forks it.
            patch.setenv("RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S", "100")
            patch.setenv("GRPC_ENABLE_FORK_SUPPORT", "0")
            warnings.simplefilter("ignore", ResourceWarning)  # Ray leaves a log of the server open
            super().__init__(ray_client_server_port=port)
            gc.collect()
        self.client = f"ray://{self.address.partition(':')[0]}:{port}"


def done(database: Path) -> dict[str, Any]:
    """All that a search did, bit for bit, but for where it was done."""
    found: dict[str, Any] = log(database)
    seed, document, *rest = found["search"][0]
    elsewhere = {key: value for key, value in document.items() if key != "executor"}
    return found | {"search": (seed, elsewhere, *rest)}


class Disturbing(Silent):
    """Does something when a search has scored its so many-th candidate."""

    def __init__(self, at: int, disturb: Callable[[], None]) -> None:
        self._left, self._disturb = at, disturb

    def progress(self, status: Status) -> None:
        self._left -= 1
        if not self._left:
            self._disturb()


def searched(
    job: Path, database: Path, *overrides: str, disturbed: Disturbing | None = None
) -> dict[str, Any]:
    """What a search does on Ray."""
    loaded = Job.from_file(job, ["executor.kind=ray", "executor.cpus=0.5", *overrides])
    launch(Setting.open(loaded), url(database), disturbed or Silent(), lambda: False)
    return done(database)


@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_workers_changes_nothing(
    job: Path, tmp_path: Path, undisturbed: dict[str, Any], nodes: Nodes, workers: int
) -> None:
    found = searched(job, tmp_path / "store.db", f"executor.workers={workers}")
    assert found == undisturbed


def test_a_search_begun_without_ray_goes_on_with_it(
    job: Path, tmp_path: Path, undisturbed: dict[str, Any], nodes: Nodes
) -> None:
    database, asked = tmp_path / "store.db", [False] * 9 + [True]
    with pytest.raises(Interrupted):
        launch(Setting.open(Job.from_file(job)), url(database), Silent(), lambda: asked.pop(0))
    with Store(url(database)) as store:
        (name,) = [row.name for row in store.searches()]
        overrides = ["executor.kind=ray", "executor.cpus=0.5", "executor.workers=2"]
        resume(name, store, Silent(), lambda: False, overrides)
    assert done(database) == undisturbed


def test_workers_that_are_killed_change_nothing(
    job: Path,
    tmp_path: Path,
    undisturbed: dict[str, Any],
    nodes: Nodes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def kill() -> None:
        for process in actors():
            os.kill(process, signal.SIGKILL)

    found = searched(
        job, tmp_path / "store.db", "executor.workers=2", disturbed=Disturbing(4, kill)
    )
    assert found == undisturbed
    assert "is replaced" in caplog.text


def test_a_node_that_is_lost_changes_nothing(
    job: Path, tmp_path: Path, undisturbed: dict[str, Any], nodes: Nodes
) -> None:
    with nodes.another() as lose:
        found = searched(
            job,
            tmp_path / "store.db",
            "executor.workers=4",
            "executor.cpus=2",
            disturbed=Disturbing(5, lose),
        )
    assert found == undisturbed


def started(job: Path, database: Path, *overrides: str, **environment: str) -> Any:
    """`evomerge run --executor ray` in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        arguments = ["--executor", "ray", "--store", url(database), "--json"]
        return start("run", job, "executor.workers=2", "executor.cpus=0.5", *overrides, *arguments)


def test_ray_is_started_where_there_is_none_and_kept_quiet(
    job: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    database = tmp_path / "store.db"
    process = started(job, database)
    assert wait_for(process, lambda: count(database, SCORED) >= 6)
    children = actors(process.pid)
    os.kill(children[0], signal.SIGKILL)
    end = ended(process)
    assert end.code == 0, end.err
    assert json.loads(end.out)["state"] == "finished"
    of_ray = r"^(\x1b|\(|\[|\d{4}-|Traceback)"  # what its lines begin with, and none of ours
    assert not re.search(of_ray, end.err, re.MULTILINE), end.err
    assert done(database) == undisturbed
    assert eventually(lambda: not any(map(is_running, children)))


def test_a_killed_driver_leaves_nothing_behind_and_is_resumed(
    job: Path, tmp_path: Path, undisturbed: dict[str, Any], nodes: Nodes
) -> None:
    database = tmp_path / "store.db"
    before = set(actors())
    process = started(job, database, RAY_ADDRESS=nodes.address)
    assert wait_for(process, lambda: count(database, SCORED) >= 6)
    workers = set(actors()) - before
    assert workers
    process.kill()
    ended(process)
    assert eventually(lambda: not any(map(is_running, workers)))
    resumed = evomerge_("resume", "tiny", "--store", url(database))
    assert resumed.code == 0, resumed.err
    assert done(database) == undisturbed


@pytest.fixture(scope="module")
def another() -> Iterator[Outside]:
    """A cluster that has nothing to do with that of this process."""
    with closing(Outside()) as head:
        yield head


def test_a_search_outside_of_a_cluster_is_the_same(
    job: Path, tmp_path: Path, undisturbed: dict[str, Any], another: Outside
) -> None:
    database = tmp_path / "store.db"
    end = ended(started(job, database, RAY_ADDRESS=another.client))
    assert end.code == 0, end.err
    assert done(database) == undisturbed


def test_a_lost_head_is_told_of_and_the_search_goes_on_with_another(
    job: Path, tmp_path: Path, undisturbed: dict[str, Any], another: Outside
) -> None:
    database = tmp_path / "store.db"
    with closing(Head()) as head:
        process = started(job, database, RAY_ADDRESS=head.address)
        assert wait_for(process, lambda: count(database, SCORED) >= 6)
        head.lose()
        end = ended(process)
    assert end.code == 1, end.err
    assert re.fullmatch(
        rf"evomerge: executor: the head of the Ray cluster, {head.address}, is lost \(.*\); what "
        r"was recorded is kept: start another one, and resume the search: evomerge resume tiny "
        rf"--store {url(database)}",
        end.err.splitlines()[-1],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", another.address)
        resumed = ended(start("resume", "tiny", "--store", url(database)))
    assert resumed.code == 0, resumed.err
    assert done(database) == undisturbed


@pytest.mark.parametrize("twice", [False, True])
def test_an_interrupt_lets_what_is_under_way_land(
    job: Path, tmp_path: Path, undisturbed: dict[str, Any], nodes: Nodes, twice: bool
) -> None:
    database = tmp_path / "store.db"
    process = started(job, database, RAY_ADDRESS=nodes.address)
    assert wait_for(process, lambda: count(database, SCORED) >= 6)
    process.send_signal(signal.SIGTERM if twice else signal.SIGINT)
    if twice:
        process.send_signal(signal.SIGTERM)
    end = ended(process)
    assert end.code == 130, end.err
    assert "Go on with: evomerge resume tiny" in end.err
    assert evomerge_("resume", "tiny", "--store", url(database)).code == 0
    assert done(database) == undisturbed
