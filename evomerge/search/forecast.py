"""What a search would take, from what a candidate costs and from who evaluates.

Knows nothing of luck: every evaluation of a stage takes the same time, none fails, and nothing but
the budget ends the search.
"""

import math
from dataclasses import dataclass

from evomerge.executor import Workers
from evomerge.optimizer import population
from evomerge.search.race import Examples
from evomerge.search.setting import Setting
from evomerge.search.settle import Cost


@dataclass(frozen=True)
class Forecast:
    """Times are in seconds.

    candidate: of a worker, one that is dropped early counted with those that are not. generation:
    of one; busy: the workers' share of it in which they work. generations: until `limit`, a key of
    the job's budget, ends the search. whole: from launch to winner. devices: at work, summed over
    them, as gpu_hours are.
    """

    candidate: float
    generation: float
    busy: float
    generations: int
    limit: str
    whole: float
    devices: float


@dataclass(frozen=True)
class _Stage:
    """Of a generation: its candidates, what an evaluation takes, and the examples in it, all tasks
    together."""

    candidates: int
    seconds: float
    examples: int


def forecast(setting: Setting, cost: Cost, workers: Workers) -> Forecast:
    """Of a setting with nothing left to 'auto'."""
    job, n, charge = setting.job, workers.count, workers.gpus or 1.0

    def evaluation(examples: Examples) -> float:
        return cost.evaluation(max(map(len, examples.values())), workers.merge_ahead)

    stages = [
        _Stage(candidates, evaluation(examples), sum(map(len, examples.values())))
        for candidates, examples in _race(setting)
    ]
    size, work = stages[0].candidates, sum(s.candidates * s.seconds for s in stages)
    generation = work / n
    if job.mode == "synchronous":  # the last round of a stage leaves workers without anything to do
        generation = sum(math.ceil(s.candidates / n) * s.seconds for s in stages)
    full, validation = evaluation(setting.train), evaluation(setting.validation)
    baselines, looks = len(setting.baselines()), job.guard.validation_looks
    before = math.ceil(baselines / n) * full
    after = (looks - 1) * full + looks * validation  # of finalists, one after the other
    each = {  # that a generation takes of each limit of the budget
        "candidates": size,
        "example_evaluations": sum(s.candidates * s.examples for s in stages),
        "hours": generation / 3600,
        "gpu_hours": charge * work / 3600,
    }
    of_baselines = {"hours": before / 3600, "gpu_hours": charge * baselines * full / 3600}
    generations = {
        key: math.ceil(max(0.0, allowed - of_baselines.get(key, 0.0)) / max(each[key], 1e-9))
        for key, allowed in job.budget
        if allowed is not None
    }
    limit = min(generations, key=generations.__getitem__)
    count = generations[limit]
    return Forecast(
        candidate=work / size,
        generation=generation,
        busy=work / max(n * generation, 1e-9),
        generations=count,
        limit=limit,
        whole=before + count * generation + after,
        devices=charge * (baselines * full + count * work + after),
    )


def _race(setting: Setting) -> list[tuple[int, Examples]]:
    """How many candidates each stage of a generation has, and the examples that it adds."""
    job, driving, staging = setting.job, setting.driving, setting.staging
    size = population(job.optimizer, job.optimizer.name, len(setting.space.coordinates))
    if staging is None:
        return [(size, driving)]
    entrants = (size, *(min(size, kept) for kept in staging.keep))
    starts = (0, *staging.stages[:-1])
    return [
        (candidates, {task: examples[start:end] for task, examples in driving.items()})
        for candidates, start, end in zip(entrants, starts, staging.stages, strict=True)
    ]
