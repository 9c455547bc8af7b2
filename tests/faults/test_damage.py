"""A byte of a store that is not what was written: it is noticed and named, and nothing is built on
it."""

import json
from pathlib import Path
from signal import SIGKILL

import pytest
from sqlalchemy import LargeBinary, create_engine, select, update

from evomerge.store import schema
from tests.faults.driver import AtWrite, Process
from tests.faults.searching import Stores, assert_refused, conduct, engine_url, rows
from tests.running import log

pytestmark = pytest.mark.faults

LOOKS = "SELECT count(*) FROM ledger WHERE kind = 'look'"


@pytest.fixture(scope="module")
def deciding(job: Path, stores: Stores) -> str:
    """The store of a search that was killed when it had spent one of its looks."""
    for number in range(36, 60):
        store = stores.fresh()
        assert conduct(job, store, AtWrite(number, "committed")).end().code == -SIGKILL
        if rows(store, LOOKS) == [(1,)]:
            return store
    pytest.fail("no process was killed after its first look")


def flip(store: str, table: str, column: str, least: int = 1) -> int:
    """Flip a bit in the middle of a value, in the first row that has one, of this id or a higher
    one; gives the row's id."""
    owner = schema.metadata.tables[table]
    value = owner.c[column]
    engine = create_engine(engine_url(store))
    with engine.begin() as connection:
        some = value.is_not(None) & (owner.c.id >= least)
        found = select(owner.c.id, value).where(some).order_by(owner.c.id)
        id, old = connection.execute(found).first() or pytest.fail("nothing to damage")
        data = bytearray(old if isinstance(value.type, LargeBinary) else old.encode())
        data[len(data) // 2] ^= 1
        new = bytes(data) if isinstance(value.type, LargeBinary) else data.decode()
        connection.execute(update(owner).where(owner.c.id == id).values({column: new}))
    engine.dispose()
    return int(id)


@pytest.mark.parametrize(
    ("table", "column", "named"),
    [
        *[
            ("ledger", column, "ledger row {id}")
            for column in ("kind", "content", "subject", "entry", "at", "previous", "hash")
        ],
        ("score", "blob", "scores"),
        ("candidate", "genotype", "candidate {id}"),
        ("candidate", "recipe", "candidate {id}"),
    ],
)
def test_flipped_bit_is_named_by_the_check(
    deciding: str, stores: Stores, table: str, column: str, named: str
) -> None:
    store = stores.copy(deciding)
    id = flip(store, table, column)
    end = Process(["db", "check", "--store", store]).end()
    assert_refused(end, "is not whole")
    assert named.format(id=id) in end.out


@pytest.mark.parametrize(
    ("table", "column", "named"),
    [
        ("ledger", "kind", "ledger row {id}"),
        ("ledger", "subject", "ledger row {id}"),
        ("ledger", "hash", "ledger row {id}"),
        ("score", "blob", "the scores of evaluation {id}"),
        ("candidate", "genotype", "the coordinates of candidate {id}"),
    ],
)
def test_search_does_not_go_on_from_a_flipped_bit(
    job: Path, deciding: str, stores: Stores, table: str, column: str, named: str
) -> None:
    store = stores.copy(deciding)
    id = flip(store, table, column)
    before = log(store)
    end = conduct(job, store).end()
    assert_refused(end, "the store is damaged", named.format(id=id), "restore a copy")
    assert log(store) == before


@pytest.mark.parametrize("column", ["kind", "subject", "hash"])
def test_test_split_is_not_opened_by_a_damaged_ledger(
    finished: str, stores: Stores, tmp_path: Path, column: str
) -> None:
    store = stores.copy(finished)
    id = flip(store, "ledger", column)
    end = Process(["export", "tiny", "--store", store, "-o", tmp_path / "out"]).end()
    assert_refused(end, "the store is damaged", f"ledger row {id}", "restore a copy")
    assert not rows(store, "SELECT id FROM ledger WHERE kind = 'unseal'")
    assert not (tmp_path / "out").exists()


def test_winner_is_not_exported_with_a_damaged_recipe(
    finished: str, stores: Stores, tmp_path: Path
) -> None:
    store = stores.copy(finished)
    ((verdict,),) = rows(store, "SELECT verdict FROM search")
    winner = flip(store, "candidate", "recipe", json.loads(str(verdict))["winner"])
    for option in ([], ["--recipe-only"]):
        arguments = ["export", "tiny", "--store", store, "-o", tmp_path / "out", *option]
        end = Process(arguments).end()
        assert_refused(end, f"the recipe of candidate {winner} does not match its hash")
    assert not rows(store, "SELECT id FROM ledger WHERE kind = 'unseal'")
    assert not (tmp_path / "out").exists()


def test_flipped_bit_of_a_reading_is_named_by_the_check(
    finished: str, stores: Stores, tmp_path: Path
) -> None:
    store = stores.copy(finished)
    arguments = ["--store", store, "-o", tmp_path / "out"]
    assert Process(["export", "tiny", *arguments]).end().code == 0
    flip(store, "reading", "blob")
    end = Process(["db", "check", "--store", store]).end()
    assert_refused(end, "is not whole")
    assert "reading" in end.out
