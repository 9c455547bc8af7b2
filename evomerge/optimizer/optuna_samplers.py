"""Optuna's samplers: TPE (Watanabe, arXiv 2304.11127) and NSGA-II (Deb et al. 2002), through
in-memory studies.

A proposal follows from what was told, what is still being scored, and a generator made anew for
each ask from the number of points asked for before; so no study is ever stored, only filled again.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Self

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import NSGAIISampler, TPESampler
from optuna.samplers.nsgaii import PolynomialMutation, SBXCrossover
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from threadpoolctl import ThreadpoolController

from evomerge.coordinates import Coordinate, Genotype, active, choice, placed
from evomerge.optimizer import Asked, Fitness, Genotypes, Log, checked
from evomerge.optimizer.generations import Pending
from evomerge.seeds import derive


class _Sampled(ABC):
    """What both have in common: an Optimizer whose points are drawn one after another, the first
    one being the space's start: where most points mean no model, chance might never find one."""

    def __init__(
        self, coordinates: Sequence[Coordinate], size: int, seed: int, objectives: int
    ) -> None:
        self._coordinates, self._size, self._seed = tuple(coordinates), size, seed
        self._objectives = objectives
        self._asked = 0
        self._parameters = _Parameters(self._coordinates)
        self._blas = ThreadpoolController()

    @property
    def size(self) -> int:
        """It never changes."""
        return self._size

    @property
    def step_size(self) -> float | None:
        """There is no step."""
        return None

    def ask(self, count: int | None = None) -> Genotypes:
        """See Optimizer."""
        asked = np.empty((self._size if count is None else count, len(self._coordinates)))
        with quiet(), self._blas.limit(limits=1, user_api="blas"):
            draw = self._drawing()
            for i, genotype in enumerate(asked):
                genotype[:] = draw() if self._asked or i else self._parameters.at_start
                self._hold(genotype)
        self._asked += len(asked)
        return asked

    def tell(self, genotypes: Genotypes, fitness: Fitness) -> None:
        """See Optimizer. No sign flips: the studies maximise."""
        checked(genotypes, fitness, len(self._coordinates), self._objectives)
        with quiet(), self._blas.limit(limits=1, user_api="blas"):
            values = fitness.reshape(len(genotypes), self._objectives)
            for genotype, point in zip(genotypes, values, strict=True):
                self._learn(genotype, point.tolist())

    def replay(self, log: Log) -> int | None:
        """See Optimizer. Of all that was asked, only the first point of the last ask is drawn
        again and compared: to draw the rest would take as long as the search did."""
        asks = [position for position, entry in enumerate(log) if isinstance(entry, Asked)]
        differs = None
        for position, entry in enumerate(log):
            if not isinstance(entry, Asked):
                self.tell(entry.genotypes, entry.fitness)
                continue
            with quiet(), self._blas.limit(limits=1, user_api="blas"):
                if position == asks[-1]:
                    first = self._drawing()() if self._asked else self._parameters.at_start
                    differs = None if np.array_equal(first, entry.genotypes[0]) else position
                for genotype in entry.genotypes:
                    self._hold(genotype)
            self._asked += len(entry.genotypes)
        return differs

    def mean(self) -> Genotype | None:
        """There is no distribution with a centre."""
        return None

    def stop_reason(self) -> str | None:
        """Never."""
        return None

    def _generator_seed(self) -> int:
        """Of the draws that follow; the samplers take 32 bits."""
        return derive(self._seed, "optimizer", self._asked) % 2**32

    @abstractmethod
    def _drawing(self) -> Callable[[], Genotype]:
        """What draws the next points, one at a call; a draw leaves no trace."""

    @abstractmethod
    def _hold(self, genotype: Genotype) -> None:
        """Take note that a point is being scored."""

    @abstractmethod
    def _learn(self, genotype: Genotype, values: list[float]) -> None:
        """Take note of a point's fitness."""


class Tpe(_Sampled):
    """Tree-structured Parzen estimators of all coordinates together; where some are conditional,
    of each group of coordinates that are active together. Points that are still being scored
    count as bad, so that a generation spreads."""

    def __init__(
        self, coordinates: Sequence[Coordinate], size: int, seed: int, objectives: int
    ) -> None:
        super().__init__(coordinates, size, seed, objectives)
        self._conditional = any(c.when is not None for c in coordinates)
        with quiet():
            self._study = _new_study(objectives)
        self._pending: Pending[int] = Pending()

    def _drawing(self) -> Callable[[], Genotype]:
        study = self._study
        study.sampler = TPESampler(
            multivariate=True,
            group=self._conditional,
            constant_liar=True,
            seed=self._generator_seed(),
        )

        def draw() -> Genotype:
            trial = study.ask()
            genotype = self._parameters.suggested(trial)
            study.tell(trial, state=TrialState.FAIL)  # held as one like any other, see _hold
            return genotype

        return draw

    def _hold(self, genotype: Genotype) -> None:
        self._pending.put(genotype, len(self._study.get_trials(deepcopy=False)))
        self._add(genotype, TrialState.RUNNING, None)

    def _learn(self, genotype: Genotype, values: list[float]) -> None:
        number = self._pending.take(genotype)
        if number is None:
            self._add(genotype, TrialState.COMPLETE, values)
        else:
            self._study.tell(number, values)

    def _add(self, genotype: Genotype, state: TrialState, values: list[float] | None) -> None:
        params = self._parameters.of_active(genotype)
        self._study.add_trial(self._parameters.trial(params, state, values))


class Nsga2(_Sampled):
    """The fittest so far, `size` of them by non-dominated rank and crowding, are the parents of
    what is proposed, by simulated binary crossover and polynomial mutation; the next parents are
    chosen when as many points again have been told. Any number of objectives."""

    def __init__(
        self, coordinates: Sequence[Coordinate], size: int, seed: int, objectives: int
    ) -> None:
        super().__init__(coordinates, size, seed, objectives)
        self._parents: list[tuple[Genotype, list[float]]] = []
        self._children: list[tuple[Genotype, list[float]]] = []

    def _drawing(self) -> Callable[[], Genotype]:
        study = self._finished_generation(
            [values for _, values in self._parents],
            [self._parameters.of_all(genotype) for genotype, _ in self._parents],
            self._generator_seed(),
        )
        return lambda: self._parameters.suggested(study.ask(), conditions=False)

    def _hold(self, genotype: Genotype) -> None:
        """What is being scored has no part in this."""

    def _learn(self, genotype: Genotype, values: list[float]) -> None:
        self._children.append((genotype.copy(), values))
        if len(self._children) == self._size:
            family = self._parents + self._children
            study = self._finished_generation(
                [values for _, values in family], [_Params()] * len(family), seed=0
            )
            self._parents = [
                family[trial.number] for trial in study.sampler.select_parent(study, 1)
            ]
            self._children = []

    def _finished_generation(
        self,
        values: Sequence[list[float]],
        params: Sequence["_Params"],
        seed: int,
    ) -> Study:
        """A study of one generation, after which the next is due: as the sampler keeps the count
        of generations in the trials, it is begun anew each time. To select, values are enough."""
        sampler = NSGAIISampler(
            population_size=self._size,
            crossover=SBXCrossover(),
            mutation=PolynomialMutation(),
            seed=seed,
        )
        study = _new_study(self._objectives, sampler)
        label = {sampler._get_generation_key(): 0}
        for point, given in zip(values, params, strict=True):
            trial = self._parameters.trial(given, TrialState.COMPLETE, point)
            trial.system_attrs = label
            study.add_trial(trial)
        return study


class _Params(dict[str, Any]):
    """Something of each parameter, by name, that nobody changes: a study copies deeply every trial
    that it is given, and to fill one would take twice as long."""

    def __deepcopy__(self, memo: object) -> Self:
        return self


class _Parameters:
    """Coordinates as Optuna's parameters, named by position so that a sampler's order is ours.

    at_start: the genotype where a search begins, (d,).
    """

    def __init__(self, coordinates: Sequence[Coordinate]) -> None:
        self._coordinates = coordinates
        self._names = [f"{i:06}" for i in range(len(coordinates))]
        kinds: dict[tuple[int, bool], BaseDistribution] = {}
        for c in coordinates:
            kinds.setdefault((c.choices, c.ordered), distribution(c))
        self._distributions = _Params(
            (name, kinds[c.choices, c.ordered])
            for name, c in zip(self._names, coordinates, strict=True)
        )
        self.at_start = np.array([_valued(c, param(c, c.start)) for c in coordinates])

    def trial(self, params: _Params, state: TrialState, values: list[float] | None) -> FrozenTrial:
        """A trial to add to a study; values only for a complete one."""
        distributions = self._distributions
        if len(params) < len(distributions):
            distributions = _Params((name, distributions[name]) for name in params)
        now = datetime.now()  # asked for, and read by no sampler
        return FrozenTrial(
            number=-1,  # the study numbers it
            trial_id=-1,
            state=state,
            value=None,
            values=values,
            datetime_start=now,
            datetime_complete=now if state.is_finished() else None,
            params=params,
            distributions=distributions,
            user_attrs={},
            system_attrs={},
            intermediate_values={},
        )

    def of_all(self, genotype: Genotype) -> _Params:
        """The parameters of every coordinate."""
        pairs = zip(self._names, self._coordinates, genotype.tolist(), strict=True)
        return _Params((name, param(coordinate, value)) for name, coordinate, value in pairs)

    def of_active(self, genotype: Genotype) -> _Params:
        """Those of the coordinates that matter at a genotype."""
        found = self.of_all(genotype)
        for name, matters in zip(self._names, active(genotype, self._coordinates), strict=True):
            if not matters:
                del found[name]
        return found

    def suggested(self, trial: Trial, conditions: bool = True) -> Genotype:
        """Ask a trial for its parameters; an inactive coordinate has none and stands at its
        start. Without `conditions` every coordinate has one."""
        genotype = self.at_start.copy()
        for i, (name, coordinate) in enumerate(zip(self._names, self._coordinates, strict=True)):
            if not conditions or coordinate.when is None or self._matters(genotype, i):
                genotype[i] = _valued(coordinate, _suggest(trial, name, coordinate))
        return genotype

    def _matters(self, genotype: Genotype, i: int) -> bool:
        """Whether a coordinate is active where all before it are known."""
        return bool(active(genotype, self._coordinates)[i])


def distribution(coordinate: Coordinate) -> BaseDistribution:
    if not coordinate.choices:
        return FloatDistribution(0.0, 1.0)
    if coordinate.ordered:
        return IntDistribution(0, coordinate.choices - 1)
    return CategoricalDistribution(range(coordinate.choices))


def _suggest(trial: Trial, name: str, coordinate: Coordinate) -> float | int:
    found: float | int
    if not coordinate.choices:
        found = trial.suggest_float(name, 0.0, 1.0)
    elif coordinate.ordered:
        found = trial.suggest_int(name, 0, coordinate.choices - 1)
    else:
        found = trial.suggest_categorical(name, range(coordinate.choices))
    return found


def param(coordinate: Coordinate, value: float) -> float | int:
    """What a value in [0, 1] is to Optuna."""
    return choice(value, coordinate.choices) if coordinate.choices else value


def _valued(coordinate: Coordinate, param: float | int) -> float:
    """What a parameter of Optuna's is in [0, 1]."""
    return placed(int(param), coordinate.choices) if coordinate.choices else float(param)


def _new_study(objectives: int, sampler: optuna.samplers.BaseSampler | None = None) -> Study:
    return optuna.create_study(sampler=sampler, directions=["maximize"] * objectives)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's messages about new studies, and without its warnings that what is used
    here is experimental; both are as they were afterwards."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
