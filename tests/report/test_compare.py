"""Recipes and searches side by side."""

import sqlite3
from pathlib import Path

import pytest

from evomerge.errors import RecipeError, StoreError
from evomerge.report import compare
from evomerge.search import summary
from evomerge.store import Store
from tests.report.conftest import conducted
from tests.running import url

OURS = """
merge_method: linear
models:
- {model: /a, parameters: {weight: 0.25}}
- {model: /b, parameters: {weight: 0.5}}
"""


def test_recipes_differ_by_what_they_say_not_by_how_it_is_spelt() -> None:
    spelt = """
models:
  - model: /a
    parameters: {weight: 2.5e-1}
  - model: /b
    parameters:
      weight: 0.50
merge_method: linear
"""
    assert compare.recipes(OURS, OURS) == ""
    assert compare.recipes(OURS, spelt).count("\n-") <= 1  # the order of keys stays
    found = compare.recipes(OURS, OURS.replace("0.25", "0.75"), ("candidate 1", "candidate 2"))
    lines = found.splitlines()
    assert lines[:2] == ["--- candidate 1", "+++ candidate 2"]
    assert [line for line in lines[2:] if line[0] in "+-"] == [
        "-    weight: 0.25",
        "+    weight: 0.75",
    ]


def test_what_is_no_recipe_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="theirs"):
        compare.recipes(OURS, "merge_method: nonsense\nmodels: []")


@pytest.fixture(scope="module")
def both(raced: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The search by race, and one by chance in the same store."""
    folder = tmp_path_factory.mktemp("both")
    with sqlite3.connect(raced) as source, sqlite3.connect(folder / "store.db") as target:
        source.backup(target)
    target.close()
    source.close()
    return conducted(
        folder,
        name="by-chance",
        optimizer={"name": "random", "population": 6},
        budget={"candidates": 12},
    )


def test_searches_stand_side_by_side_with_what_show_says(both: Path) -> None:
    with Store(url(both)) as store:
        found = compare.searches(store, ["tiny", "by-chance"])
        for one in found.searches:
            shown = summary.show(store, one.search)
            assert one.best == shown["best"]["candidate"]
            assert one.promoted == shown["promoted"]
            assert one.p_value == shown["validation_gain"]["p_value"]
            assert one.estimates["shrunk"] is not None
            assert one.estimates["shrunk"].value == shown["estimates"]["shrunk"]["value"]
            assert one.best_parent in shown["parents"]
            assert "test" not in one.estimates
    assert [one.optimizer for one in found.searches] == ["cma-es", "random"]
    assert [one.candidates for one in found.searches] == [40, 12]
    assert found.same_questions


def test_winners_that_looked_at_the_same_validation_are_compared_in_pairs(both: Path) -> None:
    with Store(url(both)) as store:
        (there,) = compare.searches(store, ["tiny", "by-chance"]).differences
        (back,) = compare.searches(store, ["by-chance", "tiny"]).differences
        scores = [
            summary.show(store, n)["best"]["score"]["validation"] for n in ("tiny", "by-chance")
        ]
    assert there.n == 12
    assert there.gain == pytest.approx(scores[0]["value"] - scores[1]["value"])
    assert (back.gain, back.p_value) == pytest.approx((-there.gain, there.p_value))
    assert there.interval[0] <= there.gain <= there.interval[1]


def test_searches_that_ask_otherwise_are_not_compared(old: Path, raced: Path) -> None:
    with Store(url(old)) as store:
        found = compare.searches(store, ["finished", "stopped", "failed"])
    assert [one.state for one in found.searches] == ["finished", "stopped", "failed"]
    assert found.differences == ()  # there is one winner
    assert found.searches[2].best is None


def test_an_unknown_search_is_refused(raced: Path) -> None:
    with Store(url(raced)) as store, pytest.raises(StoreError, match="no search 'other'"):
        compare.searches(store, ["tiny", "other"])
