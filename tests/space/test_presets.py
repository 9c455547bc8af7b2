"""The packaged presets over a Llama-like model, and the baselines of every search."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.errors import JobError
from evomerge.job import Space as Section
from evomerge.job import packaged
from evomerge.layout import infer
from evomerge.recipe import Recipe, resolve
from evomerge.space import Infeasible, Models, Space, baselines, build
from tests.space.test_weight import BASE, PARENTS, llama

LAYERS = 6
PRESETS = sorted(packaged("search_spaces").glob("*.yaml"), key=lambda path: path.stem)
GROUPS = {"model": 1, "layer": LAYERS + 2, "module": 2 * LAYERS + 3}


def models(base: str | None = BASE) -> Models:
    paths = [*PARENTS.values(), *([base] if base else [])]
    return Models(PARENTS, base, dict.fromkeys(paths, infer(llama(LAYERS))), "bfloat16")


def section(preset: Path) -> Section:
    return Section.model_validate(yaml.safe_load(preset.read_text()))


def dimensions(part: Section) -> int:
    """How many coordinates a preset has, counted independently."""
    if part.per is None:
        return (part.repeats or 1) * len(PARENTS) * LAYERS
    parameters = sum(value is not None for value in (part.weight, part.density))
    return parameters * len(PARENTS) * GROUPS[part.per]


preset = pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)


@preset
def test_a_preset_has_its_dimensions_and_starts_inside_the_cube(preset: Path) -> None:
    space: Space = build(section(preset), models())
    assert len(space.names) == len(set(space.names)) == dimensions(section(preset))
    assert space.start.shape == (len(space.names),)
    assert ((space.start > 0) & (space.start < 1)).all()
    assert 0 < space.sigma < 1


@preset
def test_a_preset_starts_at_a_merge(preset: Path) -> None:
    space = build(section(preset), models())
    assert isinstance(space.decode(space.start), Recipe)


@preset
def test_any_point_of_a_preset_is_a_recipe_that_survives_writing(preset: Path) -> None:
    space = build(section(preset), models())
    random = np.random.default_rng(0)
    for _ in range(20):
        found = space.decode(random.random(len(space.names)))
        if isinstance(found, Infeasible):
            assert preset.stem == "layer_stack"
        else:
            assert found.merge_method == (section(preset).method or "passthrough")
            assert Recipe.from_yaml(found.to_yaml()) == found


@preset
def test_a_preset_gives_a_weight_to_every_tensor(preset: Path) -> None:
    if section(preset).kind == "layers":
        return
    space = build(section(preset), models())
    recipe = space.decode(space.start)
    assert isinstance(recipe, Recipe)
    for entry in recipe.models or ():
        for parameter in entry.parameters:
            values = {resolve(parameter, [entry.parameters], name, 0.0) for name in llama(LAYERS)}
            assert values == {0.5 if parameter == "weight" else 0.6}


def test_a_section_without_a_kind_is_refused() -> None:
    with pytest.raises(JobError, match=r"space\.kind is missing: give 'weight' or 'layers'"):
        build(Section(), models())


def test_baselines_are_the_parents_first_then_base_and_plain_merges() -> None:
    found = baselines(models())
    assert list(found) == ["ops", "ja", "base", "uniform average", "task arithmetic", "ties"]
    assert list(baselines(models(base=None))) == ["ops", "ja", "uniform average"]


@pytest.mark.parametrize(("name", "path"), [*PARENTS.items(), ("base", BASE)])
def test_a_model_alone_is_passed_through(name: str, path: str) -> None:
    expected = {"merge_method": "passthrough", "models": [{"model": path}]}
    assert baselines(models())[name].to_dict() == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform average", {"merge_method": "linear"}),
        ("task arithmetic", {"merge_method": "task_arithmetic", "base_model": BASE}),
        (
            "ties",
            {"merge_method": "ties", "base_model": BASE, "parameters": {"density": 0.5}},
        ),
    ],
)
def test_plain_merges_weigh_all_parents_alike(name: str, expected: dict[str, Any]) -> None:
    entries = [{"model": path, "parameters": {"weight": 1.0}} for path in PARENTS.values()]
    found = baselines(models())[name].to_dict()
    assert found == {"models": entries, "dtype": "bfloat16", **expected}
