"""The two sinks: disk and memory get the same bits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import ModelError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import write_checkpoint
from evomerge.merge.live import Resident
from evomerge.merge.plan import Plan
from evomerge.merge.planner import make_plan
from evomerge.recipe import Recipe
from evomerge.signatures import METHODS
from tests.merge.conftest import spans_of, threads_of_torch
from tests.merge.writing import (
    FLAGS,
    RECIPES,
    assert_same,
    damaged,
    flagged,
    plan_of,
    stored,
    whole,
    written,
)


def live(
    resident: Resident, plan: Plan, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """What the sink in memory writes into parameters that hold nothing yet."""
    parameters = {
        tensor.name: torch.full(tensor.shape, torch.nan, dtype=dtype or tensor.dtype)
        for tensor in plan.tensors
    }
    resident.write(plan, parameters)
    return parameters


@pytest.fixture(scope="session")
def resident(opened: dict[str, Checkpoint]) -> Resident:
    """One sink in memory for all recipes, as in a search."""
    return Resident(opened, torch.device("cpu"))


def test_the_recipes_use_every_method() -> None:
    assert {recipe["merge_method"] for recipe in RECIPES.values()} == set(METHODS)


@pytest.mark.parametrize("name", RECIPES)
def test_disk_and_memory_get_the_same_bits(
    opened: dict[str, Checkpoint], resident: Resident, tmp_path: Path, name: str
) -> None:
    plan = plan_of(name, opened)
    out = written(plan, opened, tmp_path / "out")
    assert_same(live(resident, plan), stored(out))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "threads"),
    [
        ("float32", 3),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("float32", 1), ("bfloat16", 1), ("bfloat16", 3))
        ),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_disk_and_memory_get_the_same_bits_in_any_spans_and_threads(
    opened: dict[str, Checkpoint], tmp_path: Path, method: str, dtype: str, threads: int
) -> None:
    plan = plan_of(f"{method}-{dtype}", opened)
    with spans_of(64), threads_of_torch(threads):
        out = written(plan, opened, tmp_path / "out", threads=threads)
        assert torch.get_num_threads() == threads
        assert_same(live(Resident(opened, torch.device("cpu")), plan), stored(out))


LONG = {"embedding": (9, 40_000), "bias": (40_000,), "matrix": (300, 401), "cube": (3, 50, 401)}


@pytest.fixture(
    scope="module",
    params=[torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
    ids=str,
)
def long(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Checkpoint]:
    """Three state dicts with tensors that torch works on with several threads."""
    opened = {}
    for seed, name in enumerate(("base", "a", "b")):
        folder = tmp_path_factory.mktemp("long") / name
        folder.mkdir()
        generator = torch.Generator().manual_seed(seed)
        tensors = {k: torch.randn(v, generator=generator) for k, v in LONG.items()}
        save_file({k: t.to(request.param) for k, t in tensors.items()}, folder / "x.safetensors")
        opened[name] = Checkpoint.open(folder)
    return opened


@pytest.mark.parametrize(
    "flags", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "flags"]
)
@pytest.mark.parametrize("method", METHODS)
def test_threads_do_not_matter_to_long_tensors(
    long: dict[str, Checkpoint], tmp_path: Path, method: str, flags: bool
) -> None:
    if flags and method not in FLAGS:
        return
    recipe = (flagged if flags else whole)(method, "base", "a", "b")
    recipe["parameters"] = {
        k: v[-1] if isinstance(v, list) else v for k, v in recipe["parameters"].items()
    }
    plan = make_plan(Recipe.from_dict(recipe), long, seed=1)
    out = stored(written(plan, long, tmp_path / "one", threads=1))
    assert_same(stored(written(plan, long, tmp_path / "three", threads=3)), out)
    for threads in (1, 3):
        with threads_of_torch(threads):
            assert_same(live(Resident(long, torch.device("cpu")), plan), out)


@pytest.mark.parametrize("name", ["linear-in-bfloat16", "task-arithmetic-rounded", "dare-linear"])
def test_a_wider_live_model_gets_the_rounded_values(
    opened: dict[str, Checkpoint], resident: Resident, tmp_path: Path, name: str
) -> None:
    plan = plan_of(name, opened)
    shipped = stored(written(plan, opened, tmp_path / "out"))
    widened = {key: tensor.float() for key, tensor in shipped.items()}
    assert_same(live(resident, plan, torch.float32), widened)


def test_memory_refuses_a_model_that_lacks_a_tensor(
    opened: dict[str, Checkpoint], resident: Resident
) -> None:
    plan = plan_of("longer", opened)
    parameters = {tensor.name: torch.zeros(tensor.shape) for tensor in plan.tensors}
    del parameters["model.layers.4.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"'model\.layers\.4\.mlp\.up_proj\.weight'"):
        resident.write(plan, parameters)


@pytest.mark.slow
def test_merging_leaves_the_parents_as_they_are(
    opened: dict[str, Checkpoint], resident: Resident
) -> None:
    files = {name: model.path / "model.safetensors" for name, model in opened.items()}
    before = {name: load_file(path) for name, path in files.items()}
    for name in RECIPES:
        for tensor in live(resident, plan_of(name, opened)).values():
            tensor.fill_(torch.nan)
    for name, path in files.items():
        assert_same(load_file(path), before[name])
    first = live(Resident(opened, torch.device("cpu")), plan_of("linear", opened))
    assert_same(live(resident, plan_of("linear", opened)), first)


@pytest.mark.parametrize("seed", [5, 6])
def test_stochastic_masks_follow_the_plans_seed(
    opened: dict[str, Checkpoint], resident: Resident, seed: int
) -> None:
    recipe = Recipe.from_dict(RECIPES["dare-ties"])
    same = live(resident, make_plan(recipe, opened, seed))
    first = live(resident, plan_of("dare-ties", opened))
    equal = all(torch.equal(same[name], first[name]) for name in first)
    assert equal == (seed == 5)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_nan_in_a_parent_is_named_in_both_sinks(
    opened: dict[str, Checkpoint], tmp_path: Path, method: str, half: bool
) -> None:
    base, a, b = ("half", "half-a", "half-b") if half else ("base", "a", "b")
    recipe = Recipe.from_dict(whole(method, base, a, b))
    models = opened | {a: damaged(tmp_path / "nan", opened[a].path, torch.nan)}
    plan = make_plan(recipe, models)
    words = rf"'model\.layers\.1\.mlp\.up_proj\.weight' of '{a}' holds NaN \(value 30\)"
    with pytest.raises(ModelError, match=words) as raised:
        write_checkpoint(plan, models, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]
    with pytest.raises(ModelError, match=words):
        live(Resident(models, torch.device("cpu")), plan)
    with pytest.raises(ModelError, match=words):
        live(Resident(models, torch.device("cpu"), room=0), plan)


def test_infinity_is_a_number(opened: dict[str, Checkpoint], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    models = {"a": damaged(tmp_path / "inf", opened["a"].path, torch.inf)}
    recipe = Recipe.from_dict({"merge_method": "passthrough", "models": [{"model": "a"}]})
    plan = make_plan(recipe, models)
    out = stored(written(plan, models, tmp_path / "out"))
    assert out[name].view(-1)[30] == torch.inf
    assert_same(live(Resident(models, torch.device("cpu")), plan), out)
