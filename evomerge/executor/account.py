"""Where the time of a device went, kept by whoever holds it. Knows nothing of Ray or of engines."""

import time

from evomerge.devices import Device
from evomerge.fitness.results import Evaluation, Scored


class Account:
    """Of one device, for as long as an executor is open. See Device, whose fields these are.

    A device is held once or not at all at a time; who replaces its worker gives it back and holds
    it again.
    """

    def __init__(self, name: str, gpus: float) -> None:
        self.name = name
        self.gpus = gpus
        self._held = self._opening = self._merging = self._scoring = self._lost = 0.0
        self._evaluations = 0
        self._since: float | None = None  # on the monotonic clock, where it is held now

    @property
    def charge(self) -> float:
        """GPUs that an evaluation here is charged for: see Landed."""
        return self.gpus or 1.0

    def hold(self, since: float) -> None:
        """From this moment of the monotonic clock on."""
        self._since = since

    def give_back(self) -> None:
        """Until now; without effect where it is not held."""
        self._held, self._since = self._held_until_now(), None

    def opened(self, seconds: float) -> None:
        """Models and tasks were opened, or somebody tried to."""
        self._opening += seconds

    def landed(self, evaluation: Evaluation) -> None:
        """An evaluation came to its end. One that failed counts as scoring: what of it was merging
        nobody knows."""
        merging = evaluation.merge_seconds if isinstance(evaluation, Scored) else 0.0
        self._merging += merging
        self._scoring += evaluation.seconds - merging
        self._evaluations += 1

    def lost(self, seconds: float) -> None:
        """An evaluation came to no end."""
        self._lost += seconds

    def device(self) -> Device:
        """As it stands now."""
        return Device(
            name=self.name,
            gpus=self.gpus,
            held=self._held_until_now(),
            opening=self._opening,
            merging=self._merging,
            scoring=self._scoring,
            lost=self._lost,
            evaluations=self._evaluations,
        )

    def _held_until_now(self) -> float:
        return self._held + (0.0 if self._since is None else time.monotonic() - self._since)
