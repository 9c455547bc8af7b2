"""Task files of lm-eval: what they ask, how their files become splits, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import TaskError
from evomerge.fitness.task import Example, Task
from tests import tiny

FILE: dict[str, Any] = {
    "task": "sums",
    "dataset_path": "json",
    "dataset_kwargs": {
        "data_files": {"train": "train.jsonl", "val": "val.jsonl", "test": "test.jsonl"}
    },
    "training_split": "train",
    "validation_split": "val",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "Question: {{ question }}\nAnswer:",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["\n", "Question:"], "max_gen_toks": 9, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}


def write(folder: Path, **changes: Any) -> Path:
    """The file with keys replaced, None leaving one out, beside the files of its three splits."""
    for number, split in enumerate(("train", "val", "test")):
        start = 1000 * number
        found = [{"question": f"{n}+{n}", "answer": 2 * n} for n in range(start, start + 50)]
        tiny.write_jsonl(folder / f"{split}.jsonl", found)
    path = folder / "sums.yaml"
    data = {key: value for key, value in {**FILE, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def test_prompts_answers_and_generation_are_as_there(tmp_path: Path) -> None:
    task = Task.open(write(tmp_path, description="Add.\n"))
    assert task.name == "sums"
    assert task.examples("validation")[3] == Example("Add.\nQuestion: 1003+1003\nAnswer:", " 2006")
    assert task.settings.generate.max_new_tokens == 9
    assert task.settings.generate.stop == ("\n", "Question:")
    assert task.check_splits() == {"train": 50, "validation": 50, "test": 50}
    (note,) = task.notes
    assert "exact_match" in note


def test_what_a_file_leaves_out_is_as_there(tmp_path: Path) -> None:
    changes = {"generation_kwargs": None, "metric_list": None, "output_type": None}
    settings = Task.open(write(tmp_path, **changes)).settings
    assert (settings.generate.max_new_tokens, settings.generate.stop) == (256, ("\n\n",))


@pytest.mark.parametrize(
    ("splits", "source", "train"),
    [
        ({"test_split": None}, "val.jsonl", "train.jsonl"),
        ({"validation_split": None}, "test.jsonl", "train.jsonl"),
        ({"validation_split": "train"}, "test.jsonl", "train.jsonl"),
        ({"validation_split": None, "test_split": None}, "train.jsonl", None),
        ({"training_split": None}, "val.jsonl", None),
        ({"training_split": None, "validation_split": None}, "test.jsonl", None),
    ],
)
def test_where_splits_are_missing_a_file_is_divided_and_that_is_said(
    tmp_path: Path, splits: dict[str, Any], source: str, train: str | None
) -> None:
    task = Task.open(write(tmp_path, **splits))
    data = task.settings.data.model_dump()
    assert (data["source"], data["train"]) == (source, train)
    _, note = task.notes
    assert f"'{source}'" in note
    assert ("warning" in note) == (train is None)
    assert sum(task.check_splits().values()) == (50 if train is None else 100)


def test_data_files_may_be_the_one_file_of_train(tmp_path: Path) -> None:
    changes = {"training_split": None, "validation_split": None, "test_split": "train"}
    path = write(tmp_path, dataset_kwargs={"data_files": "train.jsonl"}, **changes)
    assert sum(Task.open(path).check_splits().values()) == 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_type": "multiple_choice"}, "output_type: 'multiple_choice' cannot be scored"),
        ({"dataset_path": "gsm8k"}, "dataset_path: 'gsm8k': only JSON Lines on disk are read"),
        ({"dataset_name": "main"}, "only JSON Lines on disk are read"),
        ({"num_fewshot": 5}, "num_fewshot: 5: prompts hold no worked examples"),
        ({"doc_to_choice": "{{ x }}"}, "doc_to_choice: unknown key: choices are not scored"),
        ({"include": "other.yaml"}, "include: unknown key: files that include others"),
        ({"doc_to_txt": "x"}, "doc_to_txt: unknown key: did you mean 'doc_to_text'?"),
        ({"doc_to_text": None}, "doc_to_text: required, and missing"),
        ({"doc_to_text": "{{ x | regex_replace('a') }}"}, "prompt: not a Jinja template"),
        ({"metric_list": [{"metric": "bleu"}]}, "metric_list: bleu: cannot be scored"),
        (
            {"metric_list": [{"metric": "exact_match", "ignore_case": True}]},
            "metric_list: ignore_case: exact_match has no such option",
        ),
        (
            {"filter_list": [{"name": "strict", "filter": [{"function": "regex"}]}]},
            "filter_list: 'regex': replies are compared whole",
        ),
        ({"generation_kwargs": {"do_sample": True}}, "replies are never sampled"),
        ({"generation_kwargs": {"top_k": 3}}, "generation_kwargs.top_k: unknown key"),
        ({"repeats": 4}, "repeats: 4"),
        ({"training_split": "trian"}, "training_split: 'trian' is none of data_files: did you"),
        (
            {"dataset_kwargs": {"data_files": {"train": ["a", "b"]}}},
            "data_files.train: 2 files: join them to one",
        ),
        (
            {"training_split": None, "validation_split": None, "test_split": None},
            "no split is named",
        ),
    ],
)
def test_what_cannot_be_scored_as_there_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(TaskError) as caught:
        Task.open(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_python_functions_are_not_run(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text("task: sums\nprocess_docs: !function utils.process\n")
    with pytest.raises(TaskError, match="no Python is run: write Jinja in place of !function"):
        Task.open(path)


def test_a_harmless_filter_is_no_filter(tmp_path: Path) -> None:
    chain = [{"name": "none", "filter": [{"function": "take_first"}]}]
    assert Task.open(write(tmp_path, filter_list=chain)).name == "sums"
