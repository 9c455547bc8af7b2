"""A copy of a store: of one moment, exact, and there complete or not at all."""

import contextlib
import itertools
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest
from sqlalchemy import event, func, insert, select, text

from evomerge.errors import StoreError
from evomerge.store import Coordinator, Queue, Store, check, copy, schema
from evomerge.store.backend import WRITES
from evomerge.store.database import connect
from tests.golden import golden, quiet, upgraded
from tests.running import query, url


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three searches, with a server's tables in use. Shared by all: copy it before
    anything is written to it."""
    found = upgraded(tmp_path_factory.mktemp("whole"))
    with Store(found.url) as opened:
        Queue(opened).submit("search", "ü", {"k": 1}, by="ada", webhook="https://x/")
        Queue(opened).stop("stopped", "ada")
        with opened.database.write() as db:
            values = {"evaluation_id": 1, "task": "ja_list_ops", "position": 0, "reply": "さん\n"}
            db.execute(insert(schema.sample), values)
    return found.store


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    """A store of the test's own."""
    return Path(shutil.copyfile(whole, tmp_path / "store.db"))


def everything(store: str) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every table, in the order of their keys."""
    found = {}
    with Store(store) as opened, opened.database.read() as db:
        for table in schema.metadata.sorted_tables:
            rows = select(table).order_by(*table.primary_key.columns)
            found[table.name] = [tuple(row) for row in db.execute(rows)]
    return found


def test_copy_to_a_file_is_the_same_store(store: Path, tmp_path: Path) -> None:
    found = copy(url(store), str(tmp_path / "copy.db"), quiet)
    assert everything(found.url) == everything(url(store))
    assert (found.schema, found.rows["candidate"]) == (schema.VERSION, 39)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.db", "store.db"]


@pytest.mark.slow
def test_store_moves_to_postgres_and_back(store: Path, tmp_path: Path, postgres_url: str) -> None:
    before = everything(url(store))
    copy(url(store), postgres_url, quiet)
    assert everything(postgres_url) == before
    copy(postgres_url, url(tmp_path / "back.db"), quiet)
    assert everything(url(tmp_path / "back.db")) == before


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_search_goes_on_in_a_copy(
    backend: str, store: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    own = url(tmp_path / "copy.db")
    target = own if backend == "sqlite" else request.getfixturevalue("postgres_url")
    copy(url(store), target, quiet)
    with Store(target) as opened, Coordinator.take_over(opened, "stopped") as held:
        held.log("note", "in the copy")  # its id follows those that were copied
        assert held.wished() is not None
        assert Queue(opened).submit("search", "next", {}, by="ada").id == 2
    with Store(target) as opened:
        assert opened.search("stopped").epoch == 2
    assert check(target, quiet).violations == ()


def test_nobody_conducts_a_search_of_the_copy(store: Path, tmp_path: Path) -> None:
    with Store(url(store)) as opened, Coordinator.take_over(opened, "stopped"):
        copy(url(store), url(tmp_path / "copy.db"), quiet)
        with Store(url(tmp_path / "copy.db")) as theirs:
            assert theirs.search("stopped").state == "stopped"
            assert opened.search("stopped").state == "running"


@pytest.mark.slow
def test_copy_is_of_one_moment(store: Path, tmp_path: Path) -> None:
    """Another process writes between the tables that are read."""
    writes = threading.Event()

    def written(done: int, of: int) -> None:
        if not writes.is_set():
            writes.set()
            with Store(url(store)) as opened, Coordinator.take_over(opened, "stopped") as held:
                held.log("note", "while it was copied")
                held.stop("enough")

    copy(url(store), url(tmp_path / "copy.db"), written)
    assert query(store, "SELECT count(*) FROM event WHERE kind = 'note'") == [(1,)]
    assert query(tmp_path / "copy.db", "SELECT count(*) FROM event WHERE kind = 'note'") == [(0,)]
    assert check(url(tmp_path / "copy.db"), quiet).violations == ()


def test_target_that_is_there_already_is_refused(store: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for target in ("store.db", "mine.txt"):
        with pytest.raises(StoreError, match="is there already: name a new file"):
            copy(url(store), str(tmp_path / target), quiet)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert check(url(store), quiet).violations == ()


def test_database_with_tables_is_refused(store: Path, postgres_url: str) -> None:
    engine = connect(postgres_url).execution_options(**{WRITES: True})
    with engine.begin() as db:
        db.execute(text("CREATE TABLE recipes (id INTEGER)"))
    with pytest.raises(StoreError, match="is not empty: name a new file or an empty database"):
        copy(url(store), postgres_url, quiet)
    with engine.begin() as db:
        tables = text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        assert db.execute(tables).scalars().all() == ["recipes"]
    engine.dispose()


def test_missing_store_and_missing_folder_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no such store"):
        copy(url(tmp_path / "none.db"), str(tmp_path / "copy.db"), quiet)
    with pytest.raises(StoreError, match=r"no folder '.*missing': create it"):
        copy(url(store), str(tmp_path / "missing" / "copy.db"), quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["store.db"]


def test_copy_that_fails_leaves_nothing(store: Path, tmp_path: Path) -> None:
    def full(done: int, of: int) -> None:
        if done > of / 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match=r"is not copied to '.*copy\.db': No space left"):
        copy(url(store), str(tmp_path / "copy.db"), full)
    assert [path.name for path in tmp_path.iterdir()] == ["store.db"]


def test_copy_whose_log_does_not_come_into_the_file_is_refused(store: Path, tmp_path: Path) -> None:
    """As on a disk that is full by then; here somebody reads what is being written."""
    readers: list[sqlite3.Connection] = []

    def read(done: int, of: int) -> None:
        if not readers:
            (unfinished,) = tmp_path.glob(".copy.db.*.unfinished")
            readers.append(sqlite3.connect(unfinished))
            readers[0].execute("BEGIN")
            readers[0].execute("SELECT * FROM sqlite_master").fetchall()

    with pytest.raises(
        StoreError, match=r"copy\.db' is not written to its end: make room on its d"
    ):
        copy(url(store), str(tmp_path / "copy.db"), read)
    readers[0].close()
    assert [path.name for path in tmp_path.iterdir()] == ["store.db"]


@pytest.mark.slow
def test_copy_that_fails_leaves_an_empty_database_empty(store: Path, postgres_url: str) -> None:
    def full(done: int, of: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left on device"):
        copy(url(store), postgres_url, full)
    copy(url(store), postgres_url, quiet)


def test_copy_that_came_out_otherwise_is_refused(store: Path, tmp_path: Path) -> None:
    """What arrives is read back: here a mean is changed on its way to the disk."""
    from sqlalchemy import Engine

    def spoil(
        connection, cursor, statement, parameters, context, executemany
    ):  # as SQLAlchemy calls it
        if statement.startswith("INSERT INTO model"):
            statement = statement.replace("INSERT INTO model", "INSERT OR IGNORE INTO model")
            parameters = parameters[:1]
        return statement, parameters

    event.listen(Engine, "before_cursor_execute", spoil, retval=True)
    try:
        with pytest.raises(StoreError, match="table 'model' came out otherwise"):
            copy(url(store), str(tmp_path / "copy.db"), quiet)
    finally:
        event.remove(Engine, "before_cursor_execute", spoil)
    assert not (tmp_path / "copy.db").exists()


def test_older_store_keeps_its_schema(tmp_path: Path) -> None:
    old = golden("002", tmp_path / "golden")
    found = copy(old.url, str(tmp_path / "copy.db"), quiet)
    assert found.schema == "002"
    for table in ("search", "candidate", "score", "ledger"):
        columns = ", ".join(sorted(r[0] for r in query(
            old.store, f"SELECT name FROM pragma_table_info('{table}')"
        )))  # fmt: skip
        rows = f"SELECT {columns} FROM {table} ORDER BY id"
        assert query(tmp_path / "copy.db", rows) == query(old.store, rows)


@pytest.mark.slow
def test_seed_of_any_size_and_text_of_any_kind_are_copied(
    store: Path, tmp_path: Path, postgres_url: str
) -> None:
    with contextlib.closing(sqlite3.connect(store)) as db, db:
        db.execute("UPDATE search SET seed = ?, stop_reason = ?", (2**62, "“ü” 日本\n"))
    copy(url(store), postgres_url, quiet)
    copy(postgres_url, str(tmp_path / "back.db"), quiet)
    assert everything(url(tmp_path / "back.db")) == everything(url(store))


@pytest.mark.slow
def test_many_rows_are_copied_in_batches(store: Path, tmp_path: Path) -> None:
    event_ = schema.event
    engine = connect(url(store)).execution_options(**{WRITES: True})
    with engine.begin() as db:
        row = {"search_id": 1, "at": "2026", "kind": "note"}
        db.execute(insert(event_), [{**row, "text": str(i)} for i in range(1_234)])
    engine.dispose()
    told: list[tuple[int, int]] = []
    found = copy(url(store), str(tmp_path / "copy.db"), lambda *done: told.append(done))
    assert found.rows["event"] == 1_237
    assert max(b[0] - a[0] for a, b in itertools.pairwise(told)) <= 500
    with Store(found.url) as opened, opened.database.read() as db:
        assert db.execute(select(func.count()).select_from(event_)).scalar() == 1_237
