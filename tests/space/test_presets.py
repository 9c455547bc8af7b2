"""The packaged presets over real models, and the baselines of every search."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from evomerge.coordinates import start_of
from evomerge.job import Space as Section
from evomerge.job import WeightSpace, packaged
from evomerge.recipe import Recipe
from evomerge.space import Models, Space, baselines, build
from tests.space.merging import assert_same, decoded, merged, models_of, random_points, values_of
from tests.space.names import BASE, PARENTS, llama, models_with, vision_llama
from tests.tiny import write_model

PRESETS = {path.stem: path for path in sorted(packaged("search_spaces").glob("*.yaml"))}
LAYERS = 2
# Coordinates over a base and two parents of two layers, parents x groups x parameters.
DIMENSIONS = {
    "any_method": 1 + 2 * 4 * 4,
    "chat_vector": 4,
    "global_task_arithmetic": 2,
    "layer_wise_fusion": 1 + 2 * 4 * 2,
    "long_to_short_task_arithmetic": 2 * 4,
    "long_to_short_ties": 2 * 4 * 2,
    "mergekit_evolve_dare_ties": 2 * 2 * 2,
    "mergekit_evolve_linear": 2 * 2,
    "mergekit_evolve_slerp": 2,
    "mergekit_evolve_task_arithmetic": 2 * 2,
    "mergekit_evolve_ties": 2 * 2 * 2,
    "model_soup": 2,
    "per_layer_dare_ties": 2 * 4 * 2,
    "per_layer_task_arithmetic": 2 * 4,
    "per_layer_ties": 2 * 4 * 2,
    "per_module_task_arithmetic": 2 * 6,
    "sakana_ps": 2 * 4 * 2,
    "vlm_language": 2 * 6,
    "wise_ft": 1,
}


def section(name: str) -> Section:
    found: Section = TypeAdapter(Section).validate_python(yaml.safe_load(PRESETS[name].read_text()))
    return found


def write_vision_model(folder: Path, seed: int, near: Path) -> Path:
    """A tiny Llama, a fine-tune of another, that also sees."""
    write_model(folder, seed, LAYERS, near=near)
    text = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in vision_llama(1) if not name.startswith("language_model.")]
    seeing = {name: torch.randn(4, 4, generator=generator) for name in names}
    tensors = {**{f"language_model.{name}": tensor for name, tensor in text.items()}, **seeing}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    vision = {"model_type": "llava", "text_config": config, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(vision))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, two fine-tunes of it, and two that also see."""
    root = tmp_path_factory.mktemp("models")
    base = write_model(root / "base", 0, LAYERS)
    found = {name: write_model(root / name, i, LAYERS, near=base) for i, name in enumerate("ab", 1)}
    seeing = {n: write_vision_model(root / n, i, base) for i, n in enumerate(("see", "look"), 3)}
    return {"base": base, **found, **seeing}


@pytest.fixture
def models(folders: dict[str, Path]) -> Callable[[str], Models]:
    """The models that a preset is made for."""

    def made(preset: str) -> Models:
        names = {"vlm_language": ("see", "b"), "wise_ft": ("a",)}.get(preset, ("a", "b"))
        return models_of({name: folders[name] for name in names}, folders["base"])

    return made


def weight_presets() -> list[str]:
    return [name for name in PRESETS if isinstance(section(name), WeightSpace)]


def test_every_weight_preset_is_counted_here() -> None:
    assert set(weight_presets()) == set(DIMENSIONS)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_in_its_file_what_it_is_for(preset: str) -> None:
    lines = PRESETS[preset].read_text().splitlines()
    assert lines[0].startswith("# ")
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize("preset", DIMENSIONS)
def test_a_preset_has_its_dimensions_and_starts_at_a_merge(
    preset: str, models: Callable[[str], Models]
) -> None:
    space: Space = build(section(preset), models(preset))
    names = [coordinate.name for coordinate in space.coordinates]
    assert len(names) == len(set(names)) == DIMENSIONS[preset]
    start = start_of(space.coordinates)
    assert ((start >= 0) & (start <= 1)).all()
    assert 0 < space.sigma <= 1 / 3
    methods = yaml.safe_load(PRESETS[preset].read_text())["method"]
    assert decoded(space, start).merge_method == (
        methods if isinstance(methods, str) else methods[0]
    )


@pytest.mark.parametrize("preset", DIMENSIONS)
def test_points_of_a_preset_are_merged_into_models(
    preset: str, models: Callable[[str], Models], folders: dict[str, Path]
) -> None:
    space = build(section(preset), models(preset))
    like = values_of(folders["see" if preset == "vlm_language" else "base"])
    seen = set()
    for genotype in (start_of(space.coordinates), *random_points(space, 3)):
        recipe = decoded(space, genotype)
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
        found = merged(recipe)
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in like.items()}
        assert all(torch.isfinite(tensor).all() for tensor in found.values())
        seen.add(float(sum(tensor.double().sum() for tensor in found.values())))
    assert len(seen) == 4  # every point another model


def test_wise_ft_is_a_line_between_two_checkpoints(
    models: Callable[[str], Models], folders: dict[str, Path]
) -> None:
    found = merged(
        decoded(space := build(section("wise_ft"), models("wise_ft")), start_of(space.coordinates))
    )
    early, late = values_of(folders["base"]), values_of(folders["a"])
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (early[name] + late[name]) / 2)


def test_a_chat_vector_is_added_to_the_first_parent(
    models: Callable[[str], Models], folders: dict[str, Path]
) -> None:
    space = build(section("chat_vector"), models("chat_vector"))
    found = merged(decoded(space, start_of(space.coordinates)))
    base, pretrained, chat = (values_of(folders[name]) for name in ("base", "a", "b"))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, pretrained[name] + chat[name] - base[name])


def test_a_soup_starts_at_the_average(
    models: Callable[[str], Models], folders: dict[str, Path]
) -> None:
    space = build(section("model_soup"), models("model_soup"))
    start = decoded(space, start_of(space.coordinates))
    assert_same(merged(start), merged(baselines(models("model_soup"))["uniform average"]))


def test_the_language_part_is_merged_and_the_rest_stays(
    models: Callable[[str], Models], folders: dict[str, Path]
) -> None:
    space = build(section("vlm_language"), models("vlm_language"))
    found = merged(decoded(space, start_of(space.coordinates)))
    see, words = values_of(folders["see"]), values_of(folders["b"])
    for name, tensor in found.items():
        own = name.removeprefix("language_model.")
        expected = see[name] if own == name else (see[name] + words[own]) / 2
        torch.testing.assert_close(tensor, expected)


@pytest.mark.parametrize("base", ["look", None])
def test_the_language_parts_of_models_that_see_are_merged(
    folders: dict[str, Path], base: str | None
) -> None:
    parents = {name: folders[name] for name in ("see", "look") if name != base}
    models = models_of(parents, folders[base] if base else None)
    method: dict[str, Any] = {"method": "task_arithmetic" if base else "linear"}
    given = {"kind": "weight", "per": "layer", "part": "text_decoder", "weight": [0.1, 1]}
    space = build(WeightSpace.model_validate(given | method), models)
    found = merged(decoded(space, random_points(space, 1)[0]))
    rest = values_of(folders[base or "see"])
    for name, tensor in found.items():
        assert torch.equal(tensor, rest[name]) != name.startswith("language_model."), name


def test_baselines_are_the_parents_first_then_base_and_plain_merges() -> None:
    found = baselines(models_with(llama(LAYERS)))
    assert list(found) == ["ops", "ja", "base", "uniform average", "task arithmetic", "ties"]
    alone = baselines(models_with(llama(LAYERS), base=None))
    assert list(alone) == ["ops", "ja", "uniform average"]


def test_of_one_parent_there_is_nothing_to_average() -> None:
    assert list(baselines(models_with(llama(LAYERS), {"ops": "/zoo/ops"}))) == ["ops", "base"]


def test_parents_of_another_depth_are_measured_and_not_merged() -> None:
    names = {"/zoo/ops": llama(2), "/zoo/ja": llama(3), BASE: llama(2)}
    assert list(baselines(models_with(names))) == ["ops", "ja", "base"]


def test_a_base_of_another_size_is_no_base_of_task_vectors() -> None:
    models = models_with(llama(2), {"ops": "/zoo/ops", "ja": "/zoo/ja"})
    larger = {**models.sizes[BASE], "lm_head.weight": 11}
    models = replace(models, sizes={**models.sizes, BASE: larger})
    assert not {"task arithmetic", "ties"} & baselines(models).keys()


@pytest.mark.parametrize(("name", "path"), [*PARENTS.items(), ("base", BASE)])
def test_a_model_alone_is_passed_through(name: str, path: str) -> None:
    expected = {"merge_method": "passthrough", "models": [{"model": path}]}
    assert baselines(models_with(llama(LAYERS)))[name].to_dict() == expected


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
    found = baselines(models_with(llama(LAYERS)))[name].to_dict()
    assert found == {"models": entries, "dtype": "bfloat16", **expected}


@pytest.mark.parametrize(
    ("parents", "base", "plain"),
    [
        (("see", "look"), None, ["uniform average"]),
        (("see", "look"), "base", ["uniform average", "task arithmetic", "ties"]),
        (("a", "see"), "base", ["uniform average", "task arithmetic", "ties"]),
        (("a", "b"), "see", ["uniform average", "task arithmetic", "ties"]),
    ],
)
def test_language_models_are_measured_in_the_model_that_sees(
    folders: dict[str, Path], parents: tuple[str, ...], base: str | None, plain: list[str]
) -> None:
    models = models_of({n: folders[n] for n in parents}, folders[base] if base else None)
    found = baselines(models)
    alone = [*parents, *(["base"] if base else [])]
    assert list(found) == [*alone, *plain]
    shell = values_of(Path(models.first))
    for name, recipe in found.items():
        tensors = merged(recipe)
        assert tensors.keys() == shell.keys()
        if name in alone:
            own = values_of(folders[base if name == "base" and base else name])
            words = {n.removeprefix("language_model."): t for n, t in own.items()}
            for tensor, value in tensors.items():
                expected = words.get(tensor.removeprefix("language_model."), shell[tensor])
                assert torch.equal(value, expected), (name, tensor)
