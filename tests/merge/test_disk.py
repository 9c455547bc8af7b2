"""A merge on disk: what stands in its folder, where it may go, and how little memory it takes."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.errors import InputError, ModelError, OutputExists
from evomerge.merge import writer
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import DEFAULT_SHARD_BYTES, write_checkpoint
from evomerge.merge.live import Resident
from evomerge.merge.place import check_free
from evomerge.merge.planner import make_plan
from evomerge.recipe import Recipe
from tests.merge.conftest import altered, spans_of
from tests.merge.writing import (
    ROOT,
    assert_same,
    plan_of,
    stack,
    stop,
    stored,
    written,
)

INDEX = "model.safetensors.index.json"

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
