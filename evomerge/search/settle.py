"""What a job leaves to evomerge, decided before the search starts: optimizer and stages.

The decisions are written into the job, so that a search that is resumed keeps to them.
"""

import time
from dataclasses import dataclass, replace

from evomerge.coordinates import start_of
from evomerge.errors import SearchFailed
from evomerge.executor import Executor, Request, given
from evomerge.fitness.results import Failed, troubles
from evomerge.job import Staging
from evomerge.optimizer import choose, population
from evomerge.recipe import Recipe
from evomerge.search.race import Examples
from evomerge.search.setting import Setting

_SAMPLE = 64  # examples of each task that are scored to foretell the time
_STAGES = (10, 20, 40)  # small ones give more generations: benchmarks/landscape.py
_KEPT = (10 / 14, 7 / 14)  # shares of a generation that go on; of 14 in the measurements


@dataclass(frozen=True)
class Cost:
    """Of one candidate, in seconds: of merging it, and of scoring it on one example of each
    task. troubles: what was found on the way, for people."""

    merge: float
    example: float
    troubles: tuple[str, ...] = ()

    def evaluation(self, examples: int, merge_ahead: bool) -> float:
        """Of so many examples of each task; a merge that goes on beside the scoring of another
        candidate takes time only as far as it is the longer of the two."""
        scoring = self.example * examples
        return max(self.merge, scoring) if merge_ahead else self.merge + scoring


def start(setting: Setting) -> Recipe:
    """Where the search begins. Raises SearchFailed when that is no model."""
    found = setting.space.decode(start_of(setting.space.coordinates))
    if not isinstance(found, Recipe):
        raise SearchFailed(f"the start of the space is infeasible: {found.reason}")
    return found


def measured(setting: Setting, executor: Executor) -> Cost:
    """The cost of the space's start, on a small sample of train. Raises SearchFailed."""
    sample: Examples = {t: e[: min(_SAMPLE, len(e))] for t, e in setting.driving.items()}
    request = Request(0, start(setting), "train", sample)
    for _ in range(2):  # the first one warms up: parents are read, task vectors made
        began = time.perf_counter()
        (landed,) = executor.evaluate(given([request]))
        whole = time.perf_counter() - began
    found = landed.evaluation
    if isinstance(found, Failed):
        raise SearchFailed(f"the start of the space cannot be scored: {found.reason}")
    seconds = max(0.0, whole - found.merge_seconds)
    example = seconds / min(len(e) for e in sample.values())
    return Cost(found.merge_seconds, example, tuple(troubles(found.tasks)))


def stages(cost: Cost, examples: int, size: int) -> Staging:
    """Stages for generations of `size` candidates and `examples` of each task.

    Each stage merges again, so that one whose examples cost less than a merge saves nothing and is
    left out; where even the last one does, it grows to what a merge costs.
    """
    worth = cost.merge / max(cost.example, 1e-9)
    last = min(examples, max(_STAGES[-1], round(worth)))
    found = [n for n in _STAGES[:-1] if worth <= n < last]
    kept = [max(1, round(share * size)) for share in _KEPT[len(_KEPT) - len(found) :]]
    return Staging(stages=(*found, last), keep=tuple(kept))


def settle(setting: Setting, executor: Executor) -> tuple[Setting, list[str]]:
    """The setting with nothing left to 'auto', and why each choice was made, in words.

    Raises JobError where the optimizer cannot search this space or these objectives.
    """
    _ = setting.optimizer()
    job, notes = setting.job, []
    coordinates, objectives = setting.space.coordinates, len(job.objectives) or 1
    optimizer = job.optimizer
    if optimizer.name == "auto":
        chosen = choose(optimizer, coordinates, objectives, setting.noisy)
        optimizer = optimizer.model_copy(update={"name": chosen.name})
        notes.append(f"optimizer: {chosen.name}, as {chosen.reason}")
    staging = job.staging
    if staging == "auto":
        cost = measured(setting, executor)
        examples = min(len(e) for e in setting.driving.values())
        size = population(optimizer, optimizer.name, len(coordinates))
        staging = stages(cost, examples, size)
        notes.append(
            f"staging: {list(staging.stages)} examples, keep {list(staging.keep)}, as a merge "
            f"takes {cost.merge:.3g} s and an example {cost.example:.3g} s"
        )
    job = job.model_copy(update={"optimizer": optimizer, "staging": staging})
    return replace(setting, job=job), notes
