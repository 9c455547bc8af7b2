"""Reading in bulk and in part: what is asked for comes, nothing else, and damage is named."""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.coordinates import Coordinate, When
from evomerge.errors import StoreError
from evomerge.fitness.results import Failed, Scored, Scores
from evomerge.recipe import sha_of
from evomerge.store import NOT_BEGUN, Coordinator, NewCandidate, NewModel, Store

COORDINATES = (
    Coordinate("a: weight", 0.5),
    Coordinate("method", 0.25, choices=2, ordered=False),
    Coordinate("ü: density", 0.1 + 0.2, when=When(1, frozenset({0, 1}))),
)
MODEL = NewModel("ja", "/models/ja", "a" * 64, {}, True)
GENOTYPE = np.array([0.1 + 0.2, 0.75, 1.0])


def scored(*values: float) -> Scored:
    """An evaluation on one task."""
    n = len(values)
    floats, flags = np.array(values, np.float32), np.zeros(n, np.bool_)
    parts = (floats, -floats, flags, np.arange(n, dtype=np.uint32), flags)
    return Scored({"task": Scores(np.arange(n, dtype=np.uint32), *parts)}, 0.5, 1.5)


def recipe(slot: int) -> tuple[dict[str, Any], str]:
    """A recipe for each slot, and its hash."""
    models = [{"model": "/models/ja", "parameters": {"weight": slot}}]
    found = {"merge_method": "linear", "models": models}
    return found, sha_of(found, {"/models/ja": "a" * 64})


def proposal(slot: int, reason: str | None = None) -> NewCandidate:
    """A candidate as an optimizer proposes it; with a reason it is infeasible."""
    if reason:
        return NewCandidate(slot, None, GENOTYPE, None, None, reason)
    return NewCandidate(slot, None, GENOTYPE + slot / 8, *recipe(slot))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a store's file."""
    return tmp_path / "store.db"


@pytest.fixture
def held(path: Path) -> Iterator[Coordinator]:
    """Of a search with a baseline (candidate 1) and two generations (2 to 4, and 5)."""
    with (
        Store(f"sqlite:///{path}", create=True) as store,
        Coordinator.launch(store, "one", 7, {}, {}, [MODEL], [], COORDINATES) as coordinator,
    ):
        baseline = NewCandidate(0, "ja", None, *recipe(0))
        coordinator.open_generation(0, "baselines", None, [baseline])
        coordinator.record(1, "full", 0, scored(1, 1, 1), fitness=1.0)
        proposals = [proposal(0), proposal(1), proposal(2, "too deep")]
        coordinator.open_generation(1, "proposed", 0.1, proposals)
        coordinator.record(2, "train", 0, scored(1, 0), fitness=0.5)
        coordinator.record(2, "train", 1, scored(0), fitness=0.5)
        coordinator.record(3, "train", 0, Failed("not finite"))
        coordinator.open_generation(2, "proposed", 0.1, [proposal(0)])
        yield coordinator


def damage(path: Path, statement: str) -> None:
    """Change a store behind its back."""
    with sqlite3.connect(path) as db:
        assert db.execute(statement).rowcount == 1
    db.close()


def test_coordinates_read_back(held: Coordinator) -> None:
    assert held.store.coordinates(held.search.id) == COORDINATES


def test_coordinates_that_were_not_written_down_are_unknown(held: Coordinator) -> None:
    with Coordinator.launch(held.store, "two", 7, {}, {}, [], []) as other:
        assert held.store.coordinates(other.search.id) == ()


def test_progress_counts_proposed_candidates_of_each_search(held: Coordinator) -> None:
    with Coordinator.launch(held.store, "two", 7, {}, {}, [], []) as other:
        other.open_generation(3, "proposed", 0.1, [proposal(0)])
        found = held.store.progress()
    one, two = found[held.search.id], found[other.search.id]
    assert one.generations == 0
    assert one.candidates == {"scored": 1, "failed": 1, "infeasible": 1, "open": 1}
    assert (two.generations, two.candidates) == (0, {"open": 1})


def test_generations_count_when_they_are_told(held: Coordinator) -> None:
    held.close_generation(0, {}, None)
    held.close_generation(2, {}, None, tell=3)
    assert held.store.progress()[held.search.id].generations == 1
    held.close_generation(1, {}, None, tell=4)
    assert held.store.progress()[held.search.id].generations == 2


def test_search_without_proposals_has_not_begun(held: Coordinator) -> None:
    with Coordinator.launch(held.store, "two", 7, {}, {}, [], []) as other:
        assert held.store.progress().get(other.search.id, NOT_BEGUN) == NOT_BEGUN
        assert held.store.fittest(other.search.id) is None


def test_fittest_is_the_earliest_of_equals_and_no_baseline(held: Coordinator) -> None:
    assert held.store.fittest(held.search.id) == 2
    held.record(5, "train", 0, scored(1, 0), fitness=0.5)
    held.flush()
    assert held.store.fittest(held.search.id) == 2
    held.rate({5: 0.75})
    assert held.store.fittest(held.search.id) == 5


def test_candidates_may_be_asked_for_in_part(held: Coordinator) -> None:
    store, search = held.store, held.search.id
    everyone = store.candidates(search)
    assert [c.id for c in everyone] == [1, 2, 3, 4, 5]
    assert [c.id for c in store.candidates(search, ids=[5, 3, 99])] == [3, 5]
    assert store.candidates(search, ids=[]) == []
    assert [c.id for c in store.candidates(search, generation=1)] == [2, 3, 4]
    assert [c.id for c in store.candidates(search, ids=[1, 2], generation=1)] == [2]
    for bare, whole in zip(store.candidates(search, with_genotypes=False), everyone, strict=True):
        assert bare.genotype is None
        assert (bare.id, bare.state, bare.reason, bare.fitness, bare.recipe_sha) == (
            (whole.id, whole.state, whole.reason, whole.fitness, whole.recipe_sha)
        )


def test_means_are_over_all_stages(held: Coordinator) -> None:
    store, search = held.store, held.search.id
    train = store.means(search, "train")
    assert (train[2]["task"].mean, train[2]["task"].n) == (pytest.approx(1 / 3), 3)
    assert store.means(search, "train", [2, 3]) == train
    assert store.means(search, "train", [3]) == {}


def test_recipes_are_those_of_feasible_candidates(held: Coordinator) -> None:
    found = held.store.recipes(held.search.id)
    assert {id: json.loads(text) for id, text in found.items()} == {
        1: recipe(0)[0], 2: recipe(0)[0], 3: recipe(1)[0], 5: recipe(0)[0],
    }  # fmt: skip


def test_scores_come_in_the_order_they_were_recorded_in(held: Coordinator) -> None:
    tasks = {name: scored(1).tasks["task"] for name in ("z", "a", "m")}
    held.record(5, "train", 0, Scored(tasks, 0.0, 0.0))
    held.flush()
    found = held.store.evaluations(held.search.id, ["train"])[-1].scores
    assert found is not None
    assert list(found) == ["z", "a", "m"]


def test_read_scores_cannot_be_changed_by_mistake(held: Coordinator) -> None:
    scores = (held.store.evaluations(held.search.id, ["train"])[0].scores or {})["task"]
    with pytest.raises(ValueError, match="read-only"):
        scores.scores[0] = 1


def test_damage_stops_only_what_reads_it(held: Coordinator, path: Path) -> None:
    damage(path, "UPDATE candidate SET genotype = zeroblob(24) WHERE id = 3")
    damage(path, "UPDATE score SET blob = zeroblob(30) WHERE evaluation_id = 2")
    store, search = held.store, held.search.id
    coordinates, scores = (
        "the coordinates of candidate 3",
        "the scores of evaluation 2 on task 'task'",
    )
    with pytest.raises(StoreError, match=f"{coordinates} do not match their hash"):
        store.candidates(search)
    with pytest.raises(StoreError, match=f"{scores} do not match their hash"):
        store.evaluations(search, ["train"])
    assert len(store.candidates(search, with_genotypes=False)) == 5
    assert len(store.evaluations(search, ["train"], with_scores=False)) == 3
    damage(path, """UPDATE candidate SET recipe = replace(recipe, '1', '2') WHERE id = 3""")
    assert store.recipe(2) == recipe(0)[0]
    with pytest.raises(StoreError, match="the recipe of candidate 3 does not match its hash"):
        store.recipes(search)
    assert store.means(search, "train")[2]["task"].n == 3


def test_a_document_that_is_no_json_is_named_as_damage(held: Coordinator, path: Path) -> None:
    with sqlite3.connect(path) as damaged:
        damaged.execute("UPDATE search SET job = '{'")
    damaged.close()
    with pytest.raises(StoreError, match="is damaged: a document in it is no JSON"):
        held.store.search("one")
