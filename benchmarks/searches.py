"""What a search finds on the zoo, and what that cost: `python -m benchmarks.searches`.

Every search goes the whole way that a user's would: launched, brought to its end, exported with
its one reading of test. The curves are drawn afterwards: what each search would have handed over
on the way (the mean of its distribution, or its fittest candidate where there is no mean) is
scored on test here directly. This measures searches, once, and chooses nothing by it.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chart import Curve, draw
from benchmarks.conducted import conducted
from benchmarks.report import ROOT, Report, check_place
from evomerge.coordinates import Genotype
from evomerge.errors import EvomergeError
from evomerge.fitness.score import score
from evomerge.fitness.task import Unsealed
from evomerge.job import Engine
from evomerge.recipe import Recipe
from evomerge.search.setting import Setting
from evomerge.store import CandidateRow, Store

NAME = "bench-searches"
DOCUMENTS = ("docs/search.md",)
CHART = "docs/searches.svg"
ZOO = ROOT / "examples" / "zoo"
TASK = "ja_list_ops"
PARENTS = ("ops", "ja")
RECOMMENDED = "per_module_task_arithmetic"
ALIKE = {"stages": [256], "keep": []}  # without stages: as many examples for every candidate
FULL = 600 * 615  # candidates of the zoo's tables, and examples that drive a search
STEPS = 24  # points of a curve over the whole budget


@dataclass(frozen=True)
class Setup:
    """A row of the table. share: of the budget that it may spend."""

    title: str
    preset: str
    optimizer: Mapping[str, Any]
    staging: Mapping[str, Any] | None = field(default_factory=lambda: ALIKE)
    share: float = 1 / 3


SETUPS = (
    Setup(
        "recommended: LRA-CMA-ES, staged",
        RECOMMENDED,
        {"name": "lra-cma-es", "population": 14, "sigma0": 0.1},
        {"stages": [10, 20, 40], "keep": [10, 7]},
    ),
    Setup(
        "CMA-ES, mergekit-evolve's genome",
        "mergekit_evolve_task_arithmetic",
        {"name": "cma-es", "sigma0": 1 / 12},  # 1/6 of a weight, whose bounds are 2 apart
        staging=None,
        share=1.0,
    ),
    Setup("CMA-ES", RECOMMENDED, {"name": "cma-es"}),
    Setup("TPE", RECOMMENDED, {"name": "tpe"}),
    Setup("random search", RECOMMENDED, {"name": "random"}),
)


@dataclass(frozen=True)
class Found:
    """A finished search. test: of its export; spent: example-evaluations, with the CPU seconds
    that they took. curve: (example-evaluations, test accuracy so far)."""

    test: float
    spent: int
    seconds: float
    curve: tuple[tuple[int, float], ...]


def run(setup: Setup, seed: int, budget: int) -> Found:
    """Launch, finish and export a search, then go back over what it had on the way."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ended = conducted(_job(setup, seed, budget), folder)
        with Store(ended.url) as store:
            spent = store.example_evaluations(store.search("measure").id)
            curve = tuple(_curve(ended.setting, store, budget))
    done = f"{ended.test:.1%}, {ended.seconds:.0f} CPU s"
    sys.stderr.write(f"{setup.title}, seed {seed}: {done}\n")
    return Found(ended.test, spent, ended.seconds, curve)


def _job(setup: Setup, seed: int, budget: int) -> dict[str, Any]:
    return {
        "name": "measure",
        "seed": seed,
        "parents": {name: {"model": str(ZOO / name)} for name in PARENTS},
        "base": {"model": str(ZOO / "base")},
        "space": {"preset": setup.preset},
        "tasks": [{"task": TASK}],
        "optimizer": dict(setup.optimizer),
        "budget": {"example_evaluations": round(budget * setup.share)},
        "staging": setup.staging and dict(setup.staging),
        "engine": Engine(device="cpu", threads=1).model_dump(),
    }


def _curve(setting: Setting, store: Store, budget: int) -> Iterator[tuple[int, float]]:
    """Test accuracy of what the search had, about every STEPS-th of the budget."""
    task = setting.tasks[TASK]
    items = task.examples("test", Unsealed(task.identity("test")))
    everything = np.arange(len(items), dtype=np.uint32)
    engine = setting.engine()
    due = 0.0
    for spent, genotype in _on_the_way(setting, store):
        if spent < due:
            continue
        due = spent + budget / STEPS
        recipe = setting.space.decode(genotype)
        if isinstance(recipe, Recipe):
            engine.load(recipe)
            yield spent, score(engine, task, items, everything, shaped=False).mean
    engine.close()


def _on_the_way(setting: Setting, store: Store) -> Iterator[tuple[int, Genotype]]:
    """After each generation the example-evaluations so far, and the optimizer's mean, or the
    fittest candidate so far: the optimizer is told anew what the store has."""
    search = store.search("measure").id
    rows = [row for row in store.candidates(search) if row.label is None]
    costs = {row.id: 0 for row in rows}
    for evaluation in store.evaluations(search, ("train", "monitor")):
        if evaluation.scores is not None and evaluation.copied_from is None:
            costs[evaluation.candidate] += sum(map(len, evaluation.scores.values()))
    optimizer = setting.optimizer()
    has_mean = optimizer.mean() is not None
    spent, fittest = 0, rows[0]
    for number in sorted({row.generation for row in rows}):
        members = [row for row in rows if row.generation == number]
        if has_mean:
            optimizer.ask(len(members))
            optimizer.tell(np.stack([_genotype(row) for row in members]), _told(members))
        spent += sum(costs[row.id] for row in members)
        fittest = max([fittest, *members], key=lambda row: _or_worst(row.fitness))
        mean = optimizer.mean()
        yield spent, _genotype(fittest) if mean is None else mean


def _genotype(row: CandidateRow) -> Genotype:
    if row.genotype is None:
        raise EvomergeError(f"candidate {row.id} has no genotype")
    return row.genotype


def _told(members: Sequence[CandidateRow]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([_or_worst(row.told) for row in members])


def _or_worst(value: float | None) -> float:
    return -1e9 if value is None else value


def measure(seeds: int, budget: int, workers: int) -> tuple[Report, list[Curve]]:
    """Every setup with every seed: the table and the curves."""
    asked = [(setup, seed) for setup in SETUPS for seed in range(1, seeds + 1)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, setup, seed, budget) for setup, seed in asked]
        found = [future.result() for future in futures]
    grouped = {
        setup.title: [f for (owner, _), f in zip(asked, found, strict=True) if owner is setup]
        for setup in SETUPS
    }
    columns = [
        "search",
        "space",
        "test accuracy, median",
        "by seed",
        "example-evaluations",
        "CPU s",
    ]
    rows = [
        [
            setup.title,
            f"`{setup.preset}`",
            f"{statistics.median(f.test for f in grouped[setup.title]):.1%}",
            ", ".join(f"{100 * f.test:.1f}" for f in grouped[setup.title]),
            f"{statistics.median(f.spent for f in grouped[setup.title]):,.0f}",
            f"{statistics.median(f.seconds for f in grouped[setup.title]):.0f}",
        ]
        for setup in SETUPS
    ]
    notes = [
        f"`{TASK}` on the zoo, parents {' and '.join(PARENTS)}: exact answers on test (n = 1,000) "
        "of the exported winner. mergekit-evolve's genome is scored on all driving examples, the "
        "recommended search in stages of 10, 20 and 40, the others on 256 drawn anew for each "
        "generation. mergekit-evolve itself searches weights through abs(); here they are bounded "
        "instead, which is kinder to it. Settings were chosen on validation scores.",
    ]
    data = {title: [f.__dict__ for f in group] for title, group in grouped.items()}
    curves = [Curve(title, [f.curve for f in group]) for title, group in grouped.items()]
    return Report(NAME, "searches on the zoo", columns, rows, notes, {"searches": data}), curves


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every search; gives the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.searches", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=FULL, help="example-evaluations")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--update-docs", action="store_true", help="write table and chart there")
    options = parser.parse_args(arguments)
    documents = DOCUMENTS if options.update_docs else ()
    try:
        check_place(NAME, documents)
        report, curves = measure(options.seeds, options.budget, options.workers)
    except EvomergeError as error:
        print(error, file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    report.publish(options.folder, documents)
    chart = ROOT / CHART if options.update_docs else options.folder / f"{NAME}.svg"
    chart.write_text(draw(curves, "test accuracy", "example-evaluations"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
