"""What a cluster adds to each candidate: the zoo's first job, inline and on one worker of Ray; what
each result costs the coordinator, with up to a thousand workers; and how long it takes to work out
the shares of searches.

The first: different candidates of the job's space, a generation of them at a time; wall time of
each, and what of it is not spent in the worker. The second: CPU of this process, Ray's threads in
it included, for a result of 200 examples and 144 coefficients. A thousand processes fit on no one
machine: all workers are one actor, which lets time pass for each. The third happens whenever
anything has changed on a cluster, in a thread of the coordinator. Nothing else should run on the
machine.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import evomerge
from evomerge.executor import Executor, Request, given, pool
from evomerge.executor.actor import Place, Ready
from evomerge.executor.cluster import Cluster
from evomerge.executor.ray import RayExecutor
from evomerge.executor.shares import Claim, Node, allot
from evomerge.executor.spec import WorkerSpec
from evomerge.fitness.results import Scored, Scores
from evomerge.job import Engine, Job
from evomerge.job import Executor as Section
from evomerge.recipe import Recipe
from evomerge.search.setting import Setting
from evomerge.seeds import generator
from tests import tiny

GENERATION = 10
WORKERS = (8, 64, 256, 1000)
RATE = 50  # results a second
SECONDS = 10
CLUSTERS = ((1, 1000, 1), (1, 125, 8), (50, 125, 8))  # searches, nodes, GPUs of each


def generations(setting: Setting, count: int) -> list[list[Request]]:
    """Random candidates on all driving examples."""
    random = generator(0, "benchmark")
    found = []
    for number in range(count):
        genotypes = random.random((GENERATION, len(setting.space.coordinates)))
        recipes = [setting.space.decode(genotype) for genotype in genotypes]
        found.append(
            [
                Request(number * GENERATION + slot, recipe, "train", setting.driving)
                for slot, recipe in enumerate(recipes)
                if isinstance(recipe, Recipe)
            ]
        )
    return found


def measured(executor: Executor, work: list[list[Request]]) -> tuple[float, float]:
    """Milliseconds of a candidate, the median over generations: in all, and outside the worker."""
    whole, outside = [], []
    for requests in work:
        started = time.perf_counter()
        found = [landed.evaluation for landed in executor.evaluate(given(requests))]
        seconds = time.perf_counter() - started
        inside = sum(e.seconds for e in found if isinstance(e, Scored))
        whole.append(1000 * seconds / len(requests))
        outside.append(1000 * (seconds - inside) / len(requests))
    return statistics.median(whole), statistics.median(outside)


class Many:
    """In place of many workers. A request's candidate is how many microseconds it takes."""

    async def place(self) -> Place:
        """See Actor."""
        return Place("", "node", (), evomerge.__version__)

    async def open(self, spec: WorkerSpec) -> Ready:
        """See Actor."""
        return Ready(merges_ahead=False)

    async def begin(self) -> None:
        """See Actor."""

    async def evaluate(self, request: Request, upcoming: Request | None = None) -> Scored:
        """See Actor."""
        await asyncio.sleep(request.candidate / 1e6)
        tasks = {}
        for task, examples in request.examples.items():
            n = len(examples)
            right, none, never = np.zeros(n, np.float32), np.zeros(n, np.uint32), np.zeros(n, bool)
            tasks[task] = Scores(examples, right, right, never, none, never)
        return Scored(tasks, 0.0, request.candidate / 1e6)


class Crowd(Cluster):
    """A cluster whose actors are all the same one."""

    _all: Any = None

    def start(
        self, kind: type, arguments: Sequence[Any], demand: Mapping[str, float], node: str
    ) -> Any:
        """See Cluster."""
        if self._all is None:
            options = {"num_cpus": 0, "max_concurrency": 2 * max(WORKERS)}
            self._all = self.ray.remote(Many).options(**options).remote()
        return self._all

    def kill(self, actor: Any) -> None:
        """It ends with the connection."""


def crowded(workers: int) -> None:
    """Print what a result costs with so many workers, at a steady pace and as fast as it goes."""
    random = generator(0, "benchmark")
    weights = [{"filter": f"layers.{i}.", "value": float(random.random())} for i in range(48)]
    models = [{"model": name, "parameters": {"weight": weights}} for name in "abc"]
    recipe = Recipe.from_dict({"merge_method": "linear", "models": models})
    examples = {"task": np.arange(200, dtype=np.uint32)}
    section = Section.model_validate({"kind": "ray", "workers": workers, "cpus": 0.001})
    spec = WorkerSpec(Engine(threads=1), {}, "", (), shaped=False)

    def spent(count: int, mean: float) -> tuple[float, float, float]:
        """Seconds: by the clock, of CPU, and of that outside of Ray's threads."""
        times = (mean * 1e6 * random.uniform(0.5, 1.5, count)).astype(int).tolist()
        requests = [Request(time, recipe, "train", examples) for time in times]
        before = time.perf_counter(), time.process_time(), time.thread_time()
        found = sum(1 for _ in executor.evaluate(given(requests)))
        after = time.perf_counter(), time.process_time(), time.thread_time()
        if found != count:
            raise RuntimeError(f"{found} of {count} results")
        whole, cpu, own = (1000 * (b - a) / count for a, b in zip(before, after, strict=True))
        return whole, cpu, own

    with mock.patch.object(pool, "Cluster", Crowd), closing(RayExecutor(section, spec)) as executor:
        while len(executor.devices()) < workers:
            spent(workers, 0.0)
        _, cpu, own = spent(RATE * SECONDS, workers / RATE)
        fastest, full, _ = spent(2000, 0.0)
        print(
            f"{workers} workers, {RATE} results a second: {cpu:.2f} ms of CPU a result, "
            f"{cpu * RATE / 10:.1f}% of a core, {own:.2f} ms of it not Ray's; at most "
            f"{1000 / fastest:.0f} a second, of {full:.2f} ms each",
            flush=True,
        )


def shared(searches: int, nodes: int, gpus: int) -> None:
    """Print how long their shares of so many nodes take that have so many GPUs each."""
    names = [f"{i:056x}" for i in range(nodes)]
    there = [Node(name, {"CPU": 64.0, "GPU": float(gpus)}) for name in names]
    each = nodes * gpus // searches
    claims = [
        Claim(f"search {i}", 0, i, {"CPU": 1.0, "GPU": 1.0}, None if searches == 1 else each)
        for i in range(searches)
    ]
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        allot(there, claims)
        seconds.append(time.perf_counter() - started)
    print(
        f"shares of {nodes} nodes with {gpus} GPUs each, {searches} searches: "
        f"{1000 * statistics.median(seconds):.0f} ms"
    )


def main() -> None:
    """Print all parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=10, help="of the first; 0: without it")
    parser.add_argument("--workers", type=int, nargs="*", default=WORKERS)
    arguments = parser.parse_args()
    if arguments.generations:
        compared(arguments.generations)
    for workers in arguments.workers:
        crowded(workers)
    for searches, nodes, gpus in CLUSTERS:
        shared(searches, nodes, gpus)


def compared(count: int) -> None:
    """Print what a candidate costs inline and on a cluster, and the difference."""
    with tempfile.TemporaryDirectory() as folder:
        job = tiny.write_job(Path(folder))
        means = []
        for kind in (["executor.kind=inline"], ["executor.kind=ray", "executor.workers=1"]):
            setting = Setting.open(Job.from_file(job, kind))
            with closing(setting.executor()) as executor:
                work = generations(setting, count + 2)
                measured(executor, work[:2])  # parents are read, task vectors made
                whole, outside = measured(executor, work[2:])
            examples = sum(map(np.size, setting.driving.values()))
            means.append(whole)
            print(
                f"{kind[0]}: {whole:.1f} ms a candidate of {examples} examples, "
                f"{outside:.2f} ms of them outside the worker"
            )
        print(f"overhead: {means[1] - means[0]:.1f} ms a candidate")


if __name__ == "__main__":
    main()
