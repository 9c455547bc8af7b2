"""Scoring examples of a task on an engine: from verdicts to arrays."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.engine import Engine
from evomerge.fitness.example import Example, Verdict
from evomerge.fitness.results import Scores
from evomerge.fitness.task import Task


def score(
    engine: Engine,
    task: Task,
    items: Sequence[Example],
    examples: NDArray[np.uint32],
    shaped: bool,
) -> Scores:
    """Score the examples at these positions of `items` on the engine's live model.

    shaped: also take the log-likelihood of the reference answers. Raises BrokenModel.
    """
    chosen = [items[position] for position in examples.tolist()]
    return packed(examples, task.scorer.judge(engine, chosen, shaped) if chosen else [])


def packed(examples: NDArray[np.uint32], verdicts: Sequence[Verdict]) -> Scores:
    """Verdicts on the examples at these positions, as arrays."""
    return Scores(
        examples,
        np.array([found.score for found in verdicts], np.float32),
        np.array([found.shaping for found in verdicts], np.float32),
        np.array([found.truncated for found in verdicts], np.bool_),
        np.array([found.tokens for found in verdicts], np.uint32),
        np.array([found.overlong for found in verdicts], np.bool_),
        {
            position: found.failure
            for position, found in zip(examples.tolist(), verdicts, strict=True)
            if found.failure is not None
        },
    )
