"""Recipes over the shared models, and both sinks of their merges."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import write_checkpoint
from evomerge.merge.plan import Plan
from evomerge.merge.planner import make_plan
from evomerge.recipe import Recipe
from evomerge.signatures import METHODS
from tests.merge.conftest import altered

ROOT = Path(__file__).parents[2]

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


def plan_of(name: str, opened: Mapping[str, Checkpoint]) -> Plan:
    recipe = Recipe.from_dict(RECIPES[name])
    return make_plan(recipe, {model: opened[model] for model in recipe.model_names()}, seed=5)


def written(plan: Plan, opened: Mapping[str, Checkpoint], out: Path, **options: Any) -> Path:
    write_checkpoint(plan, opened, out, **options)
    return out


def stored(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    differ = [name for name in left if not torch.equal(left[name], right[name])]
    assert differ == []
    assert {n: t.dtype for n, t in left.items()} == {n: t.dtype for n, t in right.items()}


class Stop(BaseException):
    """As KeyboardInterrupt, but not for pytest."""


def stop(*_: Any) -> None:
    raise Stop


def damaged(
    folder: Path, source: Path, value: float, name: str = "model.layers.1.mlp.up_proj.weight"
) -> Checkpoint:
    """A model with one odd value, the 30th of a tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name].view(-1)[30] = value
        return tensors

    return Checkpoint.open(altered(source, folder, change))


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
