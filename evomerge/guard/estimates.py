"""How sure a score is, and how much of a search's best score is luck.

All scores are per example, in [0, 1]. An `Estimate` is a value with an interval at level 0.95.
Tasks without a weight are measured for something else and no part of any of it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import hypot
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from evomerge.fitness.results import Scores, weighted_mean

LEVEL = 0.95
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_BOOTSTRAPS = 2000
_BBC_BOOTSTRAPS = 200


@dataclass(frozen=True)
class Estimate:
    """A value and its interval (low, high) at LEVEL."""

    value: float
    interval: tuple[float, float]

    def as_dict(self) -> dict[str, object]:
        """For reports."""
        return {"value": self.value, "interval": list(self.interval)}


@dataclass(frozen=True)
class Gain:
    """A paired difference of scores. p_value: two-sided, of no difference."""

    estimate: Estimate
    p_value: float
    n: int


def wilson(mean: float, n: int) -> Estimate:
    """Wilson's score interval of a mean of n values in [0, 1].

    Exact in spirit for zeros and ones; too wide, never too narrow, for values in between.
    """
    centre = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * (mean * (1 - mean) / n + _Z**2 / (4 * n**2)) ** 0.5
    return Estimate(mean, (max(0.0, centre - half), min(1.0, centre + half)))


def combined(means: Mapping[str, tuple[float, int]], weights: Mapping[str, float]) -> Estimate:
    """The weighted mean over tasks, each a (mean, n) of values in [0, 1]; one task: Wilson.

    The distances from each task's mean to the ends of its Wilson interval are added in quadrature,
    each side of its own (Zou, Huang and Zhang 2009). Unlike standard errors they are not 0 where a
    task is all zeros or all ones, so that no score of a few examples looks certain.
    """
    parts = {task: wilson(mean, n) for task, (mean, n) in means.items()}
    value = weighted_mean({task: part.value for task, part in parts.items()}, weights)
    shares = _shares(parts, weights)
    below = [shares[t] * (part.value - part.interval[0]) for t, part in parts.items()]
    above = [shares[t] * (part.interval[1] - part.value) for t, part in parts.items()]
    return Estimate(value, (max(0.0, value - hypot(*below)), min(1.0, value + hypot(*above))))


def score_estimate(tasks: Mapping[str, Scores], weights: Mapping[str, float]) -> Estimate:
    """The weighted mean over tasks with its interval; see `combined`."""
    return combined({task: (s.mean, len(s)) for task, s in tasks.items()}, weights)


def _counted(tasks: Collection[str], weights: Mapping[str, float]) -> list[str]:
    """Those with a weight."""
    return [task for task in tasks if weights[task] > 0]


def _shares(tasks: Collection[str], weights: Mapping[str, float]) -> dict[str, float]:
    """The weights of these tasks, summing to 1."""
    total = sum(weights[task] for task in tasks)
    return {task: weights[task] / total for task in tasks}


def paired_gain(
    ours: Mapping[str, Scores],
    theirs: Mapping[str, Scores],
    weights: Mapping[str, float],
    random: np.random.Generator,
) -> Gain:
    """The weighted mean difference on the same examples, with a bootstrap interval.

    Examples are resampled within each task; where all of a task's differences are equal, what a
    resample cannot show is allowed for (see _unseen). The p-value comes from flipping the signs of
    the differences at random, and is exact (McNemar) for one task scored 0 or 1.
    Raises ValueError when the examples are not the same.
    """
    differences = {}
    for task in _counted(ours, weights):
        scores = ours[task]
        if not np.array_equal(scores.examples, theirs[task].examples):
            raise ValueError(f"task '{task}': the two were scored on different examples")
        differences[task] = scores.scores.astype(float) - theirs[task].scores.astype(float)
    value = weighted_mean({t: float(d.mean()) for t, d in differences.items()}, weights)
    resampled = _weighted_resamples(differences, weights, random)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    n = sum(len(d) for d in differences.values())
    below, above = _unseen(differences, weights)
    estimate = Estimate(
        value,
        (
            max(-1.0, value - hypot(value - float(low), *below)),
            min(1.0, value + hypot(float(high) - value, *above)),
        ),
    )
    return Gain(estimate, _p_value(differences, weights, value, random), n)


def _weighted_resamples(
    differences: Mapping[str, NDArray[np.float64]],
    weights: Mapping[str, float],
    random: np.random.Generator,
) -> NDArray[np.float64]:
    shares = _shares(differences, weights)
    sums = np.zeros(_BOOTSTRAPS)
    for task, d in differences.items():
        picks = random.integers(0, len(d), size=(_BOOTSTRAPS, len(d)))
        sums += shares[task] * d[picks].mean(axis=1)
    return sums


def _unseen(
    differences: Mapping[str, NDArray[np.float64]], weights: Mapping[str, float]
) -> tuple[list[float], list[float]]:
    """How far below and above its mean difference each task that shows only one may lie.

    A bootstrap of equal differences has no width, yet n examples that agree do not prove that all
    do. As with the rule of three, 0 of n examples that differ from the rest allow for a share of
    them up to the upper end of Wilson's interval, z^2 / (n + z^2); at worst these are all losses
    (-1) or all wins (+1). Weighted, so that they add in quadrature to the bootstrap's distances.
    """
    shares = _shares(differences, weights)
    below, above = [], []
    for task, d in differences.items():
        if d.min() == d.max():
            unseen = shares[task] * wilson(0.0, len(d)).interval[1]
            below.append(unseen * (float(d[0]) + 1))
            above.append(unseen * (1 - float(d[0])))
    return below, above


def _p_value(
    differences: Mapping[str, NDArray[np.float64]],
    weights: Mapping[str, float],
    value: float,
    random: np.random.Generator,
) -> float:
    if len(differences) == 1:
        (d,) = differences.values()
        if set(np.unique(d)) <= {-1.0, 0.0, 1.0}:
            wins, losses = int((d > 0).sum()), int((d < 0).sum())
            return min(1.0, 2 * binomial_tail(wins + losses, max(wins, losses)))
    shares = _shares(differences, weights)
    flipped = np.zeros(_BOOTSTRAPS)
    for task, d in differences.items():
        signs = random.choice([-1.0, 1.0], size=(_BOOTSTRAPS, len(d)))
        flipped += shares[task] * (signs * d).mean(axis=1)
    as_extreme = int((np.abs(flipped) >= abs(value) - 1e-12).sum())
    return (1 + as_extreme) / (1 + _BOOTSTRAPS)


def binomial_tail(n: int, least: int) -> float:
    """P(X >= least) for X of n fair coins."""
    if n == 0:
        return 1.0
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(least, n + 1)
    return float(min(1.0, np.exp(logs[n] - logs[k] - logs[n - k] - n * np.log(2)).sum()))


def shrunk(means: NDArray[np.float64], n: int, best: int) -> Estimate:
    """The best candidate's score, shrunk towards the population (empirical Bayes).

    means: (candidates,) mean scores on n examples each. A normal prior is fitted to the
    population; what of its spread sampling noise explains is taken out of the best.
    """
    noise = float(np.mean(means * (1 - means))) / n
    spread = max(0.0, float(np.var(means)) - noise)
    # Two successes and two failures more (Agresti and Coull): a selected 0 or 1 is not certain.
    p = (float(means[best]) * n + 2) / (n + 4)
    own = p * (1 - p) / n
    trust = spread / (spread + own)
    centre = float(np.mean(means))
    value = centre + trust * (float(means[best]) - centre)
    half = _Z * (trust * own) ** 0.5
    return Estimate(value, (max(0.0, value - half), min(1.0, value + half)))


def bbc_cv(matrix: NDArray[np.float32], random: np.random.Generator) -> Estimate:
    """The score that choosing the best candidate leads to on new examples.

    Bootstrap bias-corrected cross-validation (arXiv 1708.07180, algorithm 3): choose on a
    resample of the examples, score on those left out. matrix: (candidates, examples).
    """
    n = matrix.shape[1]
    if n < 2:
        value = float(matrix.mean(axis=1).max())
        return Estimate(value, (0.0, 1.0))
    found = []
    for _ in range(_BBC_BOOTSTRAPS):
        counts = np.bincount(random.integers(0, n, size=n), minlength=n).astype(np.float32)
        outside = counts == 0
        if outside.any():
            chosen = int(np.argmax(matrix @ counts))
            found.append(float(matrix[chosen, outside].mean()))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(np.mean(found)), (float(low), float(high)))


def detectable_gain(n: int, alpha: float, discordance: float = 0.2, power: float = 0.8) -> float:
    """The smallest gain that n paired examples show with this power.

    From n = q (z_(1-alpha) + z_power)^2 / delta^2, q the share of examples on which the two
    models differ.
    """
    normal = NormalDist()
    z = normal.inv_cdf(1 - alpha) + normal.inv_cdf(power)
    return float((discordance / n) ** 0.5 * z)


def weighted_row(tasks: Mapping[str, Scores], weights: Mapping[str, float]) -> NDArray[np.float32]:
    """All per-example scores of a candidate, (examples,), scaled so that their plain mean is the
    weighted mean over the tasks."""
    shares = _shares(_counted(tasks, weights), weights)
    n = sum(len(tasks[task]) for task in shares)
    return np.concatenate(
        [
            tasks[task].scores * np.float32(share * n / len(tasks[task]))
            for task, share in shares.items()
        ]
    )


def promoted(gain: Gain, alpha: float, looks: int) -> bool:
    """Whether a gain on validation is one: its one-sided p-value survives `looks` uses of the
    split (Bonferroni)."""
    return gain.estimate.value > 0 and gain.p_value / 2 < alpha / looks
