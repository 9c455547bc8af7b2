"""The synchronous and the asynchronous mode: what depends on who lands first, and what never."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest

from evomerge.job import Job
from evomerge.search import Interrupted, Silent, launch, resume
from evomerge.search.setting import Setting
from evomerge.store import Store
from evomerge.store.integrity import check
from tests import tiny
from tests.dice import Rolling
from tests.running import Log, log, query, url

STAGING = {"stages": [4, 8, 16], "keep": [5, 2]}
PARETO = {"objective": "pareto", "objectives": ["score", "layers"]}
OPTIMIZERS = ["lra-cma-es", "cma-es-margin", "tpe", "nsga2", "qmc", "random"]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Job]:
    """Writes a job of five generations of eight candidates."""

    def write(**changes: Any) -> Job:
        optimizer = {"name": "cma-es", "population": 8}
        job = {"budget": {"candidates": 40}, "optimizer": optimizer, **changes}
        return Job.from_file(tiny.write_job(tmp_path, **job))

    return write


@pytest.fixture
def rolled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Conducts a job with so many workers, landing in that order; gives its store. halts: after so
    many evaluations each time, until it is finished."""
    numbers = count()

    def rolled(
        job: Job,
        workers: int = 1,
        order: int = 0,
        halts: int | None = None,
        ahead: bool = False,
    ) -> Path:
        monkeypatch.setattr(Setting, "executor", lambda s: Rolling(s, workers, order, ahead))
        path = tmp_path / f"{next(numbers)}.db"

        def asked() -> bool:
            nonlocal landed
            landed += 1
            return landed == halts

        landed = 0
        with Store(url(path), create=True) as store:
            try:
                launch(Setting.open(job), store.url, Silent(), asked)
            except Interrupted:
                while store.search("tiny").state == "stopped":
                    landed = 0
                    try:
                        resume("tiny", store, Silent(), asked)
                    except Interrupted:
                        continue
        return path

    return rolled


def trajectory(found: Log) -> Log:
    """Without the mode, which is part of the job."""
    (search,) = found["search"]
    return {**found, "search": [(search[0], {**search[1], "mode": None}, *search[2:])]}


def places(store: Path) -> list[tuple[int, int]]:
    """When each generation was asked for and told, as it is written down."""
    sql = "SELECT ask, tell FROM generation WHERE kind = 'proposed' ORDER BY number"
    return [(ask, tell) for ask, tell in query(store, sql)]


def overlaps(store: Path) -> bool:
    """Whether a generation was proposed before the one before was told."""
    found = places(store)
    return any(late[0] < early[1] for early, late in pairwise(found))


def assert_whole(store: Path) -> None:
    """Nothing is lost, nothing done twice, and the optimizer's log replays."""
    found = check(url(store), lambda done, of: None)
    assert [str(violation) for violation in found.violations] == []
    moments = sorted(place for pair in places(store) for place in pair)
    assert moments == [*range(1, len(moments) + 1)]
    assert list(query(store, "SELECT text FROM event WHERE kind = 'replay'")) == []
    sql = """SELECT COUNT(*) FROM candidate WHERE label IS NULL AND told IS NULL"""
    assert list(query(store, sql)) == [(0,)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"staging": STAGING},
        {"staging": STAGING, **PARETO},
    ],
)
def test_in_the_synchronous_mode_it_does_not_matter_who_lands_first(
    write: Callable[..., Job], rolled: Callable[..., Path], changes: dict[str, Any]
) -> None:
    job = write(**changes, **({"optimizer": {"name": "nsga2"}} if "objective" in changes else {}))
    undisturbed = rolled(job)
    assert not overlaps(undisturbed)
    for order in range(2):
        assert log(rolled(job, workers=8, order=order)) == log(undisturbed)
    assert log(rolled(job, workers=8, halts=5)) == log(undisturbed)


@pytest.mark.slow
def test_with_one_worker_that_merges_nothing_ahead_both_modes_are_the_same(
    write: Callable[..., Job], rolled: Callable[..., Path]
) -> None:
    one = rolled(write(staging=STAGING))
    other = rolled(write(staging=STAGING, mode="asynchronous"))
    assert trajectory(log(one)) == trajectory(log(other))


@pytest.mark.slow
def test_merging_ahead_changes_the_asynchronous_mode_alone(
    write: Callable[..., Job], rolled: Callable[..., Path]
) -> None:
    synchronous = write(staging=STAGING)
    assert log(rolled(synchronous, ahead=True)) == log(rolled(synchronous))
    asynchronous = rolled(write(staging=STAGING, mode="asynchronous"), ahead=True)
    assert overlaps(asynchronous)
    assert_whole(asynchronous)


@pytest.mark.slow
def test_in_the_asynchronous_mode_generations_overlap_and_nothing_is_lost(
    write: Callable[..., Job], rolled: Callable[..., Path]
) -> None:
    job = write(staging=STAGING, mode="asynchronous")
    store = rolled(job, workers=8, order=1)
    assert overlaps(store)
    assert_whole(store)
    assert log(rolled(job, workers=8, order=1)) == log(store)
    assert log(rolled(job, workers=8, order=2)) != log(store)


@pytest.mark.parametrize(
    "name", ["cma-es", *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS)]
)
def test_an_asynchronous_search_that_is_halted_again_and_again_loses_nothing(
    write: Callable[..., Job], rolled: Callable[..., Path], name: str
) -> None:
    optimizer = {"name": name, "population": 8}
    store = rolled(
        write(staging=STAGING, mode="asynchronous", optimizer=optimizer), workers=8, halts=7
    )
    assert overlaps(store)
    assert_whole(store)


def after(landed: int) -> Callable[[], bool]:
    """Asks to stop once so many evaluations have landed."""
    asked = count(1)
    return lambda: next(asked) == landed


@pytest.mark.slow
def test_a_search_older_than_the_log_goes_on_asynchronously(
    write: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its third generation was asked for before places were written down, and is told since."""
    job = write(budget={"candidates": 64})
    older, newer = tmp_path / "older.db", tmp_path / "newer.db"
    for path in (older, newer):
        with Store(url(path), create=True) as store:
            monkeypatch.setattr(Setting, "executor", lambda s: Rolling(s))
            with pytest.raises(Interrupted):
                launch(Setting.open(job), store.url, Silent(), after(27))
            if path == older:
                with closing(sqlite3.connect(older)) as database, database:
                    database.execute("UPDATE generation SET ask = NULL, tell = NULL")
            monkeypatch.setattr(Setting, "executor", lambda s: Rolling(s, 8))
            with pytest.raises(Interrupted):
                resume("tiny", store, Silent(), after(21), ["mode=asynchronous"])
            asked, told = places(path)[2]
            assert asked in (None, 5)
            assert told > 6  # the fourth was asked for in between
            resume("tiny", store, Silent(), lambda: False)
    assert [str(v) for v in check(url(older), lambda done, of: None).violations] == []
    assert log(older)["candidates"] == log(newer)["candidates"]


@pytest.mark.slow
def test_a_search_that_became_asynchronous_goes_on_from_where_it_was(
    write: Callable[..., Job], rolled: Callable[..., Path], tmp_path: Path
) -> None:
    whole = rolled(write(staging=STAGING), workers=8)  # and its executor stays
    landed = count()
    with Store(url(tmp_path / "changed.db"), create=True) as store:
        job = Setting.open(Job.from_file(tmp_path / "job.yaml"))
        with pytest.raises(Interrupted):
            launch(job, store.url, Silent(), lambda: next(landed) == 30)
        resume("tiny", store, Silent(), lambda: False, ["mode=asynchronous"])
    changed = tmp_path / "changed.db"
    assert overlaps(changed)
    assert_whole(changed)
    assert places(changed)[0] == places(whole)[0] == (1, 2)
