"""What a cluster adds to each candidate: the zoo's first job, inline and on one worker of Ray.

Different candidates of the job's space, a generation of them at a time; wall time of each, and what
of it is not spent in the worker. Nothing else should run on the machine.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from evomerge.executor import Executor, Request
from evomerge.fitness.results import Scored
from evomerge.job import Job
from evomerge.recipe import Recipe
from evomerge.search.setting import Setting
from evomerge.seeds import generator
from tests import tiny

GENERATION = 10


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
        found = [evaluation for _, evaluation in executor.evaluate(requests)]
        seconds = time.perf_counter() - started
        inside = sum(e.seconds for e in found if isinstance(e, Scored))
        whole.append(1000 * seconds / len(requests))
        outside.append(1000 * (seconds - inside) / len(requests))
    return statistics.median(whole), statistics.median(outside)


def main() -> None:
    """Print both, and the difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=10)
    count = parser.parse_args().generations
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
