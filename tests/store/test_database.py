"""Opening a database: what is refused, and how it is set up."""

import contextlib
import sqlite3
import threading
from pathlib import Path

import pytest
from sqlalchemy import text

from evomerge.errors import StoreError
from evomerge.store import Store
from evomerge.store.database import Database


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a database may be."""
    return tmp_path / "store.db"


def execute(file: Path, sql: str) -> None:
    """Behind the store's back."""
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(sql)


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:store.db", "store 'sqlite:store.db' is no URL: write a file's path, or postgresq"),
        ("", "store '' is no URL"),
        ("mysql://host/db?password=secret", r"'mysql://host/db\?password=\*\*\*' is neither"),
        ("mysql://me:secret@host/db", r"'mysql://me:\*\*\*@host/db' is neither a SQLite file nor"),
        ("postgresql+asyncpg://host/db", "is neither a SQLite file nor PostgreSQL"),
        ("postgresql://host", "is neither a SQLite file nor PostgreSQL"),
        ("sqlite://", "is neither a SQLite file nor PostgreSQL"),
        ("sqlite:///:memory:", "is neither a SQLite file nor PostgreSQL"),
    ],
)
def test_url_that_names_no_store_is_refused(url: str, message: str, create: bool) -> None:
    with pytest.raises(StoreError, match=message):
        Store(url, create)


@pytest.mark.parametrize("path", ["store.db", "./store.db", "{folder}/store.db", "~/store.db"])
def test_the_path_of_a_file_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    given = path.format(folder=tmp_path)
    with Store(given, create=True) as made:
        assert made.database.path == tmp_path / "store.db"
    assert (tmp_path / "store.db").is_file()
    with Store(f"sqlite:///{tmp_path}/store.db") as store:
        assert store.searches() == []


def test_missing_folder_is_refused(file: Path) -> None:
    with pytest.raises(StoreError, match=r"no folder '.*missing': create it"):
        Store(f"sqlite:///{file.parent}/missing/store.db", create=True)
    assert list(file.parent.iterdir()) == []


def test_missing_file_is_not_made_unless_asked_for(file: Path) -> None:
    with pytest.raises(StoreError, match="there is no such file: check --store"):
        Store(f"sqlite:///{file}")
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize("create", [True, False])
def test_database_of_something_else_is_refused_and_left_alone(file: Path, create: bool) -> None:
    execute(file, "CREATE TABLE recipes (id INTEGER)")
    with pytest.raises(StoreError, match="holds the tables of something else: name another"):
        Store(f"sqlite:///{file}", create)
    with contextlib.closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("recipes",)]


@pytest.mark.parametrize("create", [True, False])
def test_file_that_is_no_database_is_refused_and_left_alone(file: Path, create: bool) -> None:
    file.write_text("name: not-a-store\n" * 100)
    with pytest.raises(StoreError, match="cannot be opened: file is not a database: name"):
        Store(f"sqlite:///{file}", create)
    assert file.read_text() == "name: not-a-store\n" * 100


def test_folder_in_place_of_the_file_is_refused(file: Path) -> None:
    file.mkdir()
    with pytest.raises(StoreError, match="cannot be opened: unable to open database file"):
        Store(f"sqlite:///{file}", create=True)


@pytest.mark.parametrize("create", [True, False])
def test_newer_schema_is_refused(file: Path, create: bool) -> None:
    Store(f"sqlite:///{file}", create=True).database.close()
    execute(file, "UPDATE alembic_version SET version_num = '999'")
    with pytest.raises(StoreError, match=r"has schema 999, this evomerge reads .*: use the evom"):
        Store(f"sqlite:///{file}", create)


@pytest.mark.parametrize(
    ("pragma", "value"),
    [("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1), ("busy_timeout", 30_000)],
)
def test_connection_is_durable_and_patient(file: Path, pragma: str, value: object) -> None:
    with Store(f"sqlite:///{file}", create=True) as store, store.database.read() as db:
        assert db.execute(text(f"PRAGMA {pragma}")).scalar() == value


def test_write_that_raises_leaves_nothing(file: Path) -> None:
    def interrupted(store: Store) -> None:
        with store.database.write() as db:
            db.execute(text("INSERT INTO alembic_version VALUES ('other')"))
            raise KeyboardInterrupt

    with Store(f"sqlite:///{file}", create=True) as store:
        with pytest.raises(KeyboardInterrupt):
            interrupted(store)
        with store.database.read() as db:
            assert db.execute(text("SELECT count(*) FROM alembic_version")).scalar() == 1


def test_reader_sees_one_state_while_another_writes(file: Path) -> None:
    count = text("SELECT count(*) FROM alembic_version")
    with Store(f"sqlite:///{file}", create=True) as store, store.database.read() as reader:
        assert reader.execute(count).scalar() == 1
        with store.database.write() as writer:
            writer.execute(text("INSERT INTO alembic_version VALUES ('other')"))
        assert reader.execute(count).scalar() == 1
        with store.database.read() as later:
            assert later.execute(count).scalar() == 2


def test_store_is_made_once_by_many_at_once(file: Path) -> None:
    failures: list[BaseException] = []
    barrier = threading.Barrier(4)

    def make() -> None:
        barrier.wait()
        try:
            Database(f"sqlite:///{file}", create=True).close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with Store(f"sqlite:///{file}") as store:
        assert store.searches() == []
