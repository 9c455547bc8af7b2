"""Layer space: what each form's genotypes mean, the limits of a stack, where a search begins."""

import math
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from evomerge.coordinates import Coordinate, Genotype, active, placed, start_of
from evomerge.errors import JobError
from evomerge.job import LayerSpace, packaged
from evomerge.layout import infer
from evomerge.recipe import Recipe
from evomerge.space import Infeasible, Models, Space, build

PARTS = {
    "self_attn.o_proj": 4,
    "mlp.down_proj": 6,
    "input_layernorm": 2,
    "post_attention_layernorm": 2,
}
LAYER, OUTSIDE = sum(PARTS.values()), 102
PRESETS = ("sakana_dfs", "layer_stack", "depth_wise", "slices", "prune", "depth_upscale")


def named(depths: dict[str, int], kinds: dict[str, str] | None = None) -> Models:
    """Parents of these depths."""
    paths = {name: f"/zoo/{name}" for name in depths}
    sizes = {}
    for name, depth in depths.items():
        inside = {f"model.layers.{i}.{p}.weight": n for i in range(depth) for p, n in PARTS.items()}
        ends = {"model.embed_tokens.weight": 50, "model.norm.weight": 2, "lm_head.weight": 50}
        sizes[f"/zoo/{name}"] = ends | inside
    layouts = {path: infer(sizes[path]) for path in paths.values()}
    configs = {paths[name]: {"model_type": (kinds or {}).get(name, "llama")} for name in depths}
    return Models(paths, None, layouts, "float32", configs, sizes)


def space(depths: dict[str, int], **section: Any) -> Space:
    return build(LayerSpace.model_validate({"kind": "layers", **section}), named(depths))


def names(space: Space) -> list[str]:
    return [coordinate.name for coordinate in space.coordinates]


def point(space: Space, **values: float) -> Genotype:
    """The start, but for some coordinates: their names with '_' for what is no letter or digit."""
    found = start_of(space.coordinates)
    for name, value in values.items():
        at = [n.replace(" ", "_").replace(":", "") for n in names(space)].index(name)
        choices = space.coordinates[at].choices
        found[at] = placed(int(value), choices) if choices else value
    return found


def decoded(space: Space, genotype: Genotype) -> Recipe:
    recipe = space.decode(genotype)
    assert isinstance(recipe, Recipe), recipe
    return recipe


def layers(recipe: Recipe) -> list[tuple[str, int]]:
    """(parent, layer) of each output layer."""
    ranges = [one.sources[0] for one in recipe.slices or ()]
    return [(r.model.removeprefix("/zoo/"), n) for r in ranges for n in range(*r.layer_range)]


def switched(space: Space, on: list[int], slots: int) -> Genotype:
    genotype = start_of(space.coordinates)
    genotype[:slots] = 0.5  # one half is off
    genotype[on] = np.nextafter(0.5, 1)
    return genotype


def written(recipe: Recipe) -> list[float]:
    """What each output layer's o_proj is multiplied by."""
    found = []
    for one in recipe.slices or ():
        source = one.sources[0]
        filters: Any = source.parameters.get("scale", source.parameters.get("weight", []))
        value = next((f.value for f in filters if f.filter == ".o_proj."), 1.0)
        found += [value] * source.length
    return found


# -- All forms -------------------------------------------------------------------------------------

DEPTHS = st.dictionaries(st.sampled_from("abc"), st.integers(1, 5), min_size=1)
SECTIONS = st.one_of(
    st.fixed_dictionaries(
        {
            "repeats": st.integers(1, 3),
            "scales": st.sampled_from(["none", "matrix", "network"]),
        }
    ),
    st.fixed_dictionaries({"form": st.just("segments"), "segments": st.integers(1, 5)}),
    st.just({"form": "depth_wise", "removable": True}),
    st.just({"form": "upscale"}),
)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=150)
@given(data=st.data(), depths=DEPTHS, section=SECTIONS, limit=st.none() | st.integers(5, 9))
def test_any_genotype_is_a_recipe_within_the_limits_or_infeasible(
    data: st.DataObject, depths: dict[str, int], section: dict[str, Any], limit: int | None
) -> None:
    most = OUTSIDE + 8 * LAYER
    found = space(depths, **section, max_layers=limit, max_parameters=most)
    sides = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)
    d = len(found.coordinates)
    genotype = np.array(data.draw(st.lists(sides, min_size=d, max_size=d)))
    before = genotype.copy()
    recipe = found.decode(genotype)
    assert recipe == found.decode(genotype.copy())
    assert np.array_equal(before, genotype)
    if isinstance(recipe, Infeasible):
        assert recipe.reason
        return
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    default = max(depths.values()) * 2 if section.get("form") == "upscale" else None
    default = default or max(depths.values()) * 3 // 2
    order = layers(recipe)
    assert 1 <= len(order) <= min(limit or default, 8)
    assert all(layer < depths[name] for name, layer in order)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data(), depths=DEPTHS, section=SECTIONS)
def test_what_an_inactive_coordinate_is_changes_nothing(
    data: st.DataObject, depths: dict[str, int], section: dict[str, Any]
) -> None:
    found = space(depths, **section, max_layers=100)
    d = len(found.coordinates)
    genotype = np.array(data.draw(st.lists(st.floats(0, 1), min_size=d, max_size=d)))
    other = np.array(data.draw(st.lists(st.floats(0, 1), min_size=d, max_size=d)))
    mixed = np.where(active(genotype, found.coordinates), genotype, other)
    assert found.decode(mixed) == found.decode(genotype)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(depths=DEPTHS, section=SECTIONS)
def test_coordinates_are_well_formed(depths: dict[str, int], section: dict[str, Any]) -> None:
    found = space(depths, **section)
    assert len(set(names(found))) == len(found.coordinates)
    for position, one in enumerate(found.coordinates):
        assert 0 <= one.start <= 1
        assert one.choices == 0 or one.choices >= 2
        assert one.when is None or one.when.coordinate < position
    with pytest.raises(ValueError, match="a genotype of"):
        found.decode(np.full(len(found.coordinates) + 1, 0.9))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(depths=DEPTHS, section=SECTIONS)
def test_a_search_begins_with_the_first_parent(
    depths: dict[str, int], section: dict[str, Any]
) -> None:
    found = space(depths, **section, max_layers=100)
    name, depth = next(iter(depths.items()))
    order = layers(decoded(found, start_of(found.coordinates)))
    if section.get("form") == "upscale":
        cut = math.ceil(depth / 4) if depth > 1 else 0
        wanted = [*range(depth - cut), *range(cut, depth)]
        assert order == [(name, layer) for layer in wanted]
    else:
        assert order == [(name, layer) for layer in range(depth)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("depths", [{"a": 6, "b": 6}, {"a": 32, "b": 32}, {"a": 24, "b": 40}])
def test_most_of_the_first_generation_is_feasible(preset: str, depths: dict[str, int]) -> None:
    section = yaml.safe_load((packaged("search_spaces") / f"{preset}.yaml").read_text())
    if preset == "prune":
        depths = {"a": depths["a"]}
        section["max_layers"] = depths["a"] * 3 // 4
    found = build(TypeAdapter(LayerSpace).validate_python(section), named(depths))
    generator = np.random.default_rng(0)
    start = start_of(found.coordinates)
    points = np.clip(generator.normal(start, found.sigma, (100, len(start))), 0, 1)
    feasible = [isinstance(found.decode(one), Recipe) for one in points]
    assert sum(feasible) >= 75


# -- Limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"max_layers": 3}, "4 layers are more than max_layers 3"),
        ({"max_parameters": OUTSIDE + 4 * LAYER - 1}, "158 parameters are more than"),
        ({"max_parameters": 1}, "158 parameters are more than max_parameters 1"),
    ],
)
@pytest.mark.parametrize("form", ["switches", "segments", "depth_wise"])
def test_a_search_that_cannot_begin_is_refused(
    form: str, limit: dict[str, int], reason: str
) -> None:
    with pytest.raises(JobError, match=f"cannot begin: {reason}.*: raise that limit"):
        space({"a": 4, "b": 2}, form=form, **limit)


def test_the_deepest_stack_is_half_as_deep_again_as_the_deepest_parent() -> None:
    found = space({"a": 3, "b": 5}, repeats=2)
    assert len(layers(decoded(found, switched(found, list(range(7)), 16)))) == 7
    beyond = found.decode(switched(found, list(range(8)), 16))
    assert beyond == Infeasible("8 layers are more than max_layers 7")


def test_embeddings_and_head_count_as_parameters() -> None:
    found = space({"a": 3, "b": 3}, max_parameters=OUTSIDE + 3 * LAYER)
    assert isinstance(found.decode(switched(found, [0, 1, 5], 6)), Recipe)
    assert found.decode(switched(found, [0, 1, 2, 3], 6)) == Infeasible(
        f"{OUTSIDE + 4 * LAYER} parameters are more than max_parameters {OUTSIDE + 3 * LAYER}"
    )


@pytest.mark.parametrize("form", ["switches", "depth_wise", "segments"])
def test_no_layer_at_all_is_infeasible(form: str) -> None:
    more = {"removable": True} if form == "depth_wise" else {}
    found = space({"a": 3, "b": 3}, form=form, **more)
    genotype = np.full(len(found.coordinates), 0.0 if form == "switches" else 0.999)
    assert found.decode(genotype) == Infeasible("no layer is chosen")


def test_a_parent_whose_layers_cannot_be_told_is_refused() -> None:
    models = named({"a": 2, "b": 2})
    layouts = {**models.layouts, "/zoo/b": infer(["embed.weight"])}
    broken = Models(models.parents, None, layouts, "float32", models.configs, models.sizes)
    with pytest.raises(JobError, match=r"parents\.b: its layers .* it has none: take kind: weight"):
        build(LayerSpace(kind="layers"), broken)


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"form": "segments", "repeats": 2}, "repeats: has no meaning in form segments"),
        ({"form": "upscale", "scales": "matrix"}, "scales: has no meaning in form upscale"),
        ({"removable": True}, "removable: has no meaning in form switches: it is of depth_wise"),
        ({"scale": [0.5, 2]}, "scale: nothing is scaled: give scales: network or matrix"),
        ({"scales": "matrix", "scale": {"low": 0, "high": 1, "start": "equal"}}, "coefficients"),
    ],
)
def test_a_key_that_nobody_reads_is_refused(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        LayerSpace.model_validate({"kind": "layers", **section})


# -- Switches --------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=100)
@given(data=st.data(), depths=DEPTHS, repeats=st.integers(1, 3))
def test_the_switched_on_slots_stand_in_order(
    data: st.DataObject, depths: dict[str, int], repeats: int
) -> None:
    found = space(depths, repeats=repeats, max_layers=100)
    row = [(name, layer) for name, depth in depths.items() for layer in range(depth)] * repeats
    on = data.draw(st.sets(st.integers(0, len(row) - 1), min_size=1).map(sorted))
    chosen = [row[i] for i in on]
    recipe = decoded(found, switched(found, on, len(row)))
    assert layers(recipe) == chosen
    joins = [a for a, b in pairwise(chosen) if b != (a[0], a[1] + 1)]
    cut_off = len(recipe.slices or ()) - len(joins) - 1  # beside the first parent's ends
    assert cut_off == 0 or (recipe.merge_method == "linear" and cut_off <= 2)


def test_slots_are_named_for_people() -> None:
    assert names(space({"a": 2, "b": 1}, repeats=2)) == [
        "slot 0: a layer 0",
        "slot 1: a layer 1",
        "slot 2: b layer 0",
        "slot 3: a layer 0",
        "slot 4: a layer 1",
        "slot 5: b layer 0",
    ]


def test_the_ends_are_the_first_parents() -> None:
    found = space({"a": 3, "b": 3})
    inside = decoded(found, switched(found, [0, 4, 2], 6))
    assert inside.merge_method == "linear"  # it ends with a layer of b
    assert inside.base_model == "/zoo/a"
    own = space({"a": 3, "b": 3}, repeats=2)
    recipe = decoded(own, switched(own, [0, 4, 8], 12))
    assert recipe.merge_method == "passthrough"
    assert all(len(one.sources) == 1 for one in recipe.slices or ())


def test_pruning_begins_without_the_deepest_layers_before_the_last() -> None:
    found = space({"a": 8}, start="all", max_layers=5)
    order = layers(decoded(found, start_of(found.coordinates)))
    assert order == [("a", layer) for layer in (0, 1, 2, 3, 7)]
    found = space({"a": 8}, start="all")
    assert len(layers(decoded(found, start_of(found.coordinates)))) == 8
    with pytest.raises(JobError, match="16 layers are more than max_layers 12"):
        space({"a": 8, "b": 8}, start="all")


# -- Scales ----------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data(), kind=st.sampled_from(["matrix", "network"]), repeats=st.integers(1, 3))
def test_scales_of_one_are_no_scales(data: st.DataObject, kind: str, repeats: int) -> None:
    depths = {"a": 3, "b": 2}
    scaled = space(depths, repeats=repeats, scales=kind, max_layers=100)
    plain = space(depths, repeats=repeats, max_layers=100)
    slots = len(plain.coordinates)
    on = data.draw(st.sets(st.integers(0, slots - 1), min_size=1).map(sorted))
    assert scaled.decode(switched(scaled, on, slots)) == plain.decode(switched(plain, on, slots))


def test_a_matrix_has_a_value_for_each_join_that_can_be() -> None:
    once = space({"a": 2, "b": 1}, scales="matrix")
    assert names(once)[3:] == [
        "scale from a layer 0 to b layer 0",
        "scale from a layer 1 to b layer 0",
    ]
    again = space({"a": 2, "b": 1}, scales="matrix", repeats=2)
    assert len(again.coordinates) == 6 + 3 * 3 - 1  # but from layer 0 of a to layer 1


def test_a_join_is_scaled_and_a_parents_own_order_is_not() -> None:
    found = space({"a": 3, "b": 3}, scales="matrix", scale=[0.5, 2.0], max_layers=6)
    genotype = switched(found, [0, 1, 5], 6)
    genotype[6:] = 1.0  # every scale is 2
    assert written(decoded(found, genotype)) == [1.0, 1.0, 0.5]
    genotype = switched(found, [0, 2, 3, 5], 6)
    genotype[6:] = 1.0
    assert written(decoded(found, genotype)) == [1.0, 0.5, 0.25, 0.125]


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=100)
@given(data=st.data(), kind=st.sampled_from(["matrix", "network"]), low=st.sampled_from([-2, 0.5]))
def test_a_product_stops_at_its_bounds(data: st.DataObject, kind: str, low: float) -> None:
    bounds = {"low": low, "high": 2.0, "start": 1.0}
    found = space({"a": 5, "b": 5}, repeats=2, scales=kind, scale=bounds, max_layers=20)
    on = data.draw(st.sets(st.integers(0, 19), min_size=1).map(sorted))
    genotype = switched(found, on, 20)
    values = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)
    d = len(genotype) - 20
    genotype[20:] = data.draw(st.lists(values, min_size=d, max_size=d))
    recipe = decoded(found, genotype)
    assert all(1 / 8 <= abs(value) <= 8 for value in written(recipe))


def test_a_product_that_has_stopped_comes_back_at_once() -> None:
    found = space({"a": 9}, scales="matrix", scale=[0.25, 4.0], max_layers=9)
    genotype = switched(found, [0, 2, 4, 6, 8], 9)
    for i, j in ((0, 2), (2, 4), (4, 6)):
        genotype[names(found).index(f"scale from a layer {i} to a layer {j}")] = 1.0
    genotype[names(found).index("scale from a layer 6 to a layer 8")] = 0.0
    assert written(decoded(found, genotype)) == [1.0, 0.25, 0.125, 0.125, 0.5]


def test_a_network_tells_joins_apart() -> None:
    found = space({"a": 4, "b": 4}, scales="network", max_layers=8)
    genotype = switched(found, [0, 2, 5, 7], 8)
    genotype[8:] = np.random.default_rng(0).random(len(genotype) - 8)
    values = written(decoded(found, genotype))
    factors = [b / a for a, b in pairwise(values)]
    assert len({round(factor, 3) for factor in factors}) == 3
    deep = space({"a": 32, "b": 32}, scales="network", repeats=3)
    assert len(deep.coordinates) - 192 == len(found.coordinates) - 8 == 33


def test_too_large_a_matrix_is_refused_with_the_remedy() -> None:
    with pytest.raises(JobError, match=r"matrix has .* values for 64 layers.*scales: network"):
        space({"a": 32, "b": 32}, scales="matrix", repeats=3)


@pytest.mark.parametrize(
    ("kinds", "section", "reason"),
    [
        ({"a": "gemma2", "b": "gemma2"}, {}, r"parents\.a: .*multiply by 1 \+ w.*scales: none"),
        ({"b": "cohere"}, {}, "'a' and 'b' are built differently"),
        ({"a": "gemma", "b": "gemma"}, {"scale": [-1, 1.5]}, "-1 is negative, and the sign"),
    ],
)
def test_scales_that_cannot_be_folded_are_refused(
    kinds: dict[str, str], section: dict[str, Any], reason: str
) -> None:
    scaled = LayerSpace.model_validate({"kind": "layers", "scales": "network", **section})
    models = named({"a": 2, "b": 2}, kinds)
    with pytest.raises(JobError, match=reason):
        build(scaled, models)
    assert build(LayerSpace(kind="layers"), models).coordinates


# -- Segments, depth-wise, upscale -----------------------------------------------------------------


def test_segments_stand_in_order_and_end_with_their_parent() -> None:
    found = space({"a": 4, "b": 2}, form="segments", segments=3, max_layers=12)
    genotype = point(
        found,
        segment_1_source=1,
        segment_1_first_layer=3,  # b has two layers: its last
        segment_1_layers=3,
        segment_3_source=0,
        segment_3_first_layer=1,
        segment_3_layers=1,
    )
    assert layers(decoded(found, genotype)) == [("b", 1), ("a", 1), ("a", 2)]
    assert names(found)[:3] == ["segment 1: source", "segment 1: first layer", "segment 1: layers"]


def test_every_mixture_of_depths_can_be_written_down() -> None:
    found = space({"a": 3, "b": 2}, form="depth_wise")
    assert [(c.name, c.choices, c.ordered) for c in found.coordinates] == [
        ("layer 0: source", 2, False),
        ("layer 1: source", 2, False),
        ("layer 2: source", 2, False),  # a or nothing
    ]
    orders = set()
    for chosen in product(range(2), repeat=3):
        orders.add(tuple(layers(decoded(found, np.array([placed(c, 2) for c in chosen])))))
    assert len(orders) == 8
    assert (("b", 0), ("b", 1)) in orders
    with pytest.raises(JobError, match="depth_wise chooses among parents, and there is one"):
        space({"a": 3}, form="depth_wise")


def test_upscaling_begins_as_solar_does_and_keeps_to_one_parent() -> None:
    found = space({"a": 32, "b": 16}, form="upscale")
    start = decoded(found, start_of(found.coordinates))
    assert layers(start) == [("a", layer) for layer in (*range(24), *range(8, 32))]
    other = decoded(found, point(found, source=1))
    assert layers(other) == [("b", layer) for layer in (*range(12), *range(4, 16))]
    assert other.merge_method == "passthrough"
    assert space({"a": 32}, form="upscale").coordinates[0] == Coordinate(
        "end of the first part", placed(23, 32), 32
    )
    short = space({"a": 32}, form="upscale", max_layers=36)
    assert len(layers(decoded(short, start_of(short.coordinates)))) == 36


# -- Presets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_where_it_is_from_and_when_to_use_it(preset: str) -> None:
    path: Path = packaged("search_spaces") / f"{preset}.yaml"
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith("# When: ") for line in comment)
    assert isinstance(LayerSpace.model_validate(yaml.safe_load(path.read_text())), LayerSpace)


def test_scales_begin_where_they_change_nothing() -> None:
    section = LayerSpace.model_validate({"kind": "layers", "scales": "network", "scale": [0.5, 2]})
    assert section.scale.start == 1
    with pytest.raises(ValueError, match=r"start 1\.0 is outside \[1\.5, 2\.0\]"):
        LayerSpace.model_validate({"kind": "layers", "scales": "network", "scale": [1.5, 2]})
