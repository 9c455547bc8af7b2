"""Weight space: every tensor gets the coefficients of its own group, whatever the method."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from evomerge.coordinates import Genotype, active, placed, start_of
from evomerge.errors import JobError
from evomerge.job import Range, WeightSpace
from evomerge.layout import split
from evomerge.recipe import Recipe, resolve
from evomerge.signatures import METHODS
from evomerge.space import Models
from evomerge.space.groups import Groups
from evomerge.space.weight import Weights
from tests.space.merging import decoded, names_of, point, random_points
from tests.space.names import BASE, PARENTS, llama, models_with, vision_llama

ONE = {"ops": "/zoo/ops"}
THREE = {**PARENTS, "roman": "/zoo/roman"}
TASK_ARITHMETIC: dict[str, Any] = {"method": "task_arithmetic", "weight": [-0.5, 1.5]}


def space_of(models: Models, **section: Any) -> Weights:
    given_ = {"kind": "weight", "per": "model", **section}
    return Weights.from_section(WeightSpace.model_validate(given_), models)


def space_over(layers: int = 2, **section: Any) -> Weights:
    """A space over a base and two Llamas."""
    return space_of(models_with(llama(layers)), **section)


def values(recipe: Recipe, parameter: str, tensor: str) -> list[Any]:
    """What each model has of a parameter for a tensor, as the merge finds it."""
    bodies = [recipe] if recipe.modules is None else list(recipe.modules.values())
    entries = bodies[0].models
    assert entries is not None
    return [resolve(parameter, [e.parameters, recipe.parameters], tensor, 0.5) for e in entries]


SECTIONS: dict[str, dict[str, Any]] = {
    "linear": {"weight": [0.1, 1]},
    "slerp": {"t": [0, 1]},
    "nuslerp": {"weight": [0.1, 1]},
    "multislerp": {"weight": [0.1, 1]},
    "task_arithmetic": {"weight": [-0.5, 1.5], "lambda": [0.5, 1.5]},
    "ties": {"weight": [-0.5, 1.5], "density": [0.1, 1], "lambda": [0.5, 1.5], "normalize": False},
    "dare_ties": {"weight": [-0.5, 1.5], "density": [0.1, 1], "rescale": True},
    "dare_linear": {"weight": [-0.5, 1.5], "density": [0.1, 1]},
    "breadcrumbs": {"weight": [0, 1], "density": [0.1, 1], "gamma": [0, 0.1]},
    "breadcrumbs_ties": {"weight": [0, 1], "density": 0.9, "gamma": [0, 0.1]},
    "della": {"weight": [0, 1], "density": [0.3, 0.7], "epsilon": [0, 0.2]},
    "della_linear": {"weight": 1.0, "density": [0.3, 0.7], "lambda": [0.5, 1]},
    "sce": {"select_topk": [0.1, 1]},
    "nearswap": {"t": {"low": 1e-4, "high": 1e-1, "scale": "log"}},
    "ram": {"epsilon": {"low": 1e-7, "high": 1e-3, "scale": "log"}},
    "ramplus_tl": {"r": [0, 0.5], "alpha": [0, 1], "epsilon": 1e-5},
}


@pytest.mark.parametrize("method", SECTIONS)
@settings(max_examples=8, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_point_is_a_recipe_within_the_bounds_that_survives_writing(
    method: str, data: st.DataObject
) -> None:
    per = data.draw(st.sampled_from(["model", "layer", "module", "slice"]))
    section = SECTIONS[method]
    space = space_over(method=method, per=per, **section)
    units = st.floats(0, 1) | st.sampled_from([0.0, 1.0])
    d = len(space.coordinates)
    recipe = decoded(space, np.array(data.draw(st.lists(units, min_size=d, max_size=d))))
    assert recipe.merge_method == method
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert not re.search(r"-0\.0\b", recipe.to_yaml())
    for name, bounds in WeightSpace.model_validate(
        {"kind": "weight", "method": method, "per": per, **section}
    ).parameters.items():
        for tensor in llama(2):
            for value in values(recipe, name, tensor):
                if isinstance(bounds, bool | float):
                    assert value == bounds
                else:
                    assert bounds.low <= value <= bounds.high


def test_all_methods_with_coefficients_are_searched() -> None:
    assert set(METHODS) - set(SECTIONS) == {"karcher", "model_stock", "arcee_fusion", "passthrough"}
    space = space_of(
        models_with(llama(2), ONE), method="passthrough", per="layer", scale=[0.5, 2.0]
    )
    assert names_of(space)[1] == "ops: layer 0 scale"


@pytest.mark.parametrize("per", ["model", "layer", "module", "slice"])
@pytest.mark.parametrize("filters", [(), ("mlp", "bias")])
def test_every_tensor_has_the_coefficients_of_its_parent_and_group(
    per: Any, filters: tuple[str, ...]
) -> None:
    models = models_with(llama(4))
    section = {"method": "ties", "weight": [-0.5, 1.5], "density": [0.1, 1], "lambda": [0, 2]}
    space = space_of(models, per=per, granularity=2, filters=filters, **section)
    (genotype,) = random_points(space, 1)
    recipe = decoded(space, genotype)
    units = dict(zip(names_of(space), genotype, strict=True))
    for group, names in Groups.of(models.layouts[BASE], per, 2, filters).members.items():
        for name in names:
            for parameter, low, high in (("weight", -0.5, 1.5), ("density", 0.1, 1)):
                found = values(recipe, parameter, name)
                expected = [
                    low + units[f"{parent}: {group} {parameter}"] * (high - low)
                    for parent in PARENTS
                ]
                assert found == pytest.approx(expected, abs=1e-6)
            shared = resolve("lambda", [recipe.parameters], name, 0.5)
            assert shared == pytest.approx(2 * units[f"{group} lambda"], abs=1e-6)


def test_names_say_parent_group_and_parameter_in_order() -> None:
    space = space_over(per="slice", method="ties", density=[0.1, 1], weight=[0, 1], t=None)
    assert names_of(space) == [
        f"{parent}: layer {layer} {parameter}"
        for parameter in ("weight", "density")
        for parent in PARENTS
        for layer in (0, 1)
    ]


def test_models_that_name_their_tensors_differently_each_get_their_own_filters() -> None:
    names = {path: llama(2) for path in PARENTS.values()}
    names |= {"/zoo/ja": [n.removeprefix("model.") for n in llama(2)], BASE: llama(2)}
    space = space_of(models_with(names), per="layer", **TASK_ARITHMETIC)
    recipe = decoded(space, point(space, layer_1_weight=1.0))
    assert values(recipe, "weight", "model.layers.1.mlp.up_proj.weight")[0] == 1.5
    assert values(recipe, "weight", "layers.1.mlp.up_proj.weight")[1] == 1.5
    assert values(recipe, "weight", "layers.0.mlp.up_proj.weight")[1] == 0.5


@pytest.mark.parametrize(
    ("weight", "unit", "value"),
    [
        ([-1, 3], 0.5, 1.0),
        ({"low": -1, "high": 3, "start": 0}, 0.25, 0.0),
        ({"low": 0, "high": 2, "start": "equal"}, 0.25, 0.5),
        ({"low": 0.01, "high": 1, "scale": "log"}, 0.5, 0.1),
        ({"low": 0.01, "high": 1, "scale": "log", "start": 0.1}, 0.5, 0.1),
    ],
)
def test_a_search_starts_where_the_bounds_say(weight: Any, unit: float, value: float) -> None:
    space = space_over(method="task_arithmetic", per="layer", weight=weight)
    assert start_of(space.coordinates) == pytest.approx(unit)
    recipe = decoded(space, start_of(space.coordinates))
    assert values(recipe, "weight", "lm_head.weight") == pytest.approx([value, value])


def test_weights_are_signed() -> None:
    space = space_over(**TASK_ARITHMETIC)
    assert values(decoded(space, np.zeros(2)), "weight", "lm_head.weight") == [-0.5, -0.5]


def test_a_density_never_rounds_down_to_zero() -> None:
    space = space_over(method="ties", weight=1.0, density=[1e-9, 1.0])
    assert values(decoded(space, np.zeros(2)), "density", "lm_head.weight") == [1e-9, 1e-9]


def test_the_first_parent_may_be_fixed() -> None:
    weight = {"low": 0, "high": 2, "first": 1.0}
    space = space_over(method="task_arithmetic", per="layer", weight=weight)
    assert all(name.startswith("ja: ") for name in names_of(space))
    for genotype in random_points(space, 3):
        assert values(decoded(space, genotype), "weight", "lm_head.weight")[0] == 1.0


def test_decoding_is_pure() -> None:
    space = space_over(per="module", **TASK_ARITHMETIC)
    genotype, other = random_points(space, 2)
    before = genotype.copy()
    first = decoded(space, genotype)
    decoded(space, other)
    assert decoded(space, genotype).to_yaml() == first.to_yaml()
    assert np.array_equal(genotype, before)


@pytest.mark.parametrize("wrong", [0, 1, 7, 9])
def test_a_genotype_of_another_length_is_refused(wrong: int) -> None:
    space = space_over(per="layer", **TASK_ARITHMETIC)  # 2 parents x 4 groups
    with pytest.raises(ValueError, match="reshape"):
        space.decode(np.full(wrong, 0.5))


SEVERAL: dict[str, Any] = {
    "method": ["task_arithmetic", "ties", "della", "slerp", "karcher"],
    "per": "layer",
    "weight": [-0.5, 1.5],
    "density": [0.3, 0.7],
    "epsilon": [0.0, 0.2],
    "t": [0, 1],
    "normalize": False,
}


def chosen(space: Weights, genotype: Genotype, method: str) -> Genotype:
    """The same point with another method."""
    methods = [form.method for form in space.forms]
    return np.array([placed(methods.index(method), len(methods)), *genotype[1:]])


def test_the_method_is_the_first_coordinate_of_several() -> None:
    space = space_over(**SEVERAL)
    first = space.coordinates[0]
    assert (first.name, first.choices, first.ordered, first.when) == ("method", 5, False, None)
    (genotype,) = random_points(space, 1)
    found = [decoded(space, chosen(space, genotype, method)) for method in SEVERAL["method"]]
    assert [recipe.merge_method for recipe in found] == SEVERAL["method"]
    assert decoded(space, start_of(space.coordinates)).merge_method == "task_arithmetic"


@settings(max_examples=40, derandomize=True, deadline=None)
@given(method=st.sampled_from(SEVERAL["method"]), seed=st.integers(0, 999))
def test_active_coordinates_are_those_that_change_the_recipe(method: str, seed: int) -> None:
    space = space_over(**SEVERAL)
    genotype = chosen(space, random_points(space, 1, seed)[0], method)
    matters = active(genotype, space.coordinates)
    before = decoded(space, genotype)
    elsewhere = np.where(matters, genotype, 1 - genotype)
    assert decoded(space, elsewhere) == before
    at = 1 + seed % (len(genotype) - 1)
    moved = genotype.copy()
    moved[at] = 1 - moved[at]
    assert (decoded(space, moved) != before) == matters[at]


@pytest.mark.parametrize(
    ("method", "parents", "base", "models", "base_model"),
    [
        ("task_arithmetic", ONE, BASE, ["/zoo/ops"], BASE),
        ("linear", PARENTS, BASE, ["/zoo/ops", "/zoo/ja"], None),
        ("nuslerp", PARENTS, BASE, ["/zoo/ops", "/zoo/ja"], BASE),
        ("nuslerp", PARENTS, None, ["/zoo/ops", "/zoo/ja"], None),
        ("slerp", PARENTS, BASE, ["/zoo/ops", "/zoo/ja"], "/zoo/ops"),
        ("slerp", PARENTS, None, ["/zoo/ops", "/zoo/ja"], "/zoo/ops"),
        ("slerp", ONE, BASE, ["/zoo/ops"], BASE),
        ("nearswap", ONE, BASE, ["/zoo/ops"], BASE),
    ],
)
def test_methods_get_the_models_that_they_merge(
    method: str, parents: Mapping[str, str], base: str, models: list[str], base_model: str
) -> None:
    section = {k: v for k, v in SECTIONS[method].items() if k != "lambda"}
    space = space_of(models_with(llama(2), parents, base), method=method, **section)
    recipe = decoded(space, start_of(space.coordinates))
    assert [entry.model for entry in recipe.models or ()] == models
    assert recipe.base_model == base_model
    assert recipe.dtype == "bfloat16"


REFUSED: list[tuple[dict[str, Any], Mapping[str, str], str | None, str]] = [
    (
        {"method": "ties", "weight": [0, 1]},
        PARENTS,
        None,
        "base: required, and missing: 'ties' merges diff",
    ),
    ({"method": "slerp", "t": [0, 1]}, THREE, None, "parents: 3 given: 'slerp' merges 2 models"),
    ({"method": "nuslerp", "weight": [0, 1]}, THREE, BASE, "'nuslerp' merges 2 models"),
    ({"method": "passthrough", "scale": [0, 1]}, PARENTS, BASE, "'passthrough' merges 1 models"),
    ({"method": ["model_stock", "linear"], "weight": 1.0}, ONE, BASE, "at least 3 models"),
    ({"method": "ties"}, PARENTS, BASE, "space.weight is missing: 'ties' needs it"),
    ({"method": "slerp"}, PARENTS, BASE, "space.t is missing: 'slerp' needs it"),
    (
        {**TASK_ARITHMETIC, "density": [0.1, 1]},
        PARENTS,
        BASE,
        "space.density: 'task_arithmetic' has no such parameter: it takes weight, normalize",
    ),
    ({"method": "ties", "weight": 1.0}, PARENTS, BASE, "space.weight: nothing is searched"),
    ({"method": "karcher"}, PARENTS, BASE, "'karcher' has no coefficients to search"),
    ({"method": "arcee_fusion"}, PARENTS, BASE, "'arcee_fusion' has no coefficients to search"),
    ({"method": "sce"}, PARENTS, BASE, "space.select_topk: nothing is searched"),
    (
        {"method": "ties", "weight": [0, 1], "density": [0, 1]},
        PARENTS,
        BASE,
        "space.density: 0.0 is outside (0, 1]",
    ),
    (
        {"method": "breadcrumbs", "weight": 1.0, "gamma": [0, 1]},
        PARENTS,
        BASE,
        "space.gamma: 1.0 is outside [0, 1)",
    ),
    (
        {"method": "della", "weight": 1.0, "density": [0.1, 1]},
        PARENTS,
        BASE,
        "space.density: [0.1, 1.0] and epsilon up to 0.15",
    ),
    (
        {"method": "slerp", "t": {"low": 0, "high": 1, "first": 0.5}},
        PARENTS,
        BASE,
        "space.t.first: 'slerp' has one t for all parents",
    ),
    (
        {"method": "linear", "weight": {"low": 0.6, "high": 1, "start": "equal"}},
        PARENTS,
        BASE,
        "space.weight: start equal, 0.5, is outside [0.6, 1.0]",
    ),
    (
        {**TASK_ARITHMETIC, "filters": ["mlp", "atn"]},
        PARENTS,
        BASE,
        "space.filters: 'atn' is part of no tensor's name: leave it out",
    ),
    ({**TASK_ARITHMETIC, "part": "text_decoder"}, PARENTS, BASE, "has the part 'text_decoder'"),
]


@pytest.mark.parametrize(("section", "parents", "base", "words"), REFUSED)
def test_a_section_that_makes_no_weight_space_is_refused(
    section: dict[str, Any], parents: Mapping[str, str], base: str | None, words: str
) -> None:
    with pytest.raises(JobError) as caught:
        space_of(models_with(llama(2), parents, base), **section)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "weight",
    [
        [1, 1],
        {"low": 0, "high": 1, "start": 2},
        {"low": 0, "high": 1, "scale": "log"},
        {"low": 0, "high": 1, "scale": "cubic"},
        [0, float("inf")],
        "much",
    ],
)
def test_bounds_that_are_none_are_refused(weight: Any) -> None:
    with pytest.raises(ValidationError):
        space_over(method="linear", weight=weight)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(low=st.floats(-3, 3), width=st.floats(1e-3, 4), unit=st.floats(0, 1), log=st.booleans())
def test_a_value_and_its_coordinate_are_one(
    low: float, width: float, unit: float, log: bool
) -> None:
    low = abs(low) + 1e-3 if log else low
    section = {"low": low, "high": low + width, "scale": "log" if log else "linear"}
    bounds = WeightSpace.model_validate(
        {"kind": "weight", "method": "linear", "per": "model", "weight": section}
    ).parameters["weight"]
    assert not isinstance(bounds, float | bool)
    value = bounds.value(unit)
    assert low <= value <= low + width
    assert 0 <= bounds.unit(value) <= 1
    assert bounds.value(bounds.unit(value)) == pytest.approx(value, abs=1e-5)


def test_narrow_bounds_are_searched_as_finely_as_wide_ones() -> None:
    bounds = Range(low=0.0, high=2e-5)
    found = {bounds.value(unit) for unit in np.linspace(0, 1, 1001).tolist()}
    assert len(found) == 1001
    assert bounds.value(0.5) == pytest.approx(1e-5)


def test_a_section_survives_being_stored() -> None:
    section = {"kind": "weight", "per": "model", "method": "ties", "weight": [0, 1], "lambda": 0.5}
    read = WeightSpace.model_validate(section)
    again = WeightSpace.model_validate(
        read.model_dump(mode="json", exclude_none=True, by_alias=True)
    )
    assert again == read


VLM = {"see": "/vlm/see", "look": "/vlm/look"}


@pytest.mark.parametrize(
    ("parents", "base", "donor"),
    [
        (VLM, None, "/vlm/see"),
        (VLM, "/vlm/base", "/vlm/base"),
        ({"words": "/llm/words", "see": "/vlm/see"}, "/llm/base", "/vlm/see"),
        ({"words": "/llm/words"}, "/vlm/base", "/vlm/base"),
    ],
)
def test_a_part_is_merged_alone(parents: dict[str, str], base: str | None, donor: str) -> None:
    paths = [*parents.values(), *([base] if base else [])]
    names = {path: vision_llama(2) if "vlm" in path else llama(2) for path in paths}
    method = "ties" if base else "linear"
    space = space_of(
        models := models_with(names, parents, base),
        method=method,
        part="text_decoder",
        per="module",
        weight=[0.1, 1],
    )
    assert models.first == donor
    recipe = decoded(space, point(space, layer_1_mlp_weight=1.0))
    assert list(recipe.modules or {}) == ["text_decoder"]
    for number, path in enumerate(parents.values()):
        parts = split(names[path])
        layout = parts.get("text_decoder") or parts["default"]
        for name, place in layout.places.items():
            raised = place.layer == 1 and ".mlp." in name
            value = values(recipe, "weight", name)[number]
            assert (value == 1.0) == (raised or "1.post_attention" in name)


def test_a_part_that_a_model_of_several_lacks_is_refused() -> None:
    models = models_with(vision_llama(2), VLM, None)
    with pytest.raises(JobError, match=r"has no part 'text': .*text_decoder"):
        space_of(models, method="linear", weight=[0, 1], part="text")


def test_a_method_that_names_no_model_with_the_part_is_refused() -> None:
    names = {"/llm/words": llama(2), "/llm/more": llama(2), "/vlm/base": vision_llama(2)}
    parents = {"words": "/llm/words", "more": "/llm/more"}
    models = models_with(names, parents, "/vlm/base")
    with pytest.raises(JobError, match="none of the models that 'linear' merges has the part"):
        space_of(models, method="linear", weight=[0, 1], part="text_decoder")
