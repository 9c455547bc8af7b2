"""The two sinks: disk and memory get the same bits, and a folder is there whole or not at all."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.errors import InputError, ModelError, OutputExists
from evomerge.merge import writer
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import DEFAULT_SHARD_BYTES, check_free, write_checkpoint
from evomerge.merge.live import Resident
from evomerge.merge.plan import Plan
from evomerge.merge.planner import make_plan
from evomerge.recipe import METHODS, Recipe
from tests.merge.conftest import altered, spans_of, threads_of_torch

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
PAIR: dict[str, Any] = {"models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 0.3}}]}
TUNED: dict[str, Any] = {"base_model": "base", **PAIR}
SPARSE = {"weight": 0.7, "density": 0.4}


def stack(*ranges: tuple[str, int, int], **more: Any) -> dict[str, Any]:
    """Layers of one model after the other."""
    slices = [{"sources": [{"model": m, "layer_range": [i, j]}]} for m, i, j in ranges]
    return {"merge_method": "passthrough", "slices": slices, **more}


def both(start: int, end: int, weight: Any) -> dict[str, Any]:
    """A slice that blends the same layers of a and b."""
    first = {"model": "a", "layer_range": [start, end], "parameters": {"weight": weight}}
    return {"sources": [first, {"model": "b", "layer_range": [start, end]}]}


VALUES: dict[str, Any] = {
    "weight": [0.2, 0.9],
    "density": 0.4,
    "gamma": 0.1,
    "epsilon": 0.1,
    "scale": 0.7,
    "t": [0.0, 0.4, 0.05],
}
FLAGS: dict[str, dict[str, Any]] = {
    "ties": {"rescale": True, "lambda": 0.9},
    "nuslerp": {"nuslerp_flatten": False},
    "model_stock": {"filter_wise": True},
    "sce": {"select_topk": 0.3},
    "karcher": {"max_iter": 3},
}


def whole(method: str, *names: str, **more: Any) -> dict[str, Any]:
    """A recipe of a base and parents, all with the same parameters."""
    signature = METHODS[method]
    base, *parents = names
    known = signature.per_model | signature.shared
    based = {} if signature.base == "none" else {"base_model": base}
    listed = parents[: int(min(len(parents), signature.models[1] - (not signature.task_vectors)))]
    if signature.base == "none":
        listed = parents[: int(min(len(parents), signature.models[1]))]
    return {
        "merge_method": method,
        **based,
        "models": [{"model": name} for name in listed],
        "parameters": {k: v for k, v in VALUES.items() if k in known},
        **more,
    }


def flagged(method: str, *names: str) -> dict[str, Any]:
    """The same with other flags than the method's own."""
    recipe = whole(method, *names)
    return recipe | {"parameters": recipe["parameters"] | FLAGS[method]}


RECIPES: dict[str, dict[str, Any]] = {
    **{f"{method}-float32": whole(method, "base", "a", "b") for method in METHODS},
    **{f"{method}-bfloat16": whole(method, "half", "half-a", "half-b") for method in METHODS},
    **{f"{method}-flags": flagged(method, "base", "a", "b") for method in FLAGS},
    "linear": {"merge_method": "linear", "parameters": {"weight": [0.2, 0.9]}, **PAIR},
    "linear-in-bfloat16": {
        "merge_method": "linear",
        "parameters": {"weight": 0.6},
        "dtype": "bfloat16",
        **PAIR,
    },
    "linear-tied": {
        "merge_method": "linear",
        "parameters": {"weight": 0.6},
        "models": [{"model": "tied"}, {"model": "a"}],
    },
    "linear-slices": {
        "merge_method": "linear",
        "parameters": {"weight": 0.4},
        "slices": [both(0, 2, 0.1), both(1, 3, [0.2, 0.8]), both(0, 1, 0.5)],
    },
    "task-arithmetic-rounded": {
        "merge_method": "task_arithmetic",
        "parameters": {"weight": 0.5},
        "out_dtype": "bfloat16",
        **TUNED,
    },
    "base-alone": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "a"}],
        "parameters": {"weight": 0.0},
    },
    "dare-ties": {"merge_method": "dare_ties", "parameters": SPARSE, **TUNED},
    "dare-linear": {
        "merge_method": "dare_linear",
        "parameters": SPARSE,
        "out_dtype": "float16",
        **TUNED,
    },
    "shorter": stack(("a", 0, 1), ("b", 2, 3)),
    "longer": stack(("a", 0, 3), ("b", 1, 3)),
    "repeated": stack(("a", 1, 2), ("a", 1, 2), ("deep", 2, 5), ("a", 1, 2)),
    "untied-then-tied": stack(("a", 0, 2), ("tied", 2, 3)),
    "tied-then-untied": stack(("tied", 0, 2), ("a", 2, 3)),
    "tied-alone": stack(("tied", 0, 2), ("tied", 1, 3)),
}
# What transformers loads: one recipe of each kind of output.
KINDS = [
    "linear",
    "linear-in-bfloat16",
    "linear-tied",
    "linear-slices",
    "arcee_fusion-bfloat16",
    "shorter",
    "repeated",
    "untied-then-tied",
    "tied-then-untied",
    "tied-alone",
]


def plan_of(name: str, opened: Mapping[str, Checkpoint]) -> Plan:
    recipe = Recipe.from_dict(RECIPES[name])
    return make_plan(recipe, {model: opened[model] for model in recipe.model_names()}, seed=5)


def written(plan: Plan, opened: Mapping[str, Checkpoint], out: Path, **options: Any) -> Path:
    write_checkpoint(plan, opened, out, **options)
    return out


def stored(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


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


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    differ = [name for name in left if not torch.equal(left[name], right[name])]
    assert differ == []
    assert {n: t.dtype for n, t in left.items()} == {n: t.dtype for n, t in right.items()}


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


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
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


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
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


@pytest.mark.parametrize("flags", [False, True], ids=["", "flags"])
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


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_is_copied_keeps_its_bits(tmp_path: Path, dtype: str | None) -> None:
    """Buffers, and the codes of a quantised part, whatever the recipe's dtype."""
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    kept = {
        "vision_tower.layers.0.mlp.fc1.weight": torch.eye(6, 5).to(torch.float8_e4m3fn),
        "vision_tower.layers.0.attn.q.weight": torch.eye(6, 5).to(torch.float8_e5m2),
        "vision_tower.steps": torch.tensor(2**40),
        "model.mask": torch.tensor([True, False]),
    }
    opened = {}
    for model in "ab":
        (tmp_path / model).mkdir()
        tensors = {f"language_model.{name}": torch.eye(8) for name in names} | kept
        save_file(tensors, tmp_path / model / "model.safetensors")
        (tmp_path / model / "config.json").write_text('{"model_type": "llava"}')
        opened[model] = Checkpoint.open(tmp_path / model)
    part = {"models": [{"model": "a"}, {"model": "b"}]}
    recipe = {"merge_method": "linear", "modules": {"text_decoder": part}}
    more = {"parameters": {"weight": 1}} | ({"dtype": dtype} if dtype else {})
    plan = make_plan(Recipe.from_dict(recipe | more), opened)
    with spans_of(7):
        out = stored(written(plan, opened, tmp_path / "out"))
        found = {t.name: torch.zeros(t.shape, dtype=t.dtype) for t in plan.tensors}
        Resident(opened, torch.device("cpu")).write(plan, found)
    for name, tensor in kept.items():
        assert out[name].dtype == found[name].dtype == tensor.dtype
        for copy in (out[name], found[name]):
            assert torch.equal(copy.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


@pytest.mark.parametrize("limit", [1, 4000, 20_000])
def test_shards_keep_the_limit_and_the_index_is_right(
    opened: dict[str, Checkpoint], tmp_path: Path, limit: int
) -> None:
    plan = plan_of("linear", opened)
    out = written(plan, opened, tmp_path / "out", shard_bytes=limit)
    index = json.loads((out / INDEX).read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 1
    assert files == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    found = {}
    for file in files:
        tensors = load_file(out / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
        found |= dict.fromkeys(tensors, file)
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == plan.bytes
    assert_same(stored(out), stored(written(plan, opened, tmp_path / "whole")))


@pytest.mark.parametrize(
    ("name", "limit"),
    [*((name, DEFAULT_SHARD_BYTES) for name in KINDS), ("linear", 4000), ("tied-alone", 4000)],
)
def test_transformers_loads_what_was_written(
    opened: dict[str, Checkpoint], tmp_path: Path, name: str, limit: int
) -> None:
    plan = plan_of(name, opened)
    out = written(plan, opened, tmp_path / "out", shard_bytes=limit)
    model, report = AutoModelForCausalLM.from_pretrained(
        out, dtype="auto", output_loading_info=True, local_files_only=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert len(model.model.layers) == len(plan.layers["default"])
    assert len(model.model.layers) == model.config.num_hidden_layers
    tensors = stored(out)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert_same({key: parameters[key].data for key in tensors}, tensors)
    tied = parameters["lm_head.weight"] is parameters["model.embed_tokens.weight"]
    assert tied == ("lm_head.weight" not in tensors)
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    source = AutoTokenizer.from_pretrained(opened[plan.donor].path, local_files_only=True)
    assert tokenizer.get_vocab() == source.get_vocab()


@pytest.mark.parametrize(
    ("name", "depth", "dtype"),
    [
        ("linear", 3, "float32"),
        ("linear-in-bfloat16", 3, "bfloat16"),
        ("slerp-bfloat16", 3, "bfloat16"),
        ("arcee_fusion-bfloat16", 3, "float32"),
        ("task-arithmetic-rounded", 3, "bfloat16"),
        ("dare-linear", 3, "float16"),
        ("linear-slices", 5, "float32"),
        ("shorter", 2, "float32"),
        ("repeated", 6, "float32"),
    ],
)
def test_the_config_follows_depth_and_dtype(
    opened: dict[str, Checkpoint], tmp_path: Path, name: str, depth: int, dtype: str
) -> None:
    plan = plan_of(name, opened)
    out = written(plan, opened, tmp_path / "out")
    expected = {**opened[plan.donor].config, "num_hidden_layers": depth, "dtype": dtype}
    assert json.loads((out / "config.json").read_text()) == expected


def typed(source: Path, folder: Path, *kinds: str) -> Checkpoint:
    """A model whose config lists the kind of each layer."""
    return Checkpoint.open(altered(source, folder, layer_types=kinds))


def test_lists_in_the_config_follow_the_layers(models: dict[str, Path], tmp_path: Path) -> None:
    opened = {
        "a": typed(models["a"], tmp_path / "a", "full", "sliding", "full"),
        "deep": typed(models["deep"], tmp_path / "deep", *["sliding"] * 4, "full"),
    }
    recipe = Recipe.from_dict(stack(("a", 1, 3), ("deep", 3, 5), ("a", 0, 2)))
    out = written(make_plan(recipe, opened), opened, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["layer_types"] == [
        *("sliding", "full"),
        *("sliding", "full"),
        *("full", "sliding"),
    ]


def test_a_config_without_the_others_list_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    opened = {
        "a": typed(models["a"], tmp_path / "a", "full", "sliding", "full"),
        "b": Checkpoint.open(models["b"]),
    }
    recipe = Recipe.from_dict(stack(("a", 0, 2), ("b", 2, 3)))
    with pytest.raises(ModelError, match=r"'layer_types' of its config lacks layer 2"):
        write_checkpoint(make_plan(recipe, opened), opened, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_recipe_is_kept_beside_the_weights(
    opened: dict[str, Checkpoint], tmp_path: Path
) -> None:
    plan = plan_of("ties-float32", opened)
    out = written(plan, opened, tmp_path / "out")
    assert Recipe.from_file(out / "mergekit_config.yml") == plan.recipe


@pytest.mark.parametrize(("step", "words"), [(1, 30), (10**9, 1)])
def test_progress_counts_up_to_the_size(
    opened: dict[str, Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    words: int,
) -> None:
    monkeypatch.setattr(writer, "_STEP", step)
    plan = plan_of("linear", opened)
    told: list[int] = []
    written(plan, opened, tmp_path / "out", progress=told.append)
    assert told == sorted(told)
    assert len(told) == min(words, len(plan.tensors))  # each in one span
    assert told[-1] == plan.bytes


def test_finish_adds_files_before_the_folder_takes_its_name(
    opened: dict[str, Checkpoint], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    seen: list[bool] = []

    def finish(folder: Path) -> None:
        seen.append(out.exists() or not (folder / "config.json").exists())
        (folder / "README.md").write_text("a card")

    written(plan_of("linear", opened), opened, out, finish=finish)
    assert seen == [False]
    assert (out / "README.md").read_text() == "a card"


class Stop(BaseException):
    """As KeyboardInterrupt, but not for pytest."""


def stop(*_: Any) -> None:
    raise Stop


@pytest.mark.parametrize("where", ["progress", "finish"])
@pytest.mark.parametrize("empty_folder", [True, False])
def test_a_merge_that_fails_leaves_nothing_and_the_next_one_succeeds(
    opened: dict[str, Checkpoint], tmp_path: Path, where: str, empty_folder: bool
) -> None:
    plan, out = plan_of("linear", opened), tmp_path / "deeper" / "out"
    if empty_folder:
        out.mkdir(parents=True)
    with pytest.raises(Stop):
        write_checkpoint(plan, opened, out, **{where: stop})
    assert [path for path in out.parent.iterdir() if path != out] == []
    assert not out.exists() or not any(out.iterdir())
    written(plan, opened, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert set(stored(out)) == {tensor.name for tensor in plan.tensors}


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    opened: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, call, no_room)
        with pytest.raises(ModelError, match=rf"'{tmp_path}/out' cannot be written: No space left"):
            write_checkpoint(plan_of("linear", opened), opened, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    written(plan_of("linear", opened), opened, tmp_path / "out")


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from evomerge.cli import main
sys.argv[0] = "evomerge"
main()
"""


def test_a_file_that_may_not_grow_ends_the_command_with_one_line(
    models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = {"merge_method": "linear", "parameters": {"weight": 0.5}}
    listed = [{"model": str(models[name])} for name in "ab"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"models": listed}))
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, "merge", "recipe.yaml", "out"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2, ended.stderr
    *_, last = ended.stderr.splitlines()
    assert "output 'out' cannot be written: File too large" in last
    assert "Traceback" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def damaged(
    folder: Path, source: Path, value: float, name: str = "model.layers.1.mlp.up_proj.weight"
) -> Checkpoint:
    """A model with one odd value, the 30th of a tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name].view(-1)[30] = value
        return tensors

    return Checkpoint.open(altered(source, folder, change))


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


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "error", [ModelError("the file is damaged"), RuntimeError("a bug"), Stop()], ids=repr
)
def test_what_goes_wrong_in_a_thread_comes_out(
    opened: dict[str, Checkpoint], tmp_path: Path, error: BaseException, threads: int
) -> None:
    def read(name: str) -> Callable[[int, int], torch.Tensor]:
        values = opened["a"].values(name)

        def failing(start: int, stop: int) -> torch.Tensor:
            if name == "model.layers.1.mlp.up_proj.weight":
                raise error
            return values(start, stop)

        return failing

    models = opened | {"a": replace(opened["a"], read=read)}
    with pytest.raises(type(error)) as raised:
        write_checkpoint(plan_of("linear", models), models, tmp_path / "out", threads=threads)
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_cannot_be_read_is_not_taken_for_the_output(
    opened: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(start: int, stop: int) -> torch.Tensor:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    models = opened | {"a": replace(opened["a"], read=lambda name: broken)}
    with pytest.raises(ModelError, match="of 'a' cannot be read: Input/output error"):
        write_checkpoint(plan_of("linear", models), models, tmp_path / "out")
    folder = tmp_path / "a"
    shutil.copytree(opened["a"].path, folder)
    (folder / "generation_config.json").write_text("{}")
    models = opened | {"a": Checkpoint.open(folder)}
    plan = plan_of("linear", models)
    whole = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        return broken(0, 0) if path.name == "generation_config.json" else whole(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(ModelError, match=r"generation_config\.json' cannot be read: Input/output"):
        write_checkpoint(plan, models, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_there_stays_untouched(
    opened: dict[str, Checkpoint], tmp_path: Path, what: str
) -> None:
    out = tmp_path / "out"
    kept = out
    if what == "folder":
        out.mkdir()
        kept = out / "model.safetensors"
    kept.write_text("mine")
    with pytest.raises(OutputExists, match="out'"):
        write_checkpoint(plan_of("linear", opened), opened, out)
    assert kept.read_text() == "mine"
    assert sorted(tmp_path.rglob("*")) == sorted({out, kept})


def test_a_link_to_an_empty_folder_is_followed(
    opened: dict[str, Checkpoint], tmp_path: Path
) -> None:
    (tmp_path / "deep" / "real").mkdir(parents=True)
    out = tmp_path / "link"
    out.symlink_to(tmp_path / "deep" / "real")
    plan = plan_of("linear", opened)
    written(plan, opened, out)
    assert out.is_symlink()
    assert set(stored(tmp_path / "deep" / "real")) == {tensor.name for tensor in plan.tensors}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "link"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["real"]


def place(kind: str, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """An output that no folder can be renamed to."""
    if kind == "current directory":
        patch.chdir(folder)
        return Path(".")
    if kind == "current directory by a link":
        (folder / "empty").mkdir()
        (folder / "link").symlink_to(folder / "empty")
        patch.chdir(folder / "empty")
        return folder / "link"
    if kind == "mount point":
        patch.setattr(os.path, "ismount", lambda path: Path(path) == folder / "mounted")
        (folder / "mounted").mkdir()
        return folder / "mounted"
    if kind == "circle":
        (folder / "a").symlink_to(folder / "b")
        (folder / "b").symlink_to(folder / "a")
        return folder / "a"
    if kind == "closed":
        patch.setattr(os, "access", lambda path, mode: Path(path) != folder)
        return folder / "new" / "out"
    (folder / "file").write_text("mine")
    return folder / "file" / ("out" if kind == "in a file" else "deeper/out")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("current directory", "'.' cannot be written: it is the current directory"),
        ("current directory by a link", "it is the current directory"),
        ("mount point", "it is a mount point, which cannot be replaced: name another folder"),
        ("circle", "cannot be written: "),
        ("closed", "does not let you write: name another folder"),
        ("in a file", "file' is a file: name another folder"),
        ("deep in a file", "file' is a file: name another folder"),
    ],
)
def test_a_place_that_cannot_take_the_folder_is_refused_before_any_work(
    opened: dict[str, Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    message: str,
) -> None:
    out = place(kind, tmp_path, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        check_free(out)
    with pytest.raises(InputError, match=message):
        write_checkpoint(plan_of("linear", opened), opened, out, progress=stop, finish=stop)
    assert sorted(tmp_path.rglob("*")) == before


def test_files_may_go_into_an_empty_folder_that_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("current directory", "mount point"):
        (tmp_path / kind).mkdir()
        out = place(kind, tmp_path / kind, monkeypatch)
        assert check_free(out, renamed=False) == out.resolve()


KILLED = """
import sys
from pathlib import Path
from evomerge.merge import writer
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import write_checkpoint
from evomerge.merge.planner import make_plan
from evomerge.recipe import Recipe

writer._STEP = 1  # it tells of every span
model, out = sys.argv[1:]
recipe = Recipe.from_dict({"merge_method": "passthrough", "models": [{"model": model}]})
models = {model: Checkpoint.open(model)}
written = 0

def wait(so_far):
    global written
    written += 1
    if written == 10:
        print("in the middle", flush=True)
        sys.stdin.read()

write_checkpoint(make_plan(recipe, models), models, Path(out), shard_bytes=4000, progress=wait)
"""


def start(model: Path, out: Path) -> "subprocess.Popen[str]":
    """A merge that is in the middle of writing."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(model), str(out)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in the middle\n"
    return process


def test_a_killed_merge_leaves_no_output_and_the_next_one_succeeds(
    opened: dict[str, Checkpoint], models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with start(models["a"], out) as process:
        assert any(tmp_path.iterdir())
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    plan = plan_of("linear", opened)
    written(plan, opened, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert set(stored(out)) == {tensor.name for tensor in plan.tensors}


def test_an_interrupted_merge_leaves_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    with start(models["a"], tmp_path / "out") as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)  # ends what the writing thread waits for
    assert "KeyboardInterrupt" in errors
    assert process.returncode != 0
    assert list(tmp_path.iterdir()) == []


MEASURED = """
import sys, threading
from pathlib import Path
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import write_checkpoint
from evomerge.merge.planner import make_plan
from evomerge.recipe import Recipe

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

method, times, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
names = ["base", "a", "b"]
models = {name: Checkpoint.open(folder / name) for name in names}
layers = models["base"].layout.layers
sources = [{"model": name, "layer_range": [0, layers]} for name in names]
recipe = Recipe.from_dict({
    "merge_method": method,
    "base_model": "base",
    "slices": [{"sources": sources}] * times,
    "parameters": {"weight": 0.5} | ({"density": 0.4} if method == "ties" else {}),
})
plan = make_plan(recipe, models)
before, peak, done = own(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, own())

watcher = threading.Thread(target=watch)
watcher.start()
write_checkpoint(plan, models, folder / "out")
done.set()
watcher.join()
print(plan.bytes, peak - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two parents of five layers, each a matrix of 64 MB in bfloat16."""
    folder = tmp_path_factory.mktemp("large")
    for seed, model in enumerate(("base", "a", "b")):
        (folder / model).mkdir()
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in range(5):
            values = torch.empty(4000, 8000, dtype=torch.bfloat16)
            tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = values.normal_(
                generator=generator
            )
        save_file(tensors, folder / model / "model.safetensors")
        config = {"model_type": "llama", "num_hidden_layers": 5}
        (folder / model / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("method", "times", "limit"), [("ties", 10, 600_000_000), ("task_arithmetic", 1, 64_000_000)]
)
def test_memory_holds_spans_and_not_the_model(
    large: Path, method: str, times: int, limit: int
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, method, str(times), str(large)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    shutil.rmtree(large / "out", ignore_errors=True)
    assert ended.returncode == 0, ended.stderr
    size, peak = map(int, ended.stdout.split())
    assert size == times * 5 * 64_000_000 >= 5 * limit
    assert peak < limit


def test_what_a_killed_merge_left_is_removed_and_what_runs_is_not(
    opened: dict[str, Checkpoint], tmp_path: Path
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    abandoned = tmp_path / f".out.{ended.pid}.partial"
    running = tmp_path / f".out.{os.getppid()}.partial"
    for folder in (abandoned, running):
        folder.mkdir()
    plan = make_plan(
        Recipe.from_dict({"merge_method": "passthrough", "models": [{"model": "a"}]}), opened
    )
    write_checkpoint(plan, opened, tmp_path / "out")
    assert running.exists()
    assert not abandoned.exists()
