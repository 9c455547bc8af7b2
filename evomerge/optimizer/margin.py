"""CMA-ES with margin for mixed coordinates: CatCMA with Margin (Hamano et al., arXiv 2504.07884) by
the `cmaes` library.

Continuous and ordered coordinates share a normal distribution, unordered ones and those with two
choices have probabilities; a margin keeps every choice possible.
"""

from collections.abc import Sequence

import numpy as np
from cmaes import CatCMAwM
from numpy.typing import NDArray

from evomerge.coordinates import Coordinate, Genotype, choice, placed
from evomerge.optimizer import Fitness, Genotypes
from evomerge.optimizer.generations import MIN_STEP, Pending, shortened
from evomerge.seeds import derive

_TRUST = 0.5  # the share of a category's probability that its start has beyond an equal part


class MarginCmaEs:
    """A Distribution over coordinates of every kind."""

    def __init__(
        self, coordinates: Sequence[Coordinate], sigma: float, size: int, seed: int
    ) -> None:
        self._d = len(coordinates)
        numbered = list(enumerate(coordinates))
        self._continuous = [i for i, c in numbered if not c.choices]
        self._ordered = [i for i, c in numbered if c.choices > 2 and c.ordered]
        self._categories = [i for i, c in numbered if c.choices and i not in self._ordered]
        self._choices = [c.choices for c in coordinates]
        gaussian = self._continuous + self._ordered
        self._size = size
        self._cma = CatCMAwM(
            x_space=[[0.0, 1.0]] * len(self._continuous) or None,
            z_space=[self._values(i) for i in self._ordered] or None,
            c_space=[self._choices[i] for i in self._categories] or None,
            population_size=size,
            mean=np.array([coordinates[i].start for i in gaussian]),
            sigma=sigma,
            cov=np.eye(len(gaussian)),
            cat_param=self._trusting(coordinates) if self._categories else None,
            seed=derive(seed, "optimizer") % 2**32,
        )
        if self._ordered:
            # The library fills its table of thresholds up to the longest row with the highest
            # value. Taken for a threshold, that keeps the margin from reaching the lower choices.
            limits = self._cma._z_lim
            for row, i in zip(limits, self._ordered, strict=True):
                row[self._choices[i] - 1 :] = row[self._choices[i] - 2]
        self._drawn: Pending[CatCMAwM.Solution] = Pending()

    def _values(self, i: int) -> list[float]:
        return [placed(chosen, self._choices[i]) for chosen in range(self._choices[i])]

    def _trusting(self, coordinates: Sequence[Coordinate]) -> NDArray[np.float64]:
        """The first probabilities, (categories, most choices): the start's is raised."""
        widest = max(self._choices[i] for i in self._categories)
        found = np.zeros((len(self._categories), widest))
        for row, i in zip(found, self._categories, strict=True):
            row[: self._choices[i]] = (1 - _TRUST) / self._choices[i]
            row[choice(coordinates[i].start, self._choices[i])] += _TRUST
        return found

    @property
    def size(self) -> int:
        """It never changes."""
        return self._size

    @property
    def step_size(self) -> float | None:
        """The largest standard deviation of a continuous or ordered coordinate; None without."""
        if not (self._continuous or self._ordered):
            return None
        return float(np.max(self._deviations()))

    def _deviations(self) -> NDArray[np.float64]:
        found: NDArray[np.float64] = (
            self._cma._sigma * self._cma._A * np.sqrt(np.diag(self._cma._C))
        )
        return found

    def sample(self, count: int) -> Genotypes:
        """See Distribution."""
        drawn = [self._cma.ask() for _ in range(count)]
        asked = np.empty((count, self._d))
        for genotype, solution in zip(asked, drawn, strict=True):
            if solution.x is not None:
                genotype[self._continuous] = solution.x
            if solution.z is not None:
                genotype[self._ordered] = solution.z
            if solution.c is not None:
                genotype[self._categories] = self._placed(np.argmax(solution.c, axis=1))
            self._drawn.put(genotype, solution)
        return asked

    def _placed(self, chosen: NDArray[np.int64]) -> list[float]:
        """The values of chosen categories."""
        pairs = zip(chosen, self._categories, strict=True)
        return [placed(int(category), self._choices[i]) for category, i in pairs]

    def update(self, genotypes: Genotypes, fitness: Fitness) -> None:
        """See Distribution.

        The library is told ranks, the best first: its penalty for leaving the box is measured in
        spreads of fitness, and would be NaN where a first generation is equally fit.
        """
        order = np.argsort(-fitness, kind="stable")
        solutions = [self._drawn.take(g) or self._foreign(g) for g in genotypes[order]]
        self._cma.tell([(solution, float(rank)) for rank, solution in enumerate(solutions)])

    def _foreign(self, genotype: Genotype) -> CatCMAwM.Solution:
        """A point that was not drawn here, as the library describes one."""
        raw = z = c = None
        if self._continuous or self._ordered:
            scale = self._cma._sigma * self._cma._A
            covariance = scale[:, None] * self._cma._C * scale
            point = genotype[self._continuous + self._ordered]
            raw = shortened(point[None], self._cma._mean, covariance)[0]
        if self._ordered:
            z = genotype[self._ordered]
        if self._categories:
            c = np.zeros(self._cma._q.shape, np.bool_)
            for row, i in zip(c, self._categories, strict=True):
                row[choice(float(genotype[i]), self._choices[i])] = True
        return CatCMAwM.Solution(genotype[self._continuous], z, c, raw)

    def mean(self) -> Genotype:
        """The normal distribution's mean, ordered coordinates at the choice that it lies in, and
        the most probable category of each other."""
        found = np.empty(self._d)
        if self._continuous or self._ordered:
            mean = np.clip(self._cma._mean, 0.0, 1.0)
            found[self._continuous + self._ordered] = mean
            for i in self._ordered:
                found[i] = placed(choice(float(found[i]), self._choices[i]), self._choices[i])
        if self._categories:
            found[self._categories] = self._placed(np.argmax(self._cma._q, axis=1))
        return found

    def stop_reason(self) -> str | None:
        """When the continuous coordinates have converged; never where there are none, for the
        margin keeps the others moving."""
        deviations = self._deviations()[: len(self._continuous)] if self._continuous else None
        converged = deviations is not None and np.max(deviations) < MIN_STEP
        return "the optimizer converged (step size)" if converged else None
