"""What a point of the unit cube is made of: the one thing that spaces and optimizers share.

A genotype is (d,) in [0, 1]. A continuous coordinate takes any value; one with k choices cuts its
side into k equal parts, and choice i stands at its part's middle, (i + 0.5) / k. Knows nothing of
what a coordinate means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Genotype = NDArray[np.float64]


@dataclass(frozen=True)
class When:
    """Where a coordinate matters: if the coordinate at position `coordinate` has one of these
    choices."""

    coordinate: int
    choices: frozenset[int]


@dataclass(frozen=True)
class Coordinate:
    """One dimension of the cube.

    name: for people, unique in its space. start: in [0, 1], where a search begins. choices: 0 for
    a continuous coordinate, else 2 or more; ordered: neighbouring choices are neighbouring
    values, else they are mere names. when: None for a coordinate that always matters; it names an
    earlier coordinate.
    """

    name: str
    start: float
    choices: int = 0
    ordered: bool = True
    when: When | None = None


def start_of(coordinates: Sequence[Coordinate]) -> Genotype:
    """Where a search of these coordinates begins, (d,)."""
    return np.array([coordinate.start for coordinate in coordinates])


def choice(value: float, choices: int) -> int:
    """Which of the choices a value in [0, 1] stands for."""
    return min(int(value * choices), choices - 1)


def placed(chosen: int, choices: int) -> float:
    """The middle of a choice's part of [0, 1]: what `choice` turns back into it."""
    return (chosen + 0.5) / choices


def active(genotype: Genotype, coordinates: Sequence[Coordinate]) -> NDArray[np.bool_]:
    """Which coordinates matter at a genotype, (d,); one that depends on an inactive one does
    not."""
    found = np.ones(len(coordinates), np.bool_)
    for i, coordinate in enumerate(coordinates):
        if coordinate.when is not None:
            owner = coordinate.when.coordinate
            chosen = choice(float(genotype[owner]), coordinates[owner].choices)
            found[i] = found[owner] and chosen in coordinate.when.choices
    return found
