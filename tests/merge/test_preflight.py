"""What is told of a recipe before it is merged, held against the merge itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import write_checkpoint
from evomerge.merge.live import Resident
from evomerge.merge.planner import make_plan
from evomerge.merge.preflight import check_recipe, search_bytes
from evomerge.merge.sources import open_model
from evomerge.recipe import Recipe
from tests.merge.conftest import Tensors, altered, without
from tests.merge.test_adapters import write_adapter


def recipe(method: str, *models: Any, base: Any = None, **keys: Any) -> Recipe:
    listed: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(model)} for model in models],
        **({"base_model": str(base)} if base else {}),
        **keys,
    }
    return Recipe.from_dict(listed)


def errors(found: dict[str, Any]) -> list[str]:
    return [finding["text"] for finding in found["findings"] if finding["level"] == "error"]


def warnings(found: dict[str, Any]) -> list[str]:
    return [finding["text"] for finding in found["findings"] if finding["level"] == "warning"]


@pytest.fixture
def ties(models: dict[str, Path]) -> Recipe:
    return recipe(
        "ties",
        models["a"],
        models["b"],
        base=models["base"],
        parameters={"weight": 0.5, "density": 0.5},
    )


def test_what_is_told_is_what_is_written(
    ties: Recipe, models: dict[str, Path], tmp_path: Path
) -> None:
    found = check_recipe(ties)
    json.dumps(found)
    opened = {name: open_model(name) for name in ties.model_names()}
    write_checkpoint(make_plan(ties, opened), opened, tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    tensors = written.headers.values()
    assert found["output"] == {
        "layers": {"default": 3},
        "parameters": sum(header.numel for header in tensors),
        "dtype": "float32",
        "vocabulary": written.config["vocab_size"],
        "bytes": sum(header.bytes for header in tensors),
        "files": len(list((tmp_path / "out").glob("*.safetensors"))),
    }
    assert found["needs"]["disk_bytes"] == found["output"]["bytes"] == found["merge"]["bytes"]
    assert found["merge"]["methods"] == {
        "ties": {"tensors": len(tensors), "bytes": found["merge"]["bytes"]}
    }
    assert found["merge"]["copied"] == {"tensors": 0, "bytes": 0}


def test_models_are_described_with_their_roles(ties: Recipe, models: dict[str, Path]) -> None:
    found = check_recipe(ties, fast=True)["models"]
    assert list(found) == [str(models[name]) for name in ("a", "b", "base")]
    a, base = found[str(models["a"])], found[str(models["base"])]
    assert (a["roles"], base["roles"]) == ([], ["base", "config"])
    header = Checkpoint.open(models["a"]).headers
    assert a["parameters"] == sum(h.numel for h in header.values())
    assert (a["layers"], a["dtype"], a["revision"]) == ({"default": 3}, "float32", None)
    assert a["uri"] == str(models["a"])


def test_the_first_model_gives_the_config_where_there_is_no_base(models: dict[str, Path]) -> None:
    linear = recipe("linear", models["a"], models["b"], parameters={"weight": 1})
    found = check_recipe(linear, fast=True)
    assert [model["roles"] for model in found["models"].values()] == [["config"], []]


def test_geometry_is_measured_from_the_base_unless_it_is_to_be_fast(
    ties: Recipe, models: dict[str, Path]
) -> None:
    told: list[tuple[int, int]] = []
    geometry = check_recipe(ties, progress=lambda *now: told.append(now))["geometry"]
    assert geometry["base"] == str(models["base"])
    a, b = (str(models[name]) for name in "ab")
    assert set(geometry["norms"]) == set(geometry["modules"]) == {a, b}
    assert [entry["models"] for entry in geometry["cosines"]] == [(a, b)]
    assert told[-1][0] == told[-1][1] > 0
    told.clear()
    assert check_recipe(ties, fast=True, progress=lambda *now: told.append(now))["geometry"] is None
    assert told == []


def test_every_model_that_does_not_fit_is_told(
    folders: dict[str, Path], opened: dict[str, Checkpoint]
) -> None:
    linear = recipe(
        "linear",
        *(folders[name] for name in ("a", "deep", "wide", "b", "biased")),
        parameters={"weight": 1},
    )
    found = check_recipe(linear, fast=True)
    said = errors(found)
    assert len(said) == 3
    for name, text in zip(("deep", "wide", "biased"), said, strict=True):
        assert f"'{folders[name]}'" in text
        assert "fit together" in text
    assert (found["merge"], found["output"], found["needs"]) == (None, None, None)


def test_every_model_that_cannot_be_opened_is_told_and_the_others_are_compared(
    models: dict[str, Path], tmp_path: Path
) -> None:
    other = altered(models["b"], tmp_path / "other", rms_norm_eps=0.1)
    missing = [tmp_path / "nowhere", tmp_path / "empty"]
    missing[1].mkdir()
    linear = recipe("linear", models["a"], other, *missing, parameters={"weight": 1})
    found = check_recipe(linear)
    said = errors(found)
    assert ["nowhere" in said[0], "empty" in said[1], len(said)] == [True, True, 2]
    assert any("'rms_norm_eps' is 0.1" in text for text in warnings(found))
    assert set(found["models"]) == {str(models["a"]), str(other)}
    assert (found["geometry"], found["merge"]) == (None, None)


def test_a_missing_base_leaves_nothing_to_compare_with(
    models: dict[str, Path], tmp_path: Path
) -> None:
    arithmetic = recipe(
        "task_arithmetic", models["a"], base=tmp_path / "nowhere", parameters={"weight": 1}
    )
    found = check_recipe(arithmetic)
    assert len(errors(found)) == 1
    assert found["geometry"] is None
    assert str(models["a"]) in found["models"]


def test_what_only_writing_would_refuse_is_an_error(ties: Recipe) -> None:
    found = check_recipe(ties.model_copy(update={"chat_template": "chatlm"}), fast=True)
    (text,) = errors(found)
    assert "chat_template: 'chatlm'" in text
    assert found["merge"] is not None


def test_flags_of_the_merge_change_what_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    other = altered(models["b"], tmp_path / "other", model_type="mistral")
    linear = recipe("linear", models["a"], other, parameters={"weight": 1})
    (text,) = errors(check_recipe(linear, fast=True))
    assert "--allow-crimes" in text
    found = check_recipe(linear, fast=True, allow_crimes=True)
    assert errors(found) == []
    assert any("is of the kind mistral" in text for text in warnings(found))


def test_damage_is_an_error(models: dict[str, Path], tmp_path: Path) -> None:
    def damaged(tensors: Tensors) -> Tensors:
        tensors["model.norm.weight"][0] = float("nan")
        return tensors

    other = altered(models["b"], tmp_path / "other", damaged)
    linear = recipe("linear", models["a"], other, parameters={"weight": 1})
    (text,) = errors(check_recipe(linear))
    assert f"'model.norm.weight' of '{other}' holds NaN" in text
    assert errors(check_recipe(linear, fast=True)) == []


def near(base: Path, folder: Path, scale: float) -> Path:
    """A model that is moved by this share of the norm of each of the base's tensors."""
    generator = torch.Generator().manual_seed(len(folder.name))

    def moved(tensors: Tensors) -> Tensors:
        noise = {k: torch.randn(t.shape, generator=generator) for k, t in tensors.items()}
        return {k: t + scale * t.norm() * noise[k] / noise[k].norm() for k, t in tensors.items()}

    return altered(base, folder, moved)


@pytest.mark.parametrize(("scale", "far"), [(0.15, False), (0.25, True)])
def test_a_parent_far_from_its_base_is_a_warning(
    models: dict[str, Path], tmp_path: Path, scale: float, far: bool
) -> None:
    other = near(models["base"], tmp_path / "other", scale)
    arithmetic = recipe("task_arithmetic", other, base=models["base"], parameters={"weight": 1})
    said = [
        text
        for text in warnings(check_recipe(arithmetic))
        if "further than fine-tuning goes" in text
    ]
    assert bool(said) == far
    if far:
        assert f"'{other}' is 25% of the base's norm away" in said[0]


@pytest.mark.parametrize(("scale", "strange"), [(0.15, False), (0.3, True)])
def test_models_without_a_base_that_are_unlike_are_a_warning(
    models: dict[str, Path], tmp_path: Path, scale: float, strange: bool
) -> None:
    pair = [near(models["base"], tmp_path / name, scale) for name in ("one", "another")]
    said = warnings(check_recipe(recipe("linear", *pair, parameters={"weight": 1})))
    assert any("of unrelated models do not average" in text for text in said) == strange


@pytest.mark.parametrize(
    ("method", "density", "scale", "unsafe"),
    [
        ("dare_ties", 0.5, 0.1, True),
        ("dare_linear", 0.5, 0.005, False),
        ("dare_ties", 1.0, 0.1, False),
        ("ties", 0.5, 0.1, False),
    ],
)
def test_large_values_are_a_warning_where_they_are_dropped_at_random(
    models: dict[str, Path],
    tmp_path: Path,
    method: str,
    density: float,
    scale: float,
    unsafe: bool,
) -> None:
    other = near(models["base"], tmp_path / "other", scale)
    parameters = {"weight": 1, "density": density}
    dare = recipe(method, other, base=models["base"], parameters=parameters)
    said = warnings(check_recipe(dare))
    assert any("dropping them at random" in text for text in said) == unsafe


def test_what_a_merge_logs_is_a_finding_and_logged_no_more(
    ties: Recipe, models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = altered(models["b"], tmp_path / "other")
    (other / "tokenizer.json").unlink()
    linear = recipe("linear", models["a"], other, parameters={"weight": 1}, tokenizer_source="base")
    found = check_recipe(linear, fast=True)
    assert any(f"'{other}' has no tokenizer: taken to be" in text for text in warnings(found))
    assert caplog.text == ""


def test_what_is_copied_and_noted_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    def counted(tensors: Tensors) -> Tensors:
        return tensors | {"model.steps": torch.tensor([3])}

    pair = [altered(models[name], tmp_path / name, counted) for name in ("a", "b")]
    found = check_recipe(recipe("linear", *pair, parameters={"weight": 1}), fast=True)["merge"]
    assert found["copied"] == {"tensors": 1, "bytes": 8}
    assert any("'model.steps' is no weight: copied from" in note for note in found["notes"])


def test_a_stack_of_layers_is_counted(models: dict[str, Path]) -> None:
    a, b = str(models["a"]), str(models["b"])
    stacked = Recipe.from_dict(
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": a, "layer_range": [0, 2]}]},
                {"sources": [{"model": b, "layer_range": [0, 3]}]},
            ],
        }
    )
    found = check_recipe(stacked)
    assert found["output"]["layers"] == {"default": 5}
    assert set(found["merge"]["methods"]) == {"passthrough"}
    assert warnings(found) == []  # unlike models may be stacked


@pytest.mark.parametrize("method", ["ties", "dare_ties", "linear", "slerp"])
def test_memory_of_a_search_is_what_its_model_takes(models: dict[str, Path], method: str) -> None:
    paths = [models["a"], models["b"]]
    parameters: dict[str, Callable[[], Recipe]] = {
        "linear": lambda: recipe("linear", *paths, parameters={"weight": 1}),
        "slerp": lambda: recipe("slerp", *paths, base=models["a"], parameters={"t": 0.4}),
    }
    made = parameters.get(
        method,
        lambda: recipe(
            method, *paths, base=models["base"], parameters={"weight": 1, "density": 0.5}
        ),
    )()
    opened = {name: open_model(name) for name in made.model_names()}
    plan = make_plan(made, opened)
    resident = Resident(opened, torch.device("cpu"))
    live = {name: t.clone() for name, t in load_file(models["a"] / "model.safetensors").items()}
    resident.write(plan, live)
    assert search_bytes(plan) == resident.held + sum(t.nbytes for t in live.values())


def test_licences_of_models_and_adapters_are_listed(
    models: dict[str, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(models["base"], tmp_path / "base"))
    adapter = write_adapter(tmp_path / "adapter", base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (adapter / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    other = f"{base}+{adapter}"
    found = check_recipe(recipe("linear", base, other, parameters={"weight": 1}), fast=True)
    assert found["licence"] == {
        "licence": "llama3.1",
        "name": None,
        "link": None,
        "reason": "its terms hold for the whole",
        "models": {str(base): ["apache-2.0"], other: ["apache-2.0", "llama3.1"]},
    }


def test_a_plain_state_dict_is_checked_too(models: dict[str, Path], tmp_path: Path) -> None:
    pair = []
    for name in ("one", "another"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copyfile(models["a"] / "model.safetensors", folder / "model.safetensors")
        pair.append(folder)
    found = check_recipe(recipe("linear", *pair, parameters={"weight": 1}))
    assert found["findings"] == []
    assert (found["output"]["vocabulary"], found["output"]["files"]) == (None, 1)


def test_a_disk_that_is_full_is_a_warning(
    ties: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = check_recipe(ties, fast=True)
    assert found["needs"]["disk_free_bytes"] == 10
    assert "the output does not fit on this disk" in warnings(found)


def test_a_missing_tensor_is_told_once(models: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    other = altered(models["b"], tmp_path / "other", without(name))
    linear = recipe("linear", models["a"], other, parameters={"weight": 1})
    (text,) = errors(check_recipe(linear))
    assert name in text


def test_a_recipe_with_aim_is_planned_without_measuring(
    ties: Recipe, tmp_path: Path, models: dict[str, Path]
) -> None:
    text = tmp_path / "text.txt"
    aimed = Recipe.from_dict({**ties.to_dict(), "aim": {"calibration": str(text)}})
    (said,) = errors(check_recipe(aimed, fast=True))
    assert f"aim.calibration: no file '{text}'" in said
    text.write_text("some text")
    found = check_recipe(aimed, fast=True)
    assert [f["level"] for f in found["findings"] if f["about"] == "aim"] == ["info"]
    assert errors(found) == []
    assert found["merge"]["notes"] == []
