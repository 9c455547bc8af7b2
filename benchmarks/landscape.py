"""How many example-evaluations an optimizer needs on a noisy landscape whose truth is known:
`python -m benchmarks.landscape`.

The landscape has what makes merging hard to search and nothing else: every evaluation is right or
wrong, by chance, and examples differ in difficulty. What is timed in example-evaluations are the
package's own optimizers and its own staged scoring. Knows nothing of models.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Report, arguments, published
from evomerge.coordinates import Coordinate, Genotype
from evomerge.job import Optimizer as OptimizerSection
from evomerge.optimizer import Genotypes, build
from evomerge.search import race
from evomerge.seeds import generator

NAME = "bench-landscape"
DOCUMENTS = ("docs/search.md",)
DIMENSIONS = 24
EXAMPLES = 500
POPULATION = 14
SIGMA = 0.1  # of the box: what suits CMA-ES on all examples best, of 0.1, 0.15 and 1/6
GOAL = 0.8  # share of the gap between the parents and the optimum that is to be closed
FIRST = 101  # seed; stages and step size were chosen on 1 to 20
LIMIT = 500_000  # example-evaluations after which a search has failed

_PARENTS, _BEST = 0.3, 0.6  # accuracy at the start and at the optimum
_DISTANCE = 0.6  # between them, in units of the box
_CONDITION = 10.0  # how much more the steepest direction costs than the flattest
_SPREAD = 1.5  # standard deviation of the examples' difficulty, in logits


@dataclass(frozen=True)
class Landscape:
    """Merges of two parents, as a bowl in the unit cube.

    A candidate's quality falls with the squared distance to the optimum, in axes of its own; it
    solves an example with the probability sigmoid(quality - difficulty). The start, the middle of
    the cube, is as good as the parents.

    optimum: (d,). curvature: (d, d), loss of quality per squared distance. highest: quality at
    the optimum. difficulties: (n,), of all examples, in logits.
    """

    optimum: Genotype
    curvature: NDArray[np.float64]
    highest: float
    difficulties: NDArray[np.float64]

    @classmethod
    def draw(cls, seed: int, d: int = DIMENSIONS) -> "Landscape":
        """Another direction to the optimum and other axes for each seed; all else is alike."""
        random = generator(seed, "landscape")
        direction = random.standard_normal(d)
        offset = _DISTANCE * direction / np.linalg.norm(direction)
        axes, _ = np.linalg.qr(random.standard_normal((d, d)))
        bowl = (axes * np.geomspace(1.0, _CONDITION, d)) @ axes.T
        normal = statistics.NormalDist(0.0, _SPREAD)
        difficulties = np.array([normal.inv_cdf((i + 0.5) / EXAMPLES) for i in range(EXAMPLES)])
        highest, lowest = (_quality(accuracy, difficulties) for accuracy in (_BEST, _PARENTS))
        scale = (highest - lowest) / (offset @ bowl @ offset)
        return cls(0.5 + offset, scale * bowl, highest, difficulties)

    def probabilities(self, points: Genotypes) -> NDArray[np.float64]:
        """How likely each of the points, (n, d), is to solve each example: (n, examples)."""
        away = points - self.optimum
        quality = self.highest - np.einsum("ni,ij,nj->n", away, self.curvature, away)
        return _sigmoid(quality[:, None] - self.difficulties)

    def closed(self, point: Genotype) -> float:
        """The share of the gap between the parents and the optimum that a point closes; below 0
        where it is worse than the parents."""
        accuracy = float(self.probabilities(point[None]).mean())
        return (accuracy - _PARENTS) / (_BEST - _PARENTS)


def _sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    halves: NDArray[np.float64] = 0.5 + 0.5 * np.tanh(values / 2)  # exp would overflow far away
    return halves


def _quality(accuracy: float, difficulties: NDArray[np.float64]) -> float:
    """The quality that solves this share of the examples, by bisection."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        reached = float(_sigmoid(middle - difficulties).mean())
        low, high = (middle, high) if reached < accuracy else (low, middle)
    return low


@dataclass(frozen=True)
class Search:
    """A row of the table. stages, keep: as in a job's staging."""

    title: str
    optimizer: str
    stages: tuple[int, ...] = (EXAMPLES,)
    keep: tuple[int, ...] = ()

    @cached_property
    def section(self) -> OptimizerSection:
        """As a job file would have it."""
        return OptimizerSection.model_validate(
            {"name": self.optimizer, "population": POPULATION, "sigma0": SIGMA}
        )


FULL = Search("CMA-ES, all examples", "cma-es")
STAGED = Search("LRA-CMA-ES, staged 10, 20, 40", "lra-cma-es", (10, 20, 40), (10, 7))
SEARCHES = (
    FULL,
    Search("LRA-CMA-ES, all examples", "lra-cma-es"),
    STAGED,
    Search("CMA-ES, staged 10, 20, 40", "cma-es", (10, 20, 40), (10, 7)),
    Search("LRA-CMA-ES, staged 25, 50, 100", "lra-cma-es", (25, 50, 100), (10, 7)),
    Search("CMA-ES, staged 25, 50, 100", "cma-es", (25, 50, 100), (10, 7)),
    Search("LRA-CMA-ES, 25 without stages", "lra-cma-es", (25,)),
    Search("random search, all examples", "random"),
)


def spent(search: Search, seed: int) -> float:
    """Example-evaluations until the distribution's mean (of random search: the best candidate so
    far) closes the goal's share of the gap; infinity when the limit comes first."""
    landscape = Landscape.draw(seed)
    coordinates = [Coordinate(str(i), 0.5) for i in range(DIMENSIONS)]
    optimizer = build(search.section, coordinates, SIGMA, seed)
    used, generation = 0, 0
    best, best_score = np.full(DIMENSIONS, 0.5), -math.inf
    while used < LIMIT:
        generation += 1
        genotypes = optimizer.ask()
        told, cost = raced(landscape, genotypes, search, seed, generation)
        optimizer.tell(genotypes, told)
        used += cost
        if told.max() > best_score:
            best, best_score = genotypes[int(told.argmax())], float(told.max())
        mean = optimizer.mean()
        if landscape.closed(best if mean is None else mean) >= GOAL:
            return used
    return math.inf


def raced(
    landscape: Landscape, genotypes: Genotypes, search: Search, seed: int, generation: int
) -> tuple[NDArray[np.float64], int]:
    """What the optimizer is told of a generation, (n,), and the example-evaluations it took."""
    everything = np.arange(EXAMPLES, dtype=np.uint32)
    chance = generator(seed, "outcomes", generation).random((len(genotypes), EXAMPLES))
    outcomes = (chance < landscape.probabilities(genotypes)).astype(np.float64)
    racing = np.arange(len(genotypes))
    reached = np.zeros(len(genotypes), np.int_)
    values = np.zeros(len(genotypes))
    met = np.empty(0, np.int_)
    used = 0
    for stage, new in enumerate(
        race.draw({"landscape": everything}, search.stages, seed, generation)
    ):
        if stage:
            racing = np.sort(racing[race.order(values[racing])[: search.keep[stage - 1]]])
        met = np.concatenate([met, new["landscape"]])
        values[racing] = outcomes[racing][:, met].mean(axis=1)
        reached[racing] = stage
        used += len(racing) * len(new["landscape"])
    return race.told(reached, values), used


def measure(searches: Sequence[Search], seeds: int) -> Report:
    """Every search on as many landscapes as there are seeds."""
    found = {s: [spent(s, seed) for seed in range(FIRST, FIRST + seeds)] for s in (FULL, *searches)}
    quarter = statistics.median(found[FULL]) / 4
    columns = [
        "search",
        "example-evaluations, median",
        "95% of seeds",
        "closed the gap",
        "with a quarter of the first row's",
    ]
    rows = []
    for search in searches:
        costs = sorted(found[search])
        rows.append(
            [
                search.title,
                _number(statistics.median(costs)),
                _range(costs[0], costs[math.ceil(0.95 * seeds) - 1]),
                f"{sum(map(math.isfinite, costs))} of {seeds}",
                f"{sum(cost <= quarter for cost in costs)} of {seeds}",
            ]
        )
    notes = [
        f"{DIMENSIONS} dimensions, {EXAMPLES} examples, {POPULATION} candidates in a generation, "
        f"sigma0 {SIGMA}; until the distribution's mean (of random search: its best candidate) "
        f"closes {GOAL:.0%} of the gap between the parents' accuracy ({_PARENTS:.0%}) and the "
        f"optimum's ({_BEST:.0%}), or {LIMIT:,} are spent.",
        f"{seeds} seeds, each with a landscape of its own, the same for all rows; other seeds than "
        "those that stages and step size were chosen on.",
    ]
    data = {
        search.title: [cost if math.isfinite(cost) else None for cost in found[search]]
        for search in searches
    }
    return Report(NAME, "a noisy landscape", columns, rows, notes, {"searches": data})


def _number(cost: float) -> str:
    return f"{cost:,.0f}" if math.isfinite(cost) else f"over {LIMIT:,}"


def _range(low: float, high: float) -> str:
    return f"{_number(low)} to {_number(high)}" if math.isfinite(low) else _number(low)


def main(given: Sequence[str] | None = None) -> int:
    """Measure every search; gives the exit code."""
    parser = arguments("benchmarks.landscape", __doc__)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args(given)
    return published(options, NAME, DOCUMENTS, lambda: measure(SEARCHES, options.seeds))


if __name__ == "__main__":
    sys.exit(main())
