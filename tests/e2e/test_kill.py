"""kill -9, Ctrl-C or a rival at any moment: the search ends as if nothing had happened."""

import json
import shlex
import shutil
import signal
from pathlib import Path

import pytest

from tests import tiny
from tests.running import (
    Ended,
    Log,
    count,
    ended,
    evomerge_,
    log,
    query,
    start,
    url,
    wait_for,
)

EVALUATIONS = "SELECT count(*) FROM evaluation"
GENERATIONS = "SELECT count(*) FROM generation"
TOLD = "SELECT count(told_at) FROM generation"
LEDGER = "SELECT count(*) FROM ledger"

# (query, least result): a search of 4 candidates in a generation, 4 of them, with 2 stages.
MOMENTS = {
    "the schema is being made": ("SELECT 1", 1),
    "the store is empty": ("SELECT count(*) FROM alembic_version", 1),
    "the search is launched": ("SELECT count(*) FROM search", 1),
    "the baselines are opened": (GENERATIONS, 1),
    "one baseline is scored": (EVALUATIONS, 1),
    "most baselines are scored": (EVALUATIONS, 5),
    "the baselines are closed": (TOLD, 1),
    "generation 1 is opened": (GENERATIONS, 2),
    "generation 1 is in its first stage": (EVALUATIONS, 8),
    "generation 1 is in its second stage": (EVALUATIONS, 11),
    "generation 1 is told": (TOLD, 2),
    "generation 2 is opened": (GENERATIONS, 3),
    "generation 2 is between its stages": (EVALUATIONS, 17),
    "generation 2 is told": (TOLD, 3),
    "generation 3 is in its first stage": (EVALUATIONS, 21),
    "generation 3 is told": (TOLD, 4),
    "the budget is spent": ("SELECT count(stop_reason) FROM search", 1),
    "the mean is opened": ("SELECT count(*) FROM generation WHERE kind = 'final'", 1),
    "the first look is reserved": (LEDGER, 1),
    "the last look is reserved": (LEDGER, 3),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job with stages, large enough that a poll sees what it does."""
    folder = tmp_path_factory.mktemp("job")
    tiny.write_task(folder / "task", train=100, validation=60, test=100)
    staging = {"stages": [30, 60], "keep": [2]}
    return tiny.write_job(folder, staging=staging, optimizer={"name": "cma-es", "population": 4})


@pytest.fixture(scope="module")
def finished(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the job's search that nobody disturbed."""
    database = tmp_path_factory.mktemp("undisturbed") / "store.db"
    assert evomerge_("run", job, "--store", url(database)).code == 0
    return database


@pytest.fixture(scope="module")
def undisturbed(finished: Path) -> Log:
    """What that search wrote."""
    return log(finished)


def command(job: Path, database: Path) -> list[str | Path]:
    """What a user would do after a crash: launch again if nothing was launched, else resume."""
    if count(database, "SELECT count(*) FROM search"):
        return ["resume", "tiny", "--store", url(database)]
    return ["run", job, "--store", url(database)]


def hit(job: Path, database: Path, moment: str, *signals: signal.Signals) -> Ended:
    """Run the search, or go on with it, and send its process signals at a moment."""
    sql, least = MOMENTS[moment]
    process = start(*command(job, database))
    seen = wait_for(process, lambda: database.exists() and count(database, sql) >= least)
    for number in signals:
        process.send_signal(number)
    end = ended(process)
    assert seen, f"it ended by itself: {end}"
    return end


def is_finished(database: Path) -> bool:
    """Whether the search came to its end."""
    return count(database, "SELECT count(*) FROM search WHERE state = 'finished'") == 1


def killed(job: Path, folder: Path, *moments: str) -> Path:
    """The store of a search that was killed at these moments.

    Where the search came to its end before the signal did, it is done again.
    """
    for attempt in range(5):
        database = folder / f"{attempt}.db"
        for moment in moments:
            assert hit(job, database, moment, signal.SIGKILL).code == -signal.SIGKILL
        if not is_finished(database):
            return database
    pytest.fail(f"the search is too fast to be killed when {moments[-1]}")


def resumed(job: Path, database: Path) -> Log:
    """The log of a search that is left in peace until its end."""
    end = evomerge_(*command(job, database))
    assert end.code == 0, end.err
    return log(database)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("generation 1 is in its second stage", marks=pytest.mark.slow),
        "the mean is opened",
    ],
)
def test_killed_search_resumes_to_the_same_end(
    job: Path, undisturbed: Log, tmp_path: Path, moment: str
) -> None:
    assert resumed(job, killed(job, tmp_path, moment)) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_search_killed_at_any_moment_resumes_to_the_same_end(
    job: Path, undisturbed: Log, tmp_path: Path, moment: str
) -> None:
    assert resumed(job, killed(job, tmp_path, moment)) == undisturbed


@pytest.mark.slow
def test_search_killed_twice_resumes_to_the_same_end(
    job: Path, undisturbed: Log, tmp_path: Path
) -> None:
    moments = ("generation 1 is in its first stage", "generation 3 is in its first stage")
    database = killed(job, tmp_path, *moments)
    assert resumed(job, database) == undisturbed
    assert query(database, "SELECT epoch FROM search") == [(3,)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "signals", [[signal.SIGINT], [signal.SIGINT, signal.SIGINT], [signal.SIGTERM]], ids=str
)
def test_interrupted_search_says_how_to_resume_to_the_same_end(
    job: Path, undisturbed: Log, tmp_path: Path, signals: list[signal.Signals]
) -> None:
    database = tmp_path / "a store.db"
    end = hit(job, database, "generation 1 is in its first stage", *signals)
    assert (end.code, end.out) == (130, "")
    _, _, how = end.err.rpartition("Go on with: ")
    assert "Traceback" not in end.err
    program, *arguments = shlex.split(how)
    assert program == "evomerge"
    assert evomerge_(*arguments).code == 0
    assert log(database) == undisturbed


@pytest.mark.slow
def test_search_is_resumed_by_one_process_at_a_time(
    job: Path, undisturbed: Log, tmp_path: Path
) -> None:
    database = killed(job, tmp_path, "the baselines are opened")
    first = start(*command(job, database))
    assert wait_for(first, lambda: count(database, "SELECT epoch FROM search") == 2)
    first.send_signal(signal.SIGSTOP)  # alive, and in nobody's way
    second = evomerge_(*command(job, database))
    first.send_signal(signal.SIGCONT)
    assert (second.code, second.out) == (2, "")
    assert second.err == (
        f"evomerge: search 'tiny' is being conducted by process {first.pid}: "
        "wait for it, or stop it\n"
    )
    assert ended(first).code == 0
    assert log(database) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("opened", [0, 1], ids=["before the unseal", "after the unseal"])
def test_killed_export_leaves_no_folder_and_can_be_repeated(
    finished: Path, tmp_path: Path, opened: int
) -> None:
    unseals = "SELECT at FROM ledger WHERE kind = 'unseal'"
    database, out = tmp_path / "store.db", tmp_path / "out"
    shutil.copyfile(finished, database)
    arguments = ("export", "tiny", "-o", out, "--store", url(database))
    process = start(*arguments)
    partial = tmp_path / f".out.{process.pid}.partial"
    assert wait_for(process, lambda: partial.exists() and len(query(database, unseals)) >= opened)
    process.kill()
    assert ended(process).code == -signal.SIGKILL
    assert not out.exists()
    first = query(database, unseals)
    assert len(first) >= opened

    again = evomerge_(*arguments, "--json")
    assert again.code == 0
    assert (out / "model.safetensors").exists()
    assert not partial.exists()
    ((at,),) = query(database, unseals)
    assert first in ([], [(at,)])  # a begun opening is the same opening
    (seal,) = json.loads(again.out)["seal"].values()
    assert (seal["opened_at"], seal["opened_before"]) == (at, 0)
