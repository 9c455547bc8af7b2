"""Searches to report on, each conducted once."""

from pathlib import Path
from typing import Any

import pytest

from evomerge.job import Job
from evomerge.search import Silent, launch
from evomerge.search.setting import Setting
from evomerge.store import upgrade
from tests import tiny
from tests.dice import Rolling
from tests.golden import SCHEMAS, golden, quiet
from tests.running import url


def conducted(folder: Path, rolled: bool = True, **changes: Any) -> Path:
    """The store of a search by these changes of the tiny job; rolled: nothing is merged."""
    store = folder / "store.db"
    setting = Setting.open(Job.from_file(tiny.write_job(folder, **changes)))
    with pytest.MonkeyPatch.context() as patch:
        if rolled:
            patch.setattr(Setting, "executor", lambda setting: Rolling(setting))
        launch(setting, url(store), Silent(), lambda: False)
    return store


@pytest.fixture(scope="session")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a search by race, some of whose candidates failed: five generations of eight."""
    return conducted(
        tmp_path_factory.mktemp("raced"),
        optimizer={"name": "cma-es", "population": 8},
        budget={"candidates": 40},
        staging={"stages": [4, 8, 16], "keep": [5, 2]},
    )


@pytest.fixture(scope="session")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a search for stacks of layers that are good and small."""
    return conducted(
        tmp_path_factory.mktemp("stacked"),
        space={"preset": "layer_stack"},
        objective="pareto",
        objectives=["score", "layers"],
        optimizer={"name": "nsga2", "population": 8},
        budget={"candidates": 24},
    )


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a search whose candidates really were merged, and wrote replies."""
    folder = tmp_path_factory.mktemp("spoken")
    task = tiny.write_task(folder / "task", source="en_list_ops")
    text = task.read_text(encoding="utf-8")
    task.write_text(text.replace("teacher_forced: true", "teacher_forced: false"), encoding="utf-8")
    return conducted(
        folder,
        rolled=False,
        space={"preset": "global_task_arithmetic"},
        budget={"candidates": 8},
    )


@pytest.fixture(scope="session", params=[SCHEMAS[0], SCHEMAS[-1]])
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that an earlier version of evomerge left, brought up to date, with the searches
    `finished`, `stopped` and `failed`."""
    found = golden(request.param, tmp_path_factory.mktemp("old"))
    upgrade(found.url, quiet)
    return found.store
