"""PostgreSQL that goes away: connections are cut, the server is stopped, an answer is lost. The
process waits, and goes on as if nothing had happened."""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

import psycopg
import pytest

from evomerge.seeds import generator
from tests.faults.conftest import Databases
from tests.faults.driver import AtWrite, one_by_one, watch_writes
from tests.faults.searching import assert_refused, assert_whole, conduct, finish, rows, sized
from tests.postgres import Server
from tests.running import Log, log

pytestmark = pytest.mark.faults

LAUNCH = 3  # the write that launches a search; the first two make the store and try it out


@dataclass(frozen=True)
class LostAnswer:
    """The process loses its connection while PostgreSQL says that its n-th write is committed;
    results are written one by one."""

    number: int

    def __call__(self) -> None:
        commit, seen, lost = psycopg.Connection.commit, 0, False

        def count(moment: str) -> None:
            nonlocal seen, lost
            seen += moment == "begun"
            lost = lost or (seen, moment) == (self.number, "written")

        def commit_unheard(connection: "psycopg.Connection[object]") -> None:
            nonlocal lost
            commit(connection)
            if lost:
                lost = False
                connection.close()
                raise psycopg.OperationalError("the connection is lost")

        psycopg.Connection.commit = commit_unheard
        one_by_one()
        watch_writes(count)


@pytest.fixture(scope="module")
def stores(postgres: Server) -> Databases:
    """Of PostgreSQL alone."""
    return Databases(postgres)


def test_search_whose_commits_are_not_confirmed_comes_to_the_same_end(
    job: Path, stores: Databases, undisturbed: Log
) -> None:
    for number in itertools.count(1, sized(1, 6)):
        store = stores.fresh()
        end = conduct(job, store, LostAnswer(number)).end()
        if number < LAUNCH and end.code:  # nothing is conducted yet that would have to go on
            assert_refused(end, "not written", "try again")
            finish(job, store)
            continue
        assert end.code == 0, f"write {number}: {end.err}"
        assert log(store) == undisturbed, f"write {number}"
        assert_whole(store)
        if "answers again" not in end.err:  # it has no such write
            break
    assert number > 40


def test_search_whose_connections_are_cut_at_random_moments_comes_to_the_same_end(
    job: Path, stores: Databases, undisturbed: Log, postgres: Server
) -> None:
    random, cuts = generator(3, "moments"), 0
    while cuts < sized(100, 20):
        store = stores.fresh()
        process = conduct(job, store)
        while process.runs and not rows(store, "SELECT id FROM search"):
            time.sleep(0.01)
        while process.runs:
            time.sleep(random.uniform(0, 0.3))
            cuts += cut(postgres, store)
        end = process.end()
        assert end.code == 0, end.err
        assert rows(store, "SELECT epoch, state FROM search") == [(1, "finished")]
        assert log(store) == undisturbed
        assert_whole(store)


def cut(server: Server, store: str) -> int:
    """Cut every connection to a store; gives how many there were."""
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        found = connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
            [store.rpartition("/")[2]],
        ).fetchall()
    return len(found)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_search_goes_on_when_the_server_has_been_away(
    job: Path, stores: Databases, undisturbed: Log, postgres: Server, mode: str
) -> None:
    store = stores.fresh()
    process = conduct(job, store, AtWrite(24, "begun", SIGSTOP))
    assert process.stops()
    postgres.stop(mode)
    process.send(SIGCONT)
    time.sleep(sized(60, 5))
    assert process.runs
    postgres.start()
    end = process.end()
    assert end.code == 0, end.err
    assert "answers again" in end.err
    assert log(store) == undisturbed
    assert rows(store, "SELECT epoch FROM search") == [(1,)]
    assert_whole(store)


def test_search_that_ended_while_the_server_was_away_resumes_to_the_same_end(
    job: Path, stores: Databases, undisturbed: Log, postgres: Server
) -> None:
    store = stores.fresh()
    process = conduct(job, store, AtWrite(24, "written", SIGSTOP))
    assert process.stops()
    postgres.stop("immediate")
    process.send(SIGKILL)
    process.end()
    postgres.start()
    finish(job, store)
    assert log(store) == undisturbed
