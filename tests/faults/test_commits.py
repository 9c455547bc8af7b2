"""kill -9 at every commit: the search ends as if nothing had happened."""

import itertools
import json
from pathlib import Path
from signal import SIGKILL
from typing import Any, Literal

import pytest

from tests.faults.driver import AtWrite, Process
from tests.faults.searching import Stores, assert_whole, conduct, finish, rows, sized
from tests.running import Log, log

pytestmark = pytest.mark.faults

Moment = Literal["written", "committed"]
MOMENTS = ["written", "committed"]  # before COMMIT is sent, and after it has returned
UNSEALS = "SELECT subject, at FROM ledger WHERE kind = 'unseal'"


@pytest.mark.parametrize("moment", MOMENTS)
def test_search_killed_at_any_write_resumes_to_the_same_end(
    job: Path, stores: Stores, undisturbed: Log, moment: Moment
) -> None:
    for number in itertools.count(1, sized(1, 6)):
        store = stores.fresh()
        end = conduct(job, store, AtWrite(number, moment)).end()
        if end.code == 0:  # it has no such write
            break
        assert end.code == -SIGKILL, end.err
        finish(job, store)
        assert log(store) == undisturbed, f"killed at write {number}"
    assert number > 40


@pytest.mark.parametrize("number", [7, 9, 12, 16][:: sized(1, 3)])
def test_search_whose_every_process_is_killed_comes_to_the_same_end(
    job: Path, stores: Stores, undisturbed: Log, number: int
) -> None:
    store, deaths = stores.fresh(), 0
    while (end := conduct(job, store, AtWrite(number, "committed")).end()).code == -SIGKILL:
        deaths += 1  # the first writes of each take over, and reserve looks that are there
        assert deaths < 60
    assert end.code == 0, end.err
    assert deaths > 1
    assert_whole(store)
    assert log(store) == undisturbed


@pytest.mark.parametrize("moment", MOMENTS)
def test_export_killed_at_any_write_opens_the_test_split_once(
    finished: str, stores: Stores, tmp_path: Path, moment: Moment
) -> None:
    untouched = exported(stores.copy(finished), tmp_path / "undisturbed")
    for number in itertools.count(1):
        store, out = stores.copy(finished), tmp_path / str(number)
        arguments = ["export", "tiny", "--store", store, "-o", out]
        end = Process(arguments, AtWrite(number, moment)).end()
        if end.code == 0:
            break
        assert end.code == -SIGKILL, end.err
        begun = rows(store, UNSEALS)
        report = exported(store, out if not out.exists() else tmp_path / f"{number} again")
        opened = rows(store, UNSEALS)
        assert len(opened) == 1
        assert begun in ([], opened)  # a begun opening is the same opening
        assert report == untouched, f"killed at write {number}"
    assert number > 4


def exported(store: str, out: Path) -> dict[str, Any]:
    """The report of an export that comes to its end, without the time of its opening."""
    end = Process(["export", "tiny", "--store", store, "-o", out]).end()
    assert end.code == 0, end.err
    assert_whole(store)
    assert not list(out.parent.glob(f".{out.name}*"))
    report: dict[str, Any] = json.loads((out / "evomerge_report.json").read_text())
    for seal in report["seal"].values():
        assert (seal.pop("opened_at"),) in rows(store, "SELECT at FROM ledger")
    return report


@pytest.mark.parametrize("number", [7, 20, 38, 46][:: sized(1, 2)])
def test_search_of_real_models_killed_at_a_write_resumes_to_the_same_end(
    job: Path, stores: Stores, number: int, real: Log
) -> None:
    store = stores.fresh()
    assert conduct(job, store, AtWrite(number, "committed"), real=True).end().code == -SIGKILL
    finish(job, store, real=True)
    assert log(store) == real


@pytest.fixture(scope="module")
def real(job: Path, stores: Stores) -> Log:
    """What the search writes when its models are really scored."""
    store = stores.fresh()
    finish(job, store, real=True)
    return log(store)
