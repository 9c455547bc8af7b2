"""Optimizers: who proposes the next points of the unit cube.

They know nothing of models, recipes or scores' meaning, and are tested on plain functions.
Higher fitness is better everywhere outside this package; each optimizer flips the sign for its
library where it tells it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.coordinates import Coordinate, Genotype, start_of
from evomerge.errors import EvomergeError, JobError
from evomerge.job import Optimizer as OptimizerSection

Genotypes = NDArray[np.float64]
Fitness = NDArray[np.float64]


@dataclass(frozen=True)
class Asked:
    """An entry of a search's log: proposals, (n, d), as the optimizer of that time gave them."""

    genotypes: Genotypes


@dataclass(frozen=True)
class Told:
    """An entry of a search's log: the fitness, (n,) or (n, objectives), of genotypes, (n, d)."""

    genotypes: Genotypes
    fitness: Fitness


Log = Sequence[Asked | Told]


class Optimizer(Protocol):
    """Asked for points, told their fitness; the same log of both gives the same next proposals.

    Asking and telling need not alternate: proposals may be asked for while earlier ones are still
    being scored, and any number of them told in any order.
    """

    @property
    def size(self) -> int:
        """How many points a generation has at present."""
        ...

    @property
    def step_size(self) -> float | None:
        """How far proposals scatter at present, in units of the cube; None where there is no
        such thing."""
        ...

    def ask(self, count: int | None = None) -> Genotypes:
        """The next points, (count, d) in [0, 1]; by default a generation of `size`."""
        ...

    def tell(self, genotypes: Genotypes, fitness: Fitness) -> None:
        """Report the fitness, (n,), or (n, objectives) where there are several, of one or more
        points, in an order that does not depend on which was scored first.

        The genotypes may differ from the asked ones: those of a stored history stand.
        Raises ToldNonsense, and learns nothing, for the wrong number of values, for NaN or
        infinity and for points outside the cube.
        """
        ...

    def replay(self, log: Log) -> int | None:
        """Bring a new optimizer to the end of a log, the next proposals being those that would
        have followed it. Gives the position in the log of the first proposals found to differ
        from its own (another library version or processor may cause that; those of the log
        stand), None if none was."""
        ...

    def mean(self) -> Genotype | None:
        """The centre of the distribution, (d,) in [0, 1]; None where there is none."""
        ...

    def stop_reason(self) -> str | None:
        """Why proposing further is pointless, or None."""
        ...


class ToldNonsense(EvomergeError):
    """An optimizer was told values that would spoil it without a trace."""


def checked(genotypes: Genotypes, fitness: Fitness, d: int, objectives: int) -> None:
    """Raise ToldNonsense unless these are points of the cube, each with finite fitness."""
    n = len(genotypes)
    expected = (n,) if objectives == 1 else (n, objectives)
    if n == 0 or genotypes.shape != (n, d) or fitness.shape != expected:
        raise ToldNonsense(
            f"genotypes of shape {genotypes.shape} and fitness of shape {fitness.shape} "
            f"are not points in {d} dimensions with {objectives} objectives"
        )
    if not np.isfinite(fitness).all():
        raise ToldNonsense("NaN or infinity among the told fitness: rank failures worst instead")
    if not ((genotypes >= 0) & (genotypes <= 1)).all():
        raise ToldNonsense("a told genotype is outside [0, 1]: tell what was asked, or clip it")


@dataclass(frozen=True)
class Choice:
    """Which optimizer a search uses, and why."""

    name: str
    reason: str


def choose(
    section: OptimizerSection, coordinates: Sequence[Coordinate], objectives: int, noisy: bool
) -> Choice:
    """The optimizer of a job's section; `auto` picks by dimensions, kinds of coordinates, the
    number of objectives, and whether what it is told is noisy: candidates are scored on different
    examples, or proposed before the last ones are told."""
    if section.name != "auto":
        return Choice(section.name, "the job names it")
    if objectives > 1:
        return Choice("nsga2", f"{objectives} objectives: it keeps a front of trade-offs")
    if any(c.when is not None for c in coordinates):
        return Choice("tpe", "some coordinates matter only where others have a certain choice")
    if discrete := sum(c.choices > 0 for c in coordinates):
        total = len(coordinates)
        return Choice("cma-es-margin", f"{discrete} of {total} coordinates are choices")
    if len(coordinates) == 1:
        return Choice("tpe", "CMA-ES needs 2 dimensions or more, and there is one")
    if noisy:
        return Choice(
            "lra-cma-es", "what it is told is noisy, and it learns slower where that hides why"
        )
    return Choice("cma-es", f"{len(coordinates)} continuous coordinates, scored alike")


def population(section: OptimizerSection, name: str, d: int) -> int:
    """How many candidates the first generation has: 4 + floor(3 ln d) unless the job says
    (Hansen, arXiv 1604.00772, table 1); twice that for NSGA-II, whose generation has to hold a
    whole front of trade-offs and not one best point."""
    if section.population != "auto":
        return section.population
    usual = 4 + math.floor(3 * math.log(d))
    return 2 * usual if name == "nsga2" else usual


def build(
    section: OptimizerSection,
    coordinates: Sequence[Coordinate],
    sigma: float,
    seed: int,
    objectives: int = 1,
    noisy: bool = False,
) -> Optimizer:
    """The optimizer of a job's section; `sigma0` of the section wins over the space's `sigma`.

    Raises JobError where the named optimizer cannot search such coordinates or objectives.
    """
    name = choose(section, coordinates, objectives, noisy).name
    _check_able(section, name, coordinates, objectives)
    size = population(section, name, len(coordinates))
    sigma = section.sigma0 or sigma
    if name in ("tpe", "nsga2"):
        from evomerge.optimizer.optuna_samplers import Nsga2, Tpe

        sampled = Tpe if name == "tpe" else Nsga2
        return sampled(coordinates, size, seed, objectives)
    if name in ("qmc", "random"):
        from evomerge.optimizer.random_search import QuasiRandomSearch, RandomSearch

        blind = QuasiRandomSearch if name == "qmc" else RandomSearch
        return blind(coordinates, size, seed, objectives)
    return _cma(name, coordinates, sigma, size, seed, section.restarts)


def _cma(
    name: str,
    coordinates: Sequence[Coordinate],
    sigma: float,
    size: int,
    seed: int,
    restarts: int,
) -> Optimizer:
    """A variant of CMA-ES by its name."""
    from evomerge.optimizer.generations import Distribution, Generations

    distribution: Distribution
    if name == "cma-es":
        from evomerge.optimizer.cma_es import CmaEs

        distribution = CmaEs(start_of(coordinates), sigma, size, seed, restarts)
    elif name == "lra-cma-es":
        from evomerge.optimizer.lra import LraCmaEs

        distribution = LraCmaEs(start_of(coordinates), sigma, size, seed)
    else:
        from evomerge.optimizer.margin import MarginCmaEs

        distribution = MarginCmaEs(coordinates, sigma, size, seed)
    return Generations(distribution, len(coordinates))


def _check_able(
    section: OptimizerSection, name: str, coordinates: Sequence[Coordinate], objectives: int
) -> None:
    """Raise JobError where an optimizer cannot do what a job asks of it."""
    if "cma" in name and objectives > 1:
        raise JobError(
            f"optimizer.name: {name} takes one objective, not {objectives}: use nsga2 or tpe"
        )
    if name in ("cma-es", "lra-cma-es"):
        discrete = next((c.name for c in coordinates if c.choices), None)
        if discrete is not None:
            raise JobError(
                f"optimizer.name: {name} cannot search the choices of '{discrete}': "
                "use cma-es-margin or tpe"
            )
        if len(coordinates) < 2:
            raise JobError(f"optimizer.name: {name} needs 2 dimensions or more: use tpe or random")
    few = section.population != "auto" and section.population < 4
    if few and name in ("lra-cma-es", "cma-es-margin"):
        raise JobError(
            f"optimizer.population: {section.population} is too few to learn from for {name}: "
            "give 4 or more, or auto"
        )
    if section.restarts and name != "cma-es":
        raise JobError(
            f"optimizer.restarts: {section.restarts} is for cma-es, and the optimizer is {name}: "
            "name cma-es, or leave restarts out"
        )
