"""The two sinks: disk and memory get the same bits, and a folder is there whole or not at all."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.errors import InputError, ModelError, OutputExists
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import DEFAULT_SHARD_BYTES, check_free, write_checkpoint
from evomerge.merge.live import Resident
from evomerge.merge.plan import Plan, make_plan
from evomerge.recipe import METHODS, Recipe
from tests.merge.conftest import altered

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


RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "parameters": {"weight": [0.2, 0.9]}, **PAIR},
    "linear-in-bfloat16": {
        "merge_method": "linear",
        "parameters": {"weight": 0.6},
        "dtype": "bfloat16",
        **PAIR,
    },
    "linear-of-stored-bfloat16": {
        "merge_method": "linear",
        "parameters": {"weight": 0.6},
        "models": [{"model": "half"}, {"model": "half-a"}],
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
    "slerp": {
        "merge_method": "slerp",
        "base_model": "a",
        "parameters": {"t": [0.0, 0.4, 1.0]},
        "models": [{"model": "a"}, {"model": "b"}],
    },
    "task-arithmetic": {"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}, **TUNED},
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
    "ties": {"merge_method": "ties", "parameters": SPARSE, **TUNED},
    "dare-ties": {"merge_method": "dare_ties", "parameters": SPARSE, **TUNED},
    "dare-linear": {
        "merge_method": "dare_linear",
        "parameters": SPARSE,
        "out_dtype": "float16",
        **TUNED,
    },
    "passthrough": {
        "merge_method": "passthrough",
        "models": [{"model": "a"}],
        "parameters": {"scale": 0.7},
    },
    "shorter": stack(("a", 0, 1), ("b", 2, 3)),
    "longer": stack(("a", 0, 3), ("b", 1, 3)),
    "repeated": stack(("a", 1, 2), ("a", 1, 2), ("deep", 2, 5), ("a", 1, 2)),
    "untied-then-tied": stack(("a", 0, 2), ("tied", 2, 3)),
    "tied-then-untied": stack(("tied", 0, 2), ("a", 2, 3)),
    "tied-alone": stack(("tied", 0, 2), ("tied", 1, 3)),
}


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


@pytest.mark.parametrize("name", RECIPES)
def test_memory_gets_the_same_bits_twice(
    opened: dict[str, Checkpoint], resident: Resident, name: str
) -> None:
    plan = plan_of(name, opened)
    first = live(resident, plan)
    live(resident, plan_of("slerp", opened))
    assert_same(live(resident, plan), first)


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
        model = opened[name]
        kept = {key: resident.tensor(name, key, h.dtype) for key, h in model.headers.items()}
        assert_same(kept, before[name])


@pytest.mark.parametrize("seed", [5, 6])
def test_stochastic_masks_follow_the_plans_seed(
    opened: dict[str, Checkpoint], resident: Resident, seed: int
) -> None:
    recipe = Recipe.from_dict(RECIPES["dare-ties"])
    same = live(resident, make_plan(recipe, opened, seed))
    first = live(resident, plan_of("dare-ties", opened))
    equal = all(torch.equal(same[name], first[name]) for name in first)
    assert equal == (seed == 5)


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
    [*((name, DEFAULT_SHARD_BYTES) for name in RECIPES), ("linear", 4000), ("tied-alone", 4000)],
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
    assert len(model.model.layers) == len(plan.layers) == model.config.num_hidden_layers
    tensors = stored(out)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert_same({key: parameters[key].data for key in tensors}, tensors)
    tied = parameters["lm_head.weight"] is parameters["model.embed_tokens.weight"]
    assert tied == ("lm_head.weight" not in tensors)
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    source = AutoTokenizer.from_pretrained(opened[plan.tokenizer_from].path, local_files_only=True)
    assert tokenizer.get_vocab() == source.get_vocab()


@pytest.mark.parametrize(
    ("name", "depth", "dtype"),
    [
        ("linear", 3, "float32"),
        ("linear-in-bfloat16", 3, "bfloat16"),
        ("linear-of-stored-bfloat16", 3, "bfloat16"),
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
    expected = {**opened[plan.config_from].config, "num_hidden_layers": depth, "dtype": dtype}
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
    plan = plan_of("ties", opened)
    out = written(plan, opened, tmp_path / "out")
    assert Recipe.from_file(out / "mergekit_config.yml") == plan.recipe


def test_progress_counts_up_to_the_size(opened: dict[str, Checkpoint], tmp_path: Path) -> None:
    plan = plan_of("linear", opened)
    told: list[int] = []
    written(plan, opened, tmp_path / "out", progress=told.append)
    assert told == sorted(told)
    assert len(told) == len(plan.tensors)
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


def test_a_place_that_cannot_be_written_is_named(
    opened: dict[str, Checkpoint], tmp_path: Path
) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.raises(ModelError, match=rf"'{tmp_path}/out' cannot be written: No space left"):
        write_checkpoint(plan_of("linear", opened), opened, tmp_path / "out", finish=full)


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
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import write_checkpoint
from evomerge.merge.plan import make_plan
from evomerge.recipe import Recipe

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


def test_a_killed_merge_leaves_no_output_and_the_next_one_succeeds(
    opened: dict[str, Checkpoint], models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(models["a"]), str(out)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle\n"
        assert any(tmp_path.iterdir())
        process.kill()
    assert process.returncode == -9
    assert not out.exists()
    plan = plan_of("linear", opened)
    written(plan, opened, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert set(stored(out)) == {tensor.name for tensor in plan.tensors}


MEASURED = """
import sys, threading
from pathlib import Path
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import write_checkpoint
from evomerge.merge.plan import make_plan
from evomerge.recipe import Recipe

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

method, a, b, out = sys.argv[1:]
entries = [{"model": a}] + ([] if method == "passthrough" else [{"model": b}])
parameters = {} if method == "passthrough" else {"weight": 0.5}
more = {} if method in ("linear", "passthrough") else {"base_model": b}
recipe = Recipe.from_dict(
    {"merge_method": method, "models": entries, "parameters": parameters, **more}
)
models = {name: Checkpoint.open(name) for name in recipe.model_names()}
plan = make_plan(recipe, models)
before, peak, done = own(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, own())

watcher = threading.Thread(target=watch)
watcher.start()
write_checkpoint(plan, models, Path(out))
done.set()
watcher.join()
print(plan.bytes, peak - before)
"""


@pytest.fixture(scope="module")
def large(opened: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of 300 MB in tensors of 4 MB."""
    folder = tmp_path_factory.mktemp("large")
    names = [
        f"model.layers.{i}.mlp.{x}_proj.weight" for i in range(25) for x in ("up", "gate", "down")
    ]
    found = []
    for seed, model in enumerate("ab"):
        path = folder / model
        path.mkdir()
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(1000, 1000, generator=generator) for name in names}
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text('{"num_hidden_layers": 25}')
        found.append(path)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("method", "tensors"),
    [("linear", 10), ("task_arithmetic", 10), ("passthrough", 5), ("ties", 30)],  # ties sorts
)
def test_memory_holds_a_tensor_and_its_inputs_not_the_model(
    large: list[Path], tmp_path: Path, method: str, tensors: int
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, method, *map(str, large), str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    size, peak = map(int, ended.stdout.split())
    assert size == 300_000_000
    assert peak < tensors * 4_000_000  # of 75
