"""Asking and telling in any order, for a distribution that learns a generation at a time.

Told points wait until there are as many as the distribution updates from; a generation that is
told at once is learnt at once. Knows nothing of how points are drawn.
"""

from collections import defaultdict, deque
from typing import Generic, Protocol, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from evomerge.coordinates import Genotype
from evomerge.optimizer import Asked, Fitness, Genotypes, Log, checked

MIN_STEP = 1e-4  # of the cube: coefficients this close together give the same merge
T = TypeVar("T")


class Pending(Generic[T]):
    """What belongs to points that were asked for and not told yet; equal points wait in line."""

    def __init__(self) -> None:
        self._waiting: defaultdict[bytes, deque[T]] = defaultdict(deque)

    def put(self, genotype: Genotype, what: T) -> None:
        """Keep it until this point is told."""
        self._waiting[genotype.tobytes()].append(what)

    def take(self, genotype: Genotype) -> T | None:
        """What was kept for the point the longest; None if it was never asked for."""
        key = genotype.tobytes()
        if key not in self._waiting:
            return None
        line = self._waiting[key]
        found = line.popleft()
        if not line:
            del self._waiting[key]
        return found


class Distribution(Protocol):
    """What points are drawn from.

    Drawing and updating are the only things that change it, and its randomness is its own.
    """

    @property
    def size(self) -> int:
        """How many points it updates from at present."""
        ...

    @property
    def step_size(self) -> float | None:
        """See Optimizer."""
        ...

    def sample(self, count: int) -> Genotypes:
        """Draw points of the cube, (count, d)."""
        ...

    def update(self, genotypes: Genotypes, fitness: Fitness) -> None:
        """Learn from `size` points of the cube, drawn from it or not."""
        ...

    def mean(self) -> Genotype:
        """See Optimizer."""
        ...

    def stop_reason(self) -> str | None:
        """See Optimizer."""
        ...


class Generations:
    """An Optimizer of one objective.

    Its linear algebra runs on one thread: more of them round otherwise, and the proposals of a
    resumed search would not be those of the first run.
    """

    def __init__(self, distribution: Distribution, d: int) -> None:
        self._distribution, self._d = distribution, d
        self._genotypes, self._fitness = np.empty((0, d)), np.empty(0)  # told, not learnt yet
        self._blas = ThreadpoolController()

    @property
    def size(self) -> int:
        """See Optimizer."""
        return self._distribution.size

    @property
    def step_size(self) -> float | None:
        """See Optimizer."""
        return self._distribution.step_size

    def ask(self, count: int | None = None) -> Genotypes:
        """See Optimizer."""
        with self._blas.limit(limits=1, user_api="blas"):
            return self._distribution.sample(self.size if count is None else count)

    def tell(self, genotypes: Genotypes, fitness: Fitness) -> None:
        """See Optimizer."""
        checked(genotypes, fitness, self._d, objectives=1)
        with self._blas.limit(limits=1, user_api="blas"):
            genotypes, fitness = self._learn(genotypes, fitness)
            self._genotypes, self._fitness = self._learn(
                np.concatenate([self._genotypes, genotypes]),
                np.concatenate([self._fitness, fitness]),
            )

    def _learn(self, genotypes: Genotypes, fitness: Fitness) -> tuple[Genotypes, Fitness]:
        """Update from each full generation; what is left over."""
        while len(genotypes) >= self.size:
            size = self.size  # an update may change it
            self._distribution.update(genotypes[:size], fitness[:size])
            genotypes, fitness = genotypes[size:], fitness[size:]
        return genotypes, fitness

    def replay(self, log: Log) -> int | None:
        """See Optimizer: asks again for all that was asked, and tells all that was told."""
        differs = None
        for position, entry in enumerate(log):
            if isinstance(entry, Asked):
                asked = self.ask(len(entry.genotypes))
                if differs is None and asked.tobytes() != entry.genotypes.tobytes():
                    differs = position
            else:
                self.tell(entry.genotypes, entry.fitness)
        return differs

    def mean(self) -> Genotype:
        """See Optimizer."""
        return self._distribution.mean()

    def stop_reason(self) -> str | None:
        """See Optimizer."""
        return self._distribution.stop_reason()


def shortened(points: Genotypes, mean: Genotype, covariance: Genotypes) -> Genotypes:
    """Points, (n, d), pulled towards the mean, (d,), until they are no further from it than draws
    of that covariance, (d, d), are.

    Points that were not drawn from a distribution may be a hundred standard deviations away, and
    would blow its step size up (Hansen, arXiv 1110.4181, section 3: the length is cut at
    sqrt(d) + 2d / (d + 2)).
    """
    d = len(mean)
    away = points - mean
    squares = np.einsum("ni,in->n", away, np.linalg.solve(covariance, away.T))
    lengths = np.sqrt(np.maximum(squares, 0.0))
    limit = d**0.5 + 2 * d / (d + 2)
    pulled: Genotypes = mean + away * (limit / np.maximum(lengths, limit))[:, None]
    return pulled
