"""Scoring examples of a task on an engine: from verdicts to arrays."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.engine import Engine
from evomerge.fitness.example import Example, Verdict
from evomerge.fitness.results import Scores
from evomerge.fitness.task import Task

_LONGEST = 2_000  # characters of a reply that are kept for people


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
    return packed(examples, judged(engine, task, items, examples, shaped))


def judged(
    engine: Engine,
    task: Task,
    items: Sequence[Example],
    examples: NDArray[np.uint32],
    shaped: bool,
) -> list[Verdict]:
    """What came of each example; see `score`."""
    chosen = [items[position] for position in examples.tolist()]
    return task.scorer.judge(engine, chosen, shaped) if chosen else []


def sampled(
    examples: NDArray[np.uint32], verdicts: Sequence[Verdict], count: int
) -> dict[int, str]:
    """The replies to `count` of these examples, those of the lowest positions: of several to one
    example the first, and of a long one its beginning. Empty where nothing is written."""
    few = np.argsort(examples)[:count].tolist()
    return {int(examples[i]): verdicts[i].replies[0][:_LONGEST] for i in few if verdicts[i].replies}


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
