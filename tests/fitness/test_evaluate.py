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
    model = str(tiny.ZOO / "ja")
    found = score_alone(model, [Task.open(file) for file in files], "validation", ENGINE)
    assert list(found) == ["ja_list_ops", "ja_transcription"]
    for file, scores in zip(files, found.values(), strict=True):
        alone = evaluate_model(model, Task.open(file), "validation", ENGINE).document()
        assert (scores.mean, len(scores)) == (alone["score"], alone["n"])
        assert scores.examples.tolist() == list(range(12))


def test_test_split_is_scored_with_leave_for_every_task(files: list[Path]) -> None:
    tasks = [Task.open(file) for file in files]
    leaves = {task.name: Unsealed(task.identity("test")) for task in tasks}
    found = score_alone(str(tiny.ZOO / "ja"), tasks, "test", ENGINE, leaves)
    assert {name: len(scores) for name, scores in found.items()} == dict.fromkeys(leaves, 16)


def test_test_split_without_leave_is_sealed_before_a_model_is_loaded(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [Task.open(file) for file in files]
    monkeypatch.setattr(evaluate, "build", lambda *_: pytest.fail("a model is loaded"))
    some = {tasks[0].name: Unsealed(tasks[0].identity("test"))}
    for leaves in (None, {}, some, {task.name: Unsealed("0" * 64) for task in tasks}):
        with pytest.raises(SealedError, match="the test split is sealed"):
            score_alone(str(tiny.ZOO / "ja"), tasks, "test", ENGINE, leaves)


def test_a_limit_takes_the_first_examples(files: list[Path]) -> None:
    task, told = Task.open(files[1]), []
    found = evaluate_model(
        str(tiny.ZOO / "ja"), task, "train", ENGINE, 5, lambda done, of: told.append((done, of))
    )
    assert found.items == task.examples("train")[:5]
    assert found.document()["n"] == len(found.verdicts) == 5
    assert told == [(0, 5)]


def test_samples_say_what_was_asked_and_what_it_was_worth(
    files: list[Path], tmp_path: Path
) -> None:
    text = files[1].read_text(encoding="utf-8").replace("teacher_forced: true", "")
    file = tmp_path / "task.yaml"
    data = str(files[1].parent / "data")
    file.write_text(text.replace("data/", f"{data}/"), encoding="utf-8")
    found = evaluate_model(str(tiny.ZOO / "ja"), Task.open(file), "validation", ENGINE)
    samples = list(found.samples())
    for number, (sample, item) in enumerate(zip(samples, found.items, strict=True), 1):
        assert (sample["number"], sample["prompt"]) == (number, item.prompt)
        assert sample["target"] == item.target
        assert sample["score"] == float(sample["replies"] == (item.target,))
    assert sum(sample["score"] for sample in samples) > 0
    assert found.document()["tokens"] == sum(s["tokens"] for s in samples) / len(samples)
