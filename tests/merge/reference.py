"""The merge methods once more, slowly, in float64 and after the papers: what methods.py is held to.

Formulas of model soups (arXiv 2203.05482), task arithmetic (2212.04089), TIES (2306.01708) and
DARE (2311.03099, with the masks given and rescaled to the L1 norm).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def linear(xs: Sequence[Array], weights: Sequence[float], normalize: bool) -> Array:
    total = sum(w * x for w, x in zip(weights, xs, strict=True))
    return total / sum(weights) if normalize else total


def slerp(a: Array, b: Array, t: float) -> Array:
    cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def task_arithmetic(
    base: Array, ds: Sequence[Array], weights: Sequence[float], normalize: bool, scale: float
) -> Array:
    return base + scale * linear(ds, weights, normalize)


def trimmed(d: Array, density: float) -> Array:
    """Only the largest magnitudes; those of `d` are all different."""
    count = max(1, int(density * d.size))
    threshold = sorted(abs(d).ravel())[-count]
    return np.where(abs(d) >= threshold, d, 0)


def rescaled(d: Array, sparse: Array) -> Array:
    after = abs(sparse).sum()
    return sparse * abs(d).sum() / after if after else sparse


def consensus(
    base: Array, ds: Sequence[Array], weights: Sequence[float], normalize: bool, scale: float
) -> Array:
    """One element after the other: elect a sign, then add up what agrees with it."""
    merged = base.copy()
    for at in np.ndindex(base.shape):
        votes = [w * d[at] for w, d in zip(weights, ds, strict=True)]
        positive = sum(votes) >= 0
        agreed = [v for v in votes if v and (v > 0) == positive]
        divisor = sum(w for w, v in zip(weights, votes, strict=True) if v and (v > 0) == positive)
        merged[at] += scale * sum(agreed) / (divisor if normalize and divisor else 1)
    return merged


def undecided(ds: Sequence[Array], weights: Sequence[float], margin: float) -> NDArray[np.bool_]:
    """Where the sign of sum(w d) is a matter of rounding."""
    votes = np.stack([w * d for w, d in zip(weights, ds, strict=True)])
    return abs(votes.sum(axis=0)) <= margin * abs(votes).sum(axis=0)
