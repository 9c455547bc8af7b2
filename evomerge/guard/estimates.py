"""How sure a score is, and a difference of two.

All scores are per example, in [0, 1]. An `Estimate` is a value with an interval at level 0.95.
Tasks without a weight are measured for something else and no part of any of it.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from evomerge.fitness.results import Scores, weighted_mean

LEVEL = 0.95
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_BOOTSTRAPS = 2000
_FLIPS = 100_000
_SUMS = 2**18  # that are told apart in an exact p-value


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


def wilson(mean: float, n: float) -> Estimate:
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
    shares = shares_of(parts, weights)
    below = [share * (parts[t].value - parts[t].interval[0]) for t, share in shares.items()]
    above = [share * (parts[t].interval[1] - parts[t].value) for t, share in shares.items()]
    return Estimate(
        value, (max(0.0, value - math.hypot(*below)), min(1.0, value + math.hypot(*above)))
    )


def normal(value: float, standard_error: float) -> Estimate:
    """A value whose error is normal, such as a difference of two means: Wald's interval."""
    half = _Z * standard_error
    return Estimate(value, (value - half, value + half))


def score_estimate(tasks: Mapping[str, Scores], weights: Mapping[str, float]) -> Estimate:
    """The weighted mean over tasks with its interval; see `combined`."""
    return combined({task: (s.mean, len(s)) for task, s in tasks.items()}, weights)


def shares_of(tasks: Collection[str], weights: Mapping[str, float]) -> dict[str, float]:
    """The weights of those of these tasks that have one, summing to 1."""
    total = sum(weights[task] for task in tasks)
    return {task: weights[task] / total for task in tasks if weights[task] > 0}


def paired_gain(
    ours: Mapping[str, Scores],
    theirs: Mapping[str, Scores],
    weights: Mapping[str, float],
    random: np.random.Generator,
    groups: Mapping[str, NDArray[np.int64]] | None = None,
) -> Gain:
    """The weighted mean difference on the same examples, with a bootstrap interval.

    groups: of tasks whose examples belong together, a number for each position of the split, equal
    within a group. Whole groups are resampled then, and flipped; elsewhere every example is a group
    of its own. The interval is that of the percentiles over each task's groups and two more, see
    _resampled. The p-value is that of flipping signs, see _p_value: one task scored 0 or 1 is
    tested by exact McNemar. Raises ValueError when the examples are not the same.
    """
    shares = shares_of(ours, weights)
    value, resampled, parts, n = 0.0, np.zeros(_BOOTSTRAPS), [], 0
    for task, share in shares.items():
        scores = ours[task]
        if not np.array_equal(scores.examples, theirs[task].examples):
            raise ValueError(f"task '{task}': the two were scored on different examples")
        differences = scores.scores.astype(float) - theirs[task].scores.astype(float)
        sums, sizes = differences, np.ones_like(differences)
        if groups is not None and task in groups:
            _, owners = np.unique(groups[task][scores.examples], return_inverse=True)
            sums = np.bincount(owners, weights=differences)
            sizes = np.bincount(owners).astype(np.float64)
        value += share * float(differences.mean())
        resampled += share * _resampled(sums, sizes, random)
        parts.append(share * sums / len(differences))
        n += len(differences)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    interval = (min(value, float(low)), max(value, float(high)))
    return Gain(Estimate(value, interval), _p_value(np.concatenate(parts), random), n)


def _resampled(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], random: np.random.Generator
) -> NDArray[np.float64]:
    """Mean differences of resampled groups, (_BOOTSTRAPS,). sums, sizes: (groups,).

    A bootstrap cannot show what was not drawn: where few differ it is too narrow, where none does
    it has no width. So a group that ours wins and one that it loses are added, of mean size, by as
    much as any differs, or entirely where none does (Bonett and Price 2012: where examples are
    right or wrong, their adjusted Wald interval is what this comes to).
    """
    size = float(sizes.mean())
    largest = float(np.abs(sums / sizes).max()) or 1.0
    units = np.stack(
        [np.append(sums, [largest * size, -largest * size]), np.append(sizes, [size, size])]
    )
    units, counts = np.unique(units, axis=1, return_counts=True)  # equal ones are drawn together
    n = int(counts.sum())
    total, drawn = units @ random.multinomial(n, counts / n, size=_BOOTSTRAPS).T
    found: NDArray[np.float64] = total / drawn
    return found


def _p_value(differences: NDArray[np.float64], random: np.random.Generator) -> float:
    """Two-sided, of no difference: how often their sum would be as far from 0, were each
    difference as likely to have the other sign.

    Exact as long as few sums are possible, which of examples that are right or wrong is always so;
    else by _FLIPS at random, enough for a level of 0.05 over thousands of looks.
    """
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    differences = differences / np.abs(differences).max()
    sizes = np.abs(differences)
    least = abs(float(differences.sum())) - 1e-6 * float(sizes.sum())  # rounding makes no evidence
    exact = _flipped(sizes)
    if exact is not None:
        sums, chances = exact
        return float(min(1.0, chances[np.abs(sums) >= least].sum()))
    as_extreme = 0
    for _ in range(_FLIPS // _BOOTSTRAPS):
        bits = np.frombuffer(random.bytes(_BOOTSTRAPS * -(-len(sizes) // 8)), np.uint8)
        kept = np.unpackbits(bits.reshape(_BOOTSTRAPS, -1), axis=1, count=len(sizes))
        sums = 2 * (kept.astype(np.float32) @ sizes.astype(np.float32)) - sizes.sum()
        as_extreme += int((np.abs(sums) >= least).sum())
    return (1 + as_extreme) / (1 + _FLIPS)


def _flipped(sizes: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """The sums that flips of these can give, and their chances; None if there are too many.

    Equal ones are flipped together, as a binomial.
    """
    values, counts = np.unique(np.round(sizes, 9), return_counts=True)
    sums: NDArray[np.float64] = np.zeros(1)
    chances: NDArray[np.float64] = np.ones(1)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if len(sums) * (count + 1) > _SUMS:
            return None
        flips = value * (2.0 * np.arange(count + 1) - count)
        found = np.add.outer(sums, flips).ravel()
        joint = np.multiply.outer(chances, _binomial(count)).ravel()
        sums, merged = np.unique(np.round(found, 9), return_inverse=True)
        chances = np.bincount(merged, weights=joint).astype(np.float64)
    return sums, chances


def _binomial(n: int) -> NDArray[np.float64]:
    """P(X = k) for X of n fair coins, for k from 0 to n."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    chances: NDArray[np.float64] = np.exp(logs[n] - logs - logs[::-1] - n * math.log(2))
    return chances


def detectable_gain(n: int, alpha: float, discordance: float = 0.2, power: float = 0.8) -> float:
    """The smallest gain that n paired examples show with this power.

    From n = q (z_(1-alpha) + z_power)^2 / delta^2, q the share of examples on which the two
    models differ.
    """
    normal = NormalDist()
    z = normal.inv_cdf(1 - alpha) + normal.inv_cdf(power)
    return float((discordance / n) ** 0.5 * z)


def promoted(gain: Gain, alpha: float, looks: int) -> bool:
    """Whether a gain on validation is one: its one-sided p-value survives `looks` uses of the
    split (Bonferroni)."""
    return gain.estimate.value > 0 and gain.p_value / 2 < alpha / looks
