"""What workers are opened from: small enough to travel, and strict about what they find."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evomerge.errors import ModelError, OutOfMemory, TaskError
from evomerge.executor import Request
from evomerge.executor.inline import InlineExecutor
from evomerge.executor.worker import ModelSpec, TaskSpec, Worker, WorkerSpec
from evomerge.fitness.results import Failed, Scored
from evomerge.fitness.task import Task
from evomerge.job import Engine, TaskEntry, packaged
from evomerge.merge.sources import open_model
from evomerge.recipe import Recipe
from tests import tiny


@pytest.fixture
def spec(models: dict[str, Path], tmp_path: Path) -> WorkerSpec:
    """Of two models and a task, each in a place that a test may write to."""
    parents = [tiny.write_model(tmp_path / name, seed) for seed, name in enumerate("ab")]
    task = tiny.write_task(tmp_path / "task")
    return WorkerSpec(
        Engine(device="cpu", threads=1),
        {str(parent): ModelSpec.of(open_model(str(parent))) for parent in parents},
        str(parents[0]),
        (TaskSpec.of(Task.open(task), TaskEntry(task=str(task))),),
        shaped=True,
    )


def request(spec: WorkerSpec) -> Request:
    """Of the first model as it is."""
    recipe = {"merge_method": "passthrough", "models": [{"model": spec.first}]}
    examples = np.arange(4, dtype=np.uint32)
    return Request(0, Recipe.from_dict(recipe), "train", {"ja_list_ops": examples})


def test_a_worker_needs_its_spec_alone(spec: WorkerSpec) -> None:
    worker = pickle.loads(pickle.dumps(spec)).open()
    evaluation = worker.evaluate(request(spec))
    worker.close()
    assert isinstance(evaluation, Scored)
    assert len(evaluation.tasks["ja_list_ops"]) == 4


def test_what_travels_is_small(spec: WorkerSpec) -> None:
    assert len(pickle.dumps(spec)) < 3000
    assert len(pickle.dumps(request(spec))) < 3000


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_another_model_in_the_place_of_one_is_refused(
    spec: WorkerSpec, tmp_path: Path, file: str
) -> None:
    other = tiny.write_model(tmp_path / "other", seed=9, layers=2)
    path = Path(spec.first) / file
    text = (other / file).read_bytes()
    path.write_bytes(text + b"\n" if file == "tokenizer.json" else text)
    with pytest.raises(ModelError, match=r"model '.*/a' is not what it is where the search was"):
        spec.open()


def test_a_model_that_is_not_here_is_named(spec: WorkerSpec, tmp_path: Path) -> None:
    (tmp_path / "b").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="/b"):
        spec.open()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_data_are_refused(spec: WorkerSpec, tmp_path: Path, split: str) -> None:
    path = tmp_path / "task" / "data" / f"{split}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    tiny.write_jsonl(path, [json.loads(line) for line in lines[:-1]])
    with pytest.raises(TaskError, match=rf"task 'ja_list_ops': {split} is not what it is where"):
        spec.open()


def test_other_settings_of_a_task_are_refused(spec: WorkerSpec, tmp_path: Path) -> None:
    path = tmp_path / "task" / "task.yaml"
    path.write_text(
        path.read_text(encoding="utf-8").replace("max_new_tokens: ", "max_new_tokens: 1")
    )
    with pytest.raises(TaskError, match="train is not what it is where the search was started"):
        spec.open()


def test_the_test_split_is_not_needed(spec: WorkerSpec, tmp_path: Path) -> None:
    (tmp_path / "task" / "data" / "test.jsonl").unlink()
    spec.open().close()


def test_a_ready_made_task_travels_by_its_name() -> None:
    path = packaged("fitness") / "ja_list_ops" / "task.yaml"
    spec = TaskSpec.of(Task.open(path.resolve()), TaskEntry(task="ja_list_ops"))
    assert spec.name == "ja_list_ops/task.yaml"
    assert spec.open().content("train") == spec.contents["train"]


def test_chat_and_metric_of_a_task_are_kept(tmp_path: Path) -> None:
    path = tiny.write_task(tmp_path / "task")
    plain, chat = (
        TaskSpec.of(Task.open(path, c), TaskEntry(task=str(path), chat=c)) for c in (None, True)
    )
    assert chat.contents != plain.contents
    assert chat.open().content("train") == chat.contents["train"]
    with pytest.raises(TaskError):
        replace(chat, chat=None).open()


class _Full:
    """An engine whose device has no room for any model."""

    def load(self, recipe: Recipe) -> None:
        raise OutOfMemory("the merge does not fit into the memory of cuda:0")


def test_too_little_memory_is_for_others_to_judge(spec: WorkerSpec) -> None:
    with pytest.raises(OutOfMemory):
        Worker(_Full(), {}, shaped=False).evaluate(request(spec))  # type: ignore[arg-type]


def test_where_there_is_one_device_it_is_the_candidates_failure(spec: WorkerSpec) -> None:
    executor = InlineExecutor(_Full(), {}, shaped=False)  # type: ignore[arg-type]
    ((_, evaluation),) = executor.evaluate([request(spec)])
    assert isinstance(evaluation, Failed)
    assert evaluation.reason == "the merge does not fit into the memory of cuda:0"


def test_an_actor_loads_nothing_before_its_environment_is_set() -> None:
    code = (
        "import sys, evomerge.executor.actor as actor; actor.Actor({});"
        "print({'torch', 'transformers', 'huggingface_hub', 'ray'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
