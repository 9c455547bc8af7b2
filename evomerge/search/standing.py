"""How candidates stand against each other: what ranks them, who leads, what nobody beats.

Reads the record; scores nothing and writes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from evomerge.fitness.objective import Size, merit
from evomerge.fitness.results import Scored
from evomerge.guard import pareto
from evomerge.guard.review import Review, review
from evomerge.guard.selection import Tried
from evomerge.search import race
from evomerge.search.record import Member, Record
from evomerge.search.setting import Setting
from evomerge.store import Outcome


class Standing:
    """The state of a race over generations.

    incumbent: the best candidate that was scored to the end. mean: plain score of those of the
    last generation. tried: all that was proposed and scored, by recipe. reviews: of every
    generation since there is an incumbent. hypervolume: of the front so far; None with one
    objective.
    """

    def __init__(self, setting: Setting, record: Record) -> None:
        self._setting = setting
        self._record = record
        self._front: list[Member] = []
        self._sizes: dict[int, Size] = {}
        self._reference: race.Values | None = None
        self.incumbent: Member | None = None
        self.mean: float | None = None
        self.tried = Tried()
        self.reviews: list[Review] = []
        self.hypervolume: float | None = None

    def measure_from(self, baselines: Mapping[str, Scored]) -> dict[int, Outcome]:
        """How the baselines come out, by id, given their results on all of train; where there are
        several objectives they fix the point that hypervolume is measured from."""
        members, objective = self._record.members[0], self._record.objective
        found = {m.id: self._outcome(m, baselines[m.name]) for m in members}
        if objective.names:
            values = [outcome.objectives for outcome in found.values()]
            self._reference = pareto.reference(np.array(values))
        return found

    def values(self, members: Sequence[Member], stages: int | None = None) -> race.Values:
        """What ranks candidates, (n,) or (n, objectives), on the examples of the first `stages`
        or of all that they were scored on; those without a result are below all others."""
        merits = [self._merit(member, stages) for member in members]
        values, violations = [found for found, _ in merits], [broken for _, broken in merits]
        return merit(values, violations, len(self._record.objective.names) or 1)

    def _merit(self, member: Member, stages: int | None) -> tuple[tuple[float, ...] | None, float]:
        """Values and violation."""
        scored = self._record.on_train(member.id, stages) if member.feasible else None
        if scored is None:
            return None, 0.0
        objective = self._record.objective
        return objective.values(scored, self._size(member)), objective.violation(scored)

    def outcomes(
        self, members: Sequence[Member], reached: Mapping[int, int]
    ) -> tuple[dict[int, Outcome], race.Values]:
        """How each candidate of a race came out, by id, and what the optimizer is told, in slot
        order. reached: the last stage that each id took part in."""
        told = self.values(members)
        outcomes = {}
        for member in members:
            scored = self._record.on_train(member.id) if member.feasible else None
            outcomes[member.id] = Outcome() if scored is None else self._outcome(member, scored)
        # Whoever breaks a constraint, or has no result, is below all others wherever it ended.
        raced = [i for i, m in enumerate(members) if outcomes[m.id].violation == 0]
        if raced:
            told[raced] = race.told(np.array([reached[members[i].id] for i in raced]), told[raced])
        for member, value in zip(members, told, strict=True):
            first = float(np.ravel(value)[0])
            outcomes[member.id] = replace(outcomes[member.id], told=first)
        return outcomes, told

    def leader(self, members: Sequence[Member]) -> Member | None:
        """Who would be the incumbent once these had competed for it."""
        leader = self.incumbent
        for member in self._complete(members):
            if leader is None or self._record.rank(member.id) > self._record.rank(leader.id):
                leader = member
        return leader

    def _complete(self, members: Sequence[Member]) -> list[Member]:
        """Those that were scored to the end."""
        last = len(self._setting.staging.stages) - 1 if self._setting.staging else 0
        ends = [self._record.evaluation(member.id, "train", last) for member in members]
        return [m for m, end in zip(members, ends, strict=True) if isinstance(end, Scored)]

    def take(self, members: Sequence[Member]) -> list[Member]:
        """Let the candidates of a generation count as tried, and those that were scored to
        the end compete to be the incumbent; gives the latter."""
        record = self._record
        for member in members:
            scored = record.on_train(member.id)
            if scored is not None and member.recipe_sha is not None:
                shares = record.objective.shares(scored)
                self.tried.add(member.recipe_sha, scored.tasks, shares)
        complete = self._complete(members)
        plain = [record.objective.score(record.scored(m.id)) for m in complete]
        self.mean = float(np.mean(plain)) if plain else None
        self.incumbent = self.leader(members)
        return complete

    def review(self, complete: Sequence[Member], monitor: Scored | None) -> dict[str, Any] | None:
        """The guard's review of the incumbent, as it is stored, with the front of several
        objectives. complete: of `take`; monitor: the incumbent on the monitor slice."""
        if self.incumbent is None:
            return None
        record, owner = self._record, self.incumbent
        on_train = record.scored(owner.id)
        shrunk = self.tried.estimate(owner.recipe_sha or "")
        shares = record.objective.shares(on_train)
        self.reviews.append(review(owner.id, on_train, monitor, shrunk, shares))
        return asdict(self.reviews[-1]) | self._pareto(complete)

    def knees(self, count: int) -> list[Member]:
        """Of several objectives, up to `count` candidates that stand for the front; else none."""
        if not self._front:
            return []
        values = [self._shown(m, self._record.scored(m.id)) for m in self._front]
        return [self._front[i] for i in pareto.knees(np.array(values), count)]

    def _pareto(self, complete: Sequence[Member]) -> dict[str, Any]:
        """The front with these candidates, of those that break no constraint, and its volume."""
        record = self._record
        if self._reference is None:
            return {}
        keeping = [m for m in complete if record.objective.violation(record.scored(m.id)) == 0]
        once: dict[str | None, Member] = {}  # a recipe that comes again is no other trade-off
        for member in (*self._front, *keeping):
            once.setdefault(member.recipe_sha, member)
        members = list(once.values())
        if not members:
            return {"front": [], "hypervolume": 0.0}
        values = np.array([self._shown(m, record.scored(m.id)) for m in members])
        kept = pareto.front(values)
        self._front = [members[i] for i in kept]
        self.hypervolume = pareto.hypervolume(values[kept], self._reference)
        return {"front": [m.id for m in self._front], "hypervolume": self.hypervolume}

    def _outcome(self, member: Member, scored: Scored) -> Outcome:
        """But for what is told."""
        objective = self._record.objective
        several = self._shown(member, scored) if objective.names else None
        return Outcome(None, several, objective.violation(scored))

    def _shown(self, member: Member, scored: Scored) -> tuple[float, ...]:
        """Its values of each objective, without shaping."""
        return self._record.objective.values(scored, self._size(member), shaped=False)

    def _size(self, member: Member) -> Size | None:
        """Of a candidate's model, where the objective asks for it."""
        if not self._record.objective.needs_size:
            return None
        if member.id not in self._sizes:  # it takes a plan of the whole merge
            self._sizes[member.id] = self._setting.size(self._record.recipe(member))
        return self._sizes[member.id]
