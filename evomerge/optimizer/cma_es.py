"""CMA-ES (Hansen, arXiv 1604.00772) by the `cma` library, made replayable.

The library seeds NumPy's global generator when left alone; here it draws from a generator of our
own, so that equal seeds and equal tells give equal proposals whatever else the process does. Its
convergence tests that look at fitness differences are off: accuracies are quantised, and equal
values in a row mean nothing.
"""

import warnings
from typing import Any

import numpy as np

from evomerge.coordinates import Genotype
from evomerge.optimizer import Fitness, Genotypes
from evomerge.optimizer.generations import MIN_STEP, Pending
from evomerge.seeds import generator

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # cma says at import that it cannot plot
    import cma


class CmaEs:
    """A Distribution in the box [0, 1]^d by cma's smooth boundary transformation.

    restarts: how often it begins anew once it has converged, each time at a uniformly random
    point with twice the population (IPOP; Auger and Hansen 2005, section 2.2).
    """

    def __init__(self, start: Genotype, sigma: float, size: int, seed: int, restarts: int) -> None:
        self._random = generator(seed, "optimizer")
        self._sigma, self._left = sigma, restarts
        self._begin(start, size)

    def _begin(self, start: Genotype, size: int) -> None:
        options: dict[str, Any] = {
            "bounds": [0.0, 1.0],
            "popsize": size,
            "seed": np.nan,
            "randn": lambda *shape: self._random.standard_normal(shape),
            "verbose": -9,
            "signals_filename": "",  # else a file in the working directory could set options
            "tolfun": 0.0,
            "tolfunhist": 0.0,
            "tolfunrel": 0.0,
            "tolflatfitness": np.inf,
            "tolstagnation": np.inf,
            "tolx": MIN_STEP,
            "maxiter": np.inf,
        }
        self._size, self._asked = size, False
        self._cma = cma.CMAEvolutionStrategy(start, self._sigma, options)
        self._drawn: Pending[Genotype] = Pending()  # from which mean

    @property
    def size(self) -> int:
        """Doubles with every restart."""
        return self._size

    @property
    def step_size(self) -> float:
        """The largest standard deviation of a coordinate."""
        return float(np.max(self._cma.stds))

    def sample(self, count: int) -> Genotypes:
        """See Distribution."""
        self._asked = True
        asked: Genotypes = np.clip(np.asarray(self._cma.ask(count)), 0.0, 1.0)
        mean = self.mean()
        for genotype in asked:
            self._drawn.put(genotype, mean)
        return asked

    def update(self, genotypes: Genotypes, fitness: Fitness) -> None:
        """See Distribution. The one place where the sign flips: cma minimises."""
        if not self._asked:
            self._cma.ask(1)  # it insists on being asked between two tells
        self._cma.tell(list(self._as_if_drawn_now(genotypes)), list(-fitness))
        self._asked = False
        if self._left and self._cma.stop():
            self._left -= 1
            anywhere = self._random.random(genotypes[0].shape)
            self._begin(anywhere, 2 * self._size)

    def _as_if_drawn_now(self, genotypes: Genotypes) -> Genotypes:
        """Points that were drawn before the last update, as far from today's mean as they were from
        the mean of then. Left where they are, each update would take back the one before, which
        they do not know of: searches with noisy scores then stall (benchmarks/modes.py)."""
        mean, found = self.mean(), genotypes.copy()
        for point in found:
            then = self._drawn.take(point)
            if then is not None:
                point += mean - then
        return np.clip(found, 0.0, 1.0)

    def mean(self) -> Genotype:
        """The mean since the last restart, mapped into the box."""
        mean: Genotype = np.clip(np.asarray(self._cma.result.xfavorite), 0.0, 1.0)
        return mean

    def stop_reason(self) -> str | None:
        """cma's own tests, without those that a quantised score deceives."""
        reasons = self._cma.stop()
        return f"the optimizer converged ({', '.join(sorted(reasons))})" if reasons else None
