"""What can be told of a job in moments."""

from pathlib import Path

import pytest

from evomerge.errors import InputError
from evomerge.job import Job
from evomerge.search.check import check_job, plan_job
from evomerge.search.setting import Setting
from tests import tiny


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """With an optimizer that is to be chosen."""
    optimizer = {"name": "auto", "population": 4}
    return Job.from_file(tiny.write_job(tmp_path, optimizer=optimizer, budget={"candidates": 10}))


def test_a_plan_says_what_a_check_does_as_far_as_it_says_it(job: Job) -> None:
    plan, check = plan_job(job), check_job(job)
    assert plan["optimizer"] == check["job"]["optimizer"]["name"]
    same = {"population", "dimensions", "tasks", "contamination", "licence", "worn"}
    assert {key: plan[key] for key in same} == {key: check[key] for key in same}
    assert plan["memory_bytes"] <= check["memory_bytes"]
    assert plan["generations"] == {"candidates": 3}
    assert plan["generations"]["candidates"] == check["forecast"]["generations"]


def test_nothing_is_run_for_a_plan(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Setting) -> None:
        raise InputError("no engine is needed")

    monkeypatch.setattr(Setting, "engine", refuse)
    assert plan_job(job)["population"] == 4
    with pytest.raises(InputError, match="no engine"):
        check_job(job)
