"""The card of a merge by hand: what a hub reads, and what a reader does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from evomerge.export.card import merge_card
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.planner import make_plan
from evomerge.recipe import Recipe


def card(models: dict[str, Checkpoint]) -> tuple[dict[str, Any], str]:
    """Front matter and text of a plain average of the models."""
    listed = [{"model": name, "parameters": {"weight": 1}} for name in models]
    recipe = Recipe.from_dict({"merge_method": "linear", "models": listed})
    text = merge_card(make_plan(recipe, models), models)
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.fixture
def pair(models: dict[str, Path], tmp_path: Path) -> dict[str, Checkpoint]:
    """Two models that state no licence."""
    return {name: Checkpoint.open(shutil.copytree(models[name], tmp_path / name)) for name in "ab"}


def state(model: Checkpoint, **terms: str) -> None:
    (model.path / "README.md").write_text(f"---\n{yaml.safe_dump(terms)}---\n")


def test_terms_of_their_own_have_a_name_and_a_link(pair: dict[str, Checkpoint]) -> None:
    state(pair["a"], license="mit")
    state(pair["b"], license="other", license_name="odd", license_link="https://example.org/odd")
    front, _ = card(pair)
    assert (front["license"], front["license_name"]) == ("other", "odd")
    assert front["license_link"] == "https://example.org/odd"


def test_a_licence_beside_another_model_is_no_link(pair: dict[str, Checkpoint]) -> None:
    for model in pair.values():
        state(model, license="other", license_name="odd", license_link="LICENSE")
    front, _ = card(pair)
    assert front["license_name"] == "odd"
    assert "license_link" not in front


def test_a_known_licence_needs_no_name(pair: dict[str, Checkpoint]) -> None:
    for model in pair.values():
        state(model, license="mit")
    front, _ = card(pair)
    assert front["license"] == "mit"
    assert not {"license_name", "license_link"} & front.keys()


def test_folders_are_no_base_model_of_a_hubs(pair: dict[str, Checkpoint]) -> None:
    front, body = card(pair)
    assert "base_model" not in front
    assert "- `a`\n- `b`\n" in body


def test_repositories_are(pair: dict[str, Checkpoint]) -> None:
    commit = "0" * 40
    pair["a"] = replace(pair["a"], uri=f"org/a@{commit}+org/lora@{commit}", revision=commit)
    front, body = card(pair)
    assert front["base_model"] == ["org/a", "org/lora"]
    assert f"- `org/a@{commit}+org/lora@{commit}`\n- `b`\n" in body


@pytest.mark.parametrize(
    ("config", "library"), [({"_class_name": "UNet2DConditionModel"}, "diffusers"), (None, None)]
)
def test_the_library_is_the_one_that_loads_it(
    tmp_path: Path, config: dict[str, str] | None, library: str | None
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file({"conv.weight": torch.ones(2)}, tmp_path / name / "model.safetensors")
        if config is not None:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
    front, _ = card({name: Checkpoint.open(tmp_path / name) for name in "ab"})
    assert front.get("library_name") == library
