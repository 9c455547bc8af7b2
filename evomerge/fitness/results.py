"""What scoring gives: per-example results of a task, and the evaluation of a candidate.

Values only; knows nothing of how they came about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Scores:
    """Results of one task on some of a split's examples.

    examples: (n,) positions in the split. scores: (n,) in [0, 1]. shaping: (n,) mean
    log-likelihood per token of the reference answer, in [-3, 0]; zeros where not asked for.
    truncated: (n,) whether the token limit cut the reply off. tokens: (n,) generated for the
    reply; zeros where nothing is generated. overlong: (n,) whether the prompt did not fit into the
    model's context. failures: why a reply could not be graded and counts 0, by position.
    """

    examples: NDArray[np.uint32]
    scores: NDArray[np.float32]
    shaping: NDArray[np.float32]
    truncated: NDArray[np.bool_]
    tokens: NDArray[np.uint32]
    overlong: NDArray[np.bool_]
    failures: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def mean(self) -> float:
        """The plain score: what is reported."""
        return float(self.scores.mean(dtype=np.float64))

    @property
    def standard_error(self) -> float:
        """Of the mean; 0 for a single example."""
        n = len(self)
        return float(self.scores.std(ddof=1, dtype=np.float64) / n**0.5) if n > 1 else 0.0

    @property
    def void(self) -> bool:
        """Whether there is no example that could be asked and graded."""
        failed = np.isin(self.examples, np.array([*self.failures], np.uint32))
        return bool((self.overlong | failed).all())

    def fitness(self, shaping: float) -> float:
        """The plain score plus `shaping` times the mean log-likelihood: what is climbed."""
        return self.mean + shaping * float(self.shaping.mean(dtype=np.float64))

    def only(self, examples: NDArray[np.uint32]) -> "Scores":
        """These examples alone, in this order. Raises KeyError when one was not scored."""
        order = np.argsort(self.examples, kind="stable")
        at = np.searchsorted(self.examples, examples, sorter=order)
        rows = order[np.minimum(at, len(order) - 1)]
        if not np.array_equal(self.examples[rows], examples):
            missing = examples[self.examples[rows] != examples]
            raise KeyError(int(missing[0]))
        return Scores(
            examples,
            self.scores[rows],
            self.shaping[rows],
            self.truncated[rows],
            self.tokens[rows],
            self.overlong[rows],
            {at: self.failures[at] for at in examples.tolist() if at in self.failures},
        )

    @classmethod
    def joined(cls, parts: Sequence["Scores"]) -> "Scores":
        """Parts that were scored one after the other, as one."""
        return cls(
            np.concatenate([part.examples for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.shaping for part in parts]),
            np.concatenate([part.truncated for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.overlong for part in parts]),
            {at: reason for part in parts for at, reason in part.failures.items()},
        )


@dataclass(frozen=True)
class Scored:
    """An evaluation that came to its end.

    tasks: results by task name. merge_seconds, seconds: wall time of merging, and of all of it.
    replies: to a few examples, for people to read, by task and position; they go into the store,
    and nobody holds them.
    """

    tasks: Mapping[str, Scores]
    merge_seconds: float
    seconds: float
    replies: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    def score(self, weights: Mapping[str, float]) -> float:
        """The weighted mean over the tasks of the plain scores."""
        return weighted_mean({t: s.mean for t, s in self.tasks.items()}, weights)


@dataclass(frozen=True)
class Failed:
    """An evaluation without a result, and why: the candidate cannot be merged or run."""

    reason: str
    seconds: float = 0.0


Evaluation = Scored | Failed


def weighted_mean(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Over the keys of `values`."""
    total = sum(weights[key] for key in values)
    return sum(weights[key] * value for key, value in values.items()) / total


def troubles(tasks: Mapping[str, Scores]) -> list[str]:
    """For people: which examples count 0 without having been asked or graded."""
    found = []
    for task, scores in tasks.items():
        overlong, of = int(scores.overlong.sum()), f"of {len(scores):,} examples of '{task}'"
        if overlong:
            found.append(f"{overlong:,} {of} do not fit into the model's context and score 0")
        if scores.failures:
            position, reason = min(scores.failures.items())
            failed = (
                f"{len(scores.failures):,} {of} have a reply that cannot be graded and counts 0"
            )
            found.append(f"{failed}, the first, number {position + 1}: {reason}")
    return found
