"""Stores of every earlier version are brought up to date, and lose nothing by it."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from evomerge.errors import SearchBusy, StoreError
from evomerge.store import Coordinator, Store, check, copy, migrations, schema, upgrade
from evomerge.store.backend import WRITES
from evomerge.store.database import connect, version_of
from tests.golden import SCHEMAS, Golden, golden, quiet
from tests.running import evomerge_, query, url


@pytest.fixture(params=SCHEMAS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Golden:
    """A store of an earlier version."""
    return golden(request.param, tmp_path / "golden")


@pytest.fixture
def oldest(tmp_path: Path) -> Golden:
    """The store of the first version."""
    return golden(SCHEMAS[0], tmp_path / "golden")


def test_golden_stores_are_of_all_earlier_schemas() -> None:
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
    revisions = sorted(script.revision for script in scripts.walk_revisions())
    assert revisions == [*SCHEMAS, schema.VERSION]
    assert scripts.get_heads() == [schema.VERSION]


@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_migrated_schema_equals_the_tables(
    backend: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    own = url(tmp_path / "store.db")
    store = own if backend == "sqlite" else request.getfixturevalue("postgres_url")
    with Store(store, create=True) as opened, opened.database.read() as db:
        context = MigrationContext.configure(db, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []


def says_the_same(found: Golden, store: str, folder: Path) -> None:
    """That a store is whole, and exports what the version that wrote it exported."""
    checked = check(store, quiet)
    assert (checked.violations, checked.notes) == ((), ())
    with Store(store) as opened:
        states = [(row.name, row.state) for row in opened.searches()]
        assert states == [("finished", "finished"), ("stopped", "stopped"), ("failed", "failed")]
        (row, *_) = opened.searches()
        assert row.verdict is not None
        report = opened.report(row.verdict["winner"])
    assert report == found.report
    end = evomerge_("export", "finished", "-o", folder, "--recipe-only", "--store", store)
    assert end.code == 0, end.err
    assert (folder / "mergekit_config.yml").read_text() == found.recipe


@pytest.mark.slow
def test_older_store_is_upgraded_and_says_the_same(old: Golden, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"evomerge db upgrade --store {old.url}"):
        Store(old.url)
    found = upgrade(old.url, quiet)
    assert found.copy == f"{old.store}.schema-{found.schema}"
    says_the_same(old, old.url, tmp_path / "recipe")
    assert upgrade(old.url, quiet).copy is None
    assert evomerge_("ls", "--store", old.url).code == 0
    for name in ("finished", "stopped", "failed"):
        assert evomerge_("show", name, "--store", old.url).code == 0
    with pytest.raises(StoreError, match=f"schema {found.schema}"):
        Store(url(Path(found.copy)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "version", ["001", *(pytest.param(s, marks=pytest.mark.slow) for s in SCHEMAS[1:])]
)
def test_older_store_is_moved_to_postgres_and_upgraded_there(
    version: str, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old = golden(version, tmp_path / "golden")
    before = copy(old.url, postgres_url, quiet).schema
    found = upgrade(postgres_url, quiet)
    assert found.schema == before
    assert Path(found.copy or "").parent == tmp_path
    says_the_same(old, postgres_url, tmp_path / "recipe")
    again = tmp_path / "again.db"  # the copy is of the old schema, and can be upgraded in its turn
    copy(url(Path(found.copy or "")), str(again), quiet)
    upgrade(url(again), quiet)
    says_the_same(old, url(again), tmp_path / "recipe2")


def test_earlier_copy_is_kept(oldest: Golden) -> None:
    earlier = oldest.store.with_name("store.db.schema-001")
    earlier.write_text("of an upgrade that did not succeed")
    assert upgrade(oldest.url, quiet).copy == f"{earlier}.2"
    assert earlier.read_text() == "of an upgrade that did not succeed"


def test_newer_store_is_refused(oldest: Golden) -> None:
    engine = connect(oldest.url).execution_options(**{WRITES: True})
    with engine.begin() as db:
        db.execute(text("UPDATE alembic_version SET version_num = '999'"))
    engine.dispose()
    with pytest.raises(StoreError, match="schema 999"):
        Store(oldest.url)
    for refuse in (
        lambda: upgrade(oldest.url, quiet),
        lambda: copy(oldest.url, f"{oldest.store}.copy", quiet),
    ):
        with pytest.raises(StoreError, match=r"schema 999.*: use the evomerge that wrote it"):
            refuse()


def test_missing_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no such store"):
        upgrade(url(tmp_path / "none.db"), quiet)
    assert list(tmp_path.iterdir()) == []


def test_store_is_not_upgraded_under_a_search(oldest: Golden) -> None:
    lock = oldest.store.with_name("store.db.stopped.lock")  # as versions before 004 held searches
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    os.write(descriptor, b"4321\n")
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(SearchBusy, match="search 'stopped' is being conducted by process 4321"):
            upgrade(oldest.url, quiet)
        assert schema_of(oldest) == "001"
    finally:
        os.close(descriptor)
    assert upgrade(oldest.url, quiet).schema == "001"


@pytest.mark.slow
def test_store_is_not_upgraded_under_a_lease(
    oldest: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the newest schema, as a version that has a newer one will meet it."""
    upgrade(oldest.url, quiet)
    monkeypatch.setattr("evomerge.store.upgrading.VERSION", "999")
    with Store(oldest.url) as store, Coordinator.take_over(store, "stopped"):
        who = f"by process {os.getpid()} on host "
        with pytest.raises(SearchBusy, match=f"search 'stopped' is being conducted {who}"):
            upgrade(oldest.url, quiet)
    assert upgrade(oldest.url, quiet).copy == f"{oldest.store}.schema-{schema.VERSION}"


def schema_of(found: Golden) -> str:
    """The version that a store says it has."""
    return str(query(found.store, "SELECT version_num FROM alembic_version")[0][0])


# Ends itself at the statement of this beginning, or after the last one.
_KILLED = """
import os, signal, sys
from sqlalchemy import Engine, event
from evomerge.store import upgrade

url, where = sys.argv[1:]

@event.listens_for(Engine, "before_cursor_execute")
def kill(connection, cursor, statement, *rest):
    if "unfinished" not in str(connection.engine.url) and statement.strip().startswith(where):
        os.kill(os.getpid(), signal.SIGKILL)

@event.listens_for(Engine, "commit")
def kill_before_commit(connection):
    if connection.get_execution_options().get("evomerge_write"):
        kill(connection, None, "COMMIT")

upgrade(url, lambda done, of: None)
"""


def dies_upgrading(store: str, where: str) -> None:
    """Upgrade a store in a process that is killed in the middle."""
    command = [sys.executable, "-c", _KILLED, store, where]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("where", ["UPDATE alembic_version", "COMMIT"])
def test_killed_upgrade_leaves_the_old_store(oldest: Golden, where: str, tmp_path: Path) -> None:
    untouched = golden("001", tmp_path / "untouched")
    dies_upgrading(oldest.url, where)
    assert schema_of(oldest) == "001"
    for table in ("search", "candidate", "score", "ledger"):
        everything = f"SELECT * FROM {table} ORDER BY id"
        assert query(oldest.store, everything) == query(untouched.store, everything)
    upgrade(oldest.url, quiet)
    says_the_same(oldest, oldest.url, tmp_path / "recipe")


@pytest.mark.slow
def test_killed_upgrade_leaves_the_old_store_in_postgres(
    oldest: Golden, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy(oldest.url, postgres_url, quiet)
    dies_upgrading(postgres_url, "UPDATE alembic_version")
    engine = connect(postgres_url)
    with engine.connect() as db:
        assert version_of(db, "") == "001"
    engine.dispose()
    upgrade(postgres_url, quiet)
    says_the_same(oldest, postgres_url, tmp_path / "recipe")
