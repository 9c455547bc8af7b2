"""Which of many things is overdue first."""

import math
import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

_T = TypeVar("_T", bound=Hashable)


class Deadlines(Generic[_T]):
    """What is done for one takes as long whatever their number: there are few different limits, and
    among those with the same one the first that was set is the first that is due."""

    def __init__(self) -> None:
        self._limits: dict[_T, float] = {}
        self._due: dict[float, OrderedDict[_T, float]] = {}  # on the monotonic clock, by limit

    def set(self, thing: _T, limit: float) -> None:
        """Let it be overdue after so many seconds from now."""
        self.clear(thing)
        self._limits[thing] = limit
        self._due.setdefault(limit, OrderedDict())[thing] = time.monotonic() + limit

    def clear(self, thing: _T) -> None:
        """It is never overdue."""
        limit = self._limits.pop(thing, None)
        if limit is not None:
            del self._due[limit][thing]

    def left(self, thing: _T) -> float:
        """Seconds until it is overdue, infinite where it never is."""
        limit = self._limits.get(thing)
        return math.inf if limit is None else self._due[limit][thing] - time.monotonic()

    def first(self) -> _T | None:
        """What is overdue before all others."""
        firsts = [next(iter(due)) for due in self._due.values() if due]
        return min(firsts, key=self.left, default=None)
