"""What the residual stream is multiplied by where a layer follows one that it was not trained
behind: a join (W of arXiv 2403.13187, section 3.2).

A layer that follows the one before it in the same parent is left alone: nothing shifts there. A
join's value counts only in genotypes that have this join. Knows nothing of recipes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.coordinates import Coordinate, Genotype
from evomerge.errors import JobError
from evomerge.job import Range

LayerOf = tuple[str, int]  # a parent's name and the number of one of its layers

_MOST = 1_000  # coordinates of a matrix: beyond, no search gets anywhere
_HIDDEN = 4
_INPUTS = ("bias", "from layer", "to layer", "slot", "from parent", "to parent", "same parent")
_WEIGHT = 3.0  # weights of the network are in [-3, 3]
_REACH = 0.1  # of the range of scales, for an output of 1


@dataclass(frozen=True)
class Join:
    """From one layer to another, both as positions in the row of all layers, into a slot."""

    source: int
    target: int
    slot: int


class Scales(Protocol):
    """A value for each join."""

    @property
    def coordinates(self) -> tuple[Coordinate, ...]: ...

    def of(self, genotype: Genotype, joins: Sequence[Join]) -> list[float]:
        """The scales of the joins, given the values of these coordinates alone."""
        ...


def is_join(before: LayerOf, after: LayerOf) -> bool:
    """Whether the one layer was not trained behind the other."""
    return after != (before[0], before[1] + 1)


@dataclass(frozen=True)
class Unscaled:
    """Every scale is 1."""

    coordinates: tuple[Coordinate, ...] = ()

    def of(self, genotype: Genotype, joins: Sequence[Join]) -> list[float]:
        return [1.0] * len(joins)


@dataclass(frozen=True)
class Matrix:
    """A coordinate for each join that can be. positions: of each of them, by (source, target)."""

    coordinates: tuple[Coordinate, ...]
    positions: dict[tuple[int, int], int]
    bounds: Range

    @classmethod
    def over(cls, row: Sequence[LayerOf], repeats: int, bounds: Range) -> "Matrix":
        """Raises JobError where there are too many of them."""
        start = bounds.start_unit(len(row))
        pairs = [
            (i, j)
            for i, before in enumerate(row)
            for j, after in enumerate(row)
            if (repeats > 1 or i < j) and is_join(before, after)
        ]
        if len(pairs) > _MOST:
            raise JobError(
                f"space.scales: matrix has {len(pairs)} values for {len(row)} layers, and more "
                f"than {_MOST} cannot be searched: give scales: network"
            )
        names = [f"scale from {_name(row[i])} to {_name(row[j])}" for i, j in pairs]
        return cls(
            tuple(Coordinate(name, start) for name in names),
            {pair: position for position, pair in enumerate(pairs)},
            bounds,
        )

    def of(self, genotype: Genotype, joins: Sequence[Join]) -> list[float]:
        """Looked up."""
        places = [self.positions[join.source, join.target] for join in joins]
        return [self.bounds.value(float(genotype[place])) for place in places]


@dataclass(frozen=True)
class Network:
    """pi(i, j, t) with one hidden layer: 7 inputs, 4 units of tanh, a bias behind them.

    Its 33 weights in [-3, 3] are the coordinates, whatever the number of layers; at 0, where they
    begin, every scale is the start of its range. Inputs, each in [-1, 1]: a constant; where in
    their parents the two layers stand, from first to last; where the slot stands; which parents
    these are, in the job's order; whether both are the same. inputs: of every layer, (layers, 2):
    its place and its parent. slots: how many there are.
    """

    inputs: NDArray[np.float64]
    slots: int
    bounds: Range
    coordinates: tuple[Coordinate, ...]

    @classmethod
    def over(cls, row: Sequence[LayerOf], repeats: int, bounds: Range) -> "Network":
        """The network over the joins of a row of layers, repeated."""
        depths: dict[str, int] = {}
        for parent, layer in row:
            depths[parent] = layer + 1
        order = list(depths)
        inputs = [
            (_spread(layer, depths[parent]), _spread(order.index(parent), len(order)))
            for parent, layer in row
        ]
        units = range(1, _HIDDEN + 1)
        names = [f"unit {unit}, {name}" for unit in units for name in _INPUTS]
        names += [f"output, unit {unit}" for unit in units] + ["output, bias"]
        return cls(
            np.array(inputs),
            repeats * len(row),
            bounds,
            tuple(Coordinate(f"scale network: {name}", 0.5) for name in names),
        )

    def of(self, genotype: Genotype, joins: Sequence[Join]) -> list[float]:
        """One forward for all joins."""
        if not joins:
            return []
        weights = _WEIGHT * (2 * np.asarray(genotype) - 1)
        cut = _HIDDEN * len(_INPUTS)
        hidden = np.tanh(self._seen(joins) @ weights[:cut].reshape(_HIDDEN, -1).T)
        outputs = hidden @ weights[cut:-1] + weights[-1]
        units = np.clip(self.bounds.start_unit(1) + _REACH * outputs, 0, 1)
        return [self.bounds.value(unit) for unit in units.tolist()]

    def _seen(self, joins: Iterable[Join]) -> NDArray[np.float64]:
        """What the network sees of each join, (joins, 7), divided so that the sum of a unit with
        random weights does not grow with the number of inputs."""
        rows = []
        for join in joins:
            (place, parent), (to_place, to_parent) = self.inputs[[join.source, join.target]]
            same = 1.0 if parent == to_parent else -1.0
            slot = _spread(join.slot, self.slots)
            rows.append((1.0, place, to_place, slot, parent, to_parent, same))
        seen: NDArray[np.float64] = np.array(rows) / np.sqrt(len(_INPUTS))
        return seen


def _spread(position: int, count: int) -> float:
    """A position as a number in [-1, 1]; 0 where there is but one."""
    return 2 * position / (count - 1) - 1 if count > 1 else 0.0


def _name(layer: LayerOf) -> str:
    return f"{layer[0]} layer {layer[1]}"
