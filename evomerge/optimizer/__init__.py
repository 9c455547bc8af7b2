"""Optimizers: who proposes the next points of the unit cube.

They know nothing of models, recipes or scores' meaning, and are tested on plain functions.
Higher fitness is better everywhere outside this package.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import EvomergeError, JobError
from evomerge.job import Optimizer as OptimizerSection

Genotypes = NDArray[np.float64]


class Optimizer(Protocol):
    """Asked for a generation, then told its fitness; the same history gives the same proposals."""

    @property
    def step_size(self) -> float:
        """How far proposals scatter at present, in units of the cube."""
        ...

    def ask(self) -> Genotypes:
        """The next generation: (population, d), each in [0, 1]."""
        ...

    def tell(self, genotypes: Genotypes, fitness: NDArray[np.float64]) -> None:
        """Report the fitness, (population,), of a generation in the order it was asked.

        The genotypes may differ from the asked ones: those of a stored history stand.
        Raises ToldNonsense for the wrong number of values and for NaN or infinity.
        """
        ...

    def mean(self) -> Genotypes | None:
        """The centre of the distribution, (d,) in [0, 1]; None where there is none."""
        ...

    def stop_reason(self) -> str | None:
        """Why proposing further is pointless, or None."""
        ...


class ToldNonsense(EvomergeError):
    """An optimizer was told values that would spoil it without a trace."""


def checked(genotypes: Genotypes, fitness: NDArray[np.float64], size: int, d: int) -> None:
    """Raise ToldNonsense unless these are a whole generation and every number is finite."""
    if genotypes.shape != (size, d) or fitness.shape != (size,):
        raise ToldNonsense(
            f"genotypes of shape {genotypes.shape} and fitness of shape {fitness.shape} "
            f"do not make a generation of {size} in {d} dimensions"
        )
    if not (np.isfinite(fitness).all() and np.isfinite(genotypes).all()):
        raise ToldNonsense("NaN or infinity among the told values: rank failures worst instead")


def population(section: OptimizerSection, d: int) -> int:
    """Candidates in a generation; auto is 4 + floor(3 ln d) (Hansen, arXiv 1604.00772, table 1)."""
    if section.population == "auto":
        return 4 + int(3 * np.log(d))
    return section.population


def build(section: OptimizerSection, start: Genotypes, sigma: float, seed: int) -> Optimizer:
    """The optimizer of a job's section; `sigma0` of the section wins over the space's `sigma`."""
    from evomerge.optimizer.cma_es import CmaEs
    from evomerge.optimizer.random_search import RandomSearch

    size = population(section, len(start))
    if section.name == "random":
        return RandomSearch(len(start), size, seed)
    if len(start) < 2:
        raise JobError("optimizer.name: cma-es needs 2 dimensions or more: use random")
    return CmaEs(start, section.sigma0 or sigma, size, seed)
