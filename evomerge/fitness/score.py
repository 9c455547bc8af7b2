"""Scoring: examples on an engine, one score and one log-likelihood each.

The score is what is reported and promoted. The log-likelihood of the reference answer only shapes
what an optimizer climbs, where every score is still 0.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.engine import Engine
from evomerge.fitness.results import Scores
from evomerge.fitness.task import Example, Task

# Nats: a token that the model gives less than 5% is as wrong as can be. Without a floor a model
# that guesses evenly looks better than one that is half right and sure of the other half, and a
# search settles there.
_FLOOR = -3.0


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
    chosen = [items[int(position)] for position in examples]
    n = len(chosen)
    shaping, truncated = np.zeros(n, np.float32), np.zeros(n, np.bool_)
    tokens = np.zeros(n, np.uint32)
    teacher_forced = task.settings.teacher_forced
    if shaped or teacher_forced:
        found = engine.likelihoods([(item.prompt, item.target) for item in chosen])
        shaping = np.array([shape(item.token_log_likelihoods) for item in found], np.float32)
        scores = np.array([item.greedy for item in found], np.float32)
    if not teacher_forced:
        settings = task.settings.generate
        replies = engine.generate(
            [item.prompt for item in chosen], settings.max_new_tokens, settings.stop
        )
        truncated = np.array([reply.truncated for reply in replies], np.bool_)
        tokens = np.array([reply.tokens for reply in replies], np.uint32)
        scores = np.array(
            [exact_match(r.text, item.target) for r, item in zip(replies, chosen, strict=True)],
            np.float32,
        )
    return Scores(examples, scores, shaping, truncated, tokens)


def shape(token_log_likelihoods: Sequence[float]) -> float:
    """The mean over an answer's tokens, each not below -3 nats: in [-3, 0]."""
    return sum(max(_FLOOR, value) for value in token_log_likelihoods) / len(token_log_likelihoods)


def exact_match(reply: str, target: str) -> float:
    """1 if both texts are equal after Unicode normalisation (NFKC) and folding of white space."""
    return float(_normalized(reply) == _normalized(target))


def _normalized(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip()
