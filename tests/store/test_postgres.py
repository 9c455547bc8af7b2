"""PostgreSQL: what is refused, what is never shown, and a server that goes away and comes back."""

import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from psycopg import sql
from sqlalchemy import Connection, insert, text
from sqlalchemy.exc import DBAPIError

from evomerge.errors import StoreError, StoreUnavailable
from evomerge.store import Coordinator, Store, database, exists, probe, schema
from evomerge.store import postgres as backend
from evomerge.store.database import Database
from tests.postgres import Server


@pytest.fixture
def store(postgres: Server) -> Iterator[Store]:
    """With a search 'one' that nobody conducts."""
    with Store(postgres.store(), create=True) as opened:
        Coordinator.launch(opened, "one", 7, {}, {}, [], []).close()
        yield opened


def test_migrated_schema_equals_the_tables(store: Store) -> None:
    with store.database.read() as db:
        context = MigrationContext.configure(db, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []


def test_store_is_made_in_an_empty_database_when_asked_for(postgres_url: str) -> None:
    assert not exists(postgres_url)
    with pytest.raises(StoreError, match=r"is empty: check --store, or launch a search"):
        Store(postgres_url)
    assert not exists(postgres_url)
    with Store(postgres_url.replace("postgresql:", "postgresql+psycopg:"), create=True) as made:
        assert made.searches() == []
    assert exists(postgres_url)


def test_store_is_made_once_by_many_at_once(postgres_url: str) -> None:
    failures: list[BaseException] = []
    barrier = threading.Barrier(3)

    def make() -> None:
        barrier.wait()
        try:
            Database(postgres_url, create=True).close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with Store(postgres_url) as made:
        assert made.searches() == []


@pytest.mark.parametrize("create", [True, False])
def test_database_of_something_else_is_refused_and_left_alone(
    postgres: Server, postgres_url: str, create: bool
) -> None:
    name = postgres_url.rpartition("/")[2]
    postgres.execute(sql.SQL("CREATE TABLE recipes (id INTEGER)"), name)
    with pytest.raises(StoreError, match="holds the tables of something else: name another"):
        Store(postgres_url, create)
    tables = sql.SQL("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    assert postgres.execute(tables, name) == [("recipes",)]


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("127.0.0.1:1/db", "cannot be opened: .*refused.*: see whether the server is up"),
        ("127.0.0.1:{port}/missing", 'cannot be opened: .*database "missing" does not exist'),
    ],
)
def test_what_cannot_be_opened_is_told_in_a_line_without_the_password(
    postgres: Server, where: str, message: str, create: bool
) -> None:
    url = f"postgresql://postgres:geheim@{where.format(port=postgres.port)}"
    with pytest.raises(StoreError, match=message) as caught:
        Store(url, create)
    assert "geheim" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_password_is_never_shown(store: Store) -> None:
    url = store.url.replace("postgres@", "postgres:geheim@")
    with Store(url) as opened:
        assert opened.url == url
        for refused in (lambda: opened.search("two"), lambda: opened.refuse_taken("one")):
            with pytest.raises(StoreError, match=r"postgres:\*\*\*@") as caught:
                refused()
            assert "geheim" not in str(caught.value)


def test_server_that_is_too_old_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_OLDEST", 99)
    with pytest.raises(StoreError, match=r"is PostgreSQL \d\d: use 99 or newer"):
        Store(store.url)


def test_missing_driver_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match=r"needs psycopg: pip install 'evomerge\[postgres\]'"):
        Store("postgresql://host/db")


def test_role_that_may_only_read_does_and_is_refused_for_writing_at_once(
    postgres: Server, store: Store
) -> None:
    name = store.url.rpartition("/")[2]
    postgres.execute(
        sql.SQL(
            "DO $$ BEGIN CREATE ROLE reader LOGIN; EXCEPTION WHEN duplicate_object THEN END $$;"
            "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader"
        ),
        name,
    )
    url = postgres.url(name, "reader")
    with Store(url) as opened:
        assert [row.name for row in opened.searches()] == ["one"]
        with pytest.raises(
            StoreError, match=r"GRANT SELECT, INSERT, UPDATE ON .*candidate.* TO re"
        ):
            Coordinator.take_over(opened, "one")
    with pytest.raises(StoreError, match="is not yours to write"):
        Store(url, create=True)
    granted = "GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO reader"
    postgres.execute(sql.SQL(granted), name)
    with pytest.raises(StoreError, match=r"GRANT USAGE ON SEQUENCE .*search_id_seq, .* TO reader"):
        Store(url, create=True)
    assert store.search("one").epoch == 1
    usage = "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO reader"
    postgres.execute(sql.SQL(usage), name)
    with Store(url, create=True) as opened:
        Coordinator.launch(opened, "two", 7, {}, {}, [], []).close()


def test_read_only_server_is_refused_for_writing_at_once(store: Store) -> None:
    url = f"{store.url}?options=-c%20default_transaction_read_only%3Don"
    with Store(url) as opened, pytest.raises(StoreError, match=r"read-only .*: name a server that"):
        Coordinator.take_over(opened, "one")


def test_place_that_cannot_be_written_is_refused_before_there_is_a_store(
    postgres_url: str,
) -> None:
    probe(postgres_url)
    assert not exists(postgres_url)
    with pytest.raises(StoreError, match=r"read-only .*: name a server that"):
        probe(f"{postgres_url}?options=-c%20default_transaction_read_only%3Don")


def test_probe_changes_nothing(store: Store) -> None:
    probe(store.url)
    store.database.probe()
    assert [row.id for row in store.searches()] == [1]
    with Coordinator.launch(store, "two", 7, {}, {}, [], []) as coordinator:
        assert coordinator.search.id == 2


def terminate(db: Connection) -> None:
    """End the connection from the server's side, as an administrator does."""
    db.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))


def test_transaction_whose_connection_is_terminated_is_done_again(store: Store) -> None:
    told: list[str] = []
    with Coordinator.take_over(store, "one", told.append) as coordinator:
        attempts = 0

        def work(db: Connection) -> None:
            nonlocal attempts
            attempts += 1
            row = {"search_id": 1, "at": "", "kind": "note", "text": f"attempt {attempts}"}
            db.execute(insert(schema.event), row)
            if attempts == 1:
                terminate(db)

        coordinator._lease.write(work)
    assert [event[2] for event in store.events(1)] == ["attempt 2"]
    assert "terminating connection" in told[0]
    assert told[0].endswith(": try again: evomerge does, for up to 10 minutes")
    assert told[1].endswith("answers again")


def test_read_after_connections_were_terminated_finds_new_ones(
    postgres: Server, store: Store
) -> None:
    assert store.events(1) == []
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    postgres.execute(
        sql.SQL(others + " AND datname = current_database()"), store.url.split("/")[-1]
    )
    assert store.events(1) == []


def test_stopped_server_is_waited_for_by_reads_and_writes(postgres: Server, store: Store) -> None:
    told: list[str] = []
    with Coordinator.take_over(store, "one", told.append) as coordinator:
        for act in (lambda: coordinator.log("note", "text"), lambda: store.events(1)):
            told.clear()
            postgres.stop()
            thread = threading.Thread(target=act)
            thread.start()
            try:
                while not told:
                    time.sleep(0.01)
                assert thread.is_alive()
            finally:
                postgres.start()
            thread.join()
            assert told[-1].endswith("answers again")
        coordinator.stop("enough")
    assert [event[2] for event in store.events(1)] == ["text"]


@pytest.mark.slow
def test_server_that_stays_away_is_given_up_in_the_end(
    postgres: Server, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_PATIENCE", 0.3)
    told: list[str] = []
    coordinator = Coordinator.take_over(store, "one", told.append)
    postgres.stop()
    try:
        with pytest.raises(StoreUnavailable, match=r"not written: .*refused: try again$") as caught:
            coordinator.log("note", "text")
        coordinator.close()  # gives nothing back, and says nothing
    finally:
        postgres.start()
    assert caught.value.exit_code == 1
    assert len(told) == 1
    assert store.search("one").state == "stopped"


def test_reader_who_conducts_nothing_is_told_at_once(postgres: Server, store: Store) -> None:
    with Store(store.url) as reader:
        postgres.stop()
        try:
            with pytest.raises(StoreUnavailable, match="not read: "):
                reader.searches()
        finally:
            postgres.start()


def test_stopped_server_is_waited_for_by_whoever_is_patient_from_the_opening_on(
    postgres: Server, store: Store
) -> None:
    told: list[str] = []
    found: list[str] = []

    def read() -> None:
        with Store(store.url, tell=told.append) as reader:
            found.extend(row.name for row in reader.searches())

    postgres.stop()
    thread = threading.Thread(target=read)
    thread.start()
    try:
        while not told:
            time.sleep(0.01)
    finally:
        postgres.start()
    thread.join()
    assert "not opened: " in told[0]
    assert told[-1].endswith("answers again")
    assert found == ["one"]


@pytest.mark.slow
def test_server_that_does_not_answer_is_away() -> None:
    """As when the network is cut: it takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        engine = database.connect(f"postgresql://me@127.0.0.1:{port}/db?connect_timeout=2")
        with pytest.raises(DBAPIError, match="timeout") as caught:
            engine.connect()
    assert backend.Postgres(engine.url).is_away(caught.value)


def test_settings_of_the_url_win(store: Store) -> None:
    with Store(f"{store.url}?application_name=mine") as opened, opened.database.read() as db:
        assert db.execute(text("SHOW application_name")).scalar() == "mine"


def test_who_writes_may_be_idle_for_a_minute_and_who_reads_for_longer(store: Store) -> None:
    idle = text("SHOW idle_in_transaction_session_timeout")
    with store.database.read() as db:
        assert db.execute(idle).scalar() == "15min"
    with store.database.write() as db:
        assert db.execute(idle).scalar() == "1min"


@pytest.mark.parametrize("spoiled", ["writable", "link", "file"])
def test_lock_folder_that_others_may_write_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoiled: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"evomerge-{os.geteuid()}"
    if spoiled == "writable":
        folder.mkdir()
        folder.chmod(0o777)
    elif spoiled == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.touch()
    with pytest.raises(StoreError, match="set TMPDIR"):
        Coordinator.take_over(store, "one")
