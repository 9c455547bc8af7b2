"""A task by itself: what it asks, how many items there are, and nothing of its test split."""

import json
from pathlib import Path

import pytest

from evomerge.errors import TaskError
from evomerge.fitness.task import Task
from evomerge.search.check import check_task
from tests import tiny


def test_the_first_item_of_train_stands_as_a_model_is_asked_it(tmp_path: Path) -> None:
    path = tiny.write_task(tmp_path / "task")
    found, first = check_task(path), Task.open(path).examples("train")[0]
    assert found["first"]["prompt"] == first.prompt
    assert found["first"]["target"] == first.target
    assert {split: listed["items"] for split, listed in found["splits"].items()} == {
        "train": 24,
        "validation": 12,
        "test": 16,
    }


def test_a_conversation_stands_turn_by_turn(tmp_path: Path) -> None:
    path = tiny.write_task(tmp_path / "task")
    text = path.read_text(encoding="utf-8").replace("teacher_forced: true", "")
    path.write_text(f"{text}\nchat: true\nsystem: Be brief.\n", encoding="utf-8")
    turns = check_task(path)["first"]["prompt"]
    assert [turn["role"] for turn in turns] == ["system", "user"]
    assert turns[0]["text"] == "Be brief."


def test_its_splits_are_a_manifest(tmp_path: Path) -> None:
    path = tiny.write_task(tmp_path / "task")
    manifest = {"splits": check_task(path)["splits"]}
    (path.parent / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    check_task(path)
    validation = path.parent / "data" / "validation.jsonl"
    lines = validation.read_text(encoding="utf-8").splitlines(keepends=True)
    validation.write_text("".join(lines[1:]), encoding="utf-8")
    with pytest.raises(TaskError, match="validation has 11 items"):
        check_task(path)


def test_splits_that_overlap_are_refused(tmp_path: Path) -> None:
    path = tiny.write_task(tmp_path / "task")
    data = path.parent / "data"
    (data / "test.jsonl").write_bytes((data / "train.jsonl").read_bytes())
    with pytest.raises(TaskError, match="splits must not overlap"):
        check_task(path)
    before = sorted(path.parent.iterdir())
    with pytest.raises(TaskError, match="splits must not overlap"):
        check_task(path, seal=True)
    assert sorted(path.parent.iterdir()) == before


def test_a_seal_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tiny.write_task(tmp_path / "task")
    (path.parent / "task.sealed.json").mkdir()
    before = sorted(path.parent.iterdir())
    with pytest.raises(TaskError, match=r"task\.sealed\.json' cannot be written"):
        check_task(path, seal=True)
    assert sorted(path.parent.iterdir()) == before
