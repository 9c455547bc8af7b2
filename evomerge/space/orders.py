"""The ways to write down an order of layers as a point of the cube.

Each gives the slots of a genotype, from the first to the last, and says nothing of what they are
made into or how many there may be. Knows the parents' names, paths and depths alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Protocol

from evomerge.coordinates import Coordinate, Genotype, When, choice, placed
from evomerge.errors import JobError
from evomerge.space.residual import BOUND, Slot
from evomerge.space.scales import Join, LayerOf, Scales, is_join

SIGMA = 1 / 6  # of Sakana's search

_ON = 0.5 + 2 * SIGMA
_NONE = "none"


@dataclass(frozen=True)
class Parent:
    """A model whose layers are ordered."""

    name: str
    path: str
    depth: int


class Order(Protocol):
    """A way to write down an order."""

    @property
    def coordinates(self) -> tuple[Coordinate, ...]: ...

    def slots(self, genotype: Genotype) -> list[Slot]:
        """The layers that stand in the output, in order; none where nothing is chosen."""
        ...


# -- Switches --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Switches:
    """Sakana's data-flow search (arXiv 2403.13187, section 3.2).

    All layers of all parents in a row, the row repeated: a slot is on where its coordinate is above
    one half. Then come the coordinates of the scales. Their product is kept in [1/BOUND, BOUND] in
    magnitude by stopping there: a scale that leads on has no effect, and one that leads back has.
    row: the layers; paths: of the parents, by name.
    """

    row: tuple[LayerOf, ...]
    paths: Mapping[str, str]
    starts: tuple[float, ...]
    scales: Scales

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        """Named such as 'slot 3: ops layer 3'."""
        switches = (
            Coordinate("slot {}: {} layer {}".format(i, *self.row[i % len(self.row)]), start)
            for i, start in enumerate(self.starts)
        )
        return (*switches, *self.scales.coordinates)

    def slots(self, genotype: Genotype) -> list[Slot]:
        """The slots that are on."""
        cut, size = len(self.starts), len(self.row)
        on = [i for i, value in enumerate(genotype[:cut].tolist()) if value > 0.5]
        joins = [
            Join(i % size, j % size, j)
            for i, j in pairwise(on)
            if is_join(self.row[i % size], self.row[j % size])
        ]
        found = zip(joins, self.scales.of(genotype[cut:], joins), strict=True)
        scales = _stopped({join.slot: scale for join, scale in found})
        return [
            Slot(self.paths[name], layer, scales.get(i, 1.0))
            for i in on
            for name, layer in (self.row[i % size],)
        ]


def _stopped(scales: Mapping[int, float]) -> dict[int, float]:
    """Scales whose product never leaves [1/BOUND, BOUND] in magnitude."""
    found, product = {}, 1.0
    for slot, scale in scales.items():
        size = min(max(abs(product * scale), 1 / BOUND), BOUND)
        wanted = math.copysign(size, product * scale)
        found[slot], product = wanted / product, wanted
    return found


def row_of(parents: Sequence[Parent]) -> tuple[LayerOf, ...]:
    """All layers of all parents."""
    return tuple((parent.name, layer) for parent in parents for layer in range(parent.depth))


def first_switches(slots: int, on: Sequence[int], limit: int) -> tuple[float, ...]:
    """Where switches start: those of `on` two sigmas up, so that nearly all stay on at first; the
    others down by as much as lets half of the room under `limit` be used in the first generation,
    at least by Sakana's one sigma. Much more, and most of it would be beyond the limit."""
    room, off = limit - len(on), slots - len(on)
    share = min(max(room / (2 * off), 0.0), 0.5) if off else 0.5
    steps = -NormalDist().inv_cdf(share) if share else math.inf
    low = 0.5 - min(max(steps, 1.0), 2.5) * SIGMA
    switched = set(on)
    return tuple(_ON if i in switched else low for i in range(slots))


# -- Segments --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segments:
    """Layer ranges one after the other, each of a parent or of none, by its first layer and its
    length; what exceeds the parent's last layer is cut off."""

    parents: tuple[Parent, ...]
    count: int

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        """Three for each segment. The first begins as the first parent, the others as none; once
        chosen they begin as a quarter of the layers from the middle on."""
        sources = len(self.parents) + 1
        deepest = self._deepest
        found: list[Coordinate] = []
        for i in range(self.count):
            source, first, length = (
                (0, 0, self.parents[0].depth) if i == 0 else (-1, deepest // 2, deepest // 4)
            )
            matters = When(len(found), frozenset(range(sources - 1)))
            name = f"segment {i + 1}:"
            found += [
                Coordinate(
                    f"{name} source", placed(source % sources, sources), sources, ordered=False
                ),
                _integer(f"{name} first layer", first, deepest, matters),
                _integer(f"{name} layers", max(length, 1) - 1, deepest, matters),
            ]
        return tuple(found)

    def slots(self, genotype: Genotype) -> list[Slot]:
        """The segments in order."""
        found = []
        for i in range(self.count):
            source, first, length = genotype[3 * i : 3 * i + 3].tolist()
            chosen = choice(source, len(self.parents) + 1)
            if chosen < len(self.parents):
                parent = self.parents[chosen]
                start = min(choice(first, self._deepest), parent.depth - 1)
                end = min(start + 1 + choice(length, self._deepest), parent.depth)
                found += [Slot(parent.path, layer) for layer in range(start, end)]
        return found

    @property
    def _deepest(self) -> int:
        return max(parent.depth for parent in self.parents)


# -- Depth-wise ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DepthWise:
    """Which parent gives the layer at each depth (depth-wise integration, arXiv 2502.04030).
    choices: of each depth, the parents that have it; None leaves it out."""

    choices: tuple[tuple[Parent | None, ...], ...]

    @classmethod
    def over(cls, parents: Sequence[Parent], removable: bool) -> "DepthWise":
        """A depth that a parent lacks may be left out in any case."""
        if len(parents) == 1 and not removable:
            raise JobError(
                "space.form: depth_wise chooses among parents, and there is one: name another, "
                "or give removable: true"
            )
        deepest = max(parent.depth for parent in parents)
        choices: list[tuple[Parent | None, ...]] = []
        for depth in range(deepest):
            own = [parent for parent in parents if parent.depth > depth]
            left_out = [None] if removable or len(own) < len(parents) else []
            choices.append((*own, *left_out))
        return cls(tuple(choices))

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        """Beginning as the first parent."""
        first = self.choices[0][0]
        found = []
        for depth, options in enumerate(self.choices):
            start = options.index(first if first in options else None)
            n = len(options)
            found.append(Coordinate(f"layer {depth}: source", placed(start, n), n, ordered=False))
        return tuple(found)

    def slots(self, genotype: Genotype) -> list[Slot]:
        """The chosen parents' layers."""
        chosen = [
            options[choice(value, len(options))]
            for value, options in zip(genotype.tolist(), self.choices, strict=True)
        ]
        return [Slot(parent.path, depth) for depth, parent in enumerate(chosen) if parent]


# -- Depth up-scaling ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Upscale:
    """Depth up-scaling (arXiv 2312.15166, section 2): layers [0, end), then [begin, n) of one
    parent. The first search begins as SOLAR does, with a quarter of the layers cut off either copy,
    or more where `limit` asks for that; begin beyond end leaves layers out."""

    parents: tuple[Parent, ...]
    limit: int

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        """The parent comes first where there are several."""
        deepest, depth = self._deepest, self.parents[0].depth
        cut = min(max(math.ceil(depth / 4), depth - self.limit // 2), depth - 1)
        end = math.ceil((depth - cut) * deepest / depth) - 1
        begin = math.ceil(cut * deepest / depth)
        n = len(self.parents)
        source = [Coordinate("source", placed(0, n), n, ordered=False)] if n > 1 else []
        return (
            *source,
            _integer("end of the first part", end, deepest),
            _integer("begin of the second part", begin, deepest),
        )

    def slots(self, genotype: Genotype) -> list[Slot]:
        """Both parts. Of a parent that is not the deepest, at the same shares of its depth."""
        *source, last, first = genotype.tolist()
        parent = self.parents[choice(source[0], len(self.parents)) if source else 0]
        deepest = self._deepest
        end = max((choice(last, deepest) + 1) * parent.depth // deepest, 1)
        begin = choice(first, deepest) * parent.depth // deepest
        layers = [*range(end), *range(begin, parent.depth)]
        return [Slot(parent.path, layer) for layer in layers]

    @property
    def _deepest(self) -> int:
        return max(parent.depth for parent in self.parents)


def _integer(name: str, value: int, count: int, when: When | None = None) -> Coordinate:
    """One of `count` neighbouring values, or none to choose from: then it does not matter."""
    return Coordinate(name, placed(value, count), count if count > 1 else 0, when=when)
