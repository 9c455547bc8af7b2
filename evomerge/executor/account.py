"""Where the time of devices went, kept by whoever holds them. Knows nothing of Ray and engines."""

import time
from collections.abc import Iterator, Sequence
from itertools import count

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

    @property
    def is_held(self) -> bool:
        """Whether somebody holds it now."""
        return self._since is not None

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


class Accounts:
    """Of the devices that an executor has held since it was opened, each of so many GPUs."""

    def __init__(self, gpus: float) -> None:
        self._gpus = gpus
        self._all: dict[str, Account] = {}

    def held(self, host: str, gpus: Sequence[str]) -> Account:
        """Of the device that a new worker is given there, from now on: that of a worker before it,
        where there was one and nobody has it now. gpus: their numbers."""
        for name in _names(host, gpus):
            account = self._all.setdefault(name, Account(name, self._gpus))
            if not account.is_held:
                break
        account.hold(time.monotonic())
        return account

    def devices(self) -> tuple[Device, ...]:
        """As they stand now."""
        return tuple(account.device() for account in self._all.values())


def _names(host: str, gpus: Sequence[str]) -> Iterator[str]:
    """Of the devices there: GPUs by their numbers, and again where several workers share them;
    cores by counting, for nobody holds a certain one."""
    if not gpus:
        yield from (f"{host}/cpu {n}" for n in count())
    name = f"{host}/gpu {'+'.join(gpus)}"
    yield name
    yield from (f"{name} ({n})" for n in count(2))
