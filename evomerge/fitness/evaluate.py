"""A model folder on all of a split: what `evomerge eval` and the one reading of test do."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.engine import build
from evomerge.errors import SealedError, TaskError, nearest
from evomerge.fitness.results import Scores
from evomerge.fitness.score import score
from evomerge.fitness.task import SPLITS, Split, Task, Unsealed
from evomerge.job import Engine as EngineSection
from evomerge.merge.sources import open_model
from evomerge.recipe import Recipe


def evaluate_model(
    model: Path, task_file: Path, split: str, engine: EngineSection
) -> dict[str, Any]:
    """Score a model folder on all of a split.

    Raises SealedError for the test split, ModelError and TaskError for what cannot be read.
    """
    if split not in SPLITS:
        raise TaskError(f"--split: '{split}' is no split: {nearest(split, SPLITS)}")
    if split == "test":
        raise SealedError("--split: test is sealed: only `evomerge export` reads it")
    task = Task.open(task_file)
    found = score_alone(model, [task], split, engine)[task.name]
    return {
        "model": str(model),
        "task": task.name,
        "split": split,
        "n": len(found),
        "score": found.mean,
        "standard_error": found.standard_error,
        "truncated": float(found.truncated.mean()),
    }


def score_alone(
    model: Path,
    tasks: Iterable[Task],
    split: Split,
    engine: EngineSection,
    leaves: Mapping[str, Unsealed] | None = None,
) -> dict[str, Scores]:
    """Load a model folder, unmerged, and score all of a split; by task name, without shaping.

    leaves: leave to read the test split, by task name. Raises SealedError for test without it,
    ModelError and TaskError for what cannot be read.
    """
    leaves = leaves or {}
    items = {task: task.examples(split, leaves.get(task.name)) for task in tasks}
    name = str(model)
    live = build(engine, {name: open_model(name)}, name)
    try:
        live.load(Recipe.from_dict({"merge_method": "passthrough", "models": [{"model": name}]}))
        return {
            task.name: score(live, task, all_, np.arange(len(all_), dtype=np.uint32), shaped=False)
            for task, all_ in items.items()
        }
    finally:
        live.close()
