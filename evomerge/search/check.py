"""What can be known before anything runs. Of a job: does it fit, what does it need, what can it
show. Of a task by itself: do its splits keep apart, what is a model asked."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.fitness.task import Task
from evomerge.guard.estimates import detectable_gain
from evomerge.job import Job
from evomerge.merge.geometry import geometry
from evomerge.merge.licence import licence
from evomerge.merge.planner import make_plan
from evomerge.merge.preflight import search_bytes
from evomerge.optimizer import population
from evomerge.search.setting import Setting
from evomerge.search.settle import Cost, measured, settle, start
from evomerge.search.splits import examine
from evomerge.search.wear import sealed, wear
from evomerge.store import Store, exists


def check_job(job: Job, url: str | None = None) -> dict[str, Any]:
    """Open everything, score one candidate on a few examples, and tell what a search would take.

    Raises InputError as `evomerge run` would. Keys: job (every default written out), models,
    task_vector_norms (by parent, as shares of the base's norm), cosines (by pair of parents),
    dimensions, population, settled (what was left to auto, and why), tasks (sizes; how many
    items drive the search, watch it and judge finalists, none that is left out; the gain that
    these and test can detect at power 0.8; notes on how it was understood), contamination (see
    splits.examine), worn (what searches of the store at `url` have opened of the test splits, in
    words), troubles (examples, of a small sample, that cannot be asked or graded), licence,
    memory_bytes (of the start, with all models at hand), seconds_per_candidate, hours (None
    without a limit on candidates).
    """
    setting = Setting.open(job)
    executor = setting.executor()
    try:
        setting, notes = settle(setting, executor)
        cost = measured(setting, executor)
        seconds = _seconds_per_candidate(setting, cost)
    finally:
        executor.close()
    job, dimensions = setting.job, len(setting.space.coordinates)
    guard, budget = job.guard, job.budget
    return {
        "job": setting.document(),
        "models": {new.name: _model(setting, new.uri) for new in setting.new_models()},
        **_geometry(setting),
        "dimensions": dimensions,
        "population": population(job.optimizer, job.optimizer.name, dimensions),
        "settled": notes,
        "troubles": list(cost.troubles),
        "tasks": {
            name: {
                **sizes,
                "notes": list(setting.tasks[name].notes),
                "driving": len(setting.driving[name]),
                "monitor": len(setting.monitor[name]),
                "judging": len(setting.validation[name]),
                "detectable_on_validation": detectable_gain(
                    len(setting.validation[name]), guard.alpha / guard.validation_looks
                ),
                "detectable_on_test": detectable_gain(sizes["test"], guard.alpha),
            }
            for name, sizes in setting.sizes.items()
        },
        "worn": _worn(setting, url),
        "contamination": setting.splits.contamination,
        "licence": licence(setting.models.values()),
        "memory_bytes": search_bytes(make_plan(start(setting), setting.models)),
        "seconds_per_candidate": seconds,
        "hours": None if budget.candidates is None else budget.candidates * seconds / 3600,
    }


def _worn(setting: Setting, url: str | None) -> list[str]:
    if url is None or not exists(url):
        return []
    with Store(url) as store:
        return [str(found) for found in wear(store, sealed(setting.tasks))]


def check_task(path: Path, seal: bool = False) -> dict[str, Any]:
    """What `evomerge check TASK` says, as plain data; of test it only counts and compares hashes.

    seal: write what may be known of test beside the task file first, see Task.seal.

    sealed: where that is; None where nobody asked. splits: number and hash of their items, as a
    manifest.json lists them. contamination: see splits.examine. first: the first item of train, as
    a model is asked it. Raises TaskError.
    """
    task = Task.open(path)
    sealed = task.seal() if seal else None
    task.check_splits()
    first = task.examples("train")[0]
    prompt = first.prompt if isinstance(first.prompt, str) else [asdict(t) for t in first.prompt]
    return {
        "task": task.name,
        "notes": list(task.notes),
        "sealed": None if sealed is None else str(sealed),
        "splits": task.manifest()["splits"],
        "contamination": examine([task]),
        "first": {
            "prompt": prompt,
            "target": first.target,
            "reference": first.reference,
            "choices": list(first.choices),
        },
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


def _seconds_per_candidate(setting: Setting, cost: Cost) -> float:
    """Of merging and scoring, a candidate that is dropped early counted with those that are not."""
    staging = setting.staging
    if staging is None:
        return cost.merge + cost.example * max(len(e) for e in setting.driving.values())
    size = population(
        setting.job.optimizer, setting.job.optimizer.name, len(setting.space.coordinates)
    )
    racing = np.array((size, *staging.keep)) / size
    fewest = min(len(examples) for examples in setting.driving.values())
    added = np.diff(np.minimum((0, *staging.stages), fewest))
    return float(racing.sum() * cost.merge + (racing * added).sum() * cost.example)
