"""Executors: many candidates on many devices. They merge and score, and never touch a store."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.fitness.results import Evaluation
from evomerge.fitness.task_file import Split
from evomerge.recipe import Recipe


@dataclass(frozen=True)
class Request:
    """One evaluation. examples: positions in the split, by task name."""

    candidate: int
    recipe: Recipe
    split: Split
    examples: dict[str, NDArray[np.uint32]]


class Executor(Protocol):
    """Evaluates requests, in whatever order suits its devices."""

    def evaluate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Evaluation]]:
        """Each request with its evaluation, as it lands; one such iterator at a time.

        A request is taken when there is a device for it, not before: whoever gives no more of them
        is still given what is under way. A recipe that cannot be merged or run gives Failed; a
        machine that breaks raises.
        """
        ...

    def close(self) -> None:
        """Free the devices."""
        ...
