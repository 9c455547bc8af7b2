"""What any store must do: one suite that every backend passes."""

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Connection, func, insert, select, update

from evomerge.devices import Device
from evomerge.errors import (
    SearchBusy,
    SearchFailed,
    StaleCoordinator,
    StoreError,
    StoreUnavailable,
)
from evomerge.fitness.results import Failed, Scored
from evomerge.recipe import sha_of
from evomerge.store import (
    Coordinator,
    MeanRow,
    NewCandidate,
    Outcome,
    Placement,
    SearchRow,
    SplitRow,
    Store,
    Sums,
    consistent,
    database,
    schema,
    writes,
)
from evomerge.store.ledger import NewReading
from tests.contracts.stored import (
    GENOTYPE,
    JOB,
    broken_link,
    identical,
    launched,
    proposal,
    scores,
    unseal,
)
from tests.running import PATIENCE

Dump = dict[str, list[tuple[Any, ...]]]


def record(coordinator: Coordinator, *evaluation: Any, **how: Any) -> None:
    """Of one that lands alone."""
    coordinator.record(*evaluation, **how)
    coordinator.flush()


def save_devices(coordinator: Coordinator, devices: list[Device]) -> None:
    """At once."""
    coordinator.save_devices(devices)
    coordinator.flush()


def with_recipe(weight: float) -> tuple[dict[str, Any], str]:
    """A recipe of the search's model, and its hash."""
    models = [{"model": "/models/ja", "parameters": {"weight": weight}}]
    recipe = {"merge_method": "linear", "models": models}
    return recipe, sha_of(recipe, {"/models/ja": "a" * 64})


def scored(*values: float) -> Scored:
    """An evaluation on one task."""
    return Scored({"task": scores(*values)}, 0.5, 1.5)


def dump(store: Store) -> Dump:
    """Every row of every table, but for the search's clock and lease, which any write moves."""
    rows = {}
    with store.database.read() as db:
        for table in schema.metadata.sorted_tables:
            columns = [c for c in table.c if c.name not in ("active_seconds", "lease_until")]
            rows[table.name] = [tuple(row) for row in db.execute(select(*columns))]
    return rows


def test_launched_search_reads_back(store: Store, coordinator: Coordinator) -> None:
    (row,) = store.searches()
    assert row == store.search("one") == coordinator.search
    assert (row.name, row.seed, row.epoch, row.state) == ("one", 7, 1, "running")
    assert (row.job, row.versions) == (JOB, {"torch": "2"})
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


def test_taking_over_that_fails_at_last_holds_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(store, "one").close()
    (row,) = store.searches()
    answers = iter([row])  # and then the database is gone

    def search(name: str) -> SearchRow:
        for found in answers:
            return found
        raise StoreUnavailable("the connection was lost")

    with monkeypatch.context() as patched:
        patched.setattr(store, "search", search)
        with pytest.raises(StoreUnavailable):
            Coordinator.take_over(store, "one")
    assert store.search("one").state == "stopped"
    Coordinator.take_over(store, "one").close()


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


def test_recipe_reads_back_and_a_damaged_one_is_found(
    store: Store, coordinator: Coordinator
) -> None:
    recipe, sha = with_recipe(0.1 + 0.2)
    (id,) = coordinator.open_generation(
        1, "proposed", 0.1, [NewCandidate(0, None, GENOTYPE, recipe, sha)]
    )
    assert store.recipe(id) == recipe
    text = json.dumps(recipe)
    for damaged in (text.replace("0.3", "0.4"), text[1:], "7", text.replace("/models", "/model3")):
        with store.database.write() as db:
            db.execute(update(schema.candidate).values(recipe=damaged))
        with pytest.raises(StoreError, match=f"the recipe of candidate {id} does not match its"):
            store.recipe(id)


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
    record(opened, 3, "train", 0, Scored({"one": scores(1, 0)}, 0.5, 2.0))
    record(opened, 4, "train", 0, Scored({"one": scores(1, 0)}, 0.0, 0.0), copied_from=3)
    rows = store.evaluations(opened.search.id, ["train"])
    assert [(row.candidate, row.copied_from) for row in rows] == [(3, None), (4, 3)]
    assert store.example_evaluations(opened.search.id) == 2
    assert store.device_seconds(opened.search.id) == 2.0


def test_evaluation_says_where_it_was_made(store: Store, opened: Coordinator) -> None:
    placement = Placement("a/gpu 0", 0.5, 0.1 + 0.2)
    record(opened, 3, "train", 0, scored(1), placement=placement)
    record(opened, 4, "train", 0, scored(1))
    first, second = store.evaluations(opened.search.id, ["train"])
    assert (first.device, first.gpus, first.waited) == ("a/gpu 0", 0.5, 0.1 + 0.2)
    assert (second.device, second.gpus, second.waited) == (None, 1.0, 0.0)
    assert Sums(store, opened.search.id).time().waited == 0.1 + 0.2  # of the other it is not known
    assert store.device_seconds(opened.search.id) == 1.5 * 0.5 + 1.5


def held(name: str, seconds: float, evaluations: int) -> Device:
    """A device whose time went in proportion."""
    return Device(
        name, 2.0, seconds, seconds / 8, seconds / 4, seconds / 2, seconds / 16, evaluations
    )


def test_time_of_devices_is_added_up_over_epochs_by_name(
    store: Store, coordinator: Coordinator
) -> None:
    id = coordinator.search.id
    assert store.devices(id) == []
    save_devices(coordinator, [held("b", 16.0, 1), held("a", 32.0, 2)])
    save_devices(coordinator, [held("b", 64.0, 5), held("c", 8.0, 0)])  # a was not told of again
    assert store.devices(id) == [
        held("b", 64.0, 5),
        held("a", 32.0, 2),
        held("c", 8.0, 0),
    ]
    coordinator.close()
    with Coordinator.take_over(store, "one") as again:
        save_devices(again, [held("a", 32.0, 3)])
        save_devices(again, [held("a", 64.0, 4)])
    assert store.devices(id) == [
        held("b", 64.0, 5),
        held("a", 96.0, 6),
        held("c", 8.0, 0),
    ]


def test_asks_and_tells_have_their_places_in_a_log(store: Store, coordinator: Coordinator) -> None:
    for number in (1, 2):
        coordinator.open_generation(number, "proposed", 0.1, [proposal(0)], ask=number)
    coordinator.close_generation(2, {}, None, tell=3)
    coordinator.close_generation(1, {}, None, tell=4)
    coordinator.open_generation(3, "final", None, [proposal(0)])
    found = store.generations(coordinator.search.id)
    assert [(g.ask, g.tell) for g in found] == [(1, 4), (2, 3), (None, None)]


def test_search_goes_on_under_another_job(store: Store, opened: Coordinator) -> None:
    opened.change({"k": 1}, "k is 1 from here on")
    assert store.search("one").job == opened.search.job == {"k": 1}
    assert [event[1:] for event in store.events(opened.search.id)] == [
        ("changed", "k is 1 from here on")
    ]


def test_fitness_may_be_known_later_than_the_scores(store: Store, opened: Coordinator) -> None:
    record(opened, 1, "full", 0, scored(1))
    opened.rate({1: 0.1 + 0.2})
    assert next(c.fitness for c in store.candidates(opened.search.id)) == 0.1 + 0.2


def test_scores_read_back_bit_for_bit(store: Store, opened: Coordinator) -> None:
    tasks = {"one": scores(1, 0, 1 / 3), "two": scores(0.1)}
    record(opened, 3, "train", 0, Scored(tasks, 0.25, 0.75), fitness=0.1 + 0.2)
    (row,) = store.evaluations(opened.search.id, ["train"])
    assert (row.candidate, row.purpose, row.stage, row.reason) == (3, "train", 0, None)
    assert (row.merge_seconds, row.seconds) == (0.25, 0.75)
    assert row.scores is not None
    assert set(row.scores) == set(tasks)
    assert all(identical(row.scores[task], tasks[task]) for task in tasks)
    candidate = store.candidates(opened.search.id)[2]
    assert (candidate.state, candidate.fitness) == ("scored", 0.1 + 0.2)


def test_failure_is_recorded_with_its_reason(store: Store, opened: Coordinator) -> None:
    record(opened, 3, "train", 0, Failed("not finite", 2.0))
    (row,) = store.evaluations(opened.search.id, ["train"])
    assert (row.reason, row.scores, row.seconds) == ("not finite", None, 2.0)
    candidate = store.candidates(opened.search.id)[2]
    assert (candidate.state, candidate.reason) == ("failed", "not finite")


@pytest.mark.parametrize("told", [False, True])
def test_a_failed_search_is_reopened_without_the_failures_that_no_optimizer_was_told_of(
    store: Store, opened: Coordinator, told: bool
) -> None:
    record(opened, 1, "full", 0, Failed("no GPU"))
    record(opened, 3, "train", 0, Failed("no GPU"))
    record(opened, 4, "train", 0, scored(1), fitness=0.5)
    record(opened, 4, "full", 0, Failed("no GPU"))
    if told:
        opened.close_generation(1, {}, None, tell=2)
    opened.stop("it failed")
    opened.finish("failed", None)
    opened.reopen()
    row = store.search("one")
    assert (row.state, row.stop_reason) == ("running", None)
    assert (opened.search.state, opened.search.stop_reason) == ("running", None)
    found = store.evaluations(row.id, ["train", "full"])
    kept = [(3, "train")] if told else []
    assert [(e.candidate, e.purpose) for e in found] == [*kept, (4, "train")]
    third = ("failed", "no GPU") if told else ("open", None)
    states = [(c.state, c.reason) for c in store.candidates(row.id)]
    assert states == [("open", None), ("open", None), third, ("scored", None)]


@pytest.mark.parametrize("again", [scored(0, 0), Failed("late")])
def test_first_record_of_an_evaluation_stays(
    store: Store, opened: Coordinator, again: Scored | Failed
) -> None:
    record(opened, 3, "train", 0, scored(1, 0), fitness=0.5)
    before = dump(store)
    record(opened, 3, "train", 0, again, fitness=0.0)
    assert dump(store) == before


def test_record_without_fitness_leaves_the_old_one(store: Store, opened: Coordinator) -> None:
    record(opened, 3, "train", 0, scored(1), fitness=0.5)
    record(opened, 3, "monitor", 0, scored(0))
    assert store.candidates(opened.search.id)[2].fitness == 0.5


def test_evaluations_come_by_purpose_in_order_of_candidates_and_stages(
    store: Store, opened: Coordinator
) -> None:
    for candidate, purpose, stage in [(4, "train", 0), (3, "train", 1), (3, "train", 0)]:
        record(opened, candidate, purpose, stage, scored(1))
    record(opened, 1, "full", 0, scored(1))
    found = store.evaluations(opened.search.id, ["train", "monitor"])
    assert [(e.candidate, e.stage) for e in found] == [(3, 0), (3, 1), (4, 0)]
    without = store.evaluations(opened.search.id, ["full"], with_scores=False)
    assert [(e.candidate, e.scores) for e in without] == [(1, None)]


def test_tasks_come_as_they_were_recorded(store: Store, opened: Coordinator) -> None:
    """Sums over tasks depend on their order in the last bit, and a resumed search on each bit."""
    names = ["zeta", "alpha", "mid"]
    for candidate in (4, 3):
        record(opened, candidate, "train", 0, Scored({n: scores(1) for n in names}, 0.5, 1.5))
    for row in store.evaluations(opened.search.id, ["train"]):
        assert list(row.scores or ()) == names


def test_means_weigh_stages_by_their_examples(store: Store, opened: Coordinator) -> None:
    record(opened, 3, "train", 0, scored(1, 1, 1))
    record(opened, 3, "train", 1, scored(0))
    record(opened, 4, "train", 0, Failed("broken"))
    record(opened, 3, "full", 0, scored(0, 0))
    tokens = 2**32 - 1 - 3 / 4
    expected = MeanRow(0.75, 4, truncated=0.25, tokens=tokens, overlong=1, failed=1)
    assert store.means(opened.search.id, "train") == {3: {"task": expected}}


def test_candidates_with_a_recipe_that_was_scored_on_train_are_found_in_all_searches(
    store: Store, opened: Coordinator
) -> None:
    sha = next(c.recipe_sha for c in store.candidates(opened.search.id) if c.id == 3)
    assert sha is not None
    record(opened, 3, "train", 0, scored(1))
    assert store.scored_on_train(sha) == []
    record(opened, 3, "full", 0, scored(1))
    with launched(store, "two") as other:
        other.open_generation(1, "proposed", 0.25, [proposal(0), proposal(1)])
        mine, theirs = (c.id for c in store.candidates(other.search.id))
        record(other, mine, "full", 0, scored(1))
        record(other, theirs, "full", 0, Failed("broken"))
        assert store.scored_on_train(sha) == [(other.search.id, mine), (opened.search.id, 3)]


def test_example_evaluations_count_what_drives_and_watches_proposals(
    store: Store, opened: Coordinator
) -> None:
    record(opened, 1, "full", 0, scored(1, 1, 1, 1))  # a baseline
    record(opened, 3, "train", 0, scored(1, 1))
    record(opened, 3, "monitor", 0, scored(1))
    record(opened, 3, "full", 0, scored(1, 1, 1, 1))
    record(opened, 3, "validation", 0, scored(1, 1, 1, 1))
    assert store.example_evaluations(opened.search.id) == 3


def test_searches_of_one_store_do_not_see_each_other(store: Store, opened: Coordinator) -> None:
    record(opened, 3, "train", 0, scored(1))
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


@pytest.mark.parametrize(
    ("text", "stored"),
    [("日本語 ✓ 𝔘", "日本語 ✓ 𝔘"), ("a\0b", "a␀b"), ("a\ud800b", "a\\ud800b"), ("a\nb", "a\nb")],
)
def test_any_text_is_stored_and_what_no_database_holds_is_shown(
    store: Store, opened: Coordinator, text: str, stored: str
) -> None:
    opened.log("note", text)
    record(opened, 3, "train", 0, Failed(text))
    opened.change({"text": text, "optimizer": {"name": text}}, text)
    assert {event[2] for event in store.events(opened.search.id)} == {stored}
    assert store.candidates(opened.search.id)[2].reason == stored
    assert store.search("one").job["text"] == text  # JSON can say it


def test_read_sees_one_state_while_another_process_writes(
    store: Store, opened: Coordinator
) -> None:
    count = select(func.count()).select_from(schema.event)
    with store.database.read() as reader:
        assert reader.execute(count).scalar() == 0
        opened.log("note", "text")
        assert reader.execute(count).scalar() == 0
        with store.database.read() as later:
            assert later.execute(count).scalar() == 1


def test_whatever_a_view_is_made_of_is_one_state(store: Store, opened: Coordinator) -> None:
    id = opened.search.id

    @consistent
    def inner(store: Store) -> tuple[int, int]:
        return len(store.events(id)), store.example_evaluations(id)

    @consistent
    def outer(store: Store, text: str) -> list[tuple[int, int]]:
        before = inner(store), (len(store.events(id)), store.example_evaluations(id))
        writer = threading.Thread(target=write, args=(text,))
        writer.start()
        writer.join()
        return [*before, inner(store)]

    def write(text: str) -> None:
        opened.log("note", text)
        record(opened, 3, "train", 0, scored(1, 1, 1, 1))

    assert outer(store, "a") == [(0, 0)] * 3
    assert inner(store) == (1, 4)
    assert outer(store, "b") == [(1, 4)] * 3
    assert len(store.events(id)) == 2


def test_what_was_read_in_a_view_is_not_read_again(store: Store, opened: Coordinator) -> None:
    id = opened.search.id

    @consistent
    def view(store: Store) -> list[bool]:
        return [
            store.search("one") is store.search("one"),
            store.generations(id, 1) is store.generations(id),
            store.candidates(id, generation=1) is store.candidates(id, generation=1),
            store.candidates(id, ids=[3]) is store.candidates(id, ids=[3]),
        ]

    assert view(store) == [True, False, True, False]
    assert store.search("one") is not store.search("one")


def test_view_that_fails_leaves_nothing_behind(store: Store, opened: Coordinator) -> None:
    opened.log("note", "text")
    with pytest.raises(StoreError, match="no search 'two'"):
        consistent(Store.search)(store, "two")
    opened.log("note", "text")
    assert len(store.events(opened.search.id)) == 2


def test_view_is_taken_again_as_a_whole(store: Store, opened: Coordinator) -> None:
    told: list[str] = []
    tries: list[int] = []
    store.database.wait_with(told.append)

    def read() -> int:
        tries[-1] += 1
        if len(tries) == 1:
            raise StoreUnavailable("the connection was lost")
        return len(store.searches())

    @consistent
    def view(store: Store) -> int:
        tries.append(0)
        return store.database.persist(read)

    assert view(store) == 1
    assert tries == [1, 1]
    assert told[-1].endswith("answers again")


def test_read_cannot_write(store: Store, opened: Coordinator) -> None:
    row = {"search_id": opened.search.id, "at": "", "kind": "", "text": ""}
    with pytest.raises(StoreError, match=r"read-?only"), store.database.read() as db:
        db.execute(insert(schema.event), row)
    opened.log("note", "the next one can")


def test_report_stays_byte_for_byte(store: Store, opened: Coordinator) -> None:
    assert store.report(3) is None
    text = '{"gain":  0.30000000000000004,\n "name": "日本語"}\n'
    opened.save_report(3, text)
    opened.save_report(3, "{}")
    assert store.report(3) == text


WRITES: dict[str, Callable[[Coordinator], object]] = {
    "open_generation": lambda c: c.open_generation(2, "proposed", 0.1, [proposal(0)]),
    "record": lambda c: record(c, 3, "train", 0, scored(1), fitness=1.0),
    "save_devices": lambda c: save_devices(c, [held("a", 16.0, 1)]),
    "rate": lambda c: c.rate({3: 1.0}),
    "change": lambda c: c.change({"k": 1}, "text"),
    "close_generation": lambda c: c.close_generation(1, {3: Outcome(1.0)}, None, warning="gap"),
    "look": lambda c: c.look("c" * 64, 3, allowed=5),
    "allow_looks": lambda c: c.allow_looks("c" * 64, 9),
    "unseal": lambda c: unseal(c, "f" * 64, "1" * 64),
    "save_readings": lambda c: c.save_readings(
        [NewReading(unseal(c, "f" * 64, "1" * 64)[1].id, "e" * 64, "1" * 64, "task", scores(1))]
    ),
    "save_report": lambda c: c.save_report(3, "{}"),
    "log": lambda c: c.log("note", "text"),
    "stop": lambda c: c.stop("enough"),
    "reopen": lambda c: c.reopen(),
    "finish": lambda c: c.finish("finished", None),
}


def test_every_writing_method_is_tried_below() -> None:
    public = {name for name in vars(Coordinator) if not name.startswith("_")}
    assert public - {"launch", "take_over", "close", "flush", "wished"} == set(WRITES)


@pytest.mark.parametrize("method", WRITES)
def test_stale_coordinator_is_refused_and_writes_nothing(
    store: Store, opened: Coordinator, method: str
) -> None:
    opened.close()  # as seen from another host: the old one is believed dead, but lives
    with Coordinator.take_over(store, "one") as successor:
        before = dump(store)
        with pytest.raises(StaleCoordinator, match="'one' was taken over"):
            WRITES[method](opened)
        refused = dump(store)
        (event,) = refused.pop("event")[len(before.pop("event")) :]
        assert refused == before
        assert event[-2] == "stale"
        assert "a late write of epoch 1, " in event[-1]
        before = dump(store)
        WRITES[method](successor)
        assert dump(store) != before


# Rows that a write adds, by table.
ADDED = {
    "open_generation": {"generation": 1, "candidate": 1},
    "record": {"evaluation": 1, "score": 1},
    "save_devices": {"device": 1},
    "change": {"event": 1},
    "look": {"ledger": 1},
    "allow_looks": {"ledger": 1, "event": 1},
    "unseal": {"ledger": 1},
    "save_readings": {"ledger": 1, "reading": 1},
    "save_report": {"export": 1},
    "log": {"event": 1},
    "close_generation": {"event": 1},
    "reopen": {"event": 1},
}


def sizes(store: Store) -> Counter[str]:
    """How many rows each table has."""
    return Counter({name: len(rows) for name, rows in dump(store).items()})


def lose_answers(store: Store, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """From now on, of so many transactions that are committed, one seems to have failed."""
    real, count = store.database.write, itertools.count(1)

    @contextmanager
    def write() -> Iterator[Connection]:
        with real() as db:
            yield db
        if next(count) % every == 0:
            raise StoreUnavailable("the connection was lost")

    monkeypatch.setattr(store.database, "write", write)


@pytest.mark.parametrize("method", WRITES)
def test_write_whose_answer_was_lost_is_done_once(
    store: Store, opened: Coordinator, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    store.database.wait_with(told.append)
    before = sizes(store)
    lose_answers(store, monkeypatch, every=2)
    opened.stop(None)  # the first one is answered
    found = WRITES[method](opened)
    assert told  # that it is tried again
    assert sizes(store) - before == Counter(ADDED.get(method, {}))
    if method == "open_generation":
        assert found == [c.id for c in store.candidates(opened.search.id) if c.generation == 2]


def test_launch_whose_answer_was_lost_is_done_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_answers(store, monkeypatch, every=2)
    store.database.probe()
    with launched(store, "one") as coordinator:
        assert store.search("one") == coordinator.search
        assert sizes(store)["search"] == sizes(store)["model"] == 1


def test_time_is_counted_once_however_often_a_write_is_tried(
    store: Store, opened: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    opened.rate({3: 0.0})
    before = store.search("one").active_seconds
    lose_answers(store, monkeypatch, every=1)
    monkeypatch.setattr(database, "_PATIENCE", 0.0)
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            opened.rate({3: 1.0})
    assert store.search("one").active_seconds - before <= time.monotonic() - started


@pytest.fixture
def transactions(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with each from now on that writes."""
    real, found = store.database.write, list[None]()

    @contextmanager
    def write() -> Iterator[Connection]:
        with real() as db:
            yield db
        found.append(None)

    monkeypatch.setattr(store.database, "write", write)
    return found


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may wait does so until something else is written."""
    monkeypatch.setattr(writes, "TOGETHER", 3600.0)


def landed(store: Store, opened: Coordinator) -> list[int]:
    """The candidates that have a result in the store."""
    return [found.candidate for found in store.evaluations(opened.search.id, ["train"])]


def test_first_result_after_a_quiet_time_is_written_at_once(
    store: Store, opened: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writes, "TOGETHER", 0.0)
    opened.record(3, "train", 0, scored(1))
    assert landed(store, opened) == [3]


@pytest.mark.usefixtures("patient")
def test_results_that_land_together_share_a_transaction_with_the_next_write(
    store: Store, opened: Coordinator, transactions: list[None]
) -> None:
    for candidate in (4, 3):
        opened.record(candidate, "train", 0, scored(1), fitness=0.5)
    assert (landed(store, opened), transactions) == ([], [])
    opened.close_generation(1, {3: Outcome(1.0)}, None)
    assert (landed(store, opened), transactions) == ([3, 4], [None])


def test_result_that_nothing_follows_is_written_all_the_same(
    store: Store, opened: Coordinator
) -> None:
    deadline = time.monotonic() + PATIENCE
    for candidate in (3, 4):
        opened.record(candidate, "train", 0, scored(1))
    while landed(store, opened) != [3, 4] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert landed(store, opened) == [3, 4]


@pytest.mark.usefixtures("patient")
def test_closing_writes_what_waits(store: Store, opened: Coordinator) -> None:
    opened.record(3, "train", 0, scored(1))
    opened.close()
    assert landed(store, opened) == [3]


@pytest.mark.usefixtures("patient")
def test_write_that_is_refused_loses_nothing_that_waits(store: Store, opened: Coordinator) -> None:
    opened.record(3, "train", 0, scored(1))
    with pytest.raises(SearchFailed, match="all 0 looks at validation are spent"):
        opened.look("c" * 64, 3, allowed=0)
    assert landed(store, opened) == []
    opened.log("note", "text")
    assert landed(store, opened) == [3]


@pytest.mark.usefixtures("patient")
def test_results_whose_answer_was_lost_are_there_once(
    store: Store, opened: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.database.wait_with(lambda text: None)
    for candidate in (3, 4):
        opened.record(candidate, "train", 0, scored(1))
    lose_answers(store, monkeypatch, every=2)
    store.database.probe()  # the first one is answered
    before = sizes(store)
    opened.log("note", "text")
    assert sizes(store) - before == Counter(evaluation=2, score=2, event=1)


def test_coordinator_that_learns_late_that_it_is_stale_is_refused_once(
    store: Store, opened: Coordinator
) -> None:
    opened.log("note", "text")  # so that the first result has to wait
    with store.database.write() as db:  # as another process does
        db.execute(update(schema.search).values(epoch=2))

    def go_on() -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            opened.record(3, "train", 0, scored(1))
            time.sleep(0.01)

    for _ in range(2):
        with pytest.raises(StaleCoordinator, match="'one' was taken over"):
            go_on()
    opened.close()
    assert [kind for _, kind, _ in store.events(opened.search.id)] == ["note", "stale"]
    assert landed(store, opened) == []


def test_coordinators_that_write_at_once_lose_nothing(store: Store) -> None:
    names, each = ("one", "two", "three"), 20

    def write(name: str) -> None:
        with Store(store.url) as own, launched(own, name) as coordinator:
            for number in range(each):
                unseal(coordinator, "f" * 64, f"{name} {number}")

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
    record(opened, 3, "train", 0, scored(1, 0))
    damage(store, schema.score.c.blob)
    with pytest.raises(
        StoreError, match="damaged: the scores of evaluation 1 on task 'task' do not"
    ):
        store.evaluations(opened.search.id, ["train"])
