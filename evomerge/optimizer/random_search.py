"""Searches that learn nothing, the reference that any other optimizer has to beat: independent
uniform points, and points of a scrambled Sobol sequence, which leave fewer gaps (Owen 1998)."""

import warnings
from collections.abc import Sequence

from scipy.stats import qmc

from evomerge.coordinates import Coordinate, choice, placed
from evomerge.optimizer import Asked, Fitness, Genotypes, Log, checked
from evomerge.seeds import derive, generator


class RandomSearch:
    """Independent uniform points of [0, 1]^d; any number of objectives."""

    def __init__(
        self, coordinates: Sequence[Coordinate], size: int, seed: int, objectives: int
    ) -> None:
        self._coordinates, self._size, self._objectives = tuple(coordinates), size, objectives
        self._random = generator(seed, "optimizer")

    @property
    def size(self) -> int:
        """It never changes."""
        return self._size

    @property
    def step_size(self) -> None:
        """There is no step."""

    def ask(self, count: int | None = None) -> Genotypes:
        """See Optimizer."""
        points = self._points(self._size if count is None else count)
        for i, coordinate in enumerate(self._coordinates):
            if k := coordinate.choices:
                points[:, i] = [placed(choice(value, k), k) for value in points[:, i]]
        return points

    def _points(self, count: int) -> Genotypes:
        return self._random.random((count, len(self._coordinates)))

    def tell(self, genotypes: Genotypes, fitness: Fitness) -> None:
        """Checks, and learns nothing."""
        checked(genotypes, fitness, len(self._coordinates), self._objectives)

    def replay(self, log: Log) -> int | None:
        """See Optimizer."""
        differs = None
        for position, entry in enumerate(log):
            if isinstance(entry, Asked):
                asked = self.ask(len(entry.genotypes))
                if differs is None and asked.tobytes() != entry.genotypes.tobytes():
                    differs = position
        return differs

    def mean(self) -> None:
        """There is no distribution that moves."""

    def stop_reason(self) -> None:
        """Never."""


class QuasiRandomSearch(RandomSearch):
    """Points of a scrambled Sobol sequence, the one that Optuna's sampler draws from as well; it
    is read here directly, since a study would add nothing but the time to rebuild it."""

    def __init__(
        self, coordinates: Sequence[Coordinate], size: int, seed: int, objectives: int
    ) -> None:
        super().__init__(coordinates, size, seed, objectives)
        self._sobol = qmc.Sobol(len(coordinates), rng=derive(seed, "optimizer"))

    def _points(self, count: int) -> Genotypes:
        with warnings.catch_warnings():
            # The sequence is balanced at powers of two only; a generation need not be one.
            warnings.simplefilter("ignore", UserWarning)
            points: Genotypes = self._sobol.random(count)
            return points
