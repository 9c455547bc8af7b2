"""What the asynchronous mode costs and saves on a landscape whose truth is known:
`python -m benchmarks.modes`.

The landscape, its noise and its goal are those of `benchmarks.landscape`; races and optimizers are
the package's own. Devices are imagined, and so is time: an evaluation takes as long as its
examples, times a log-normal factor that is the same in both modes. In the synchronous mode a
generation is proposed when the one before is told, in the asynchronous mode when a device has
nothing to do. Knows nothing of models, stores or executors.
"""

import heapq
import itertools
import math
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.landscape import (
    DIMENSIONS,
    EXAMPLES,
    FIRST,
    FULL,
    GOAL,
    LIMIT,
    POPULATION,
    SEARCHES,
    SIGMA,
    STAGED,
    Landscape,
    Search,
)
from benchmarks.report import Report, arguments, published
from evomerge.coordinates import Coordinate
from evomerge.optimizer import Genotypes, build
from evomerge.search import race
from evomerge.seeds import generator

NAME = "bench-modes"
DOCUMENTS = ("docs/search.md",)
SPREAD = 0.6  # of the logarithm of an evaluation's time
DEVICES = 8
EXAMPLE = 0.1  # seconds
MODES = ("synchronous", "asynchronous")
MEASURED = (
    FULL,
    next(search for search in SEARCHES if search.title == "LRA-CMA-ES, all examples"),
    next(search for search in SEARCHES if search.title == "CMA-ES, staged 10, 20, 40"),
    STAGED,
)


@dataclass(frozen=True)
class Found:
    """Of a search that closed its goal's share of the gap; infinite where the limit came first.

    examples: evaluated by then, those under way included. seconds: by then. busy: share of the
    devices' time.
    """

    examples: float
    seconds: float
    busy: float


class Entered:
    """A generation in its race, with all that chance will say of it. See landscape.raced."""

    def __init__(
        self, landscape: Landscape, genotypes: Genotypes, search: Search, seed: int, number: int
    ) -> None:
        n = len(genotypes)
        self.genotypes = genotypes
        chance = generator(seed, "outcomes", number).random((n, EXAMPLES))
        self._outcomes = (chance < landscape.probabilities(genotypes)).astype(np.float64)
        everything = {"landscape": np.arange(EXAMPLES, dtype=np.uint32)}
        drawn = race.draw(everything, search.stages, seed, number)
        self._met = [one["landscape"] for one in drawn]
        drawn_times = generator(seed, "seconds", number).standard_normal((n, len(drawn)))
        self._factors = np.exp(SPREAD * drawn_times)
        self.race = race.Race(range(n), search.keep, self._values)

    def _values(self, entrants: Sequence[int], stages: int) -> race.Values:
        met = np.concatenate(self._met[:stages])
        found: race.Values = self._outcomes[np.ix_(list(entrants), met)].mean(axis=1)
        return found

    def examples(self, stage: int) -> int:
        """That a stage adds."""
        return len(self._met[stage])

    def seconds(self, entrant: int, stage: int) -> float:
        """Of an evaluation."""
        return float(EXAMPLE * self.examples(stage) * self._factors[entrant, stage])

    @property
    def told(self) -> race.Values:
        """What the optimizer is told when it is over."""
        reached = np.array([self.race.reached[entrant] for entrant in range(len(self.genotypes))])
        values = [self._values([entrant], stage + 1)[0] for entrant, stage in enumerate(reached)]
        return race.told(reached, np.array(values))


_Work = tuple[float, int, Entered, int, int]  # when it ends, its place in line, and what it is


def crossed(search: Search, seed: int, mode: str, devices: int = DEVICES) -> Found:
    """A search until the distribution's mean closes the goal's share of the gap."""
    landscape = Landscape.draw(seed)
    coordinates = [Coordinate(str(i), 0.5) for i in range(DIMENSIONS)]
    optimizer = build(search.section, coordinates, SIGMA, seed)
    queue: deque[tuple[Entered, int, int]] = deque()
    working: list[_Work] = []
    numbers, order = itertools.count(1), itertools.count()
    under_way, used, clock, busy = 0, 0, 0.0, 0.0
    while used < LIMIT:
        while len(working) < devices:
            if not queue:
                if under_way and mode == "synchronous":
                    break
                under_way += 1
                new = Entered(landscape, optimizer.ask(), search, seed, next(numbers))
                queue.extend((new, *one) for one in new.race.begin())
            entered, entrant, stage = queue.popleft()
            seconds = entered.seconds(entrant, stage)
            used, busy = used + entered.examples(stage), busy + seconds
            heapq.heappush(working, (clock + seconds, next(order), entered, entrant, stage))
        clock, _, entered, entrant, stage = heapq.heappop(working)
        queue.extend((entered, *one) for one in entered.race.landed(entrant, stage, True))
        if not entered.race.is_over:
            continue
        under_way -= 1
        optimizer.tell(entered.genotypes, entered.told)
        mean = optimizer.mean()
        if mean is not None and landscape.closed(mean) >= GOAL:
            return Found(used, clock, _share(busy, working, devices, clock))
    return Found(math.inf, math.inf, _share(busy, working, devices, clock))


def _share(busy: float, working: Sequence[_Work], devices: int, clock: float) -> float:
    """Of the devices' time until now, of which what is under way has some in the future."""
    return (busy - sum(end - clock for end, *_ in working)) / (devices * clock)


def measure(searches: Sequence[Search], seeds: int, devices: Sequence[int]) -> Report:
    """Every search in both modes, on as many landscapes as there are seeds."""
    columns = [
        "search",
        "devices",
        "mode",
        "example-evaluations, median",
        "minutes, median",
        "busy",
        "closed the gap",
        "sooner than synchronous",
    ]
    rows, data = [], []
    for search, count in itertools.product(searches, devices):
        found = {
            mode: [crossed(search, seed, mode, count) for seed in range(FIRST, FIRST + seeds)]
            for mode in MODES
        }
        usual = found["synchronous"]
        for mode, these in found.items():
            pairs = zip(these, usual, strict=True)
            sooner = sum(one.seconds < other.seconds for one, other in pairs)
            examples = statistics.median(one.examples for one in these)
            minutes = statistics.median(one.seconds for one in these) / 60
            rows.append(
                [
                    search.title,
                    str(count),
                    mode,
                    f"{examples:,.0f}" if math.isfinite(examples) else f"over {LIMIT:,}",
                    f"{minutes:.1f}" if math.isfinite(minutes) else "never",
                    f"{statistics.median(one.busy for one in these):.1%}",
                    f"{sum(math.isfinite(one.seconds) for one in these)} of {seeds}",
                    "" if mode == "synchronous" else f"{sooner} of {seeds}",
                ]
            )
            runs = [
                {k: v if math.isfinite(v) else None for k, v in vars(one).items()} for one in these
            ]
            data.append({"search": search.title, "devices": count, "mode": mode, "runs": runs})
    notes = [
        f"Simulated: an example takes {EXAMPLE} s, an evaluation its examples' time with a "
        f"log-normal factor (sigma {SPREAD}), a merge nothing; generations of {POPULATION}.",
        f"{seeds} seeds, the landscapes and the goal of the table above. Sooner: of the same seeds "
        "in simulated time. Both modes go by the same draws for each generation.",
    ]
    return Report(NAME, "both modes", columns, rows, notes, {"searches": data})


def main(given: Sequence[str] | None = None) -> int:
    """Measure every search; gives the exit code."""
    parser = arguments("benchmarks.modes", __doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--devices", default="8,32")
    options = parser.parse_args(given)
    devices = [int(number) for number in options.devices.split(",")]
    return published(options, NAME, DOCUMENTS, lambda: measure(MEASURED, options.seeds, devices))


if __name__ == "__main__":
    sys.exit(main())
