"""Measure the tables of the zoo's README: fixed recipes, searches, and controls.

Every number is on the test split of a task. Searches go the whole way that a user's would: launch,
finals, export with its one reading of test. The fixed recipes and the parents are scored on test
here directly: this script measures the zoo, once, and chooses nothing by it.

    python -m examples.zoo.measure [--workers 2] [--seeds 3] [--candidates 600]
"""

import argparse
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.conducted import conducted
from evomerge.engine.build import build as build_engine
from evomerge.fitness.score import score
from evomerge.fitness.task import Task, Unsealed
from evomerge.job import Engine, find_task
from evomerge.merge.checkpoint import Checkpoint
from evomerge.recipe import Recipe

ZOO = Path(__file__).resolve().parent
ENGINE = Engine(device="cpu", threads=1)
EXAMPLES = 256  # of train that a candidate is scored on, drawn anew for each generation
SPACES = {
    "global": "one coefficient per parent",
    "per_layer": "one per parent and layer",
    "per_module": "one per parent and module",
}
PARENTS = {"ja_list_ops": ("ops", "ja"), "ja_list_ops_roman": ("ops", "ja", "roman")}


@dataclass(frozen=True)
class Search:
    """One search to run: a space over some parents, on a task."""

    task: str
    parents: tuple[str, ...]
    preset: str
    seed: int
    candidates: int


def run(search: Search) -> dict[str, Any]:
    """Launch, finish and export a search; gives the test score and the time it took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parents = {parent: ZOO / parent for parent in search.parents}
        if len(parents) == 1:  # a search needs two: a copy of the base has an empty task vector
            parents["nothing"] = Path(shutil.copytree(ZOO / "base", folder / "nothing"))
        plain = {
            "name": "measure",
            "seed": search.seed,
            "parents": {key: {"model": str(path)} for key, path in parents.items()},
            "base": {"model": str(ZOO / "base")},
            "space": {"preset": search.preset},
            "tasks": [{"task": search.task}],
            "optimizer": {"name": "cma-es"},
            "budget": {"candidates": search.candidates},
            "staging": {"stages": [EXAMPLES], "keep": []},
            "engine": ENGINE.model_dump(),
        }
        ended = conducted(plain, folder)
    sys.stderr.write(f"{search}: {ended.test:.1%} in {ended.seconds:.0f} CPU s\n")
    return {"test": ended.test, "seconds": ended.seconds}


def fixed(task_name: str) -> dict[str, float]:
    """Test scores of the parents and of recipes that anybody would try, by name."""
    task = Task.open(find_task(task_name))
    items = task.examples("test", Unsealed(task.identity("test")))
    everything = np.arange(len(items), dtype=np.uint32)
    names = PARENTS[task_name]
    folders = {name: str(ZOO / name) for name in ("base", *names)}
    opened = {path: Checkpoint.open(path) for path in folders.values()}
    engine = build_engine(ENGINE, opened, folders["base"])
    recipes = {
        name: Recipe.from_dict({"merge_method": "passthrough", "models": [{"model": path}]})
        for name, path in folders.items()
    }
    parents = [folders[name] for name in names]

    def merged(method: str, weight: float, **shared: float) -> Recipe:
        plain: dict[str, Any] = {
            "merge_method": method,
            "models": [{"model": path, "parameters": {"weight": weight}} for path in parents],
            "parameters": shared,
        }
        if method != "linear":
            plain["base_model"] = folders["base"]
        return Recipe.from_dict(plain)

    recipes["uniform average"] = merged("linear", 1.0)
    for weight in (1.0, 0.7):
        recipes[f"task arithmetic, weights {weight:g}"] = merged("task_arithmetic", weight)
        name = f"TIES, weights {weight:g}, density 0.5"
        recipes[name] = merged("ties", weight, density=0.5)
    scores = {}
    for name, recipe in recipes.items():
        engine.load(recipe)
        scores[name] = score(engine, task, items, everything, shaped=False).mean
    engine.close()
    return scores


def main() -> None:
    """Run everything and print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=600)
    options = parser.parse_args()

    def searches(task: str, parents: tuple[str, ...], space: str, seeds: int) -> list[Search]:
        preset = f"{space}_task_arithmetic"
        return [
            Search(task, parents, preset, seed, options.candidates) for seed in range(1, seeds + 1)
        ]

    rows: list[tuple[str, str, list[Search]]] = []
    for task, parents in PARENTS.items():
        for space, words in SPACES.items():
            rows.append((task, f"search, {words}", searches(task, parents, space, options.seeds)))
        for left_out in parents:
            rest = tuple(name for name in parents if name != left_out)
            words = f"search, one coefficient per parent and layer, without `{left_out}`"
            rows.append((task, words, searches(task, rest, "per_layer", 1)))
    everything = [search for _, _, group in rows for search in group]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        found = dict(zip(everything, pool.map(run, everything), strict=True))
    for task in PARENTS:
        print(
            f"\n`{task}`, test split, {options.candidates} candidates of "
            f"{EXAMPLES} examples a search\n"
        )
        print("| merge | test accuracy | by seed |\n|---|---|---|")
        for name, value in fixed(task).items():
            print(f"| {name} | {value:.1%} | |")
        for owner, name, group in rows:
            if owner == task:
                values = [found[search]["test"] for search in group]
                by_seed = ", ".join(f"{100 * value:.1f}" for value in values)
                print(f"| {name} | {mean(values):.1%} | {by_seed} |")


if __name__ == "__main__":
    main()
