"""How long each optimizer takes to propose, to learn, and to be rebuilt from a log.

    python -m benchmarks.optimizers [--names cma-es,tpe] [--update-docs]

What a candidate costs is the mean over whole generations, the first ones left out, in CPU time, as
everything runs on one thread. TPE's costs grow with what it was told, so they are also measured at
the end of the log that is replayed.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import process_time
from typing import get_args

import numpy as np

from benchmarks.report import Report, arguments, published
from evomerge.coordinates import Coordinate
from evomerge.errors import InputError
from evomerge.job import Optimizer as Section
from evomerge.optimizer import Asked, Optimizer, Told, build

NAMES = [name for name in get_args(Section.model_fields["name"].annotation) if name != "auto"]
NAME = "bench-optimizers"
DOCUMENTS = ("docs/search.md",)
GOALS = {64: 2.0, 500: 50.0}  # milliseconds a candidate, by dimensions, of CMA-ES
REPLAY_GOAL = 10.0  # seconds
LOG_DIMENSIONS = 64
NOISE = 0.1


@dataclass(frozen=True)
class Times:
    """Of one optimizer. per_candidate: milliseconds of ask plus tell, by dimensions. late: the same
    at the end of the log. replay: seconds. exact: whether its own last proposals were found."""

    name: str
    per_candidate: dict[int, float]
    late: float
    replay: float
    exact: bool


def new(name: str, d: int) -> Optimizer:
    """Half continuous, a quarter ordered choices and a quarter unordered ones, for what takes
    them; else all continuous."""
    kinds = [(0, True), (0, True), (5, True), (3, False)]
    if name in ("cma-es", "lra-cma-es"):
        kinds = kinds[:1]
    coordinates = [
        Coordinate(f"c{i}", 0.5, choices, ordered)
        for i, (choices, ordered) in enumerate(kinds * (d // len(kinds)))
    ]
    return build(Section(name=name), coordinates, 0.15, seed=1)


def fitness(genotypes: np.ndarray, noise: np.random.Generator) -> np.ndarray:
    """A noisy sphere."""
    return -((genotypes - 0.7) ** 2).sum(axis=1) + NOISE * noise.normal(size=len(genotypes))


def generation(
    optimizer: Optimizer, noise: np.random.Generator
) -> tuple[list[Asked | Told], float]:
    """Its log, and the seconds that asking and telling took."""
    start = process_time()
    asked = optimizer.ask()
    taken = process_time() - start
    told = fitness(asked, noise)
    start = process_time()
    optimizer.tell(asked, told)
    return [Asked(asked), Told(asked, told)], taken + process_time() - start


def per_candidate(name: str, d: int, generations: int) -> float:
    """Milliseconds: the mean over generations, for a library may do its work in some only."""
    noise = np.random.default_rng(1)
    optimizer = new(name, d)
    for _ in range(3):
        generation(optimizer, noise)
    seconds = sum(generation(optimizer, noise)[1] for _ in range(generations))
    return 1e3 * seconds / (generations * optimizer.size)


def log_of(name: str, generations: int) -> list[Asked | Told]:
    """What a search would have stored. For TPE and NSGA-II, which take long to propose, of random
    points; only the last generation is their own."""
    noise = np.random.default_rng(2)
    optimizer = new(name, LOG_DIMENSIONS)
    if name not in ("tpe", "nsga2"):
        entries = [generation(optimizer, noise)[0] for _ in range(generations)]
        return [entry for pair in entries for entry in pair]
    source = new("random", LOG_DIMENSIONS)
    log: list[Asked | Told] = []
    for _ in range(generations - 1):
        asked = source.ask(optimizer.size)
        log += [Asked(asked), Told(asked, fitness(asked, noise))]
    optimizer.replay(log)
    return [*log, *generation(optimizer, noise)[0]]


def measure(name: str, generations: int) -> Times:
    """Everything of one optimizer."""
    few = name in ("tpe", "nsga2")
    counts = {d: 4 if few else 20 if d > 100 else 200 for d in GOALS}
    early = {d: per_candidate(name, d, count) for d, count in counts.items()}
    log = log_of(name, generations)
    optimizer = new(name, LOG_DIMENSIONS)
    start = process_time()
    differs = optimizer.replay(log)
    replay = process_time() - start
    late = 1e3 * generation(optimizer, np.random.default_rng(3))[1] / optimizer.size
    return Times(name, early, late, replay, differs is None)


def report(found: Sequence[Times], generations: int) -> Report:
    """The table."""
    columns = ["optimizer", *(f"ask + tell, {d}" for d in GOALS), "late", "replay", "exact"]
    rows = [
        [
            times.name,
            *(f"{times.per_candidate[d]:.3g} ms" for d in GOALS),
            f"{times.late:.3g} ms",
            f"{times.replay:.2g} s",
            "yes" if times.exact else "no",
        ]
        for times in found
    ]
    limits = " and ".join(f"{limit:g} ms at {d}" for d, limit in GOALS.items())
    notes = [
        "Ask plus tell of one candidate, on one thread, by dimensions; half of them are choices "
        f"where the optimizer takes any. Goals of CMA-ES: {limits} dimensions.",
        f"Replay: a log of {generations} generations in {LOG_DIMENSIONS} dimensions, of the "
        f"automatic population; goal: {REPLAY_GOAL:g} s. Late: ask plus tell of one candidate at "
        "its end.",
    ]
    data = {"times": [asdict(times) for times in found]}
    return Report(NAME, "Optimizers", columns, rows, notes, data)


def main(given: Sequence[str] | None = None) -> int:
    """Measure what is asked for; gives the exit code."""
    parser = arguments("benchmarks.optimizers", __doc__)
    parser.add_argument("--names", default=",".join(NAMES), help="some of the default")
    parser.add_argument("--generations", type=int, default=1000, help="of the log")
    options = parser.parse_args(given)

    def measured() -> Report:
        names = options.names.split(",")
        if unknown := [name for name in names if name not in NAMES]:
            raise InputError(f"--names: '{unknown[0]}' is none of {', '.join(NAMES)}")
        found = [measure(name, options.generations) for name in names]
        return report(found, options.generations)

    return published(options, NAME, DOCUMENTS, measured)


if __name__ == "__main__":
    sys.exit(main())
