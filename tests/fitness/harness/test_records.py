"""Splits of lm-eval's tasks as train, validation and test, and where worked examples come from."""

from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import SealedError, TaskError
from evomerge.fitness.task import Task
from tests.fitness.harness.sums import write

THREE_ALIKE = {"training_split": "train", "validation_split": "train", "test_split": "train"}


@pytest.mark.parametrize(
    ("splits", "source", "whole"),
    [
        ({"test_split": None}, "val", "train"),
        ({"validation_split": None}, "test", "train"),
        ({"validation_split": "train"}, "test", "train"),
        ({"validation_split": None, "test_split": None}, "train", None),
        (THREE_ALIKE, "train", None),
        ({"training_split": None}, "val", None),
        ({"training_split": None, "validation_split": None}, "test", None),
    ],
)
def test_where_splits_are_missing_one_is_divided_and_that_is_said(
    tmp_path: Path, splits: dict[str, Any], source: str, whole: str | None
) -> None:
    task = Task.open(write(tmp_path, n=50, **splits))
    _, note = task.notes
    assert f"'{source}'" in note
    assert ("warning" in note) == (whole is None)
    sizes = task.check_splits()
    assert sum(sizes.values()) == (50 if whole is None else 100)
    assert sizes["train"] > 20
    starts = {"train": "", "val": "1", "test": "2"}
    numbers = [str(item.record["question"]) for item in task.examples("validation")]
    assert {number[0] for number in numbers if len(number) > 6} <= {starts[source]}


def test_the_one_file_of_a_task_is_its_train(tmp_path: Path) -> None:
    changes = {"training_split": None, "validation_split": None, "test_split": "train"}
    path = write(tmp_path, n=50, dataset_kwargs={"data_files": "train.jsonl"}, **changes)
    assert sum(Task.open(path).check_splits().values()) == 50


def test_too_few_records_to_divide_are_refused(tmp_path: Path) -> None:
    task = Task.open(write(tmp_path, n=1, validation_split=None))
    with pytest.raises(TaskError, match="of its 1 records none falls into"):
        task.check_splits()


def test_the_test_split_is_sealed(tmp_path: Path) -> None:
    task = Task.open(write(tmp_path))
    with pytest.raises(SealedError, match="the test split is sealed"):
        task.examples("test")


def shown(task: Task, split: Any) -> list[set[str]]:
    """The questions that each prompt shows before its own."""
    prompts = [str(item.prompt) for item in task.examples(split)]
    return [
        {line.removeprefix("Question: ") for line in prompt.splitlines() if "Question" in line}
        - {str(item.record["question"])}
        for prompt, item in zip(prompts, task.examples(split), strict=True)
    ]


def questions(task: Task, split: Any) -> set[str]:
    return {str(item.record["question"]) for item in task.examples(split)}


@pytest.mark.parametrize("sampler", ["default", "first_n"])
@pytest.mark.parametrize(
    "splits",
    [
        {"fewshot_split": "train"},
        {},
        {"validation_split": None},
        {"training_split": None, "validation_split": None},
        {"training_split": None, "validation_split": None, "fewshot_split": "test"},
        {"validation_split": None, "test_split": None},
    ],
)
def test_worked_examples_are_of_train_and_never_the_item_itself(
    tmp_path: Path, sampler: str, splits: dict[str, Any]
) -> None:
    path = write(tmp_path, num_fewshot=3, fewshot_config={"sampler": sampler}, **splits)
    task = Task.open(path)
    train = questions(task, "train")
    for split in ("train", "validation"):
        for examples in shown(task, split):
            assert len(examples) == 3  # the item itself would not be counted
            assert examples <= train


def test_prompts_are_the_same_however_often_and_in_what_order_splits_are_read(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, num_fewshot=2, fewshot_split="train")
    one, other = Task.open(path), Task.open(path)
    first = [one.content(split) for split in ("train", "validation", "test")]
    assert first[::-1] == [other.content(split) for split in ("test", "validation", "train")]


@pytest.mark.parametrize(
    "splits",
    [
        {"fewshot_split": "test"},
        {"fewshot_split": "val"},
        {"fewshot_split": "test", "validation_split": None},
    ],
)
def test_worked_examples_of_what_is_scored_are_refused(
    tmp_path: Path, splits: dict[str, Any]
) -> None:
    path = write(tmp_path, num_fewshot=2, **splits)
    with pytest.raises(TaskError, match="worked examples come from train alone"):
        Task.open(path)
    assert Task.open(write(tmp_path, num_fewshot=0, **splits)).name == "sums"


def test_worked_examples_may_be_written_out_or_have_a_split_of_their_own(tmp_path: Path) -> None:
    samples = [{"question": "one and one", "answer": "two"}]
    task = Task.open(write(tmp_path, num_fewshot=1, fewshot_config={"samples": samples}))
    assert shown(task, "validation")[0] == {"one and one"}
    files = {"train": "train.jsonl", "val": "val.jsonl", "dev": "test.jsonl"}
    changes = {"dataset_kwargs": {"data_files": files}, "test_split": None, "fewshot_split": "dev"}
    task = Task.open(write(tmp_path, num_fewshot=1, **changes))
    assert all(question.startswith("20") for (question,) in shown(task, "train"))
