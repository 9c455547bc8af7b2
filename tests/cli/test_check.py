"""`evomerge check` of recipes: what it draws, its document, its exit code; and what is neither a
recipe nor a job."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.merge.test_adapters import write_adapter
from tests.running import Ended, evomerge_


@pytest.fixture
def recipe(models: dict[str, Path], tmp_path: Path) -> Path:
    """A recipe that goes through."""
    return write(tmp_path, models)


def write(folder: Path, shared: dict[str, Path], **changes: Any) -> Path:
    """A recipe of the shared models, with keys replaced."""
    data: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": str(shared["base"]),
        "models": [{"model": str(shared[name])} for name in ("a", "b")],
        "parameters": {"weight": 0.5, "density": 0.4},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data | changes))
    return path


def document(end: Ended) -> Any:
    return json.loads(end.out)


def test_a_good_recipe_is_drawn_in_sections(recipe: Path) -> None:
    end = evomerge_("check", recipe)
    assert (end.code, end.err) == (0, "")
    lines = end.out.splitlines()
    assert max(map(len, lines)) <= 100
    titles = [line for line in lines if line and not line.startswith(" ")]
    assert titles == [
        "models",
        "fit",
        "task vectors",
        "cosines of the task vectors",
        "merge",
        "output",
        "needs",
        "licence",
    ]
    assert "the models fit together" in end.out
    assert "ties  30 tensors" in end.out
    assert "result  unknown (a model states no licence)" in end.out
    assert "no legal advice" in end.out


def test_a_good_recipe_has_a_document(recipe: Path) -> None:
    end = evomerge_("check", recipe, "--json")
    assert (end.code, end.err) == (0, "")
    assert set(document(end)) == {
        "method",
        "models",
        "findings",
        "geometry",
        "merge",
        "output",
        "needs",
        "licence",
    }


def test_fast_leaves_out_what_reads_all_values(recipe: Path) -> None:
    end = evomerge_("check", recipe, "--fast")
    assert end.code == 0
    assert "task vectors" not in end.out
    assert document(evomerge_("check", recipe, "--fast", "--json"))["geometry"] is None


def test_without_a_base_models_are_compared(models: dict[str, Path], tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "merge_method": "linear",
        "parameters": {"weight": 1},
        "base_model": None,
    }
    end = evomerge_("check", write(tmp_path, models, **keys))
    assert "cosines of the models\n  a, b  0.9" in end.out


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_every_error_is_shown_and_the_exit_code_is_that_of_wrong_input(
    models: dict[str, Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    tiny.write_model(tmp_path / "wide", seed=4, hidden=32)
    names = [models["a"], models["deep"], tmp_path / "wide"]
    path = write(tmp_path, models, models=[{"model": str(name)} for name in names])
    end = evomerge_("check", path, *options)
    assert end.code == 2
    assert end.err == f"evomerge: '{path}' would not be merged: 2 errors, see above\n"
    if options:
        levels = [finding["level"] for finding in document(end)["findings"]]
        assert levels.count("error") == 2
        assert levels == sorted(levels, key=["error", "warning", "info"].index)
    else:
        assert "'deep'" in end.out
        assert "'wide'" in end.out


def test_models_that_end_alike_are_told_apart(models: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        tiny.write_model(tmp_path / name / "model", seed=5, near=models["base"])
    names = [str(tmp_path / name / "model") for name in ("one", "two")]
    path = write(tmp_path, models, models=[{"model": name} for name in names])
    assert "one/model, two/model  1.000" in evomerge_("check", path, "--allow-crimes").out


def test_a_model_with_an_adapter_is_called_by_both(models: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapters" / "x", models["a"])
    names = [str(models["a"]), f"{models['a']}+{adapter}"]
    end = evomerge_("check", write(tmp_path, models, models=[{"model": name} for name in names]))
    assert "\n  a+x " in end.out


def test_many_notes_are_cut_short(models: dict[str, Path], tmp_path: Path) -> None:
    pair = []
    for name in ("a", "b"):
        folder = tiny.write_model(tmp_path / name, seed=6)
        tensors = load_file(folder / "model.safetensors")
        tensors |= {f"count_{i}": torch.tensor([i]) for i in range(12)}
        save_file(tensors, folder / "model.safetensors")
        pair.append({"model": str(folder)})
    keys: dict[str, Any] = {
        "merge_method": "linear",
        "parameters": {"weight": 1},
        "base_model": None,
    }
    end = evomerge_("check", write(tmp_path, models, models=pair, **keys), "--fast")
    assert end.out.count("is no weight: copied") == 8
    assert "and 4 more: --json lists all" in end.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("- a list", "holds no keys"),
        ("a: [", "is not YAML"),
        ("modles: []", "neither a recipe, which has a 'merge_method', nor a job, which has"),
        ("merge_method: tis\nmodels: [{model: x}]", "did you mean 'ties'?"),
        ("name: x", "parents: required, and missing"),
    ],
)
def test_what_is_neither_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "file.yaml"
    if text is not None:
        path.write_text(text)
    end = evomerge_("check", path)
    assert (end.code, end.out, end.err.count("\n")) == (2, "", 1)
    assert message in end.err


def test_a_recipe_has_no_overrides(recipe: Path) -> None:
    end = evomerge_("check", recipe, "seed=1")
    assert (end.code, end.out) == (2, "")
    assert "is a recipe: 'seed=1' can override keys of jobs only" in end.err


@pytest.mark.parametrize("option", ["--fast", "--allow-crimes", "--allow-pickle"])
def test_a_job_takes_no_option_of_recipes(job_file: Path, option: str) -> None:
    end = evomerge_("check", job_file, option)
    assert (end.code, end.out) == (2, "")
    assert "is a job: this option is for recipes" in end.err


def test_nothing_is_written(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert evomerge_("check", recipe).code == 0
    assert set(tmp_path.rglob("*")) == before


def test_a_task_is_sealed_and_nothing_else_is(recipe: Path, tmp_path: Path) -> None:
    task = tiny.write_task(tmp_path / "task")
    sealed = task.with_suffix(".sealed.json")
    end = evomerge_("check", task, "--seal", "--json")
    assert (end.code, document(end)["sealed"]) == (0, str(sealed))
    assert sealed.exists()
    (task.parent / "data" / "test.jsonl").unlink()
    said = " ".join(evomerge_("check", task).out.split())
    assert "test is known by 'task.sealed.json' alone" in said
    again = evomerge_("check", task, "--seal")
    assert (again.code, "is missing: put it there" in again.err) == (2, True)
    other = evomerge_("check", recipe, "--seal")
    assert (other.code, "--seal is for tasks" in other.err) == (2, True)
