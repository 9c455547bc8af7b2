"""Statistics are measured once and kept; AIM on top of every method follows its formula."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from evomerge.errors import InputError, ModelError, RecipeError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import write_checkpoint
from evomerge.merge.files import FromFiles
from evomerge.merge.live import Resident
from evomerge.merge.methods.aim import relaxed
from evomerge.merge.operand import Operand
from evomerge.merge.plan import Plan, compute
from evomerge.merge.planner import make_plan
from evomerge.merge.statistics import ACTIVATION_MEAN, Origin, Statistics, recall
from evomerge.recipe import Recipe
from evomerge.signatures import METHODS
from tests.merge import reference
from tests.merge.conftest import altered, without

HEAD = "lm_head.weight"
ORIGIN = Origin(ACTIVATION_MEAN, "m" * 64, "c" * 64, 4, 8)

modestly = settings(max_examples=60, deadline=None, derandomize=True)
shares = st.floats(0, 1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where statistics are kept; not there yet."""
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


def random_statistics(model: Checkpoint, seed: int = 0) -> Statistics:
    """Of every matrix but the embeddings; the first channel of each is never active."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, header in model.headers.items():
        if len(header.shape) == 2 and "embed" not in name:
            activation = torch.rand(header.shape[1], generator=generator)
            activation[0] = 0
            values[ACTIVATION_MEAN, name] = activation
    return Statistics(values)


def refuse() -> Statistics:
    raise AssertionError("this was kept and needs no measuring")


# What is kept


def test_statistics_are_measured_once(cache: Path) -> None:
    first = recall(ORIGIN, lambda: Statistics({(ACTIVATION_MEAN, "a.weight"): torch.arange(3.0)}))
    again = recall(ORIGIN, refuse)
    for found in (first, again):
        assert torch.equal(found.values[ACTIVATION_MEAN, "a.weight"], torch.arange(3.0))
        assert found.get(ACTIVATION_MEAN, "b.weight") is None
        assert found.get("gram", "a.weight") is None
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"kind": "gram"},
        {"model": "n" * 64},
        {"calibration": "d" * 64},
        {"blocks": 5},
        {"tokens": 9},
    ],
    ids=lambda other: next(iter(other)),
)
def test_anything_else_is_measured_again(cache: Path, other: dict[str, Any]) -> None:
    changed = Origin(**{**vars(ORIGIN), **other})
    recall(ORIGIN, lambda: Statistics({("x", "a"): torch.zeros(1)}))
    found = recall(changed, lambda: Statistics({("x", "a"): torch.ones(1)}))
    assert found.values["x", "a"] == 1
    assert recall(ORIGIN, refuse).values["x", "a"] == 0


def test_without_a_named_cache_it_is_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EVOMERGE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    recall(ORIGIN, lambda: Statistics({}))
    assert len(list((tmp_path / ".cache" / "evomerge" / "statistics").iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "other", "no safetensors"])
def test_a_damaged_file_is_named(cache: Path, damage: str) -> None:
    recall(ORIGIN, lambda: Statistics({("x", "a"): torch.ones(9)}))
    (kept,) = cache.iterdir()
    if damage == "cut":
        kept.write_bytes(kept.read_bytes()[:-4])
    elif damage == "other":
        kept.unlink()
        recall(Origin(**{**vars(ORIGIN), "blocks": 5}), lambda: Statistics({}))
        next(cache.iterdir()).rename(kept)
    else:
        kept.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=f"statistics '{kept}' are damaged: delete the file"):
        recall(ORIGIN, refuse)


def test_a_failed_measurement_leaves_nothing(cache: Path) -> None:
    def fail() -> Statistics:
        raise ModelError("no")

    with pytest.raises(ModelError, match="no"):
        recall(ORIGIN, fail)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot be kept in .*: set EVOMERGE_CACHE"):
        recall(ORIGIN, refuse)


# The formula


@modestly
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    by_rows=st.booleans(),
    omega=shares,
)
def test_relaxing_follows_the_paper(
    seed: int, rows: int, columns: int, by_rows: bool, omega: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    merged, base = torch.randn(2, rows, columns, generator=generator)
    activation = torch.rand((rows, 1) if by_rows else (columns,), generator=generator)
    found = relaxed(Operand.of(merged), Operand.of(base), activation, omega).whole()
    expected = reference.aim(
        merged.double().numpy(), base.double().numpy(), wide(activation), omega
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_relaxing_long_rows_span_by_span() -> None:
    generator = torch.Generator().manual_seed(0)
    merged, base = torch.randn(2, 1000, 701, generator=generator).bfloat16()
    for shape in ((701,), (1000, 1)):
        activation = torch.rand(shape, generator=generator)
        result = relaxed(Operand.of(merged), Operand.of(base), activation, 0.4)
        assert len(list(result.spans())) > 1
        share = activation / activation.max() * (1 - 0.4)
        expected = merged.float() + (base.float() - merged.float()) * share
        assert torch.equal(result.whole(), expected.bfloat16())


def test_inputs_that_are_never_active_change_nothing() -> None:
    merged, base = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    found = relaxed(Operand.of(merged), Operand.of(base), torch.zeros(4), 0.0)
    assert torch.equal(found.whole(), merged)


def wide(tensor: Tensor) -> reference.Array:
    return tensor.double().numpy()


# On top of every method


def tree(method: str, **more: Any) -> dict[str, Any]:
    """A recipe of the method over base, a and b, as many of them as it takes."""
    signature = METHODS[method]
    parameters = {"weight": 0.6, "t": 0.3, "density": 0.5}
    known = {**signature.per_model, **signature.shared}
    with_base = signature.base == "required" and not signature.task_vectors
    count = min(signature.models[1] - with_base, 2)
    found: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": name} for name in ("a", "b")[: int(count)]],
        "parameters": {key: value for key, value in parameters.items() if key in known},
    }
    if signature.base != "none":
        found["base_model"] = "base"
    return {**found, **more}


def plan_of(opened: Mapping[str, Checkpoint], made: dict[str, Any], **options: Any) -> Plan:
    recipe = Recipe.from_dict(made)
    return make_plan(recipe, {n: opened[n] for n in recipe.model_names()}, 5, **options)


def with_aim(
    opened: Mapping[str, Checkpoint],
    made: dict[str, Any],
    omega: float,
    statistics: Statistics,
    base: str = "base",
) -> Plan:
    aim = {"calibration": "text.txt", "omega": omega}
    return plan_of(opened, {**made, "base_model": base, "aim": aim}, statistics={base: statistics})


def computed(opened: Mapping[str, Checkpoint], plan: Plan) -> dict[str, Tensor]:
    inputs = FromFiles(opened)
    return {t.name: compute(t, inputs, plan.seed).whole().view(t.shape) for t in plan.tensors}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        m if m in ("linear", "ties", "slerp") else pytest.param(m, marks=pytest.mark.slow)
        for m in METHODS
    ],
)
def test_aim_follows_its_formula_on_top_of_every_method(
    opened: dict[str, Checkpoint], method: str
) -> None:
    merged = computed(opened, plan_of(opened, tree(method)))
    base = load_file(opened["base"].path / "model.safetensors")

    @settings(max_examples=4, deadline=None, derandomize=True)
    @given(omega=shares, seed=st.integers(0, 9))
    def check(omega: float, seed: int) -> None:
        statistics = random_statistics(opened["base"], seed)
        found = computed(opened, with_aim(opened, tree(method), omega, statistics))
        assert found.keys() == merged.keys()
        for name, values in found.items():
            activation = statistics.get(ACTIVATION_MEAN, name)
            assert values.dtype == merged[name].dtype
            if activation is None:
                assert torch.equal(values, merged[name]), name
                continue
            expected = reference.aim(wide(merged[name]), wide(base[name]), wide(activation), omega)
            np.testing.assert_allclose(wide(values), expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(values[:, 0], merged[name][:, 0])  # never active

    check()


@pytest.mark.parametrize(
    "method",
    [
        m if m in ("linear", "ties", "slerp") else pytest.param(m, marks=pytest.mark.slow)
        for m in METHODS
    ],
)
def test_omega_one_changes_nothing(opened: dict[str, Checkpoint], method: str) -> None:
    merged = computed(opened, plan_of(opened, tree(method)))
    found = computed(opened, with_aim(opened, tree(method), 1.0, random_statistics(opened["base"])))
    assert all(torch.equal(found[name], merged[name]) for name in merged)


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_omega_zero_gives_the_base_where_all_inputs_are_as_active(
    opened: dict[str, Checkpoint], method: str
) -> None:
    active = Statistics(
        {key: torch.full_like(a, 3) for key, a in random_statistics(opened["base"]).values.items()}
    )
    found = computed(opened, with_aim(opened, tree(method), 0.0, active))
    base = load_file(opened["base"].path / "model.safetensors")
    for _, name in active.values:
        torch.testing.assert_close(found[name], base[name], rtol=0, atol=1e-6)


def test_a_base_that_only_aim_needs_is_not_merged(opened: dict[str, Checkpoint]) -> None:
    statistics = random_statistics(opened["base"])
    made = tree("linear")
    merged = with_aim(opened, made, 0.4, statistics).tensors
    assert {source.model for t in merged for source in t.inputs} == {"a", "b"}
    made["models"].append({"model": "base"})
    merged = with_aim(opened, made, 0.4, statistics).tensors
    assert {source.model for t in merged for source in t.inputs} == {"a", "b", "base"}


SLICED: dict[str, Any] = {
    "merge_method": "passthrough",
    "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 2]}]},
        {"sources": [{"model": "b", "layer_range": [1, 3]}]},
    ],
}


def test_layers_of_slices_are_drawn_to_the_same_layers_of_the_base(
    opened: dict[str, Checkpoint],
) -> None:
    plan = with_aim(opened, SLICED, 0.4, random_statistics(opened["base"]))
    key = "model.layers.{}.mlp.up_proj.weight"
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    for place, layer in enumerate([0, 1, 1, 2]):
        aim = by_name[key.format(place)].aim
        assert aim is not None
        assert aim.base.name == key.format(layer)


RECIPES: dict[str, dict[str, Any]] = {
    "linear": tree("linear"),
    "ties": tree("ties"),
    "dare-ties-rounded": tree("dare_ties", out_dtype="bfloat16"),
    "arcee-in-bfloat16": tree("arcee_fusion", dtype="bfloat16"),
    "slices": SLICED,
}


@pytest.mark.parametrize("name", RECIPES)
def test_both_sinks_write_the_same_bits(
    opened: dict[str, Checkpoint], tmp_path: Path, name: str
) -> None:
    resident = Resident(opened, torch.device("cpu"))
    for omega in (0.4, 0.9):  # the second one finds its inputs in memory
        plan = with_aim(opened, RECIPES[name], omega, random_statistics(opened["base"]))
        out = tmp_path / str(omega)
        write_checkpoint(plan, opened, out)
        live = {t.name: torch.full(t.shape, torch.nan, dtype=t.dtype) for t in plan.tensors}
        resident.write(plan, live)
        stored = load_file(out / "model.safetensors")
        assert stored.keys() == live.keys()
        assert [n for n in live if not torch.equal(stored[n], live[n])] == []


def test_the_recipe_beside_the_model_names_aim(
    opened: dict[str, Checkpoint], tmp_path: Path
) -> None:
    plan = with_aim(opened, tree("linear"), 0.25, random_statistics(opened["base"]))
    write_checkpoint(plan, opened, tmp_path / "out")
    written = Recipe.from_file(tmp_path / "out" / "mergekit_config.yml")
    assert written == plan.recipe
    assert written.aim is not None
    assert written.aim.omega == 0.25


def test_rows_of_tokens_in_another_order(opened: dict[str, Checkpoint], tmp_path: Path) -> None:
    """The head of a base whose token numbers are not the output's."""
    folder = altered(opened["base"].path, tmp_path / "swapped")
    text = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    (one, i), (two, j) = sorted(vocabulary.items(), key=lambda entry: entry[1])[-2:]
    vocabulary |= {one: j, two: i}
    (folder / "tokenizer.json").write_text(json.dumps(text))
    models = {**opened, "base": Checkpoint.open(folder)}
    made = tree("linear", tokenizer_source="a")
    statistics = random_statistics(models["base"])
    found = computed(models, with_aim(models, made, 0.4, statistics))[HEAD]
    merged = computed(models, plan_of(models, made))[HEAD]
    base = models["base"].tensor(HEAD).clone()
    base[[i, j]] = base[[j, i]]
    expected = reference.aim(
        wide(merged), wide(base), wide(statistics.values[ACTIVATION_MEAN, HEAD]), 0.4
    )
    np.testing.assert_allclose(wide(found), expected, rtol=1e-5, atol=1e-6)


# What cannot be


def test_matrices_without_statistics_are_merged_and_named(opened: dict[str, Checkpoint]) -> None:
    values = dict(random_statistics(opened["base"]).values)
    lost = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 2)]
    for name in lost:
        del values[ACTIVATION_MEAN, name]
    plan = with_aim(opened, tree("ties"), 0.4, Statistics(values))
    assert [n for n in plan.notes if "aim" in n] == [
        f"aim: '{lost[0]}' and 1 more are merged without it: the activations that enter them "
        "could not be measured"
    ]
    merged = computed(opened, plan_of(opened, tree("ties")))
    found = computed(opened, plan)
    assert all(torch.equal(found[name], merged[name]) for name in lost)
    whole = with_aim(opened, tree("ties"), 0.4, random_statistics(opened["base"]))
    assert whole.notes == ()


def test_without_statistics_there_is_no_plan(opened: dict[str, Checkpoint]) -> None:
    made = tree("linear", base_model="base", aim={"calibration": "text.txt"})
    with pytest.raises(RecipeError, match="no statistics of the base 'base': `evomerge merge`"):
        plan_of(opened, made)


def test_a_base_of_another_depth_is_refused(opened: dict[str, Checkpoint]) -> None:
    statistics = random_statistics(opened["deep"])
    with pytest.raises(ModelError, match="'a' has 3 layers and 'deep' 5"):
        with_aim(opened, tree("linear"), 0.4, statistics, base="deep")


def test_sources_of_other_layers_need_a_listed_base(opened: dict[str, Checkpoint]) -> None:
    sources = [{"model": "a", "layer_range": [0, 1]}, {"model": "b", "layer_range": [1, 2]}]
    made = {
        "merge_method": "linear",
        "slices": [{"sources": sources}],
        "parameters": {"weight": 1.0},
    }
    with pytest.raises(RecipeError, match=r"base_model 'base' is not among them: list it"):
        with_aim(opened, made, 0.4, random_statistics(opened["base"]))


def test_a_base_without_a_tensor_is_noted(opened: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Nothing is drawn to what the base does not have."""
    lacking = altered(opened["base"].path, tmp_path / "lacking", without(HEAD))
    models = {**opened, "lacking": Checkpoint.open(lacking)}
    statistics = random_statistics(models["lacking"])
    plan = with_aim(models, tree("linear"), 0.4, statistics, base="lacking")
    assert [n.split()[1] for n in plan.notes if n.startswith("aim")] == [f"'{HEAD}'"]
