"""Executors: many candidates on many devices. They merge and score, and never touch a store."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.devices import Device
from evomerge.fitness.results import Evaluation
from evomerge.fitness.task_file import Split
from evomerge.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Request:
    """One evaluation. examples: positions in the split, by task name. samples: how many replies of
    each task come along for people to read, see fitness.score.sampled."""

    candidate: int
    recipe: Recipe
    split: Split
    examples: dict[str, NDArray[np.uint32]]
    samples: int = 0


@dataclass(frozen=True)
class Landed:
    """A request, the same object that was taken, and what came of it. device: see Device.name.
    gpus: that it is charged for: those that were held for it, and 1 where it ran on a CPU, which
    Device counts as 0."""

    request: Request
    evaluation: Evaluation
    device: str
    gpus: float


@dataclass(frozen=True)
class Workers:
    """Who evaluates at the same time.

    count: how many there is room for at present, at least 1. gpus: of each, 0 on a CPU.
    merge_ahead: each merges the next candidate while it scores one, as far as memory allows.
    """

    count: int
    gpus: float
    merge_ahead: bool


Take = Callable[[], Request | None]


class Stopped(Exception):  # not an error
    """Raised by whoever is asked for a request: what has begun is to land, and nothing to begin."""


def given(requests: Iterable[Request]) -> Take:
    """Requests that are known beforehand, one after the other."""
    left = iter(requests)
    return lambda: next(left, None)


class Executor(Protocol):
    """Evaluates requests, in whatever order suits its devices."""

    def evaluate(self, take: Take) -> Iterator[Landed]:
        """What comes of requests, as it lands; one such iterator at a time.

        take: gives the next request, None where there is none at present. It is called when there
        is a device for one, not before, and again whenever something has landed and been seen to;
        the iterator ends when it gives None and nothing is under way. A device that merges ahead is
        one for two requests: when it raises Stopped, what was taken and has not begun is never
        heard of again. A recipe that cannot be merged or run gives Failed; a machine that breaks
        raises.
        """
        ...

    def workers(self) -> Workers:
        """Who evaluates."""
        ...

    def devices(self) -> tuple[Device, ...]:
        """All that were held since the executor was opened, those given back included, as they
        stand now."""
        ...

    def close(self) -> None:
        """Free the devices."""
        ...
