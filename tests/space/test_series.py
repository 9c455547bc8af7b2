"""Checkpoint series: interpolations that end at the checkpoints, and soups of all of them."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.coordinates import placed, start_of
from evomerge.errors import JobError
from evomerge.job import Job, SeriesSpace
from evomerge.layout import infer
from evomerge.recipe import Recipe
from evomerge.space import Models, Space, build
from tests import tiny
from tests.space.merging import (
    assert_same,
    decoded,
    merged,
    models_of,
    names_of,
    point,
    random_points,
    values_of,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five checkpoints of a run."""
    folder = tmp_path_factory.mktemp("run")
    first = tiny.write_model(folder / "run-0", seed=0)
    later = {f"run-{i}": i for i in range(1, 5)}
    rest = {n: tiny.write_model(folder / n, seed=i, near=first) for n, i in later.items()}
    return {"run-0": first, **rest}


def space_over(models: Models, **keys: Any) -> Space:
    return build(SeriesSpace.model_validate({"kind": "series", **keys}), models)


def first(run: dict[str, Path], count: int) -> Models:
    """Of the first checkpoints of a run."""
    return models_of(dict(list(run.items())[:count]))


def pair(recipe: Recipe) -> tuple[str, str]:
    """The names of the early and the late checkpoint."""
    early, late = recipe.model_names()
    return Path(early).name, Path(late).name


def weights(recipe: Recipe) -> list[Any]:
    return [entry.parameters["weight"] for entry in recipe.models or ()]


@pytest.mark.parametrize("per", ["model", "layer", "module"])
@pytest.mark.parametrize(("delta", "end"), [(0.0, "run-0"), (1.0, "run-1")])
def test_delta_0_and_1_are_the_checkpoints_themselves(
    run: dict[str, Path], per: str, delta: float, end: str
) -> None:
    space = space_over(first(run, 2), per=per)
    recipe = decoded(space, point(space, delta=(delta + 0.25) / 1.5))
    assert_same(merged(recipe), values_of(run[end]))


def test_beyond_its_ends_delta_extrapolates(run: dict[str, Path]) -> None:
    space = space_over(first(run, 2))
    found = merged(decoded(space, point(space, delta=1.0)))
    early, late = values_of(run["run-0"]), values_of(run["run-1"])
    for name, tensor in found.items():
        expected = late[name] + 0.25 * (late[name] - early[name])
        assert torch.allclose(tensor, expected, atol=1e-6), name


def test_each_group_has_a_delta_of_its_own(run: dict[str, Path]) -> None:
    space = space_over(first(run, 2), per="module", delta=[0, 1])
    name = "layer 1 attention delta"
    genotype = np.zeros(len(space.coordinates))
    genotype[names_of(space).index(name)] = 1.0
    early, late = values_of(run["run-0"]), values_of(run["run-1"])
    found = merged(decoded(space, genotype))
    moved = {name for name, tensor in found.items() if not torch.equal(tensor, early[name])}
    assert {n for n in found if n.startswith("model.layers.1.self_attn.")} <= moved
    assert all(name.startswith("model.layers.1.") and "mlp" not in name for name in moved)
    assert all(torch.equal(found[name], late[name]) for name in moved)


def test_two_checkpoints_leave_no_choice_of_them(run: dict[str, Path]) -> None:
    assert names_of(space_over(first(run, 2))) == ["all delta"]
    assert names_of(space_over(first(run, 3))) == ["early", "late", "all delta"]


@pytest.mark.parametrize("count", [3, 4, 5])
def test_every_pair_is_chosen_and_always_in_the_order_of_the_run(
    run: dict[str, Path], count: int
) -> None:
    space = space_over(first(run, count))
    early, late, _ = space.coordinates
    assert early.ordered
    assert late.ordered
    found = set()
    for i in range(early.choices):
        for j in range(late.choices):
            genotype = [placed(i, early.choices), placed(j, late.choices), 0.5]
            found.add(pair(decoded(space, np.array(genotype))))
    assert found == set(combinations(list(run)[:count], 2))


def test_a_search_starts_halfway_between_the_ends_of_the_run(run: dict[str, Path]) -> None:
    space = space_over(first(run, 4))
    recipe = decoded(space, start_of(space.coordinates))
    assert pair(recipe) == ("run-0", "run-3")
    assert weights(recipe) == [0.5, 0.5]


def test_a_later_checkpoint_stays_as_the_early_one_moves(run: dict[str, Path]) -> None:
    space = space_over(first(run, 5))
    for early in range(4):
        genotype = point(space, early=placed(early, 4))
        assert pair(decoded(space, genotype)) == (f"run-{early}", "run-4")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data(), count=st.integers(2, 6), per=st.sampled_from(["model", "layer"]))
def test_weights_sum_to_1_and_stay_within_the_bounds_of_delta(
    data: st.DataObject, count: int, per: str
) -> None:
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    space = space_over(named(names, count), per=per)
    d = len(space.coordinates)
    genotype = np.array(data.draw(st.lists(st.floats(0, 1), min_size=d, max_size=d)))
    recipe = decoded(space, genotype)
    for early, late in zip(*map(numbers, weights(recipe)), strict=True):
        assert early + late == pytest.approx(1, abs=1e-12)
        assert -0.25 <= late <= 1.25


def named(names: list[str], count: int) -> Models:
    """Checkpoints that exist by name alone."""
    paths = {f"c{i}": f"/run/{i}" for i in range(count)}
    layouts = dict.fromkeys(paths.values(), infer(names))
    sizes = dict.fromkeys(paths.values(), dict.fromkeys(names, 4))
    return Models(paths, None, layouts, "float32", {key: {} for key in paths.values()}, sizes)


def numbers(weight: Any) -> list[float]:
    return [entry.value for entry in weight] if isinstance(weight, list) else [weight]


def test_the_base_is_the_first_checkpoint_of_the_run(run: dict[str, Path]) -> None:
    later = {name: path for name, path in run.items() if name != "run-0"}
    space = space_over(models_of(later, base=run["run-0"]))
    assert pair(decoded(space, start_of(space.coordinates))) == ("run-0", "run-4")
    soup = space_over(models_of(later, base=run["run-0"]), form="soup")
    assert names_of(soup)[0] == "base: all weight"


def test_a_soup_of_equal_shares_is_the_average(run: dict[str, Path]) -> None:
    space = space_over(first(run, 3), form="soup")
    found = merged(decoded(space, start_of(space.coordinates)))
    models = [values_of(path) for path in list(run.values())[:3]]
    for name, tensor in found.items():
        expected = torch.stack([model[name] for model in models]).mean(0)
        assert torch.allclose(tensor, expected, atol=1e-6), name


def test_any_point_of_a_soup_can_be_merged(run: dict[str, Path]) -> None:
    space = space_over(first(run, 3), form="soup", per="layer")
    assert len(space.coordinates) == 3 * 5
    corners = [np.zeros(len(space.coordinates)), np.ones(len(space.coordinates))]
    for genotype in [*corners, *random_points(space, 3)]:
        merged(decoded(space, genotype))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"form": "soup", "delta": [0, 1]}, "delta: a soup has none"),
        ({"delta": {"low": 0, "high": 1, "first": 1}}, "delta: one for all"),
        ({"delta": {"low": 0, "high": 1, "start": "equal"}}, "delta: one for all"),
        ({"per": "slice"}, "space.per: .slice."),
    ],
)
def test_keys_without_a_meaning_are_refused(
    tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    path = tiny.write_job(tmp_path, space={"kind": "series", **keys})
    with pytest.raises(JobError, match=words):
        Job.from_file(path)


def test_a_granularity_that_does_not_divide_the_layers_is_refused(run: dict[str, Path]) -> None:
    with pytest.raises(JobError, match="granularity: 2 does not divide"):
        space_over(first(run, 2), per="layer", granularity=2)


@pytest.mark.parametrize("preset", ["checkpoint_interpolation", "checkpoint_soup"])
def test_presets_are_merges_at_their_start(
    run: dict[str, Path], tmp_path: Path, preset: str
) -> None:
    job = Job.from_file(
        tiny.write_job(
            tmp_path,
            parents={"run": {"series": str(run["run-0"].parent / "run-*")}},
            base=None,
            space={"preset": preset},
        )
    )
    parents = {name: Path(parent.model or "") for name, parent in job.parents.items()}
    assert list(parents) == list(run)
    space = build(job.space, models_of(parents))
    assert merged(decoded(space, start_of(space.coordinates)))
