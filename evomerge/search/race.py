"""Staged scoring of a generation: who meets on which examples, who goes on, what is told.

All candidates of a generation meet on the same random examples, drawn anew for the next one; each
stage adds examples and keeps the best. Knows nothing of models, stores or how a score comes about.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.guard.pareto import front
from evomerge.seeds import generator

Examples = dict[str, NDArray[np.uint32]]
Values = NDArray[np.float64]


class Race:
    """Who of a generation goes on to which stage, whichever order scores land in.

    reached: the last stage that each candidate was sent to.
    """

    def __init__(
        self,
        entrants: Sequence[int],
        keep: Sequence[int],
        values: Callable[[Sequence[int], int], Values],
    ) -> None:
        """keep: how many go on from each stage but the last. values: of candidates that were
        scored in so many stages, what ranks them, each by itself; see `order`. It is asked for once
        of each candidate and stage."""
        self._keep = keep
        self._values = values
        self._sent: list[list[int]] = [list(entrants), *([] for _ in keep)]
        self._landed: list[dict[int, bool]] = [{} for _ in self._sent]
        self._worth: list[dict[int, Values]] = [{} for _ in keep]  # of those that were scored
        self._sizes = self._expected()
        self.reached = dict.fromkeys(entrants, 0)

    def begin(self) -> list[tuple[int, int]]:
        """Everybody's first stage: who is to be scored, and in which one."""
        return [(entrant, 0) for entrant in self._sent[0]]

    def landed(self, entrant: int, stage: int, scored: bool) -> list[tuple[int, int]]:
        """One has been scored in a stage, or failed there; gives who is to be scored now, and in
        which stage, as nothing that is still under way can change that."""
        self._landed[stage][entrant] = scored
        if not scored:
            self._sizes = self._expected()
        elif stage < len(self._keep):
            self._worth[stage][entrant] = self._values([entrant], stage + 1)[0]
        return [sent for at in range(stage, len(self._keep)) for sent in self._sent_on(at)]

    def _sent_on(self, stage: int) -> list[tuple[int, int]]:
        """Who goes on from a stage by now: whoever is among the best even if all that are under way
        turned out better."""
        worth, following = self._worth[stage], self._sent[stage + 1]
        missing = self._sizes[stage] - len(self._landed[stage])
        places = self._keep[stage] - missing
        if places <= len(following) or not worth:
            return []
        scored = [entrant for entrant in self._sent[0] if entrant in worth]
        values = np.array([worth[entrant] for entrant in scored])
        if missing and values.ndim > 1:
            return []  # whom nobody dominates depends on all of them
        best = {scored[i] for i in order(values)[:places]}
        new = [one for one in scored if one in best and self.reached[one] == stage]
        following += new
        self.reached |= dict.fromkeys(new, stage + 1)
        return [(entrant, stage + 1) for entrant in new]

    def _expected(self) -> list[int]:
        """How many each stage has, were nobody to fail any more."""
        sizes = [len(self._sent[0])]
        for keep, landed in zip(self._keep, self._landed, strict=False):
            sizes.append(min(keep, sizes[-1] - sum(not scored for scored in landed.values())))
        return sizes

    @property
    def progress(self) -> tuple[int, int]:
        """Of the first stage that is not complete, or the last: how many have landed, and all."""
        counts = [*zip(map(len, self._landed), self._sizes, strict=True)]
        return next((one for one in counts if one[0] < one[1]), counts[-1])

    @property
    def missing(self) -> float:
        """So many candidates are as much work as what has not landed; an evaluation of one stage
        counts as much as of another."""
        landed, of = sum(map(len, self._landed)), sum(self._sizes)
        return len(self._sent[0]) * (of - landed) / max(1, of)

    @property
    def is_over(self) -> bool:
        """Whether everybody who is in it has landed."""
        return [len(landed) for landed in self._landed] == self._sizes

    @property
    def is_lost(self) -> bool:
        """Whether it is over because all failed who were in some stage."""
        return self.is_over and bool(self._sent[0]) and not any(self._landed[-1].values())


def draw(
    driving: Mapping[str, NDArray[np.uint32]], stages: Sequence[int], seed: int, generation: int
) -> list[Examples]:
    """The examples that each stage adds, by task; stage i ends at stages[i] of each task."""
    found: list[Examples] = [{} for _ in stages]
    for index, (task, examples) in enumerate(driving.items()):
        order = generator(seed, f"subset {index}", generation).permutation(examples)
        start = 0
        for stage, end in enumerate(stages):
            found[stage][task] = order[start:end]
            start = end
    return found


def order(values: Values) -> list[int]:
    """Positions from the best to the worst of (n,) or (n, objectives), higher being better.

    Equal values keep their order. Of several objectives, those that nobody dominates come first,
    then those that only they dominate, and so on; within each, by the first objective.
    """
    if values.ndim == 1:
        return [int(i) for i in np.argsort(-values, kind="stable")]
    left, found = np.arange(len(values)), []
    while len(left):
        best = left[front(values[left])]
        found += [int(i) for i in best[np.argsort(-values[best, 0], kind="stable")]]
        left = np.setdiff1d(left, best)
    return found


def told(reached: NDArray[np.int_], values: Values) -> Values:
    """What an optimizer is told after a race: values in the order in which the race ended.

    reached: (n,) the last stage that each candidate was scored in; values: (n,) or
    (n, objectives) on all that it was scored on. Whoever was left behind is not above anyone who
    went on: its value is lowered to just below the least of theirs, in each objective, those who
    were left together keeping their order. So ranks within a
    generation are those of the race, which is all that CMA-ES hears, and values stay comparable
    between generations for optimizers that look at all of them.
    """
    found = values.astype(np.float64)
    for stage in sorted(set(reached.tolist()), reverse=True):
        ahead, here = reached > stage, np.flatnonzero(reached == stage)
        if ahead.any():
            least = np.atleast_1d(found[ahead].min(axis=0))
            for column, limit in zip(found.reshape(len(found), -1).T, least, strict=True):
                for i in here[np.argsort(-column[here], kind="stable")]:
                    if column[i] < limit:
                        break
                    limit = column[i] = np.nextafter(limit, -np.inf)
    return found
