"""CMA-ES (Hansen, arXiv 1604.00772) by the `cma` library, made replayable.

The library seeds NumPy's global generator when left alone; here it draws from a generator of our
own, so that equal seeds and equal tells give equal proposals whatever else the process does. Its
convergence tests that look at fitness differences are off: accuracies are quantised, and equal
values in a row mean nothing.
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from evomerge.optimizer import Genotypes, checked
from evomerge.seeds import generator

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # cma says at import that it cannot plot
    import cma

_MIN_STEP = 1e-4  # of the cube: coefficients this close together give the same merge


class CmaEs:
    """In the box [0, 1]^d by cma's smooth boundary transformation."""

    def __init__(self, start: Genotypes, sigma: float, size: int, seed: int) -> None:
        random = generator(seed, "optimizer")
        options: dict[str, Any] = {
            "bounds": [0.0, 1.0],
            "popsize": size,
            "seed": np.nan,
            "randn": lambda *shape: random.standard_normal(shape),
            "verbose": -9,
            "signals_filename": "",  # else a file in the working directory could set options
            "tolfun": 0.0,
            "tolfunhist": 0.0,
            "tolfunrel": 0.0,
            "tolflatfitness": np.inf,
            "tolstagnation": np.inf,
            "tolx": _MIN_STEP,
            "maxiter": np.inf,
        }
        self._size, self._d = size, len(start)
        self._cma = cma.CMAEvolutionStrategy(start, sigma, options)

    @property
    def step_size(self) -> float:
        """The largest standard deviation of a coordinate."""
        return float(np.max(self._cma.stds))

    def ask(self) -> Genotypes:
        """See Optimizer."""
        with threadpool_limits(1, user_api="blas"):  # more threads, other rounding
            asked: Genotypes = np.clip(np.asarray(self._cma.ask()), 0.0, 1.0)
            return asked

    def tell(self, genotypes: Genotypes, fitness: NDArray[np.float64]) -> None:
        """See Optimizer. The one place where the sign flips: cma minimises."""
        checked(genotypes, fitness, self._size, self._d)
        with threadpool_limits(1, user_api="blas"):
            self._cma.tell(list(genotypes), list(-fitness))

    def mean(self) -> Genotypes:
        """The distribution's mean, mapped into the box."""
        mean: Genotypes = np.clip(np.asarray(self._cma.result.xfavorite), 0.0, 1.0)
        return mean

    def stop_reason(self) -> str | None:
        """cma's own tests, without those that a quantised score deceives."""
        reasons = self._cma.stop()
        return f"the optimizer converged ({', '.join(sorted(reasons))})" if reasons else None
