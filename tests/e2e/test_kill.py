"""kill -9, Ctrl-C or SIGTERM: the search ends as if nothing had happened.

The processes here are those that a user starts, hit at moments that a poll sees; `tests/faults`
hits them at every commit.
"""

import shlex
import signal
from pathlib import Path

import pytest

from tests import tiny
from tests.running import Ended, Log, count, ended, evomerge_, log, start, url, wait_for

# (query, least result): a search of 4 candidates in a generation, 3 of them, with 2 stages.
MOMENTS = {
    "generation 1 is in its first stage": ("SELECT count(*) FROM evaluation", 8),
    "the mean is opened": ("SELECT count(*) FROM generation WHERE kind = 'final'", 1),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job with stages, large enough that a poll sees what it does."""
    folder = tmp_path_factory.mktemp("job")
    tiny.write_task(folder / "task", train=100, validation=60, test=100)
    staging = {"stages": [30, 60], "keep": [2]}
    return tiny.write_job(folder, staging=staging, optimizer={"name": "cma-es", "population": 4})


@pytest.fixture(scope="module")
def undisturbed(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Log:
    """What the job's search writes when nobody disturbs it."""
    database = tmp_path_factory.mktemp("undisturbed") / "store.db"
    assert evomerge_("run", job, "--store", url(database)).code == 0
    return log(database)


def command(job: Path, database: Path) -> list[str | Path]:
    """What a user would do after a crash: launch again if nothing was launched, else resume."""
    if count(database, "SELECT count(*) FROM search"):
        return ["resume", "tiny", "--store", url(database)]
    return ["run", job, "--store", url(database)]


def hit(job: Path, database: Path, moment: str, *signals: signal.Signals) -> Ended:
    """Run the search and send its process signals at a moment."""
    sql, least = MOMENTS[moment]
    process = start(*command(job, database))
    seen = wait_for(process, lambda: database.exists() and count(database, sql) >= least)
    for number in signals:
        process.send_signal(number)
    end = ended(process)
    assert seen, f"it ended by itself: {end}"
    return end


def killed(job: Path, folder: Path, moment: str) -> Path:
    """The store of a search that was killed at this moment.

    Where the search came to its end before the signal did, it is done again.
    """
    for attempt in range(5):
        database = folder / f"{attempt}.db"
        assert hit(job, database, moment, signal.SIGKILL).code == -signal.SIGKILL
        if not count(database, "SELECT count(*) FROM search WHERE state = 'finished'"):
            return database
    pytest.fail(f"the search is too fast to be killed when {moment}")


@pytest.mark.slow
def test_killed_search_resumes_to_the_same_end(job: Path, undisturbed: Log, tmp_path: Path) -> None:
    database = killed(job, tmp_path, "the mean is opened")
    end = evomerge_(*command(job, database))
    assert end.code == 0, end.err
    assert log(database) == undisturbed


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
