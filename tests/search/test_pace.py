"""How long a search will take from here: by its pace, until the first limit of the budget."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.executor import Request
from evomerge.fitness.results import Evaluation
from evomerge.guard.review import Used
from evomerge.job import Budget, Job
from evomerge.search import Interrupted, Silent, Status, flow, launch, pace, resume, summary
from evomerge.search.pace import seconds_left
from evomerge.search.setting import Setting
from evomerge.store import Store
from tests import tiny
from tests.dice import Rolling
from tests.running import evomerge_, query, url

# In half an hour.
USED = Used(candidates=10, example_evaluations=1000, hours=0.5, gpu_hours=1.0)


@pytest.mark.parametrize(
    ("budget", "under_way", "minutes"),
    [
        ({"candidates": 30}, 0, 60),
        ({"candidates": 30}, 2, 66),
        ({"candidates": 30, "example_evaluations": 1500}, 0, 15),
        ({"candidates": 30, "hours": 0.6}, 0, 6),
        ({"candidates": 30, "gpu_hours": 1.2}, 0, 6),
        ({"candidates": 8}, 0, 0),
    ],
)
def test_the_limit_that_comes_first_counts(
    budget: dict[str, float], under_way: int, minutes: float
) -> None:
    found = seconds_left(Budget.model_validate(budget), USED, USED, under_way)
    assert found == pytest.approx(60 * minutes)


def test_the_pace_is_that_of_what_is_done_here() -> None:
    faster = Used(candidates=5, example_evaluations=500, hours=0.1, gpu_hours=0.2)
    assert seconds_left(Budget(candidates=30), USED, faster, 0) == pytest.approx(20 * 360 / 5)
    nothing = Used(0, 0, 0.1, 0.0)
    assert seconds_left(Budget(candidates=30), USED, nothing, 4) is None


class Looking(Silent):
    """Tells what `show` says whenever a generation is complete."""

    def __init__(self, store: Callable[[], Store]) -> None:
        self._store = store
        self.seen: list[tuple[Status, dict[str, Any]]] = []

    def generation(self, status: Status) -> None:
        self.seen.append((status, self.show()))

    def show(self) -> dict[str, Any]:
        with self._store() as store:
            return summary.show(store, "tiny")


@pytest.fixture
def halted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store of a search that was asked to stop in the second of its three generations."""
    monkeypatch.setattr(Setting, "executor", lambda setting: Rolling(setting))
    optimizer = {"name": "cma-es", "population": 8}
    written = tiny.write_job(tmp_path, optimizer=optimizer, budget={"candidates": 24})
    path = tmp_path / "store.db"
    landed = iter(range(1000))
    with pytest.raises(Interrupted):
        launch(Setting.open(Job.from_file(written)), url(path), Silent(), lambda: next(landed) > 15)
    return path


def test_show_says_how_much_time_is_left_until_a_search_ends(halted: Path) -> None:
    looking = Looking(lambda: Store(url(halted)))
    found = looking.show()
    used, open_ = found["budget"], found["candidates"]["open"]
    assert found["state"] == "stopped"
    assert (used["candidates"]["used"], open_) == (16, 6)
    left = (24 - 16 + open_) * 3600 * used["hours"]["used"] / (16 - open_)
    assert found["seconds_left"] == pytest.approx(left)
    said = evomerge_("show", "tiny", "--store", url(halted)).out
    assert "\ntime left, at the pace so far: about " in said
    assert " s, once it is resumed\n" in said
    with Store(url(halted)) as store:
        resume("tiny", store, looking, lambda: False)
    (_, second), (status, third) = looking.seen
    assert second["state"] == third["state"] == "running"
    assert second["seconds_left"] > 0
    assert third["seconds_left"] == status.seconds_left == 0
    assert looking.show()["seconds_left"] is None
    assert "time left" not in evomerge_("show", "tiny", "--store", url(halted)).out


class Clock:
    """That of a search whose evaluations take half a second each, and nothing else any time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in (flow, pace):
            monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self.now


class Timed(Rolling):
    """By such a clock; nothing fails."""

    def __init__(self, setting: Setting, clock: Clock, ahead: bool = False) -> None:
        super().__init__(setting, ahead=ahead)
        self._clock = clock

    def _evaluated(self, request: Request) -> Evaluation:
        self._clock.now += 0.5
        found = super()._evaluated(request)
        return replace(found, seconds=0.5)


class Seeing(Silent):
    """Notes down when it was told how much time is left."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seen: list[tuple[float, float | None]] = []

    def progress(self, status: Status) -> None:
        self.seen.append((self._clock.now, status.seconds_left))


@pytest.mark.slow
def test_time_left_counts_the_stages_that_candidates_have_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(Setting, "executor", lambda setting: Timed(setting, clock))
    written = tiny.write_job(
        tmp_path,
        optimizer={"name": "cma-es", "population": 8},
        staging={"stages": [2, 4, 6, 8, 10, 16], "keep": [7, 6, 5, 4, 3]},
        budget={"candidates": 80},
    )
    seeing, path = Seeing(clock), tmp_path / "store.db"
    launch(Setting.open(Job.from_file(written)), url(path), seeing, lambda: False)
    end = seeing.seen[-1][0]
    told = [(left, end - now) for now, left in seeing.seen if left and end - now > 10]
    assert len(told) > 100
    assert all(0.9 < left / really < 2 for left, really in told)


@pytest.mark.parametrize("ahead", [False, True])
def test_an_evaluation_waits_until_a_device_begins_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(Setting, "executor", lambda setting: Timed(setting, clock, ahead))
    written = tiny.write_job(
        tmp_path, optimizer={"name": "cma-es", "population": 8}, budget={"candidates": 8}
    )
    path = tmp_path / "store.db"
    launch(Setting.open(Job.from_file(written)), url(path), Silent(), lambda: False)
    sql = "SELECT waited FROM evaluation WHERE purpose = 'train' ORDER BY id"
    assert [waited for (waited,) in query(path, sql)] == [0.5 * place for place in range(8)]
