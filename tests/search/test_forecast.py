"""What a search would take: by workers, stages, merges that overlap, and the limits of the budget.

A merge takes 2 s and an example 0.1 s; 20 examples drive the search, 24 are in train and 12 in
validation, which 3 models look at; generations are of 4 candidates, and there are 6 baselines.
"""

from dataclasses import replace
from typing import Any

import pytest

from evomerge.executor import Workers
from evomerge.job import Budget, Job, Staging
from evomerge.search.forecast import Forecast, forecast
from evomerge.search.setting import Setting
from evomerge.search.settle import Cost
from tests import tiny

COST = Cost(merge=2.0, example=0.1)
ALONE = Workers(1, 0.0, merge_ahead=False)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Of three generations without stages."""
    return Setting.open(Job.from_file(tiny.write_job(tmp_path_factory.mktemp("job"))))


def foretold(setting: Setting, workers: Workers = ALONE, **changes: Any) -> Forecast:
    """With keys of the job replaced."""
    changed = replace(setting, job=setting.job.model_copy(update=changes))
    return forecast(changed, COST, workers)


def test_one_worker_does_everything_in_turn(setting: Setting) -> None:
    found = foretold(setting)
    assert found.candidate == pytest.approx(2 + 20 * 0.1)
    assert found.generation == pytest.approx(4 * found.candidate)
    assert (found.busy, found.generations, found.limit) == (1.0, 3, "candidates")
    baselines = len(setting.baselines()) * (2 + 24 * 0.1)
    finals = 2 * (2 + 24 * 0.1) + 3 * (2 + 12 * 0.1)
    assert found.whole == pytest.approx(baselines + 3 * found.generation + finals)
    assert found.devices == pytest.approx(found.whole)


def test_several_workers_wait_for_the_last_round_of_a_generation(setting: Setting) -> None:
    found = foretold(setting, replace(ALONE, count=3))
    assert found.generation == pytest.approx(2 * found.candidate)
    assert found.busy == pytest.approx(4 / 6)
    assert found.devices == pytest.approx(foretold(setting).devices)


def test_more_workers_than_candidates_are_of_no_use(setting: Setting) -> None:
    few, many = (foretold(setting, replace(ALONE, count=n)) for n in (4, 8))
    assert few.generation == many.generation == pytest.approx(few.candidate)
    assert (few.busy, many.busy) == (1.0, 0.5)


def test_in_the_asynchronous_mode_nobody_waits(setting: Setting) -> None:
    found = foretold(setting, replace(ALONE, count=8), mode="asynchronous")
    assert found.generation == pytest.approx(4 * found.candidate / 8)
    assert found.busy == pytest.approx(1)


@pytest.mark.parametrize(("example", "seconds"), [(0.05, 2.0), (0.1, 2.0), (0.5, 10.0)])
def test_a_merge_ahead_takes_no_time_of_its_own(
    setting: Setting, example: float, seconds: float
) -> None:
    found = forecast(setting, Cost(2.0, example), replace(ALONE, merge_ahead=True))
    assert found.candidate == pytest.approx(seconds)


def test_each_gpu_of_a_worker_counts(setting: Setting) -> None:
    alone, group = foretold(setting), foretold(setting, replace(ALONE, gpus=4.0))
    assert group.whole == alone.whole
    assert group.devices == pytest.approx(4 * alone.devices)


def test_those_who_are_dropped_early_cost_less(setting: Setting) -> None:
    found = foretold(setting, staging=Staging(stages=(5, 15), keep=(2,)))
    assert found.generation == pytest.approx(4 * (2 + 5 * 0.1) + 2 * (2 + 10 * 0.1))
    assert found.candidate == pytest.approx(found.generation / 4)


BASELINES = 6 * 4.4  # seconds


@pytest.mark.parametrize(
    ("budget", "generations", "limit"),
    [
        ({"candidates": 13}, 4, "candidates"),
        ({"candidates": 40, "example_evaluations": 161}, 3, "example_evaluations"),
        ({"candidates": 40, "hours": (BASELINES + 17) / 3600}, 2, "hours"),
        ({"candidates": 40, "gpu_hours": (2 * BASELINES + 33) / 3600}, 2, "gpu_hours"),
        ({"candidates": 40, "hours": BASELINES / 3600 / 2}, 0, "hours"),
    ],
)
def test_the_limit_that_is_reached_first_ends_the_search(
    setting: Setting, budget: dict[str, float], generations: int, limit: str
) -> None:
    assert len(setting.baselines()) == 6
    workers = replace(ALONE, gpus=2.0)
    found = foretold(setting, workers, budget=Budget.model_validate(budget))
    assert (found.generations, found.limit) == (generations, limit)
