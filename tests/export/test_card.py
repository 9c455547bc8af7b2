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
from evomerge.report.caveats import caveats


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


def test_a_report_without_anything_to_mind_has_no_caveats() -> None:
    seal = {"opened_before": 0, "opened_by": "s", "searches": [], "overlaps": []}
    clean = {"benchmarks": [], "quarantined": {}, "overlaps": [], "notes": []}
    report = {"search": "s", "more_looks": [], "seal": {"t": seal}, "contamination": clean}
    assert caveats(report) == []
    assert caveats({"search": "s", "seal": {"t": {"opened_before": 0}}}) == []  # an older one


def test_public_test_sets_and_quarantined_items_are_caveats() -> None:
    benchmarks = [
        {"benchmark": name, "task": task, "split": "train", "items": 3, "share": 0.5}
        for name, task in (("MGSM", "a"), ("GSM8K", "a"), ("MGSM", "b"))
    ]
    quarantined = {"a": {"train": [0, 4], "validation": [1]}, "b": {"train": [7]}}
    found = {"benchmarks": benchmarks, "quarantined": quarantined}
    first, second = caveats({"search": "s", "seal": {}, "contamination": found})
    assert first == "the search was driven by test sets of public benchmarks: MGSM, GSM8K"
    assert second.startswith("4 items were left out")


def test_worn_test_splits_and_later_looks_are_caveats() -> None:
    looks = {"at": "2026-11-23T06:00:00.000+00:00", "before": 3, "allowed": 5, "opened": True}
    seal = {
        "opened_before": 2,
        "opened_by": "other",
        "searches": ["a", "b"],
        "overlaps": [{"times": 1, "searches": ["c"], "share": 0.125}],
    }
    found = caveats({"search": "s", "more_looks": [looks], "seal": {"t": seal}})
    assert [text.split(":")[0] for text in found] == [
        "post hoc",
        "this recipe was read on the test split of `t` by search `other`, once for both",
        "the test split of `t` was opened for 2 other recipes before by searches `a`, `b`",
        "12% of the test split of `t` was opened before, by search `c`",
    ]
    assert found[0].endswith("instead of 3 on 2026-11-23, after its test split had been opened")
