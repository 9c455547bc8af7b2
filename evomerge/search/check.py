"""What can be known of a job before it runs: does it fit, what does it need, what can it show."""

import time
from typing import Any

import numpy as np

from evomerge.errors import SearchFailed
from evomerge.executor import Request
from evomerge.fitness.results import Failed
from evomerge.guard.estimates import detectable_gain
from evomerge.job import Job
from evomerge.merge.geometry import geometry
from evomerge.merge.licence import licence
from evomerge.merge.planner import make_plan
from evomerge.merge.preflight import search_bytes
from evomerge.optimizer import population
from evomerge.recipe import Recipe
from evomerge.search.setting import Examples, Setting

_SAMPLE = 64  # examples of each task that are scored to foretell the time


def check_job(job: Job) -> dict[str, Any]:
    """Open everything, score one candidate on a few examples, and tell what a search would take.

    Raises InputError as `evomerge run` would. Keys: job (every default written out), models,
    task_vector_norms (by parent, as shares of the base's norm), cosines (by pair of parents),
    dimensions, population, tasks (sizes, the gain that validation and test can detect at power
    0.8), licence, memory_bytes (of the start, with all models at hand), seconds_per_candidate,
    hours (None without a limit on candidates).
    """
    setting = Setting.open(job)
    start = _start(setting)
    seconds = _seconds_per_candidate(setting, start)
    guard, budget = job.guard, job.budget
    return {
        "job": setting.document(),
        "models": {new.name: _model(setting, new.uri) for new in setting.new_models()},
        **_geometry(setting),
        "dimensions": len(setting.space.start),
        "population": population(job.optimizer, len(setting.space.start)),
        "tasks": {
            name: {
                **sizes,
                "driving": len(setting.driving[name]),
                "monitor": len(setting.monitor[name]),
                "detectable_on_validation": detectable_gain(
                    sizes["validation"], guard.alpha / guard.validation_looks
                ),
                "detectable_on_test": detectable_gain(sizes["test"], guard.alpha),
            }
            for name, sizes in setting.sizes.items()
        },
        "licence": licence(setting.models.values()),
        "memory_bytes": search_bytes(make_plan(start, setting.models)),
        "seconds_per_candidate": seconds,
        "hours": None if budget.candidates is None else budget.candidates * seconds / 3600,
    }


def _model(setting: Setting, path: str) -> dict[str, Any]:
    model = setting.models[path]
    return {
        "uri": path,
        "sha256": model.sha,
        "parameters": sum(header.numel for header in model.headers.values()),
        "layers": model.layout.layers,
    }


def _geometry(setting: Setting) -> dict[str, dict[str, float]]:
    """Of the parents' task vectors: their norms as shares of the base's, and the cosine of each
    pair; empty without a base."""
    if setting.named.base is None:
        return {"task_vector_norms": {}, "cosines": {}}
    parents = {name: setting.models[path] for name, path in setting.named.parents.items()}
    found = geometry(setting.models[setting.named.base], parents)
    cosines = {f"{a}, {b}": cosine for (a, b), cosine in found.cosines.items()}
    return {"task_vector_norms": found.norms, "cosines": cosines}


def _start(setting: Setting) -> Recipe:
    """Where the search begins."""
    start = setting.space.decode(setting.space.start)
    if not isinstance(start, Recipe):
        raise SearchFailed(f"the start of the space is infeasible: {start.reason}")
    return start


def _seconds_per_candidate(setting: Setting, start: Recipe) -> float:
    """Of merging and of scoring all that a candidate is scored on, from a small sample."""
    sample: Examples = {t: e[: min(_SAMPLE, len(e))] for t, e in setting.driving.items()}
    executor = setting.executor()
    try:
        for _ in range(2):  # the first one warms up: parents are read, task vectors made
            began = time.perf_counter()
            request = Request(0, start, "train", sample)
            ((_, found),) = executor.evaluate([request])
            whole = time.perf_counter() - began
    finally:
        executor.close()
    if isinstance(found, Failed):
        raise SearchFailed(f"the start of the space cannot be scored: {found.reason}")
    scored = sum(len(e) for e in sample.values())
    staging = setting.job.staging
    wanted = sum(len(e) for e in setting.driving.values())
    if staging:
        wanted = int(np.mean(staging.stages)) * len(setting.tasks)
    return found.merge_seconds + (whole - found.merge_seconds) * wanted / scored
