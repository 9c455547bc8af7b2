"""One model on one task: what `evomerge eval` does."""

from pathlib import Path
from typing import Any

import numpy as np

from evomerge.engine import build
from evomerge.errors import SealedError, TaskError, nearest
from evomerge.fitness.score import score
from evomerge.fitness.task import SPLITS, Task
from evomerge.job import Engine as EngineSection
from evomerge.merge.checkpoint import Checkpoint
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
    items = task.examples(split)
    name = str(model)
    live = build(engine, {name: Checkpoint.open(model)}, name)
    try:
        live.load(Recipe.from_dict({"merge_method": "passthrough", "models": [{"model": name}]}))
        found = score(live, task, items, np.arange(len(items), dtype=np.uint32), shaped=False)
    finally:
        live.close()
    return {
        "model": name,
        "task": task.name,
        "split": split,
        "n": len(found),
        "score": found.mean,
        "standard_error": found.standard_error,
        "truncated": float(found.truncated.mean()),
    }
