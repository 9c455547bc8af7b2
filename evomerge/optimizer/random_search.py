"""Uniform random search: the reference that any other optimizer has to beat."""

import numpy as np
from numpy.typing import NDArray

from evomerge.optimizer import Genotypes, checked
from evomerge.seeds import generator


class RandomSearch:
    """Independent uniform points of [0, 1]^d."""

    def __init__(self, d: int, size: int, seed: int) -> None:
        self._shape = (size, d)
        self._random = generator(seed, "optimizer")

    @property
    def step_size(self) -> float:
        """The standard deviation of the uniform distribution; it never changes."""
        return float(12**-0.5)

    def ask(self) -> Genotypes:
        """See Optimizer."""
        return self._random.random(self._shape)

    def tell(self, genotypes: Genotypes, fitness: NDArray[np.float64]) -> None:
        """Checks, and learns nothing."""
        checked(genotypes, fitness, *self._shape)

    def mean(self) -> None:
        """There is no distribution that moves."""

    def stop_reason(self) -> None:
        """Never."""
