"""What a search has spent, and how long it will take from here."""

import math
import time
from dataclasses import fields
from typing import TYPE_CHECKING

from evomerge.guard.review import Used

if TYPE_CHECKING:
    from evomerge.job import Budget
    from evomerge.search.record import Record
    from evomerge.search.setting import Setting


def seconds_left(budget: "Budget", used: Used, done: Used, under_way: float) -> float | None:
    """Until whichever limit of the budget comes first; None before a candidate was scored.

    used: all that the search has spent. done: the part of it that says what the pace is, of
    candidates those that are scored. under_way: candidates that are proposed and not scored; one
    that is in the middle of its stages counts in part.
    """
    if done.candidates <= 0:
        return None
    left = []
    for name in (field.name for field in fields(Used)):
        allowed, spent = getattr(budget, name), getattr(done, name)
        if allowed is not None and spent > 0:
            missing = max(0.0, allowed - getattr(used, name))
            missing += under_way if name == "candidates" else 0
            left.append(missing * 3600 * done.hours / spent)
    return min(left, default=None)


class Pace:
    """Of this process. hours_before: that earlier ones have spent."""

    def __init__(self, setting: "Setting", record: "Record", hours_before: float) -> None:
        self._budget = setting.job.budget
        self._record = record
        self._hours_before = hours_before
        self._started = time.monotonic()
        self.begin()

    def begin(self) -> None:
        """What is spent from here on says what the pace is: baselines are no candidates."""
        record, used = self._record, self.used
        told = sum(len(m) for n, m in record.members.items() if n and record.is_told(n))
        self._before = Used(told, used.example_evaluations, used.hours, used.gpu_hours)

    @property
    def used(self) -> Used:
        """All that the search has spent."""
        record = self._record
        hours = self._hours_before + (time.monotonic() - self._started) / 3600
        return Used(len(record.proposed), record.examples_used, hours, record.device_seconds / 3600)

    def seconds_left(self, under_way: float) -> float | None:
        """At the pace of this process, see `seconds_left`."""
        used, before = self.used, self._before
        done = Used(
            used.candidates - math.ceil(under_way) - before.candidates,
            used.example_evaluations - before.example_evaluations,
            used.hours - before.hours,
            used.gpu_hours - before.gpu_hours,
        )
        return seconds_left(self._budget, used, done, under_way)
