"""Merges that fail, are interrupted or killed: they leave no output, and the next one succeeds."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.errors import ModelError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import write_checkpoint
from evomerge.merge.planner import make_plan
from evomerge.recipe import Recipe
from tests.merge.writing import ROOT, Stop, plan_of, start, stop, stored, written


def test_finish_adds_files_before_the_folder_takes_its_name(
    opened: dict[str, Checkpoint], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    seen: list[bool] = []

    def finish(folder: Path) -> None:
        seen.append(out.exists() or not (folder / "config.json").exists())
        (folder / "README.md").write_text("a card")

    written(plan_of("linear", opened), opened, out, finish=finish)
    assert seen == [False]
    assert (out / "README.md").read_text() == "a card"


@pytest.mark.parametrize("where", ["progress", "finish"])
@pytest.mark.parametrize("empty_folder", [True, False])
def test_a_merge_that_fails_leaves_nothing_and_the_next_one_succeeds(
    opened: dict[str, Checkpoint], tmp_path: Path, where: str, empty_folder: bool
) -> None:
    plan, out = plan_of("linear", opened), tmp_path / "deeper" / "out"
    if empty_folder:
        out.mkdir(parents=True)
    with pytest.raises(Stop):
        write_checkpoint(plan, opened, out, **{where: stop})
    assert [path for path in out.parent.iterdir() if path != out] == []
    assert not out.exists() or not any(out.iterdir())
    written(plan, opened, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert set(stored(out)) == {tensor.name for tensor in plan.tensors}


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    opened: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, call, no_room)
        with pytest.raises(ModelError, match=rf"'{tmp_path}/out' cannot be written: No space left"):
            write_checkpoint(plan_of("linear", opened), opened, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    written(plan_of("linear", opened), opened, tmp_path / "out")


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from evomerge.cli import main
sys.argv[0] = "evomerge"
main()
"""


@pytest.mark.slow
def test_a_file_that_may_not_grow_ends_the_command_with_one_line(
    models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = {"merge_method": "linear", "parameters": {"weight": 0.5}}
    listed = [{"model": str(models[name])} for name in "ab"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"models": listed}))
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, "merge", "recipe.yaml", "out"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2, ended.stderr
    *_, last = ended.stderr.splitlines()
    assert "output 'out' cannot be written: File too large" in last
    assert "Traceback" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "error", [ModelError("the file is damaged"), RuntimeError("a bug"), Stop()], ids=repr
)
def test_what_goes_wrong_in_a_thread_comes_out(
    opened: dict[str, Checkpoint], tmp_path: Path, error: BaseException, threads: int
) -> None:
    def read(name: str) -> Callable[[int, int], torch.Tensor]:
        values = opened["a"].values(name)

        def failing(start: int, stop: int) -> torch.Tensor:
            if name == "model.layers.1.mlp.up_proj.weight":
                raise error
            return values(start, stop)

        return failing

    models = opened | {"a": replace(opened["a"], read=read)}
    with pytest.raises(type(error)) as raised:
        write_checkpoint(plan_of("linear", models), models, tmp_path / "out", threads=threads)
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_merge_leaves_no_output_and_the_next_one_succeeds(
    opened: dict[str, Checkpoint], models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with start(models["a"], out) as process:
        assert any(tmp_path.iterdir())
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    plan = plan_of("linear", opened)
    written(plan, opened, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert set(stored(out)) == {tensor.name for tensor in plan.tensors}


@pytest.mark.slow
def test_an_interrupted_merge_leaves_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    with start(models["a"], tmp_path / "out") as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)  # ends what the writing thread waits for
    assert "KeyboardInterrupt" in errors
    assert process.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_merge_left_is_removed_and_what_runs_is_not(
    opened: dict[str, Checkpoint], tmp_path: Path
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    abandoned = tmp_path / f".out.{ended.pid}.partial"
    running = tmp_path / f".out.{os.getppid()}.partial"
    for folder in (abandoned, running):
        folder.mkdir()
    plan = make_plan(
        Recipe.from_dict({"merge_method": "passthrough", "models": [{"model": "a"}]}), opened
    )
    write_checkpoint(plan, opened, tmp_path / "out")
    assert running.exists()
    assert not abandoned.exists()
