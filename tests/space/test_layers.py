"""Layer space: the slots that are switched on, recombined into runs of consecutive layers."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import JobError
from evomerge.job import Space as Section
from evomerge.layout import infer
from evomerge.recipe import Recipe
from evomerge.space import Genotype, Infeasible, Models, Space, build


def stack(depths: dict[str, int], **section: Any) -> Space:
    """A layer space over parents of these depths."""
    layouts = {
        f"/zoo/{name}": infer(f"model.layers.{i}.mlp.up_proj.weight" for i in range(depth))
        for name, depth in depths.items()
    }
    models = Models({name: f"/zoo/{name}" for name in depths}, None, layouts, "float32")
    return build(Section.model_validate({"kind": "layers", **section}), models)


def slots(space: Space) -> list[tuple[str, int]]:
    """(parent's path, layer) of each slot, read from its name."""
    split = [name.split(": ")[1].split(" layer ") for name in space.names]
    return [(f"/zoo/{parent}", int(layer)) for parent, layer in split]


def layers(recipe: Recipe) -> list[tuple[str, int]]:
    """(model, layer) of each output layer."""
    found = []
    for part in recipe.slices or ():
        (source,) = part.sources
        found += [(source.model, layer) for layer in range(*source.layer_range)]
    return found


def switched(space: Space, on: list[int]) -> Genotype:
    genotype = np.full(len(space.names), 0.5)  # one half is off
    genotype[on] = np.nextafter(0.5, 1)
    return genotype


def decoded(space: Space, genotype: Genotype) -> Recipe:
    recipe = space.decode(genotype)
    assert isinstance(recipe, Recipe)
    return recipe


@settings(max_examples=100, deadline=None)
@given(data=st.data(), repeats=st.integers(1, 3))
def test_runs_recombine_to_the_chosen_slots_in_order(data: st.DataObject, repeats: int) -> None:
    depths = data.draw(st.dictionaries(st.sampled_from("abc"), st.integers(1, 5), min_size=2))
    space = stack(depths, repeats=repeats, max_layers=100)
    on = data.draw(st.sets(st.integers(0, len(space.names) - 1), min_size=1).map(sorted))
    recipe = decoded(space, switched(space, on))
    chosen = [slots(space)[i] for i in on]
    assert layers(recipe) == chosen
    assert recipe.merge_method == "passthrough"
    joins = [(a, b) for a, b in pairwise(chosen) if b != (a[0], a[1] + 1)]
    assert len(recipe.slices or ()) == len(joins) + 1, "runs are as long as they can be"


def test_slots_are_all_layers_of_all_parents_repeated() -> None:
    space = stack({"a": 2, "b": 1}, repeats=2)
    assert space.names == (
        "slot 0: a layer 0",
        "slot 1: a layer 1",
        "slot 2: b layer 0",
        "slot 3: a layer 0",
        "slot 4: a layer 1",
        "slot 5: b layer 0",
    )
    assert space.start.shape == (6,)


@pytest.mark.parametrize("depths", [{"a": 4, "b": 4}, {"a": 2, "b": 7}, {"a": 7, "b": 2}])
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_start_is_the_first_parent_alone(depths: dict[str, int], repeats: int) -> None:
    space = stack(depths, repeats=repeats)
    recipe = decoded(space, space.start)
    assert layers(recipe) == [("/zoo/a", layer) for layer in range(depths["a"])]
    assert len(recipe.slices or ()) == 1
    assert ((space.start >= 0) & (space.start <= 1)).all()


def test_no_layer_at_all_is_infeasible() -> None:
    space = stack({"a": 3, "b": 3})
    assert space.decode(switched(space, [])) == Infeasible("no layer is switched on")


@pytest.mark.parametrize("limit", [1, 4])
def test_a_stack_deeper_than_max_layers_is_infeasible(limit: int) -> None:
    space = stack({"a": 3, "b": 3}, max_layers=limit)
    assert isinstance(space.decode(switched(space, list(range(limit)))), Recipe)
    found = space.decode(switched(space, list(range(limit + 1))))
    assert found == Infeasible(f"{limit + 1} layers are more than max_layers {limit}")


@pytest.mark.parametrize(("depths", "limit"), [({"a": 6, "b": 4}, 9), ({"a": 3, "b": 5}, 7)])
def test_the_deepest_stack_is_half_as_deep_again_as_the_deepest_parent(
    depths: dict[str, int], limit: int
) -> None:
    space = stack(depths, repeats=2)
    assert isinstance(space.decode(switched(space, list(range(limit)))), Recipe)
    assert isinstance(space.decode(switched(space, list(range(limit + 1)))), Infeasible)


def test_a_layer_repeated_in_place_starts_a_new_run() -> None:
    space = stack({"a": 2, "b": 1}, repeats=2)
    recipe = decoded(space, switched(space, [0, 3, 4]))  # a0, a0, a1
    assert [s.sources[0].layer_range for s in recipe.slices or ()] == [(0, 1), (0, 2)]


def test_decoding_is_pure() -> None:
    space = stack({"a": 3, "b": 3})
    genotype = np.linspace(0, 1, 6)
    before = genotype.copy()
    first = decoded(space, genotype)
    space.decode(np.zeros(6))
    assert decoded(space, genotype) == first
    assert np.array_equal(genotype, before)


@pytest.mark.parametrize("wrong", [0, 5, 7])
def test_a_genotype_of_another_length_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        stack({"a": 3, "b": 3}).decode(np.full(wrong, 0.9))


@pytest.mark.parametrize("key", ["weight", "density"])
def test_coefficients_have_no_meaning_in_a_layer_space(key: str) -> None:
    with pytest.raises(JobError, match=f"space.{key}: has no meaning in a space of kind 'layers'"):
        stack({"a": 1, "b": 1}, **{key: [0.1, 1]})
