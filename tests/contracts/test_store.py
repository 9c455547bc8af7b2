"""What any store must do: one suite that every backend passes."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select, update

from evomerge.errors import SearchBusy, SearchFailed, StaleCoordinator, StoreError
from evomerge.fitness.results import Failed, Scored, Scores
from evomerge.store import (
    Coordinator,
    MeanRow,
    NewCandidate,
    NewModel,
    NewSplit,
    Outcome,
    SplitRow,
    Store,
    schema,
)

Dump = dict[str, list[tuple[Any, ...]]]

GENOTYPE = np.array([0.1 + 0.2, 5e-324, -0.0, 1 - 2**-53, 0.0, 1.0])
RECIPE = {
    "merge_method": "linear",
    "models": [{"model": "/models/ja", "parameters": {"weight": 1}}],
}


@pytest.fixture(params=["sqlite"])
def fresh_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a store that is not there yet."""
    return {"sqlite": f"sqlite:///{tmp_path / 'store.db'}"}[request.param]


@pytest.fixture
def store(fresh_url: str) -> Iterator[Store]:
    """A new, empty store."""
    with Store(fresh_url, create=True) as opened:
        yield opened


@pytest.fixture
def coordinator(store: Store) -> Iterator[Coordinator]:
    """Of a new search without any generation."""
    with launched(store, "one") as held:
        yield held


@pytest.fixture
def opened(coordinator: Coordinator) -> Coordinator:
    """Of a search with two baselines (candidates 1, 2) and two proposals (3, 4)."""
    baselines = [NewCandidate(i, label, None, RECIPE, "a" * 64) for i, label in enumerate("xy")]
    coordinator.open_generation(0, "baselines", None, baselines)
    coordinator.open_generation(1, "proposed", 0.25, [proposal(0), proposal(1)])
    return coordinator


def launched(store: Store, name: str) -> Coordinator:
    """A new search."""
    models = [NewModel("ja", "/models/ja", "a" * 64, {"config.json": "b" * 64}, True)]
    splits = [NewSplit("task", "train", "c" * 64, "f" * 64, ["d" * 64, "e" * 64])]
    return Coordinator.launch(store, name, 7, {"k": ["ü"]}, {"torch": "2"}, models, splits)


def proposal(slot: int, genotype: np.ndarray = GENOTYPE) -> NewCandidate:
    """A candidate as the optimizer proposes it."""
    return NewCandidate(slot, None, genotype, RECIPE, f"{slot}" * 64)


def scores(*values: float) -> Scores:
    """Per-example results in which every bit matters."""
    n = len(values)
    examples = np.arange(n, dtype=np.uint32)[::-1] + np.uint32(2**32 - n)
    shaping = -np.arange(n, dtype=np.float32) / np.float32(3)
    tokens = np.uint32(2**32 - 1) - np.arange(n, dtype=np.uint32)
    odd, third = np.arange(n) % 2 == 1, np.arange(n) % 3 == 2
    reasons = {int(at): "ü" for at in examples[third]}
    return Scores(examples, np.array(values, np.float32), shaping, odd, tokens, third, reasons)


def scored(*values: float) -> Scored:
    """An evaluation on one task."""
    return Scored({"task": scores(*values)}, 0.5, 1.5)


def dump(store: Store) -> Dump:
    """Every row of every table, but for the search's clock, which any write moves."""
    rows = {}
    with store.database.read() as db:
        for table in schema.metadata.sorted_tables:
            columns = [c for c in table.c if c.name != "active_seconds"]
            rows[table.name] = [tuple(row) for row in db.execute(select(*columns))]
    return rows


def identical(ours: Scores, theirs: Scores) -> bool:
    """Whether two results agree in every bit and in their types."""
    parts = ("examples", "scores", "shaping", "truncated", "tokens", "overlong")
    pairs = [(getattr(ours, part), getattr(theirs, part)) for part in parts]
    same = all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)
    return same and ours.failures == theirs.failures


def test_launched_search_reads_back(store: Store, coordinator: Coordinator) -> None:
    (row,) = store.searches()
    assert row == store.search("one") == coordinator.search
    assert (row.name, row.seed, row.epoch, row.state) == ("one", 7, 1, "running")
    assert (row.job, row.versions) == ({"k": ["ü"]}, {"torch": "2"})
    assert (row.stop_reason, row.verdict) == (None, None)
    model = {"uri": "/models/ja", "revision": None, "sha256": "a" * 64, "first": True}
    assert store.models(row.id) == {"ja": model}
    assert store.splits(row.id) == {("task", "train"): SplitRow("c" * 64, "f" * 64, 2)}


def test_searches_are_listed_oldest_first(store: Store) -> None:
    for name in ("b", "a", "c"):
        launched(store, name).close()
    assert [row.name for row in store.searches()] == ["b", "a", "c"]


def test_unknown_search_is_refused_with_the_nearest_name(
    store: Store, coordinator: Coordinator
) -> None:
    with pytest.raises(StoreError, match=r"no search 'onne': did you mean 'one'\?"):
        store.search("onne")


def test_search_is_running_while_held_and_stopped_after(store: Store) -> None:
    with launched(store, "one"):
        assert store.search("one").state == "running"
    assert store.search("one").state == "stopped"


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_ended_search_keeps_its_state_verdict_and_reason(
    store: Store, coordinator: Coordinator, state: str
) -> None:
    coordinator.stop("enough")
    coordinator.finish(state, {"winner": 3})
    row = store.search("one")
    assert (row.state, row.stop_reason, row.verdict) == (state, "enough", {"winner": 3})


def test_taken_name_is_refused_and_nothing_is_written(store: Store) -> None:
    launched(store, "one").close()
    before = dump(store)
    with pytest.raises(StoreError, match="the name 'one' is taken"):
        launched(store, "one")
    assert dump(store) == before
    Coordinator.take_over(store, "one").close()  # the refused one holds no lock


def test_launch_that_fails_writes_nothing_and_holds_no_lock(store: Store) -> None:
    before = dump(store)
    with pytest.raises(TypeError):
        Coordinator.launch(store, "one", 7, {"no JSON": {1, 2}}, {}, [], [])
    assert dump(store) == before
    launched(store, "one").close()


def test_search_that_is_conducted_cannot_be_taken_over(
    store: Store, coordinator: Coordinator
) -> None:
    before = dump(store)
    with pytest.raises(SearchBusy, match="'one' is being conducted by process"):
        Coordinator.take_over(store, "one")
    assert dump(store) == before


def test_taking_over_raises_the_epoch(store: Store) -> None:
    launched(store, "one").close()
    for epoch in (2, 3):
        with Coordinator.take_over(store, "one") as held:
            assert held.search.epoch == epoch


def test_candidates_read_back_bit_for_bit(store: Store, opened: Coordinator) -> None:
    first, second, third, fourth = store.candidates(opened.search.id)
    assert [(c.generation, c.slot, c.label) for c in (first, second)] == [(0, 0, "x"), (0, 1, "y")]
    assert first.genotype is None
    assert (third.generation, third.slot, third.label) == (1, 0, None)
    assert (third.state, third.reason, third.fitness, third.told) == ("open", None, None, None)
    assert (third.recipe_sha, fourth.recipe_sha) == ("0" * 64, "1" * 64)
    assert third.genotype is not None
    assert third.genotype.dtype == np.float64
    assert third.genotype.tobytes() == GENOTYPE.tobytes()
    assert store.recipe(third.id) == RECIPE


def test_candidates_come_by_generation_and_slot_whatever_their_ids(
    store: Store, coordinator: Coordinator
) -> None:
    coordinator.open_generation(2, "proposed", 0.1, [proposal(1), proposal(0)])
    coordinator.open_generation(1, "proposed", 0.1, [proposal(0)])
    found = [(c.generation, c.slot) for c in store.candidates(coordinator.search.id)]
    assert found == [(1, 0), (2, 0), (2, 1)]
    assert [g.number for g in store.generations(coordinator.search.id)] == [1, 2]


def test_infeasible_candidate_has_its_reason_and_no_recipe(
    store: Store, coordinator: Coordinator
) -> None:
    new = NewCandidate(0, None, GENOTYPE, None, None, "too deep")
    (id,) = coordinator.open_generation(1, "proposed", 0.1, [new])
    (row,) = store.candidates(coordinator.search.id)
    assert (row.id, row.state, row.reason) == (id, "infeasible", "too deep")
    assert store.recipe(id) is None


@pytest.mark.parametrize(
    ("number", "bad", "error"),
    [
        (2, proposal(0), StoreError),  # a slot twice
        (2, NewCandidate(1, None, GENOTYPE, {"no": {"JSON"}}, "a" * 64), TypeError),
        (1, proposal(1), StoreError),  # a generation twice
    ],
)
def test_generation_is_opened_whole_or_not_at_all(
    store: Store, opened: Coordinator, number: int, bad: NewCandidate, error: type[Exception]
) -> None:
    before = dump(store)
    with pytest.raises(error):
        opened.open_generation(number, "proposed", 0.1, [proposal(0), bad])
    assert dump(store) == before


def test_generation_is_told_when_closed(store: Store, opened: Coordinator) -> None:
    several = Outcome(0.1 + 0.2, (0.1 + 0.2, -7.0), 0.0)
    opened.close_generation(1, {3: several, 4: Outcome(-1.0)}, {"gap": 0.5})
    baselines, proposed = store.generations(opened.search.id)
    assert (baselines.kind, baselines.step_size, baselines.told) == ("baselines", None, False)
    assert (proposed.kind, proposed.step_size, proposed.told) == ("proposed", 0.25, True)
    assert (baselines.review, proposed.review) == (None, {"gap": 0.5})
    found = store.candidates(opened.search.id)
    assert [c.told for c in found] == [None, None, 0.1 + 0.2, -1.0]
    assert [c.objectives for c in found] == [None, None, (0.1 + 0.2, -7.0), None]
    assert [c.violation for c in found] == [None, None, 0.0, None]


def test_generation_remembers_who_proposed_it(store: Store, opened: Coordinator) -> None:
    section = {"name": "tpe", "population": 4}
    opened.open_generation(2, "proposed", None, [proposal(0)], section)
    assert [g.optimizer for g in store.generations(opened.search.id)] == [None, None, section]


def test_results_of_an_equal_candidate_are_free(store: Store, opened: Coordinator) -> None:
    opened.record(3, "train", 0, Scored({"one": scores(1, 0)}, 0.5, 2.0))
    opened.record(4, "train", 0, Scored({"one": scores(1, 0)}, 0.0, 0.0), copied_from=3)
    rows = store.evaluations(opened.search.id, ["train"])
    assert [(row.candidate, row.copied_from) for row in rows] == [(3, None), (4, 3)]
    assert store.example_evaluations(opened.search.id) == 2
    assert store.device_seconds(opened.search.id) == 2.0


def test_search_goes_on_under_another_job(store: Store, opened: Coordinator) -> None:
    opened.change({"k": 1}, "k is 1 from here on")
    assert store.search("one").job == opened.search.job == {"k": 1}
    assert [event[1:] for event in store.events(opened.search.id)] == [
        ("changed", "k is 1 from here on")
    ]


def test_fitness_may_be_known_later_than_the_scores(store: Store, opened: Coordinator) -> None:
    opened.record(1, "full", 0, scored(1))
    opened.rate({1: 0.1 + 0.2})
    assert next(c.fitness for c in store.candidates(opened.search.id)) == 0.1 + 0.2


def test_scores_read_back_bit_for_bit(store: Store, opened: Coordinator) -> None:
    tasks = {"one": scores(1, 0, 1 / 3), "two": scores(0.1)}
    opened.record(3, "train", 0, Scored(tasks, 0.25, 0.75), fitness=0.1 + 0.2)
    (row,) = store.evaluations(opened.search.id, ["train"])
    assert (row.candidate, row.purpose, row.stage, row.reason) == (3, "train", 0, None)
    assert (row.merge_seconds, row.seconds) == (0.25, 0.75)
    assert row.scores is not None
    assert set(row.scores) == set(tasks)
    assert all(identical(row.scores[task], tasks[task]) for task in tasks)
    candidate = store.candidates(opened.search.id)[2]
    assert (candidate.state, candidate.fitness) == ("scored", 0.1 + 0.2)


def test_failure_is_recorded_with_its_reason(store: Store, opened: Coordinator) -> None:
    opened.record(3, "train", 0, Failed("not finite", 2.0))
    (row,) = store.evaluations(opened.search.id, ["train"])
    assert (row.reason, row.scores, row.seconds) == ("not finite", None, 2.0)
    candidate = store.candidates(opened.search.id)[2]
    assert (candidate.state, candidate.reason) == ("failed", "not finite")


@pytest.mark.parametrize("again", [scored(0, 0), Failed("late")])
def test_first_record_of_an_evaluation_stays(
    store: Store, opened: Coordinator, again: Scored | Failed
) -> None:
    opened.record(3, "train", 0, scored(1, 0), fitness=0.5)
    before = dump(store)
    opened.record(3, "train", 0, again, fitness=0.0)
    assert dump(store) == before


def test_record_without_fitness_leaves_the_old_one(store: Store, opened: Coordinator) -> None:
    opened.record(3, "train", 0, scored(1), fitness=0.5)
    opened.record(3, "monitor", 0, scored(0))
    assert store.candidates(opened.search.id)[2].fitness == 0.5


def test_evaluations_come_by_purpose_in_order_of_candidates_and_stages(
    store: Store, opened: Coordinator
) -> None:
    for candidate, purpose, stage in [(4, "train", 0), (3, "train", 1), (3, "train", 0)]:
        opened.record(candidate, purpose, stage, scored(1))
    opened.record(1, "full", 0, scored(1))
    found = store.evaluations(opened.search.id, ["train", "monitor"])
    assert [(e.candidate, e.stage) for e in found] == [(3, 0), (3, 1), (4, 0)]
    without = store.evaluations(opened.search.id, ["full"], with_scores=False)
    assert [(e.candidate, e.scores) for e in without] == [(1, None)]


def test_tasks_come_as_they_were_recorded(store: Store, opened: Coordinator) -> None:
    """Sums over tasks depend on their order in the last bit, and a resumed search on each bit."""
    names = ["zeta", "alpha", "mid"]
    for candidate in (4, 3):
        opened.record(candidate, "train", 0, Scored({n: scores(1) for n in names}, 0.5, 1.5))
    for row in store.evaluations(opened.search.id, ["train"]):
        assert list(row.scores or ()) == names


def test_means_weigh_stages_by_their_examples(store: Store, opened: Coordinator) -> None:
    opened.record(3, "train", 0, scored(1, 1, 1))
    opened.record(3, "train", 1, scored(0))
    opened.record(4, "train", 0, Failed("broken"))
    opened.record(3, "full", 0, scored(0, 0))
    tokens = 2**32 - 1 - 3 / 4
    expected = MeanRow(0.75, 4, truncated=0.25, tokens=tokens, overlong=1, failed=1)
    assert store.means(opened.search.id, "train") == {3: {"task": expected}}


def test_candidates_with_a_recipe_that_was_scored_on_train_are_found_in_all_searches(
    store: Store, opened: Coordinator
) -> None:
    sha = next(c.recipe_sha for c in store.candidates(opened.search.id) if c.id == 3)
    assert sha is not None
    opened.record(3, "train", 0, scored(1))
    assert store.scored_on_train(sha) == []
    opened.record(3, "full", 0, scored(1))
    with launched(store, "two") as other:
        other.open_generation(1, "proposed", 0.25, [proposal(0), proposal(1)])
        mine, theirs = (c.id for c in store.candidates(other.search.id))
        other.record(mine, "full", 0, scored(1))
        other.record(theirs, "full", 0, Failed("broken"))
        assert store.scored_on_train(sha) == [(other.search.id, mine), (opened.search.id, 3)]


def test_example_evaluations_count_what_drives_and_watches_proposals(
    store: Store, opened: Coordinator
) -> None:
    opened.record(1, "full", 0, scored(1, 1, 1, 1))  # a baseline
    opened.record(3, "train", 0, scored(1, 1))
    opened.record(3, "monitor", 0, scored(1))
    opened.record(3, "full", 0, scored(1, 1, 1, 1))
    opened.record(3, "validation", 0, scored(1, 1, 1, 1))
    assert store.example_evaluations(opened.search.id) == 3


def test_searches_of_one_store_do_not_see_each_other(store: Store, opened: Coordinator) -> None:
    opened.record(3, "train", 0, scored(1))
    opened.log("note", "mine")
    with launched(store, "two") as other:
        id = other.search.id
        assert store.candidates(id) == []
        assert store.generations(id) == []
        assert store.evaluations(id, ["train"]) == []
        assert store.means(id, "train") == {}
        assert store.example_evaluations(id) == 0
        assert store.events(id) == []


def test_events_read_back_in_order(store: Store, coordinator: Coordinator) -> None:
    for text in ("b", "a"):
        coordinator.log("note", text)
    assert [event[1:] for event in store.events(coordinator.search.id)] == [
        ("note", "b"),
        ("note", "a"),
    ]


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
    leave, at, before = opened.unseal("f" * 64, "1" * 64)
    assert (leave.content, before) == ("f" * 64, 0)
    assert opened.unseal("f" * 64, "1" * 64) == (leave, at, 0)
    assert [(row.kind, row.content, row.subject) for row in store.ledger()] == [
        ("unseal", "f" * 64, "1" * 64)
    ]


def test_unsealing_for_another_recipe_counts_the_openings_before(
    store: Store, opened: Coordinator
) -> None:
    opened.unseal("f" * 64, "1" * 64)
    assert opened.unseal("f" * 64, "2" * 64)[2] == 1
    assert opened.unseal("0" * 64, "2" * 64)[2] == 0  # other content
    assert opened.unseal("f" * 64, "1" * 64)[2] == 0  # what came later is not before
    with launched(store, "two") as other:
        assert other.unseal("f" * 64, "3" * 64)[2] == 2


def broken_link(store: Store) -> int | None:
    """The first row of the ledger whose hash does not follow from it and from the row before."""
    table, previous = schema.ledger, "0" * 64
    with store.database.read() as db:
        rows = db.execute(select(table).order_by(table.c.id)).all()
    for number, row in enumerate(rows):
        hashed = {k: v for k, v in row._asdict().items() if k not in ("id", "hash")}
        digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
        if row.previous != previous or row.hash != digest:
            return number
        previous = row.hash
    return None


def test_ledger_is_a_hash_chain_over_all_searches(store: Store, opened: Coordinator) -> None:
    opened.look("c" * 64, 3, allowed=5)
    with launched(store, "two") as other:
        other.unseal("f" * 64, "1" * 64)
    opened.unseal("f" * 64, "2" * 64)
    assert len(store.ledger()) == 3
    assert broken_link(store) is None
    with store.database.write() as db:
        table = schema.ledger
        db.execute(update(table).where(table.c.id == 2).values(subject="3" * 64))
    assert broken_link(store) == 1


def test_report_stays_byte_for_byte(store: Store, opened: Coordinator) -> None:
    assert store.report(3) is None
    text = '{"gain":  0.30000000000000004,\n "name": "日本語"}\n'
    opened.save_report(3, text)
    opened.save_report(3, "{}")
    assert store.report(3) == text


WRITES: dict[str, Callable[[Coordinator], object]] = {
    "open_generation": lambda c: c.open_generation(2, "proposed", 0.1, [proposal(0)]),
    "record": lambda c: c.record(3, "train", 0, scored(1), fitness=1.0),
    "rate": lambda c: c.rate({3: 1.0}),
    "change": lambda c: c.change({"k": 1}, "text"),
    "close_generation": lambda c: c.close_generation(1, {3: Outcome(1.0)}, None),
    "look": lambda c: c.look("c" * 64, 3, allowed=5),
    "unseal": lambda c: c.unseal("f" * 64, "1" * 64),
    "save_report": lambda c: c.save_report(3, "{}"),
    "log": lambda c: c.log("note", "text"),
    "stop": lambda c: c.stop("enough"),
    "finish": lambda c: c.finish("finished", None),
}


def test_every_writing_method_is_tried_below() -> None:
    public = {name for name in vars(Coordinator) if not name.startswith("_")}
    assert public - {"launch", "take_over", "close"} == set(WRITES)


@pytest.mark.parametrize("method", WRITES)
def test_stale_coordinator_is_refused_and_writes_nothing(
    store: Store, opened: Coordinator, method: str
) -> None:
    opened.close()  # as seen from another host: the old one is believed dead, but lives
    with Coordinator.take_over(store, "one") as successor:
        before = dump(store)
        with pytest.raises(StaleCoordinator, match="'one' was taken over"):
            WRITES[method](opened)
        assert dump(store) == before
        WRITES[method](successor)
        assert dump(store) != before


def test_coordinators_that_write_at_once_lose_nothing(store: Store) -> None:
    names, each = ("one", "two", "three"), 20

    def write(name: str) -> None:
        with Store(store.url) as own, launched(own, name) as coordinator:
            for number in range(each):
                coordinator.unseal("f" * 64, f"{name} {number}")

    threads = [threading.Thread(target=write, args=[name]) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.ledger()) == each * len(names)
    assert broken_link(store) is None


def damage(store: Store, column: Any) -> None:
    """Flip one bit of a blob."""
    with store.database.write() as db:
        rows = db.execute(select(column.table.c.id, column).where(column.is_not(None))).all()
        id, blob = rows[0]
        flipped = bytes([blob[0] ^ 1]) + blob[1:]
        table = column.table
        db.execute(update(table).where(table.c.id == id).values({column.name: flipped}))


def test_damaged_genotype_is_found(store: Store, opened: Coordinator) -> None:
    damage(store, schema.candidate.c.genotype)
    with pytest.raises(StoreError, match="damaged: the coordinates of candidate 3 do not"):
        store.candidates(opened.search.id)


def test_damaged_scores_are_found(store: Store, opened: Coordinator) -> None:
    opened.record(3, "train", 0, scored(1, 0))
    damage(store, schema.score.c.blob)
    with pytest.raises(
        StoreError, match="damaged: the scores of evaluation 1 on task 'task' do not"
    ):
        store.evaluations(opened.search.id, ["train"])
