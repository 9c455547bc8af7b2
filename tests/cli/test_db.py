"""`evomerge db`: what it says of a store, and its exit codes."""

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from evomerge.store import schema
from tests.golden import golden, upgraded
from tests.running import evomerge_, query, url


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of three searches."""
    return upgraded(tmp_path).store


def broken(store: Path) -> None:
    """Change two rows behind the store's back."""

    with contextlib.closing(sqlite3.connect(store)) as db, db:
        db.execute("UPDATE ledger SET at = '2025' WHERE id = 2")
        db.execute("UPDATE candidate SET state = 'open' WHERE id = 10")


def test_store_of_a_search_and_its_export_is_whole(exported: Path) -> None:
    end = evomerge_("db", "check", "--store", url(exported.parent / "store.db"))
    assert (end.code, end.err) == (0, "")
    what, which = end.out.rstrip().rsplit("\n", 1)
    assert what.startswith("checked 1 search, ")
    assert what.endswith(" 1 export")
    assert max(map(len, what.splitlines())) <= 100
    assert which == f"{url(exported.parent / 'store.db')} is whole"


def test_check_names_violations_and_fails(store: Path) -> None:
    broken(store)
    end = evomerge_("db", "check", "--store", url(store))
    assert end.code == 1
    assert end.out.splitlines() == [
        "search 'finished': ledger row 2: does not match its hash: restore a backup of the store",
        "search 'finished': generation 1, candidate 10: is 'open'; by its evaluations it is "
        "'scored': restore a backup of the store",
    ]
    assert end.err == f"evomerge: store '{url(store)}' is not whole: 2 violations, see above\n"


@pytest.mark.slow
def test_check_as_json(store: Path) -> None:
    end = evomerge_("db", "check", "--store", url(store), "--json")
    found = json.loads(end.out)
    assert (end.code, found["url"], found["violations"], found["notes"]) == (0, url(store), [], [])
    assert found["checked"]["candidate"] == 39
    broken(store)
    end = evomerge_("db", "check", "--store", url(store), "--json")
    assert end.code == 1
    assert json.loads(end.out)["violations"][0] == {
        "search": "finished",
        "where": "ledger row 2",
        "what": "does not match its hash",
        "remedy": "restore a backup of the store",
    }


def test_check_of_an_older_store_says_what_to_do(tmp_path: Path) -> None:
    old = golden("001", tmp_path)
    end = evomerge_("db", "check", "--store", old.url)
    assert end.code == 2
    assert f"evomerge db upgrade --store {old.url}" in end.err


def test_backup_is_a_store(store: Path, tmp_path: Path) -> None:
    end = evomerge_("db", "backup", "--store", url(store), "-o", tmp_path / "copy.db")
    assert (end.code, end.err) == (0, "")
    first, last = end.out.rstrip().rsplit("\n", 1)
    assert first.startswith("copied and compared 3 searches, 9 generations, 39 candidates")
    assert last == url(tmp_path / "copy.db")
    assert evomerge_("db", "check", "--store", last).code == 0
    again = evomerge_("db", "backup", "--store", url(store), "-o", tmp_path / "copy.db")
    assert again.code == 2
    assert "is there already: name a new file" in again.err


def test_backup_as_json(store: Path, tmp_path: Path) -> None:
    end = evomerge_("db", "backup", "--store", url(store), "-o", tmp_path / "copy.db", "--json")
    found = json.loads(end.out)
    assert (found["url"], found["schema"]) == (url(tmp_path / "copy.db"), schema.VERSION)
    assert found["rows"]["candidate"] == 39


@pytest.mark.slow
def test_backup_to_postgres_and_back(store: Path, tmp_path: Path, postgres_url: str) -> None:
    assert evomerge_("db", "backup", "--store", url(store), "-o", postgres_url).code == 0
    assert evomerge_("db", "check", "--store", postgres_url).code == 0
    back = tmp_path / "back.db"
    assert evomerge_("db", "backup", "--store", postgres_url, "-o", back).code == 0
    everything = "SELECT * FROM score ORDER BY id"
    assert query(back, everything) == query(store, everything)


def test_upgrade_says_where_the_old_store_is(tmp_path: Path) -> None:
    old = golden("001", tmp_path)
    end = evomerge_("db", "upgrade", "--store", old.url)
    assert (end.code, end.err) == (0, "")
    copy = f"{old.store}.schema-001"
    assert end.out == f"upgraded from schema 001; the old store is {copy}\n"
    end = evomerge_("db", "upgrade", "--store", old.url)
    assert end.out == f"{old.url} is up to date\n"
    shutil.move(copy, tmp_path / "old.db")
    end = evomerge_("db", "upgrade", "--store", url(tmp_path / "old.db"), "--json")
    assert json.loads(end.out) == {
        "url": url(tmp_path / "old.db"),
        "schema": "001",
        "copy": f"{tmp_path / 'old.db'}.schema-001",
    }
