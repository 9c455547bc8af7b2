"""A task by itself: do its splits keep apart, and what a model is asked. Opens nothing of test but
to count and hash it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from evomerge.fitness.task import Task


def check_task(path: Path) -> dict[str, Any]:
    """What `evomerge check TASK` says, as plain data.

    splits: number and hash of their items, as a manifest.json lists them. first: the first item of
    train, as a model is asked it. Raises TaskError.
    """
    task = Task.open(path)
    task.check_splits()
    first = task.examples("train")[0]
    prompt = first.prompt if isinstance(first.prompt, str) else [asdict(t) for t in first.prompt]
    return {
        "task": task.name,
        "notes": list(task.notes),
        "splits": task.manifest()["splits"],
        "first": {
            "prompt": prompt,
            "target": first.target,
            "reference": first.reference,
            "choices": list(first.choices),
        },
    }
