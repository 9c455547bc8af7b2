"""Searches on Ray whose workers are killed over and over, and whose node is lost, in both modes."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evomerge.job import Job
from evomerge.optimizer import Asked, Told
from evomerge.search import Silent, Status, launch
from evomerge.search.setting import Setting
from evomerge.seeds import generator
from evomerge.store import Store
from evomerge.store.integrity import check
from tests import tiny
from tests.clusters import Nodes, actors
from tests.executor.test_searches import done
from tests.running import evomerge_, query, url

pytestmark = pytest.mark.ray

CANDIDATES = 120
EVERY = 25  # results, after which a worker is killed
MODES = ["synchronous", "asynchronous"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ten generations in stages on the zoo."""
    return tiny.write_job(
        tmp_path_factory.mktemp("job"),
        optimizer={"name": "lra-cma-es", "population": 12},
        staging={"stages": [6, 14], "keep": [8]},
        budget={"candidates": CANDIDATES},
    )


class Disturbed(Silent):
    """Does something after every so many results."""

    def __init__(self, every: int, disturb: Callable[[], None]) -> None:
        self._every, self._disturb = every, disturb
        self._results = 0

    def progress(self, status: Status) -> None:
        self._results += 1
        if self._results % self._every == 0:
            self._disturb()


def searched(job: Path, database: Path, watcher: Silent, mode: str, *overrides: str) -> Setting:
    """A search on four workers of Ray, brought to its end."""
    on_ray = ["executor.kind=ray", "executor.workers=4", f"mode={mode}"]
    setting = Setting.open(Job.from_file(job, [*on_ray, *overrides]))
    launch(setting, url(database), watcher, lambda: False)
    return setting


def assert_whole(setting: Setting, database: Path) -> None:
    """The store is sound; each candidate was told once, in a log that is without a gap and that
    gives the same proposals again; nothing failed."""
    assert [*map(str, check(url(database), lambda done, of: None).violations)] == []
    with Store(url(database)) as store:
        search = store.search(setting.job.name)
        assert search.state == "finished"
        rows = [row for row in store.generations(search.id) if row.kind == "proposed"]
        candidates = store.candidates(search.id)
    log: dict[int, Asked | Told] = {}
    for row in rows:
        members = [one for one in candidates if one.generation == row.number]
        genotypes = np.stack([one.genotype for one in members if one.genotype is not None])
        told = np.array([one.told for one in members], np.float64)
        assert row.ask is not None
        assert row.tell is not None
        log |= {row.ask: Asked(genotypes), row.tell: Told(genotypes, told)}
    assert sorted(log) == [*range(1, 2 * len(rows) + 1)]
    assert setting.optimizer().replay([log[place] for place in sorted(log)]) is None
    assert sum(len(one.genotypes) for one in log.values() if isinstance(one, Told)) == CANDIDATES
    assert query(database, "SELECT COUNT(*) FROM evaluation WHERE state = 'failed'") == [(0,)]


@pytest.mark.parametrize("mode", MODES)
def test_workers_that_are_killed_over_and_over_cost_time_alone(
    job: Path, tmp_path: Path, nodes: Nodes, mode: str
) -> None:
    random, killed = generator(1, "soak"), []

    def kill() -> None:
        own = actors()
        killed.append(own[random.integers(len(own))])
        os.kill(killed[-1], signal.SIGKILL)

    database = tmp_path / "store.db"
    setting = searched(job, database, Disturbed(EVERY, kill), mode, "executor.cpus=0.5")
    assert len(killed) >= 5
    assert_whole(setting, database)
    if mode == "synchronous":
        inline = tmp_path / "inline.db"
        assert evomerge_("run", job, "--store", url(inline)).code == 0
        assert done(database) == done(inline)


def test_a_node_that_is_lost_in_the_asynchronous_mode_costs_time_alone(
    job: Path, tmp_path: Path, nodes: Nodes
) -> None:
    database, losses = tmp_path / "store.db", []
    with nodes.another() as lose:

        def once() -> None:
            if not losses:
                losses.append(1)
                lose()

        watcher = Disturbed(20, once)
        setting = searched(job, database, watcher, "asynchronous", "executor.cpus=2")
    assert losses
    assert_whole(setting, database)
