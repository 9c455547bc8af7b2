"""The shipped zoo: sizes, splits, and that its target needs both parents."""

import json
from pathlib import Path

import pytest

from evomerge.fitness.evaluate import evaluate_model
from evomerge.fitness.task import SPLITS, Task
from evomerge.job import Engine, Job
from evomerge.merge.checkpoint import Checkpoint
from tests.tiny import ROOT, ZOO

MODELS = ("base", "ops", "ops-early", "ja", "roman")
NAMES = ("en_list_ops", "ja_list_ops", "ja_list_ops_roman", "ja_transcription")
TASKS = [ROOT / "fitness" / name for name in NAMES]
tasks = pytest.mark.parametrize("folder", TASKS, ids=lambda path: path.name)


def records(folder: Path, split: str) -> list[dict[str, str]]:
    """A split's records."""
    lines = (folder / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_models_together_are_small() -> None:
    files = [file for name in MODELS for file in (ZOO / name).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 6_000_000


def test_all_models_share_one_tokenizer_and_one_shape() -> None:
    opened = [Checkpoint.open(ZOO / name) for name in MODELS]
    shapes = [{name: h.shape for name, h in model.headers.items()} for model in opened]
    assert all(shape == shapes[0] for shape in shapes)
    assert len({model.files["tokenizer.json"] for model in opened}) == 1


@tasks
def test_the_manifest_lists_the_items_of_each_split(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == Task.open(folder / "task.yaml").manifest()
    for split in SPLITS:
        assert manifest["splits"][split]["items"] == len(records(folder, split))


@pytest.mark.slow
def test_no_list_is_asked_for_in_two_splits_of_any_task() -> None:
    owner: dict[tuple[str, str], str] = {}
    for folder in TASKS:
        Task.open(folder / "task.yaml").check_splits()
        for split in SPLITS:
            for record in records(folder, split):
                cell = record["operation"], record["digits"]
                assert owner.setdefault(cell, split) == split, cell


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ja_list_ops", "ja_list_ops_roman"])
@pytest.mark.parametrize("model", MODELS)
def test_no_model_alone_can_do_a_target_task(model: str, task: str) -> None:
    opened, engine = (
        Task.open(ROOT / "fitness" / task / "task.yaml"),
        Engine(device="cpu", threads=1),
    )
    found = evaluate_model(str(ZOO / model), opened, "validation", engine)
    assert found.scores.mean < 0.1


@pytest.mark.parametrize(
    ("model", "task", "least"),
    [
        ("ops", "en_list_ops", 0.95),
        ("ops-early", "en_list_ops", 0.4),
        ("ja", "ja_transcription", 0.95),
    ],
)
def test_each_specialist_can_do_its_own_task(model: str, task: str, least: float) -> None:
    opened, engine = (
        Task.open(ROOT / "fitness" / task / "task.yaml"),
        Engine(device="cpu", threads=1),
    )
    found = evaluate_model(str(ZOO / model), opened, "validation", engine)
    assert found.scores.mean >= least


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_job_is_a_job(path: Path) -> None:
    Job.from_file(path)
