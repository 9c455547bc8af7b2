"""What a search has spent, and how long it will take from here."""

import time

from evomerge.guard.review import Used
from evomerge.search.record import Record
from evomerge.search.setting import Setting


class Pace:
    """Of this process. hours_before: that earlier ones have spent."""

    def __init__(self, setting: Setting, record: Record, hours_before: float) -> None:
        self._budget = setting.job.budget
        self._record = record
        self._hours_before = hours_before
        self._started = time.monotonic()
        self._examples_before = record.examples_used
        self._device_seconds_before = record.device_seconds
        self._fresh = 0  # candidates that this process scored, stages counted apart

    def heard(self, purpose: str) -> None:
        """An evaluation was made."""
        self._fresh += purpose == "train"

    @property
    def used(self) -> Used:
        """All that the search has spent."""
        hours = self._hours_before + (time.monotonic() - self._started) / 3600
        record = self._record
        devices = record.device_seconds / 3600
        return Used(len(record.proposed), record.examples_used, hours, devices)

    def seconds_left(self, under_way: int) -> float | None:
        """For whichever limit of the budget comes first; None before anything was scored.

        under_way: candidates that are proposed and not scored.
        """
        if not self._fresh:
            return None
        elapsed = time.monotonic() - self._started
        budget, used, left = self._budget, self.used, []
        if budget.candidates is not None:
            missing = max(0, budget.candidates - used.candidates) + under_way
            left.append(missing * elapsed / self._fresh)
        if budget.example_evaluations is not None:
            pace = elapsed / max(1, used.example_evaluations - self._examples_before)
            left.append(max(0, budget.example_evaluations - used.example_evaluations) * pace)
        if budget.hours is not None:
            left.append(max(0.0, budget.hours - used.hours) * 3600)
        if budget.gpu_hours is not None:
            spent = max(1e-9, self._record.device_seconds - self._device_seconds_before)
            missing_seconds = max(0.0, budget.gpu_hours - used.gpu_hours) * 3600
            left.append(missing_seconds * elapsed / spent)
        return min(left)
