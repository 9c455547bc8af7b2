"""A validation score that is asked for from outside is a look, if a search proposed the model."""

import shutil
from pathlib import Path

import pytest

from evomerge.errors import SearchBusy, SearchFailed
from evomerge.fitness.task import Task
from evomerge.merge.disk import RECIPE
from evomerge.recipe import Recipe
from evomerge.search.looks import reserve
from evomerge.store import CandidateRow, Coordinator, Store
from tests import tiny
from tests.running import url


@pytest.fixture
def store(searched: Path, tmp_path: Path) -> str:
    """A store of its own with the finished search, all of whose looks are spent."""
    return url(Path(shutil.copyfile(searched, tmp_path / "store.db")))


@pytest.fixture
def task(searched: Path) -> Task:
    """A task of that search."""
    return Task.open(searched.parent / "task" / "task.yaml")


def proposed(store: str) -> list[CandidateRow]:
    with Store(store) as opened:
        found = opened.candidates(opened.search("tiny").id)
    return [candidate for candidate in found if candidate.label is None]


def looked(store: str) -> set[str]:
    with Store(store) as opened:
        return {row.subject for row in opened.ledger() if row.kind == "look"}


def merged(store: str, candidate: CandidateRow, folder: Path) -> str:
    """A folder that says that it was merged by a candidate's recipe."""
    folder.mkdir()
    with Store(store) as opened:
        recipe = Recipe.from_dict(opened.recipe(candidate.id) or {})
    (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    return str(folder)


def test_another_look_than_those_of_the_finals_is_refused(
    store: str, task: Task, tmp_path: Path
) -> None:
    before = looked(store)
    unseen = next(c for c in proposed(store) if f"tiny/{c.id}" not in before)
    with pytest.raises(SearchFailed, match=f"validation of .* are spent.*{unseen.id}"):
        reserve(store, merged(store, unseen, tmp_path / "out"), task)
    assert looked(store) == before


def test_a_finalist_was_looked_at_and_costs_nothing(store: str, task: Task, tmp_path: Path) -> None:
    before = looked(store)
    seen = next(c for c in proposed(store) if f"tiny/{c.id}" in before)
    assert reserve(store, merged(store, seen, tmp_path / "out"), task) == ["tiny"]
    assert looked(store) == before


def test_a_running_search_is_not_disturbed(store: str, task: Task, tmp_path: Path) -> None:
    folder = merged(store, proposed(store)[0], tmp_path / "out")
    with (
        Store(store) as opened,
        Coordinator.take_over(opened, "tiny"),
        pytest.raises(SearchBusy),
    ):
        reserve(store, folder, task)


def test_models_that_no_search_proposed_are_free(store: str, task: Task, tmp_path: Path) -> None:
    candidate = proposed(store)[0]
    foreign = merged(store, candidate, tmp_path / "foreign")
    recipe = Recipe.from_yaml((Path(foreign) / RECIPE).read_text(encoding="utf-8"))
    other = {
        "merge_method": "linear",
        "models": [
            {"model": name, "parameters": {"weight": 0.123}} for name in recipe.model_names()
        ],
    }
    (Path(foreign) / RECIPE).write_text(Recipe.from_dict(other).to_yaml(), encoding="utf-8")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / RECIPE).write_text("no recipe", encoding="utf-8")
    for model in (foreign, str(tiny.ZOO / "ja"), str(tmp_path / "odd"), "someone/model"):
        assert reserve(store, model, task) == []
    assert reserve(url(tmp_path / "none.db"), foreign, task) == []


def test_validation_of_another_task_is_no_look(store: str, tmp_path: Path) -> None:
    unseen = next(c for c in proposed(store) if f"tiny/{c.id}" not in looked(store))
    other = Task.open(tiny.write_task(tmp_path / "other", validation=5))
    assert reserve(store, merged(store, unseen, tmp_path / "out"), other) == []
