"""Weight merges inside a layer order: the same tensors as the merge, in the order's places."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.coordinates import Genotype, placed, start_of
from evomerge.errors import JobError
from evomerge.job import BothSpace, Job, packaged
from evomerge.recipe import Recipe
from evomerge.space import Infeasible, build
from evomerge.space.both import Both
from tests import tiny
from tests.merge.conftest import altered, without
from tests.space.merging import (
    Tensors,
    assert_same,
    decoded,
    layers_of,
    merged,
    models_of,
    names_of,
    random_points,
    values_of,
)

LAYERS = 3
TASK = {"kind": "weight", "method": "task_arithmetic", "per": "module", "weight": [-0.5, 1.5]}
TWICE = {"kind": "layers", "form": "switches", "repeats": 2, "max_layers": 6}


@pytest.fixture(scope="module")
def folders(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two parents, and c: like b, its head tied to its embeddings."""
    tied = altered(
        models["b"],
        tmp_path_factory.mktemp("tied") / "c",
        without("lm_head.weight"),
        tie_word_embeddings=True,
    )
    return {"a": models["a"], "b": models["b"], "c": tied, "base": models["base"]}


def both(
    folders: dict[str, Path],
    *parents: str,
    weight: dict[str, Any] = TASK,
    layers: dict[str, Any] = TWICE,
    base: bool = True,
) -> Both:
    """Over these parents, by default a and b."""
    section = BothSpace.model_validate({"kind": "both", "weight": weight, "layers": layers})
    named = {name: folders[name] for name in parents or ("a", "b")}
    space = build(section, models_of(named, folders["base"] if base else None))
    assert isinstance(space, Both)
    return space


def at(space: Both, order: list[int], weights: Genotype) -> Genotype:
    """The point with these weights, at which layers stand in this order: ascending, and once more
    ascending."""
    on = np.full(len(space.order.coordinates), placed(0, 2))
    position = -1
    for layer in order:
        position = next(i for i in range(position + 1, len(on)) if i % LAYERS == layer)
        on[position] = placed(1, 2)
    return np.concatenate([weights, on])


def restacked(tensors: Tensors, order: list[int]) -> Tensors:
    """A model's layers in another order, by their names alone."""
    found = {n: t for n, t in tensors.items() if not n.startswith("model.layers.")}
    for place, layer in enumerate(order):
        for name, tensor in tensors.items():
            if name.startswith(f"model.layers.{layer}."):
                found[name.replace(f"layers.{layer}.", f"layers.{place}.")] = tensor
    return found


def test_one_parent_alone_in_its_own_order_is_that_parent(folders: dict[str, Path]) -> None:
    weight = {"kind": "weight", "method": "linear", "per": "model", "weight": [0, 1]}
    space = both(folders, weight=weight, base=False)
    recipe = decoded(space, at(space, [0, 1, 2], np.array([1.0, 0.0])))
    assert_same(merged(recipe), values_of(folders["a"]))
    assert len(recipe.slices or ()) == 1, "layers that are merged alike share a slice"


def test_a_search_starts_at_the_plain_merge(folders: dict[str, Path]) -> None:
    space = both(folders)
    genotype = start_of(space.coordinates)
    plain = decoded(space.weights, genotype[: len(space.weights.coordinates)])
    assert_same(merged(decoded(space, genotype)), merged(plain))


@pytest.mark.parametrize(
    "weight",
    [
        TASK,
        {**TASK, "per": "layer", "lambda": [0.5, 2]},
        {**TASK, "per": "slice", "filters": ["mlp"]},
        {**TASK, "per": "model", "filters": ["norm", "embed"]},
        {**TASK, "method": "ties", "per": "module", "density": [0.2, 1.0], "lambda": [0.5, 2]},
        {"kind": "weight", "method": "slerp", "per": "layer", "t": [0, 1]},
        {"kind": "weight", "method": "nuslerp", "per": "module", "weight": [0.1, 1]},
        {**TASK, "method": ["task_arithmetic", "ties"], "density": [0.2, 1.0]},
    ],
    ids=lambda weight: f"{weight['method']}-{weight['per']}",
)
@pytest.mark.parametrize("order", [[2], [0, 0], [1, 2, 0, 1]])
def test_every_slot_is_the_merge_of_its_layer(
    folders: dict[str, Path], weight: dict[str, Any], order: list[int]
) -> None:
    space = both(folders, weight=weight)
    for weights in random_points(space.weights, 2):
        recipe = decoded(space, at(space, order, weights))
        assert layers_of(recipe) == order
        expected = restacked(merged(decoded(space.weights, weights)), order)
        assert_same(merged(recipe), expected)
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("parents", [("a", "c"), ("c", "a"), ("c", "b")])
def test_a_tied_head_has_the_coefficients_of_its_embeddings(
    folders: dict[str, Path], parents: tuple[str, str]
) -> None:
    space = both(folders, *parents)
    (weights,) = random_points(space.weights, 1)
    recipe = decoded(space, at(space, [0, 2, 1], weights))
    assert_same(merged(recipe), restacked(merged(decoded(space.weights, weights)), [0, 2, 1]))


def test_names_that_stand_inside_each_other_are_told_apart(tmp_path: Path) -> None:
    """A norm of the layer, and one of its attention that has the first one's name in its own."""

    def renamed(tensors: Tensors) -> Tensors:
        words = {
            "input_layernorm.weight": "norm.weight",
            "post_attention_layernorm.weight": "self_attn.norm.weight",
        }
        changed = {}
        for name, tensor in tensors.items():
            for old, new in words.items():
                name = name.replace(old, new)
            changed[name] = tensor
        return changed

    base = tiny.write_model(tmp_path / "plain", seed=0)
    folders = {"base": altered(base, tmp_path / "base", renamed)}
    for i, name in enumerate("ab", 1):
        near = tiny.write_model(tmp_path / f"plain-{name}", seed=i, near=base)
        folders[name] = altered(near, tmp_path / name, renamed)
    for filters in (["norm"], ["self_attn"], ["self_attn.norm"]):
        space = both(folders, weight={**TASK, "per": "layer", "filters": filters})
        (weights,) = random_points(space.weights, 1)
        recipe = decoded(space, at(space, [1, 0, 2], weights))
        expected = restacked(merged(decoded(space.weights, weights)), [1, 0, 2])
        assert_same(merged(recipe), expected)


def test_only_layers_that_are_merged_alike_share_a_slice(folders: dict[str, Path]) -> None:
    space = both(folders, weight={**TASK, "per": "layer"})
    (weights,) = random_points(space.weights, 1)
    alike = weights.copy()
    first, second = (
        [i for i, name in enumerate(names_of(space.weights)) if f"layer {layer} " in name]
        for layer in (0, 1)
    )
    alike[second] = alike[first]

    def slices(recipe: Recipe) -> list[tuple[int, int]]:
        return [one.sources[0].layer_range for one in recipe.slices or ()]

    order = [0, 1, 2, 0, 1]
    assert slices(decoded(space, at(space, order, weights))) == [(i, i + 1) for i in order]
    assert slices(decoded(space, at(space, order, alike))) == [(0, 2), (2, 3), (0, 2)]


def test_coordinates_are_those_of_both_spaces(folders: dict[str, Path]) -> None:
    weight = {**TASK, "method": ["ties", "task_arithmetic"], "density": [0.1, 1]}
    space = both(folders, weight=weight)
    weights, order = space.weights.coordinates, space.order.coordinates
    assert names_of(space) == [
        *(f"weight: {one.name}" for one in weights),
        *(f"layers: {one.name}" for one in order),
    ]
    assert len(set(names_of(space))) == len(weights) + len(order)
    for ours, own in zip(space.coordinates, (*weights, *order), strict=True):
        assert (ours.start, ours.choices, ours.ordered) == (own.start, own.choices, own.ordered)
        assert (ours.when is None) == (own.when is None)
    owners = {one.when.coordinate for one in space.coordinates if one.when}
    assert {names_of(space)[owner] for owner in owners} >= {"weight: method"}


def test_an_order_without_layers_is_infeasible(folders: dict[str, Path]) -> None:
    space = both(folders)
    weights = start_of(space.weights.coordinates)
    assert isinstance(space.decode(at(space, [], weights)), Infeasible)
    shallow = both(folders, layers={**TWICE, "max_layers": 3})
    assert isinstance(shallow.decode(at(shallow, [0, 1, 2, 0], weights)), Infeasible)


@pytest.mark.parametrize(
    "layers",
    [
        {"kind": "layers", "form": "segments", "segments": 2},
        {"kind": "layers", "form": "depth_wise", "removable": True},
        {"kind": "layers", "form": "upscale"},
    ],
    ids=lambda layers: str(layers["form"]),
)
def test_any_form_of_order_may_stand_around_a_merge(
    folders: dict[str, Path], layers: dict[str, Any]
) -> None:
    space = both(folders, layers={**layers, "max_layers": 6})
    cut = len(space.weights.coordinates)
    found = set()
    for genotype in [start_of(space.coordinates), *random_points(space, 20)]:
        recipe, order = space.decode(genotype), space.order.decode(genotype[cut:])
        assert isinstance(recipe, Recipe) == isinstance(order, Recipe)
        if isinstance(recipe, Recipe) and isinstance(order, Recipe):
            assert layers_of(recipe) == layers_of(order)
            found.add(tuple(layers_of(recipe)))
    assert len(found) > 3


def test_decoding_is_pure(folders: dict[str, Path]) -> None:
    space = both(folders)
    genotype = start_of(space.coordinates)
    before = genotype.copy()
    first = decoded(space, genotype)
    space.decode(np.zeros(len(genotype)))
    assert decoded(space, genotype) == first
    assert np.array_equal(genotype, before)


def test_parents_of_different_depth_are_refused(
    folders: dict[str, Path], models: dict[str, Path]
) -> None:
    with pytest.raises(JobError, match=r"has 5 layers and .* 3: only those of one depth"):
        both({**folders, "deep": models["deep"]}, "a", "deep")


@pytest.mark.parametrize(
    ("half", "keys", "words"),
    [
        ("weight", {"part": "text_decoder"}, "space.weight.part: 'text_decoder' alone"),
        ("layers", {"form": "depth_wise"}, "space.layers.form: depth_wise chooses a parent"),
        ("layers", {"scales": "matrix"}, "space.layers.scales: 'matrix' is folded"),
    ],
)
def test_what_a_merge_of_layers_cannot_be_is_refused(
    folders: dict[str, Path], half: str, keys: dict[str, Any], words: str
) -> None:
    halves = {"weight": TASK, "layers": {"kind": "layers"}}
    with pytest.raises(JobError) as caught:
        both(folders, **{**halves, half: {**halves[half], **keys}})
    assert words in str(caught.value)


def job_with(tmp_path: Path, **space: Any) -> Any:
    """The space section of a job."""
    return Job.from_file(tiny.write_job(tmp_path, space=space)).space


def preset(name: str = "both_weights_and_order") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(
        (packaged("search_spaces") / f"{name}.yaml").read_text(encoding="utf-8")
    )
    return found


def test_a_preset_is_a_merge_at_its_start(folders: dict[str, Path]) -> None:
    found = preset()
    space = both(folders, weight=found["weight"], layers=found["layers"])
    recipe = decoded(space, start_of(space.coordinates))
    assert layers_of(recipe) == [0, 1, 2]
    assert merged(recipe).keys() == values_of(folders["base"]).keys()


def test_single_keys_of_each_half_may_be_laid_over_a_preset(tmp_path: Path) -> None:
    found = job_with(
        tmp_path,
        preset="both_weights_and_order",
        weight={"granularity": 3},
        layers={"repeats": 1},
    )
    assert isinstance(found, BothSpace)
    expected = preset()
    assert found.weight.granularity == 3
    assert found.weight.method == expected["weight"]["method"]
    assert found.weight.weight is not None
    assert found.layers.repeats == 1
    assert found.layers.form == expected["layers"]["form"]


def test_each_half_may_be_a_preset_of_its_own(tmp_path: Path) -> None:
    found = job_with(
        tmp_path,
        preset="both_weights_and_order",
        weight={"preset": "per_layer_ties", "granularity": 2},
    )
    ties = preset("per_layer_ties")
    assert isinstance(found, BothSpace)
    assert (found.weight.method, found.weight.granularity) == ("ties", 2)
    assert found.weight.per == ties["per"]
    assert found.layers.repeats == preset()["layers"]["repeats"]
    alone = job_with(
        tmp_path, kind="both", weight={"preset": "per_layer_ties"}, layers={"kind": "layers"}
    )
    assert alone.weight.density == found.weight.density


@pytest.mark.parametrize("name", ["per_layer_tie", 3])
def test_an_unknown_preset_of_a_half_is_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(JobError, match=r"space\.preset: "):
        job_with(tmp_path, kind="both", weight={"preset": name}, layers={"kind": "layers"})
