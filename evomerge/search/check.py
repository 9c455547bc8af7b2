"""What can be known before anything runs. Of a job: does it fit, what does it need, what can it
show. Of a task by itself: do its splits keep apart, what is a model asked."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from evomerge.fitness.task import Task
from evomerge.guard.estimates import detectable_gain
from evomerge.job import Job
from evomerge.merge.geometry import geometry
from evomerge.merge.licence import licence
from evomerge.merge.planner import make_plan
from evomerge.merge.preflight import search_bytes
from evomerge.optimizer import choose, population
from evomerge.search.forecast import forecast
from evomerge.search.setting import Setting
from evomerge.search.settle import measured, settle, start
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
    workers (see executor.Workers; allowed: how many the job asks for at most, None for no limit),
    memory_bytes (of the start, of each worker, with all models at hand, and with a second live
    model where it merges ahead), forecast (see forecast.Forecast).
    """
    setting = Setting.open(job)
    executor = setting.executor()
    try:
        setting, notes = settle(setting, executor)
        cost = measured(setting, executor)
        workers = executor.workers()
    finally:
        executor.close()
    plan, optimizer = make_plan(start(setting), setting.models), setting.job.optimizer
    return {
        **_outline(setting, url),
        "models": {new.name: _model(setting, new.uri) for new in setting.new_models()},
        **_geometry(setting),
        "population": population(optimizer, optimizer.name, len(setting.space.coordinates)),
        "settled": notes,
        "troubles": list(cost.troubles),
        "workers": {**asdict(workers), "allowed": _allowed(setting.job)},
        "memory_bytes": search_bytes(plan) + (plan.bytes if workers.merge_ahead else 0),
        "forecast": asdict(forecast(setting, cost, workers)),
    }


def plan_job(job: Job, url: str | None = None) -> dict[str, Any]:
    """What `check_job` says that can be told in moments: the headers of models and the records of
    tasks are read, nothing is merged, scored or hashed.

    Raises InputError as `evomerge run` would. Keys as of check_job: job, dimensions, population,
    tasks, worn, contamination, licence, memory_bytes (without a second live model); optimizer (its
    name, chosen where the job leaves it to auto); generations (until each limit of the budget that
    time has no part in, where no stage drops a candidate).
    """
    setting = Setting.open(job)
    _ = setting.optimizer()  # refused here as by a launch
    name: str = job.optimizer.name
    if name == "auto":
        objectives = len(job.objectives) or 1
        name = choose(job.optimizer, setting.space.coordinates, objectives, setting.noisy).name
    size = population(job.optimizer, name, len(setting.space.coordinates))
    examples = size * sum(map(len, setting.driving.values()))
    each = {"candidates": size, "example_evaluations": examples}
    return {
        **_outline(setting, url),
        "optimizer": name,
        "population": size,
        "memory_bytes": search_bytes(make_plan(start(setting), setting.models)),
        "generations": {
            key: -(-limit // each[key])
            for key, limit in job.budget
            if key in each and limit is not None
        },
    }


def _outline(setting: Setting, url: str | None) -> dict[str, Any]:
    """What an opened job says of itself."""
    guard = setting.job.guard
    return {
        "job": setting.document(),
        "dimensions": len(setting.space.coordinates),
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
    }


def _allowed(job: Job) -> int | None:
    """Workers that the job asks for at most."""
    section = job.executor
    if section.kind == "inline":
        return 1
    return None if section.workers == "auto" else section.workers


def _worn(setting: Setting, url: str | None) -> list[str]:
    if url is None or not exists(url):
        return []
    with Store(url) as store:
        return [str(found) for found in wear(store, sealed(setting.tasks))]


def check_task(path: Path, seal: bool = False) -> dict[str, Any]:
    """What `evomerge check TASK` says, as plain data; of test it only counts and compares hashes.

    seal: write what may be known of test beside the task file, see Task.seal.

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
