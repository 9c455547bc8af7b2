"""What any store must do with guarded splits: looks, openings, readings, and their chain of hashes.
One suite that every backend passes."""

import threading
from dataclasses import replace

import pytest
from sqlalchemy import select, update

from evomerge.errors import SearchFailed, StoreError
from evomerge.store import Coordinator, Store, schema
from evomerge.store.ledger import NewReading, Opening
from tests.contracts.stored import broken_link, identical, launched, proposal, scores, unseal


def test_look_is_counted_once_for_a_candidate(store: Store, opened: Coordinator) -> None:
    for _ in range(3):
        opened.look("c" * 64, 3, allowed=2)
    (row,) = store.ledger()
    assert (row.search, row.kind, row.content) == (opened.search.id, "look", "c" * 64)
    assert row.entry == {"candidate": 3}


def test_looks_end_at_the_limit_but_a_begun_one_may_be_repeated(
    store: Store, opened: Coordinator
) -> None:
    opened.look("c" * 64, 3, allowed=2)
    opened.look("c" * 64, 1, allowed=2)
    with pytest.raises(SearchFailed, match="all 2 looks at validation are spent"):
        opened.look("c" * 64, 4, allowed=2)
    opened.look("c" * 64, 3, allowed=2)
    assert [row.entry["candidate"] for row in store.ledger()] == [3, 1]


def test_looks_of_another_search_do_not_count(store: Store, opened: Coordinator) -> None:
    opened.look("c" * 64, 3, allowed=1)
    with launched(store, "two") as other:
        (id,) = other.open_generation(1, "proposed", 0.1, [proposal(0)])
        other.look("c" * 64, id, allowed=1)
    assert len(store.ledger()) == 2


def test_unsealing_for_the_same_recipe_is_the_same_opening(
    store: Store, opened: Coordinator
) -> None:
    leave, opening = unseal(opened, "f" * 64, "1" * 64)
    assert (leave.content, opening.before) == ("f" * 64, 0)
    assert unseal(opened, "f" * 64, "1" * 64) == (leave, opening)
    assert [(row.kind, row.content, row.subject) for row in store.ledger()] == [
        ("unseal", "f" * 64, "1" * 64)
    ]


def test_unsealing_for_another_recipe_counts_the_openings_before(
    store: Store, opened: Coordinator
) -> None:
    unseal(opened, "f" * 64, "1" * 64)
    assert unseal(opened, "f" * 64, "2" * 64)[1].before == 1
    assert unseal(opened, "0" * 64, "2" * 64)[1].before == 0  # other content
    assert unseal(opened, "f" * 64, "1" * 64)[1].before == 0  # what came later is not before
    with launched(store, "two") as other:
        assert unseal(other, "f" * 64, "3" * 64)[1].before == 2


def test_equal_recipes_of_two_searches_are_one_opening(store: Store, opened: Coordinator) -> None:
    with launched(store, "two") as other:
        found = unseal(other, "f" * 64, "1" * 64)
    assert unseal(opened, "f" * 64, "1" * 64) == found
    assert (found[1].search, found[1].before, found[1].searches) == ("two", 0, ())
    assert unseal(opened, "f" * 64, "2" * 64)[1].searches == ("two",)
    assert len(store.ledger()) == 2


def test_recipe_that_another_search_read_in_another_way_is_opened_again(
    store: Store, opened: Coordinator
) -> None:
    content, sha, one_way, another = "f" * 64, "1" * 64, "e" * 64, "d" * 64
    _, first = opened.unseal(content, sha, one_way, {})
    with launched(store, "two") as other:
        assert other.unseal(content, sha, another, {})[1] == first  # nothing was read so far
        opened.save_readings([NewReading(first.id, one_way, sha, "task", scores(1, 0))])
        _, second = other.unseal(content, sha, another, {})
        assert (second.before, second.searches) == (1, ("one",))
        other.save_readings([NewReading(second.id, another, sha, "task", scores(0, 0))])
        assert other.unseal(content, sha, another, {})[1] == second
    assert opened.unseal(content, sha, one_way, {})[1] == first


def test_reading_is_kept_bit_for_bit_and_the_first_one_stays(
    store: Store, opened: Coordinator
) -> None:
    _, opening = unseal(opened, "f" * 64, "1" * 64)
    assert store.reading("e" * 64, "1" * 64) is None
    for values in ((1, 0.5, 0), (0, 0, 0)):
        reading = NewReading(opening.id, "e" * 64, "1" * 64, "task", scores(*values))
        opened.save_readings([reading])
    found = store.reading("e" * 64, "1" * 64)
    assert found is not None
    assert identical(found, scores(1, 0.5, 0))
    assert store.reading("d" * 64, "1" * 64) is None  # asked otherwise


def test_more_looks_open_a_finished_search_again(store: Store, opened: Coordinator) -> None:
    opened.finish("finished", {"winner": 3, "promoted": False})
    opened.close()
    with Coordinator.take_over(store, "one") as coordinator:
        coordinator.allow_looks("c" * 64, 9)
        assert coordinator.search == replace(store.search("one"), epoch=coordinator.search.epoch)
    row = store.search("one")
    assert (row.state, row.verdict, row.job["guard"]["validation_looks"]) == ("stopped", None, 9)
    (said,) = [text for _, kind, text in store.events(row.id) if kind == "more looks"]
    assert said == "from 5 to 9 looks at validation; candidate 3 had won, not promoted"
    (use,) = store.ledger()
    assert (use.kind, use.entry) == ("more looks", {"from": 5, "to": 9, "search": "one"})
    assert broken_link(store) is None


def test_searches_that_open_one_test_split_at_once_open_it_once(store: Store) -> None:
    names, begun = ("one", "two", "three", "four"), threading.Barrier(4)
    found: list[Opening] = []

    def open_it(name: str) -> None:
        with Store(store.url) as own, launched(own, name) as coordinator:
            begun.wait()
            _, opening = unseal(coordinator, "f" * 64, "1" * 64)
            found.append(opening)
            coordinator.save_readings(
                [NewReading(opening.id, "e" * 64, "1" * 64, "task", scores(1, 0))]
            )

    threads = [threading.Thread(target=open_it, args=[name]) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(store.ledger()) == 1
    with store.database.read() as db:
        assert len(db.execute(select(schema.reading.c.id)).all()) == 1


def test_ledger_is_a_hash_chain_over_all_searches(store: Store, opened: Coordinator) -> None:
    opened.look("c" * 64, 3, allowed=5)
    with launched(store, "two") as other:
        unseal(other, "f" * 64, "1" * 64)
    unseal(opened, "f" * 64, "2" * 64)
    assert len(store.ledger()) == 3
    assert broken_link(store) is None
    with store.database.write() as db:
        table = schema.ledger
        db.execute(update(table).where(table.c.id == 2).values(subject="3" * 64))
    assert broken_link(store) == 1
    for use in (
        store.ledger,
        lambda: opened.look("c" * 64, 3, allowed=5),
        lambda: opened.allow_looks("c" * 64, 9),
        lambda: unseal(opened, "f" * 64, "4" * 64),
    ):
        with pytest.raises(StoreError, match="ledger row 2 does not match the chain of hashes"):
            use()
