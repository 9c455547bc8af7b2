"""Staged scoring of a generation: who meets on which examples, who goes on, what is told.

All candidates of a generation meet on the same random examples, drawn anew for the next one; each
stage adds examples and keeps the best. Pure functions on numbers: knows nothing of models, stores
or how a score comes about.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.guard.pareto import front
from evomerge.seeds import generator

Examples = dict[str, NDArray[np.uint32]]
Values = NDArray[np.float64]


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
