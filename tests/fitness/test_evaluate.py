"""A model folder on all of a split: several tasks at once, the test split with leave alone."""

from pathlib import Path

import pytest

from evomerge.errors import SealedError
from evomerge.fitness import evaluate
from evomerge.fitness.evaluate import evaluate_model, score_alone
from evomerge.fitness.task import Task, Unsealed
from evomerge.job import Engine
from tests import tiny

ENGINE = Engine(device="cpu", threads=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small task files."""
    folder = tmp_path_factory.mktemp("tasks")
    reading = tiny.write_task(folder / "reading", source="ja_transcription")
    return [tiny.write_task(folder / "task"), reading]


def test_several_tasks_score_as_each_alone(files: list[Path]) -> None:
    model = tiny.ZOO / "ja"
    found = score_alone(model, [Task.open(file) for file in files], "validation", ENGINE)
    assert list(found) == ["ja_list_ops", "ja_transcription"]
    for file, scores in zip(files, found.values(), strict=True):
        alone = evaluate_model(model, file, "validation", ENGINE)
        assert (scores.mean, len(scores)) == (alone["score"], alone["n"])
        assert scores.examples.tolist() == list(range(12))


def test_test_split_is_scored_with_leave_for_every_task(files: list[Path]) -> None:
    tasks = [Task.open(file) for file in files]
    leaves = {task.name: Unsealed(task.identity("test")) for task in tasks}
    found = score_alone(tiny.ZOO / "ja", tasks, "test", ENGINE, leaves)
    assert {name: len(scores) for name, scores in found.items()} == dict.fromkeys(leaves, 16)


def test_test_split_without_leave_is_sealed_before_a_model_is_loaded(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [Task.open(file) for file in files]
    monkeypatch.setattr(evaluate, "build", lambda *_: pytest.fail("a model is loaded"))
    some = {tasks[0].name: Unsealed(tasks[0].identity("test"))}
    for leaves in (None, {}, some, {task.name: Unsealed("0" * 64) for task in tasks}):
        with pytest.raises(SealedError, match="the test split is sealed"):
            score_alone(tiny.ZOO / "ja", tasks, "test", ENGINE, leaves)
