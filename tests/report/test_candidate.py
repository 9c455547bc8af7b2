"""A candidate's page says what the store holds of it, and how it stands against each parent."""

import dataclasses
import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.errors import StoreError
from evomerge.recipe import Recipe
from evomerge.report import candidate as reported
from evomerge.report import compare, failures, history, population
from evomerge.report.coefficients import Coefficients, coefficients, path
from evomerge.search import summary
from evomerge.store import Store
from tests.running import query, url

NAMES = {"/a": "a", "/b": "b", "/base": "base"}


@pytest.fixture(scope="module")
def store(raced: Path) -> Iterator[Store]:
    with Store(url(raced)) as opened:
        yield opened


@pytest.fixture(scope="module")
def everybody(store: Store) -> dict[int, reported.Candidate]:
    rows = store.candidates(store.search("tiny").id, with_genotypes=False)
    return {row.id: reported.candidate(store, "tiny", row.id) for row in rows}


def test_every_candidate_is_described(
    store: Store, everybody: dict[int, reported.Candidate]
) -> None:
    found = everybody
    states = {one.member.state for one in found.values()}
    assert states == {"scored", "failed"}
    ranked = sorted((one.place, id) for id, one in found.items() if one.place is not None)
    order = [row["id"] for row in summary.top(store, "tiny", None)]
    assert [place for place, _ in ranked] == [*range(1, len(ranked) + 1)]
    assert [id for _, id in ranked] == order[: len(ranked)]
    assert {one.of for one in found.values()} == {len(ranked)}
    for one in found.values():
        if one.member.state == "failed":
            assert (one.tasks, one.comparisons, one.place) == ((), (), None)
            assert [made.reason for made in one.evaluations] == ["the dice say so"]
        assert one.recipe is not None
        assert len(one.genotype or ()) == (0 if one.member.generation == 0 else 16)


def test_roles_are_those_of_the_verdict(
    store: Store, everybody: dict[int, reported.Candidate]
) -> None:
    found, verdict = everybody, store.search("tiny").verdict
    assert verdict is not None
    assert [id for id, one in found.items() if one.winner] == [verdict["winner"]]
    assert {id for id, one in found.items() if one.finalist} == set(verdict["finalists"])
    assert sum(one.incumbent for one in found.values()) == 1


def test_it_is_compared_with_each_parent_on_the_examples_that_both_have(
    store: Store, everybody: dict[int, reported.Candidate]
) -> None:
    row = store.search("tiny")
    parents = {c.label: c.id for c in store.candidates(row.id, generation=0)}
    scores = {
        (e.candidate, e.purpose, e.stage): e.scores
        for e in store.evaluations(row.id, ("train", "full"))
    }
    compared = 0
    for id, one in everybody.items():
        if one.member.generation == 0 or one.finalist or not one.comparisons:
            continue
        ours = np.concatenate(
            [
                scores[id, "train", i]["ja_list_ops"].scores
                for i in range(3)
                if scores.get((id, "train", i))
            ]
        )
        positions = np.concatenate(
            [
                scores[id, "train", i]["ja_list_ops"].examples
                for i in range(3)
                if scores.get((id, "train", i))
            ]
        )
        assert [c.parent for c in one.comparisons] == ["ja", "ops", "base"]
        for comparison in one.comparisons:
            theirs = scores[parents[comparison.parent], "full", 0]
            assert theirs is not None
            same = theirs["ja_list_ops"].only(positions).scores
            assert (comparison.split, comparison.n) == ("train", len(ours))
            assert comparison.ours == pytest.approx(ours.mean())
            assert comparison.theirs == pytest.approx(same.mean())
            assert comparison.gain == pytest.approx(ours.mean() - same.mean())
            assert comparison.interval[0] <= comparison.gain <= comparison.interval[1]
            assert 0 < comparison.p_value <= 1
            compared += 1
    assert compared > 20


def test_the_winner_is_compared_on_validation_as_in_the_verdict(store: Store) -> None:
    row = store.search("tiny")
    assert row.verdict is not None
    found = reported.candidate(store, "tiny", row.verdict["winner"])
    (own,) = (one for one in found.comparisons if one.split == "validation")
    gain = row.verdict["validation_gain"]
    assert own.gain == pytest.approx(gain["value"])
    assert own.n == gain["n"]
    assert own.p_value == pytest.approx(gain["p_value"])
    assert own.interval == pytest.approx(tuple(gain["interval"]), abs=0.1)


def test_a_comparison_is_the_same_each_time(store: Store) -> None:
    assert reported.candidate(store, "tiny", 20) == reported.candidate(store, "tiny", 20)


def test_examples_that_belong_together_are_one_in_a_comparison(
    raced: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = reported.candidate(store, "tiny", 20).comparisons[0]
    row = store.search("tiny")
    (one,) = store.evaluations(row.id, ("train",), ids=[20])[:1]
    assert one.scores is not None
    n = store.splits(row.id)["ja_list_ops", "train"].n
    groups = {"ja_list_ops": np.zeros(n, np.int64)}
    monkeypatch.setattr(reported, "groups_of", lambda *_: groups)
    together = reported.candidate(store, "tiny", 20).comparisons[0]
    assert together.gain == alone.gain
    assert together.p_value == 1.0  # a single group says nothing


def test_evaluations_say_what_they_took_and_whose_they_are(
    store: Store, everybody: dict[int, reported.Candidate]
) -> None:
    found = everybody
    rows = query(
        Path(store.url.removeprefix("sqlite:///")),
        "SELECT candidate_id, purpose, stage, seconds, copied_from, device FROM evaluation",
    )
    said = {
        (id, e.purpose, e.stage, e.seconds, e.copied_from, e.device)
        for id, one in found.items()
        for e in one.evaluations
    }
    assert said == set(rows)


def test_the_recipe_is_one_that_can_be_merged(store: Store) -> None:
    found = reported.candidate(store, "tiny", 20)
    assert found.recipe is not None
    recipe = Recipe.from_yaml(found.recipe)
    assert recipe.to_dict() == store.recipe(20)
    assert found.coefficients is not None
    assert found.coefficients.rows == ("ja", "ops")
    assert found.coefficients.columns[0] == "embed_tokens"
    assert found.coefficients.columns[1:7] == tuple(f"layer {i}" for i in range(6))
    assert found.path is None


@pytest.mark.slow
def test_a_stack_of_layers_has_a_path(stacked: Path) -> None:
    with Store(url(stacked)) as opened:
        rows = opened.candidates(opened.search("tiny").id, with_genotypes=False)
        found = [reported.candidate(opened, "tiny", row.id) for row in rows if row.generation]
    paths = [one.path for one in found if one.path is not None]
    assert len(paths) > 10
    for one in found:
        if one.path is not None and one.member.objectives is not None:
            assert len(one.path) == -one.member.objectives["layers"]
            assert {source for source, _ in one.path} <= {"ja", "ops"}
        if one.member.state == "infeasible":
            assert (one.recipe, one.coefficients, one.path) == (None, None, None)


def test_stores_of_earlier_versions_have_candidates(old: Path) -> None:
    with Store(url(old)) as opened:
        for name in ("finished", "stopped", "failed"):
            row = opened.search(name)
            rows = opened.candidates(row.id, with_genotypes=False)
            winner = (row.verdict or {}).get("winner")
            few = [c for c in rows if c.slot == 0 or c.state == "failed" or c.id == winner]
            found = [reported.candidate(opened, name, c.id) for c in few]
            assert [one.member.id for one in found if one.exported] == [winner] * (
                winner is not None
            )
            assert any(one.comparisons for one in found)
            assert all(reported.samples(opened, name, c.id) == () for c in few)


def test_an_unknown_candidate_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="search 'tiny' has no candidate 999"):
        reported.candidate(store, "tiny", 999)
    with pytest.raises(StoreError, match="search 'tiny' has no candidate 999"):
        reported.samples(store, "tiny", 999)


def recipe(text: str) -> Recipe:
    return Recipe.from_dict(yaml.safe_load(text))


def test_coefficients_of_whole_models_have_one_column() -> None:
    found = recipe("""
        merge_method: task_arithmetic
        base_model: /base
        models:
        - {model: /a, parameters: {weight: 0.25}}
        - {model: /base}
        - {model: /b, parameters: {weight: 0.75}}
        """)
    assert coefficients(found, NAMES) == Coefficients(
        "weight", ("a", "b"), ("all",), ((0.25,), (0.75,))
    )


def test_coefficients_of_one_model_hold_wherever_others_differ() -> None:
    found = coefficients(
        recipe("""
        merge_method: linear
        models:
        - {model: /a, parameters: {weight: 1}}
        - model: /b
          parameters:
            weight:
            - {filter: model.layers.0.mlp., value: 0.1}
            - {filter: model.layers.0., value: 0.2}
            - {filter: model.layers.10., value: 0.3}
        """),
        NAMES,
    )
    assert found is not None
    assert found.columns == ("layer 0 mlp", "layer 0", "layer 10", "rest")
    assert found.values == ((1.0, 1.0, 1.0, 1.0), (0.1, 0.2, 0.3, None))


def test_a_gradient_is_read_where_its_numbers_stand() -> None:
    found = coefficients(
        recipe("""
        merge_method: slerp
        base_model: /a
        models: [{model: /a}, {model: /b}]
        parameters: {t: [0, 0.5, 1]}
        """),
        NAMES,
    )
    assert found == Coefficients(
        "t", ("b",), ("rest", "rest at 50%", "rest at 100%"), ((0.0, 0.5, 1.0),)
    )


def test_a_method_without_shares_has_no_coefficients() -> None:
    text = "{merge_method: model_stock, base_model: /base, models: [{model: /a}, {model: /b}]}"
    assert coefficients(recipe(text), NAMES) is None


def test_layers_that_several_are_merged_into_have_all_their_names() -> None:
    found = recipe("""
        merge_method: linear
        slices:
        - sources: [{model: /a, layer_range: [0, 2]}]
        - sources:
          - {model: /a, layer_range: [2, 3], parameters: {weight: 0.5}}
          - {model: /b, layer_range: [2, 3], parameters: {weight: 0.25}}
        - sources:
          - model: /b
            layer_range: [5, 6]
            parameters: {weight: [{filter: model.layers., value: 1.0}, {value: 0.0}]}
          - model: /a
            layer_range: [5, 6]
            parameters: {weight: [{filter: model.layers., value: 0.0}, {value: 1.0}]}
        parameters: {weight: 1.0, normalize: false}
        """)
    assert path(found, NAMES) == (("a", 0), ("a", 1), ("a + b", 2), ("b", 5))
    assert coefficients(found, NAMES) == Coefficients(
        "weight", ("a", "b"), ("layer 2",), ((0.5,), (0.25,))
    )


def test_what_was_read_of_test_is_nowhere(old: Path, tmp_path: Path) -> None:
    """The report of an exported search is given numbers that cannot be mistaken."""
    copied = tmp_path / "store.db"
    shutil.copyfile(old, copied)
    with sqlite3.connect(copied) as db:
        (report,) = db.execute("SELECT report FROM export").fetchone()
        document = json.loads(report)
        document["estimates"]["test"] = {"value": 0.918273645, "interval": [0.9182, 0.9183]}
        db.execute("UPDATE export SET report = ?", (json.dumps(document),))
    db.close()
    with Store(url(copied)) as opened:
        search = opened.search("finished")
        rows = opened.candidates(search.id, with_genotypes=False)
        assert search.verdict is not None
        found: list[Any] = [
            history.history(opened, "finished"),
            population.population(opened, "finished"),
            *population.front(opened, "finished"),
            population.lineage(opened, "finished"),
            *failures.failures(opened, "finished"),
            compare.searches(opened, ["finished", "stopped"]),
            *(reported.candidate(opened, "finished", row.id) for row in rows if row.slot == 0),
            reported.candidate(opened, "finished", search.verdict["winner"]),
        ]
        assert summary.show(opened, "finished")["estimates"]["test"]["value"] == 0.918273645
    text = json.dumps([dataclasses.asdict(one) for one in found])
    assert "0.9182" not in text
    assert '"test"' not in text
