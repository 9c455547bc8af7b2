"""LRA-CMA-ES by the `cmaes` library: CMA-ES whose learning rates follow the signal-to-noise ratio
of its own updates (Nomura, Akimoto and Ono, arXiv 2304.03473), for noisy fitness.

The library cares for bounds by drawing again, which in many dimensions near a bound takes its
hundred tries and biases the mean inwards. Here it draws without bounds, and is told how it fared
of what leaves the cube, moved to the nearest point of it, less a penalty for the way.

The paper's correction of the step size, which grows it where the learning rate falls, feeds itself
in a cube: far from its middle everything is equally bad, which looks like noise, which lets the
rate fall further. So the step size is held at what the search began with.
"""

import numpy as np
from cmaes import CMA

from evomerge.coordinates import Genotype
from evomerge.optimizer import Fitness, Genotypes
from evomerge.optimizer.generations import MIN_STEP, Pending, shortened
from evomerge.seeds import derive

# Of the penalty. On noisy spheres in 8 to 64 dimensions, optimum at or near the faces in half of
# them, less lets the mean drift away outside, and more keeps it from the faces.
_PENALTY = 0.4


class LraCmaEs:
    """A Distribution in the box [0, 1]^d."""

    def __init__(self, start: Genotype, sigma: float, size: int, seed: int) -> None:
        self._size, self._widest = size, sigma
        self._cma = CMA(
            start,
            sigma,
            population_size=size,
            seed=derive(seed, "optimizer") % 2**32,
            lr_adapt=True,
        )
        self._drawn: Pending[Genotype] = Pending()

    @property
    def size(self) -> int:
        """It never changes."""
        return self._size

    @property
    def step_size(self) -> float:
        """The largest standard deviation of a coordinate."""
        return float(self._cma._sigma * np.sqrt(np.max(np.diag(self._cma._C))))

    def sample(self, count: int) -> Genotypes:
        """See Distribution."""
        drawn = np.array([self._cma.ask() for _ in range(count)])
        asked: Genotypes = np.clip(drawn, 0.0, 1.0)
        for genotype, before in zip(asked, drawn, strict=True):
            self._drawn.put(genotype, before)
        return asked

    def update(self, genotypes: Genotypes, fitness: Fitness) -> None:
        """See Distribution. The library is told ranks, the best first, so that the penalty has
        its measure."""
        covariance = self._cma._sigma**2 * self._cma._C
        drawn = [self._drawn.take(genotype) for genotype in genotypes]
        foreign = [i for i, before in enumerate(drawn) if before is None]
        points = np.array([g if b is None else b for g, b in zip(genotypes, drawn, strict=True)])
        if foreign:
            points[foreign] = shortened(points[foreign], self._cma.mean, covariance)
        ranks = np.empty(len(points))
        ranks[np.argsort(-fitness, kind="stable")] = np.arange(len(points))
        losses = ranks + self._penalties(points, covariance)
        self._cma.tell(list(zip(points, losses, strict=True)))
        self._cma._sigma = min(self._cma._sigma, self._widest)

    def _penalties(self, points: Genotypes, covariance: Genotypes) -> Fitness:
        """In ranks, (n,): the squared way to the cube against the distribution's variance. Among
        candidates that share differs by about 1 / sqrt(d), hence the root."""
        way = ((points - np.clip(points, 0.0, 1.0)) ** 2).sum(axis=1)
        n, d = points.shape
        penalties: Fitness = _PENALTY * n * d**0.5 * way / np.trace(covariance)
        return penalties

    def mean(self) -> Genotype:
        """See Distribution."""
        mean: Genotype = np.clip(self._cma.mean, 0.0, 1.0)
        return mean

    def stop_reason(self) -> str | None:
        """See Optimizer."""
        return "the optimizer converged (step size)" if self.step_size < MIN_STEP else None
