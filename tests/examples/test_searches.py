"""The job files of examples/searches: each runs to its end, on small tasks and a small budget."""

import json
from pathlib import Path

import pytest
import yaml

from evomerge.job import Job
from tests import tiny
from tests.running import evomerge_, url
from tests.tiny import ROOT, ZOO

JOBS = sorted((ROOT / "examples" / "searches").glob("*.yaml"), key=lambda path: path.stem)
AFTER = {"ps-then-dfs": "sakana-ps"}  # whose winner it needs
OFTEN = ("recommended", "ps-then-dfs")  # the others: make test-slow


def small(name: str, folder: Path) -> Path:
    """The job over cut tasks, two generations long."""
    path = ROOT / "examples" / "searches" / f"{name}.yaml"
    job = yaml.safe_load(path.read_text(encoding="utf-8").replace("../zoo", str(ZOO)))
    for entry in job["tasks"]:
        task = tiny.write_task(folder / entry["task"], source=source(entry["task"]))
        if entry["task"] == "generated":
            text = task.read_text(encoding="utf-8").replace("teacher_forced: true", "")
            task.write_text(text, encoding="utf-8")
    job["optimizer"]["population"] = 4
    job["budget"] = {"candidates": 8}
    job["guard"] = {"validation_looks": 2}
    if "staging" in job:
        job["staging"] = {"stages": [6, 12], "keep": [2]}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    return folder / f"{name}.yaml"


def source(task: str) -> str:
    return "en_list_ops" if task == "generated" else task


def run(name: str, folder: Path) -> None:
    end = evomerge_("run", small(name, folder), "--store", url(folder / "store.db"), "--json")
    assert end.code == 0, end.err
    shown = json.loads(end.out)
    assert shown["state"] == "finished"
    assert sum(shown["candidates"].values()) >= 8
    assert shown["best"]["validation"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in OFTEN else pytest.mark.slow)
        for path in JOBS
    ],
)
def test_an_example_search_runs_to_its_end(path: Path, tmp_path: Path) -> None:
    if path.stem in AFTER:
        run(AFTER[path.stem], tmp_path)
    run(path.stem, tmp_path)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_an_example_search_is_a_job_as_it_stands(path: Path) -> None:
    assert Job.from_file(path).name == path.stem


def test_every_preset_has_an_example_or_says_why_not() -> None:
    used = "\n".join(path.read_text(encoding="utf-8") for path in JOBS)
    without = {
        "vlm_language",  # the zoo has no such model; tests/engine/test_vision.py searches one
        *(f"mergekit_evolve_{method}" for method in ("linear", "slerp", "ties", "dare_ties")),
        *("per_layer_task_arithmetic", "per_layer_ties", "per_layer_dare_ties"),
        *("layer_stack", "long_to_short_task_arithmetic"),  # variants of those that have one
    }
    for preset in (ROOT / "search_spaces").glob("*.yaml"):
        assert (f"preset: {preset.stem}" in used) != (preset.stem in without), preset.stem
