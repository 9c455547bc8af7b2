"""One process at a time works off a store's queue."""

import subprocess
import sys

import pytest
from psycopg import sql

from evomerge.store import Queue, Store
from tests.postgres import Server

_LEADER = """
import sys, time
from evomerge.store import Queue, Store
with Store(sys.argv[1]) as store:
    led = Queue(store).lead()
    print(led is not None, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_one_process_leads_until_it_lets_go_or_dies(fresh_url: str) -> None:
    with Store(fresh_url, create=True) as store, Store(fresh_url) as second:
        command = [sys.executable, "-c", _LEADER, fresh_url]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "True\n"
            assert Queue(store).lead() is None
        finally:
            other.kill()
            other.communicate()
        while (leadership := Queue(store).lead()) is None:
            pass  # a server needs a moment to notice
        assert leadership.is_held()
        assert Queue(second).lead() is None
        leadership.release()
        leadership.release()
        again = Queue(second).lead()
        assert again is not None
        again.release()
        assert not again.is_held()


def test_leadership_goes_with_its_connection(postgres: Server) -> None:
    store_url = postgres.store()
    with Store(store_url) as store, Store(store_url) as second:
        leadership = Queue(store).lead()
        assert leadership is not None
        postgres.execute(
            sql.SQL(
                "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_database "
                "ON pg_database.oid = database WHERE locktype = 'advisory' AND datname = {}"
            ).format(sql.Literal(store_url.rpartition("/")[2]))
        )
        assert not leadership.is_held()
        leadership.release()
        while (taken := Queue(second).lead()) is None:
            pass
        taken.release()
