"""Weight space: every tensor gets the coefficient of its own group, and no other."""

import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import JobError
from evomerge.job import Space as Section
from evomerge.layout import infer
from evomerge.recipe import Recipe, resolve
from evomerge.space import Genotype, Models, Space, build

PARENTS = {"ops": "/zoo/ops", "ja": "/zoo/ja"}
BASE = "/zoo/base"


def llama(layers: int, extras: bool = True, prefix: str = "model.") -> list[str]:
    """Tensor names of a Llama-like model; `extras`: biases, and q_norm and k_norm as in Qwen 3."""
    names = [f"{prefix}embed_tokens.weight"]
    for i in range(layers):
        layer = f"{prefix}layers.{i}."
        projections = [f"self_attn.{key}_proj" for key in "qkvo"]
        projections += [f"mlp.{key}_proj" for key in ("gate", "up", "down")]
        names += [f"{layer}{projection}.weight" for projection in projections]
        names += [f"{layer}{key}_layernorm.weight" for key in ("input", "post_attention")]
        if extras:
            names += [f"{layer}self_attn.{key}_norm.weight" for key in "qk"]
            names += [f"{layer}{projection}.bias" for projection in projections]
    return [*names, f"{prefix}norm.weight", "lm_head.weight"]


def gpt2(layers: int) -> list[str]:
    """Tensor names of a GPT-2-like model, whose norms do not have 'norm' in their names."""
    parts = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    inside = [f"transformer.h.{i}.{part}" for i in range(layers) for part in parts]
    names = ["transformer.wte", "transformer.wpe", *inside, "transformer.ln_f"]
    return [*(f"{name}.weight" for name in names), "lm_head.weight"]


def own_group(name: str, per: str, granularity: int) -> str:
    """Which group a tensor belongs to, by rules of this test's own."""
    if per == "model":
        return "all"
    number = re.search(r"\b(?:layers|h)\.(\d+)\.", name)
    if re.search(r"norm|\bln_", name) and (number is None or per == "module"):
        return "norms" if per == "module" else "final norm and head"
    if number is None:
        embeds = re.search(r"embed|wte|wpe", name)
        return "embeddings" if embeds else "head" if per == "module" else "final norm and head"
    first = int(number[1]) // granularity * granularity
    block = f"layer {first}" if granularity == 1 else f"layers {first}-{first + granularity - 1}"
    if per == "layer":
        return block
    return f"{block} {'attention' if 'attn' in name else 'mlp'}"


def space_over(names: Sequence[str], **section: Any) -> Space:
    """A weight space over a base and two parents with these tensors."""
    layouts = dict.fromkeys([*PARENTS.values(), BASE], infer(names))
    given_ = {"kind": "weight", "method": "task_arithmetic", "weight": [-0.5, 1.5], **section}
    return build(Section.model_validate(given_), Models(PARENTS, BASE, layouts, "bfloat16"))


def point(space: Space, seed: int = 0) -> Genotype:
    return np.random.default_rng(seed).random(len(space.names))


def decoded(space: Space, genotype: Genotype) -> Recipe:
    recipe = space.decode(genotype)
    assert isinstance(recipe, Recipe)
    return recipe


def check_every_tensor(space: Space, names: Sequence[str], per: str, granularity: int) -> None:
    """Resolve each parameter of each parent for each tensor, and compare with the coordinate."""
    bounds = {"weight": (-0.5, 1.5), "density": (0.1, 1.0)}
    genotype = point(space)
    coordinates = dict(zip(space.names, genotype, strict=True))
    recipe = decoded(space, genotype)
    assert recipe.models is not None
    for parent, entry in zip(PARENTS, recipe.models, strict=True):
        for parameter in entry.parameters:
            low, high = bounds[parameter]
            for name in names:
                group = own_group(name, per, granularity)
                unit = coordinates.pop(f"{parent}: {group} {parameter}", None)
                if unit is not None:  # the group's first tensor
                    coordinates[f"seen {parent}: {group} {parameter}"] = unit
                unit = coordinates[f"seen {parent}: {group} {parameter}"]
                found = resolve(parameter, [entry.parameters, recipe.parameters], name, t=0.5)
                assert found == pytest.approx(low + unit * (high - low), abs=1e-6), name
    assert all(key.startswith("seen ") for key in coordinates), "a group that owns no tensor"


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 12),
    granularity=st.sampled_from([1, 2, 3, 4]),
    per=st.sampled_from(["model", "layer", "module"]),
    extras=st.booleans(),
    prefix=st.sampled_from(["model.", "", "model.language_model."]),
    alphabetical=st.booleans(),
)
def test_every_tensor_gets_the_coefficient_of_its_own_group(
    layers: int, granularity: int, per: str, extras: bool, prefix: str, alphabetical: bool
) -> None:
    names = llama(layers * granularity, extras, prefix)
    names = sorted(names) if alphabetical else names  # as in a safetensors file
    density = {"density": [0.1, 1.0]}
    space = space_over(names, method="ties", per=per, granularity=granularity, **density)
    check_every_tensor(space, names, per, granularity)


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 12),
    per=st.sampled_from(["layer", "module"]),
    prefix=st.sampled_from(["model.", ""]),
    seed=st.integers(0, 999),
)
def test_the_order_of_the_tensors_does_not_matter(
    layers: int, per: str, prefix: str, seed: int
) -> None:
    names = llama(layers, prefix=prefix)
    ordered = space_over(names, per=per)
    random.Random(seed).shuffle(names)
    space = space_over(names, per=per)
    assert space.names == ordered.names
    check_every_tensor(space, names, per, 1)


@pytest.mark.parametrize("per", ["model", "layer", "module"])
@pytest.mark.parametrize("layers", [1, 2, 12])
def test_norms_that_are_not_called_norm_are_found(layers: int, per: str) -> None:
    check_every_tensor(space_over(gpt2(layers), per=per), gpt2(layers), per, 1)


@pytest.mark.parametrize("alphabetical", [False, True])
def test_layer_1_is_not_layer_11(alphabetical: bool) -> None:
    names = sorted(llama(12)) if alphabetical else llama(12)
    space = space_over(names, per="layer")
    genotype = np.zeros(len(space.names))
    genotype[space.names.index("ops: layer 1 weight")] = 1.0
    recipe = decoded(space, genotype)
    assert recipe.models is not None
    raised = {
        int(name.split(".")[2])
        for name in names
        if resolve("weight", [recipe.models[0].parameters], name, 0.0) == 1.5
    }
    assert raised == {1}


@pytest.mark.parametrize(
    ("per", "granularity", "labels"),
    [
        ("model", 1, ["all"]),
        ("layer", 1, ["embeddings", "layer 0", "layer 1", "final norm and head"]),
        ("layer", 2, ["embeddings", "layers 0-1", "final norm and head"]),
        (
            "module",
            2,
            ["norms", "embeddings", "layers 0-1 attention", "layers 0-1 mlp", "head"],
        ),
    ],
)
def test_names_say_parent_group_and_parameter(
    per: str, granularity: int, labels: list[str]
) -> None:
    sections = {"method": "ties", "density": [0.1, 1]}
    space = space_over(llama(2), per=per, granularity=granularity, **sections)
    assert list(space.names) == [
        f"{parent}: {label} {parameter}"
        for parameter in ("weight", "density")
        for parent in PARENTS
        for label in labels
    ]
    assert space.start.shape == (len(space.names),)


@settings(max_examples=60, deadline=None)
@given(
    low=st.floats(-3, 3),
    width=st.floats(1e-6, 4),
    start=st.none() | st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_coefficients_stay_within_their_bounds_and_the_start_in_the_cube(
    low: float, width: float, start: float | None, seed: int
) -> None:
    high = low + width
    middle = None if start is None else min(max(low + start * width, low), high)
    space = space_over(llama(2), per="layer", weight={"low": low, "high": high, "start": middle})
    assert ((space.start >= 0) & (space.start <= 1)).all()
    corners = np.random.default_rng(seed).integers(0, 2, len(space.names)).astype(float)
    for genotype in (point(space, seed), corners, space.start):
        for entry in decoded(space, genotype).to_dict()["models"]:
            for filtered in entry["parameters"]["weight"]:
                assert low <= filtered["value"] <= high


def test_a_density_never_rounds_down_to_zero() -> None:
    space = space_over(llama(1), method="ties", per="model", density=[1e-9, 1.0])
    recipe = decoded(space, np.zeros(4))
    assert recipe.models is not None
    assert recipe.models[0].parameters["density"] == 1e-9


def test_a_coefficient_never_rounds_to_minus_zero() -> None:
    space = space_over(llama(1), per="model", weight=[-1e-7, 1.0])
    assert "-0.0" not in decoded(space, np.zeros(2)).to_yaml()


@pytest.mark.parametrize(
    ("weight", "start"),
    [([-1, 3], 0.5), ({"low": -1, "high": 3, "start": 0}, 0.25), ({"low": 0, "high": 2}, 0.5)],
)
def test_the_search_starts_where_the_bounds_say_or_in_their_middle(
    weight: Any, start: float
) -> None:
    assert space_over(llama(1), per="layer", weight=weight).start == pytest.approx(start)


@pytest.mark.parametrize("per", ["model", "layer", "module"])
def test_decoding_is_pure(per: str) -> None:
    space = space_over(llama(3), per=per)
    genotype = point(space)
    before = genotype.copy()
    first = decoded(space, genotype)
    decoded(space, point(space, seed=1))
    np.random.default_rng().random()
    assert decoded(space, genotype).to_yaml() == first.to_yaml()
    assert np.array_equal(genotype, before)


@pytest.mark.parametrize("wrong", [0, 1, 7, 9])
def test_a_genotype_of_another_length_is_refused(wrong: int) -> None:
    space = space_over(llama(2), per="layer")  # 2 parents x 4 groups
    with pytest.raises(ValueError, match=r"reshape|argument 2|shorter|longer"):
        space.decode(np.full(wrong, 0.5))


def test_a_recipe_names_parents_base_dtype_and_shared_parameters() -> None:
    recipe = decoded(space := space_over(llama(1), per="model", normalize=True), space.start)
    assert recipe.to_dict() == {
        "merge_method": "task_arithmetic",
        "models": [{"model": p, "parameters": {"weight": 0.5}} for p in PARENTS.values()],
        "base_model": BASE,
        "parameters": {"normalize": True},
        "dtype": "bfloat16",
    }


def test_a_method_without_a_base_names_none() -> None:
    space = space_over(llama(1), per="model", method="linear")
    assert decoded(space, space.start).base_model is None


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"method": None}, "a weight space needs 'method' and 'per'"),
        ({"per": None}, "a weight space needs 'method' and 'per'"),
        ({"method": "slerp"}, "space.method: 'slerp' has no weights to search"),
        ({"method": "passthrough"}, "space.method: 'passthrough' has no weights to search"),
        ({"density": [0.1, 1]}, "space.density: 'task_arithmetic' has no such parameter"),
        ({"weight": None}, "space.weight is missing: give its bounds"),
        ({"method": "ties", "density": [0, 1]}, "space.density: [0.0, 1.0] leaves (0, 1]"),
        ({"method": "ties", "density": [0.5, 1.1]}, "space.density: [0.5, 1.1] leaves (0, 1]"),
        ({"granularity": 4}, "space.granularity: 4 does not divide the model's 6 layers"),
        ({"granularity": 12}, "space.granularity: 12 does not divide the model's 6 layers"),
        ({"repeats": 2}, "space.repeats: has no meaning in a space of kind 'weight'"),
        ({"max_layers": 2}, "space.max_layers: has no meaning in a space of kind 'weight'"),
    ],
)
def test_a_section_that_makes_no_weight_space_is_refused(
    section: dict[str, Any], words: str
) -> None:
    with pytest.raises(JobError) as caught:
        space_over(llama(6), **{"per": "layer", **section})
    assert words in str(caught.value)


def test_a_method_of_task_vectors_needs_a_base() -> None:
    section = Section.model_validate(
        {"kind": "weight", "method": "ties", "per": "model", "weight": [0, 1]}
    )
    layouts = dict.fromkeys(PARENTS.values(), infer(llama(1)))
    with pytest.raises(JobError, match="base is missing: 'ties'"):
        build(section, Models(PARENTS, None, layouts, "float32"))
