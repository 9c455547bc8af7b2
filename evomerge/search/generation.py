"""A generation on its way: through the stages of its race, then a look at the monitor slice."""

from collections.abc import Callable, Sequence

import numpy as np

from evomerge.errors import SearchFailed
from evomerge.fitness.results import Evaluation, Failed, Scored
from evomerge.optimizer import Genotypes
from evomerge.search import race
from evomerge.search.flow import Flow, Then, Wanted
from evomerge.search.record import Member
from evomerge.search.setting import Setting
from evomerge.search.standing import Standing


class Generation:
    """Candidates that were proposed together. over: is called with it once everything that was
    missing of it has been evaluated."""

    def __init__(
        self,
        number: int,
        members: Sequence[Member],
        step_size: float | None,
        setting: Setting,
        standing: Standing,
        flow: Flow,
        over: Callable[["Generation"], None],
    ) -> None:
        self.number, self.members, self.step_size = number, members, step_size
        self._monitor = setting.monitor
        self._standing = standing
        self._flow, self._over = flow, over
        self._ids = {member.id: member for member in members if member.feasible}
        staging, driving = setting.staging, setting.driving
        self._examples = [driving]
        if staging is not None:
            self._examples = race.draw(driving, staging.stages, setting.job.seed, number)
        self._race = race.Race(list(self._ids), staging.keep if staging else (), self._values)
        self._failures: list[tuple[int, int, str]] = []  # stage, slot, reason

    @property
    def genotypes(self) -> Genotypes:
        """(n, d), in slot order."""
        return np.stack([m.genotype for m in self.members if m.genotype is not None])

    @property
    def reached(self) -> dict[int, int]:
        """The last stage that each id took part in."""
        return self._race.reached

    @property
    def progress(self) -> tuple[int, int]:
        """How many candidates of the present stage are scored, and all of them."""
        return self._race.progress

    @property
    def missing(self) -> float:
        """What has not landed of it, in candidates; see Race."""
        return self._race.missing

    def begin(self) -> None:
        """Have everything evaluated that is missing of it."""
        self._send(self._race.begin())
        self._go_on()

    def _send(self, sent: list[tuple[int, int]]) -> None:
        for id, stage in sent:

            def landed(found: Evaluation, id: int = id, stage: int = stage) -> None:
                if isinstance(found, Failed):
                    self._failures.append((stage, self._ids[id].slot, found.reason))
                self._send(self._race.landed(id, stage, isinstance(found, Scored)))
                self._go_on()

            self._want(self._ids[id], "train", stage, self._examples[stage], landed)

    def _go_on(self) -> None:
        if self._race.is_lost:
            last = max(stage for stage, _, _ in self._failures)
            _, _, reason = min(failure for failure in self._failures if failure[0] == last)
            raise SearchFailed(
                f"every candidate of generation {self.number} failed, the first one by: {reason}"
            )
        if not self._race.is_over:
            return
        leader = self._standing.leader(self.members)
        if leader is None or not all(len(examples) for examples in self._monitor.values()):
            self._over(self)
            return
        self._want(leader, "monitor", 0, self._monitor, lambda _: self._over(self))

    def _want(
        self, member: Member, purpose: str, stage: int, examples: race.Examples, then: Then
    ) -> None:
        self._flow.want(Wanted(self.number, member, purpose, stage, "train", examples, then))

    def _values(self, ids: Sequence[int], stages: int) -> race.Values:
        return self._standing.values([self._ids[id] for id in ids], stages)
