"""What a job leaves to evomerge, and what may change in mid-search."""

from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import JobError
from evomerge.job import Job
from evomerge.search import Silent, launch
from evomerge.search.changes import changed
from evomerge.search.setting import Setting
from evomerge.search.settle import Cost, settle, stages
from tests import tiny
from tests.dice import Rolling
from tests.running import url


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        (0.0, ((10, 20, 40), (10, 7))),
        (0.005, ((10, 20, 40), (10, 7))),
        (0.015, ((20, 40), (7,))),
        (0.03, ((40,), ())),
        (0.2, ((200,), ())),
        (9.0, ((400,), ())),
    ],
)
def test_stages_that_cost_less_than_a_merge_are_left_out(
    merge: float, expected: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    found = stages(Cost(merge, 0.001), examples=400, size=14)
    assert (found.stages, found.keep) == expected


def test_stages_fit_small_tasks_and_small_generations() -> None:
    assert stages(Cost(0.0, 0.001), examples=15, size=4).stages == (10, 15)
    assert stages(Cost(0.0, 0.001), examples=8, size=4).stages == (8,)
    assert stages(Cost(0.0, 0.0), examples=100, size=2).keep == (1, 1)


@pytest.fixture
def job(tmp_path: Any) -> dict[str, Any]:
    loaded = Job.from_file(tiny.write_job(tmp_path))
    return loaded.model_dump(mode="json", exclude_none=True, by_alias=True)


def test_budget_optimizer_and_stop_may_change(job: dict[str, Any]) -> None:
    before = Job.from_dict(job, "x")
    found = changed(job, ["budget.candidates=40", "optimizer.name=random", "stop.target=0.9"], "x")
    assert found.budget.candidates == 40
    assert (found.optimizer.name, found.optimizer.population) == ("random", 4)
    assert found.stop.target == 0.9
    sections = ("budget", "optimizer", "stop")
    same = found.model_copy(update={name: getattr(before, name) for name in sections})
    assert same == before


def test_where_candidates_are_scored_may_change(job: dict[str, Any]) -> None:
    found = changed(job, ["executor.kind=ray", "executor.workers=2"], "x")
    assert (found.executor.kind, found.executor.workers) == ("ray", 2)


def test_keys_of_another_kind_of_executor_are_left_behind(job: dict[str, Any]) -> None:
    before = changed(job, ["executor.kind=ray", "executor.workers=2"], "x").document()
    assert changed(before, ["executor.time_limit=9"], "x").executor.workers == 2
    found = changed(before, ["executor.kind=inline"], "x").executor
    assert (found.kind, found.workers) == ("inline", "auto")
    with pytest.raises(JobError, match=r"workers: only executor\.kind: ray has it"):
        changed(before, ["executor.workers=3", "executor.kind=inline"], "x")


@pytest.mark.parametrize("override", ["seed=4", "shaping=0", "space.kind=layers", "name=other"])
def test_what_scores_depend_on_may_not(job: dict[str, Any], override: str) -> None:
    with pytest.raises(JobError, match="only mode, optimizer, budget, stop, executor and guard"):
        changed(job, [override], "search 'x'")


def test_auto_is_settled_once(job: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="auto is settled at launch: name an optimizer"):
        changed(job, ["optimizer.name=auto"], "search 'x'")


@pytest.mark.parametrize(
    ("mode", "name"), [("synchronous", "cma-es"), ("asynchronous", "lra-cma-es")]
)
def test_where_proposals_overlap_auto_takes_the_optimizer_that_bears_it(
    tmp_path: Path, mode: str, name: str
) -> None:
    written = tiny.write_job(tmp_path, optimizer={"population": 4}, mode=mode)
    setting = Setting.open(Job.from_file(written))
    settled, notes = settle(setting, Rolling(setting))
    assert settled.job.optimizer.name == name
    assert notes[0].startswith(f"optimizer: {name}, as ")


@pytest.mark.parametrize("unable", [{"population": 3}, {"restarts": 2}])
def test_what_auto_takes_is_refused_before_a_search_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unable: dict[str, int]
) -> None:
    monkeypatch.setattr(Setting, "executor", lambda setting: Rolling(setting))
    job = Job.from_file(tiny.write_job(tmp_path, optimizer=unable, mode="asynchronous"))
    with pytest.raises(JobError, match="lra-cma-es"):
        launch(Setting.open(job), url(tmp_path / "store.db"), Silent(), lambda: False)
    assert not (tmp_path / "store.db").exists()
