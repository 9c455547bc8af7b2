"""The merge methods once more, slowly, in float64 and after the papers: what they are held to.

Model soups (arXiv 2203.05482), slerp and its generalisations to unit spheres, task arithmetic
(2212.04089), TIES (2306.01708), DARE (2311.03099), Breadcrumbs (2312.06795), DELLA (2406.11617),
Model Stock (2403.19522), SCE (2408.07990), RAM (2601.13572), NearSwap and Arcee Fusion. The guards
against small numbers and the rescaling to the L1 norm are mergekit's; random masks are given.
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


def nuslerp(a: Array, b: Array, t: float, axis: int | None = None) -> Array:
    """The vectors along `axis`, each on its own great circle; without one, the whole tensor."""
    if axis is None:
        return _arc(a.ravel(), b.ravel(), t).reshape(a.shape)
    starts, ends = np.moveaxis(a, axis, -1), np.moveaxis(b, axis, -1)
    merged = np.empty_like(starts)
    for at in np.ndindex(merged.shape[:-1]):
        merged[at] = _arc(starts[at], ends[at], t)
    return np.moveaxis(merged, -1, axis)


def _arc(a: Array, b: Array, t: float) -> Array:
    """Slerp of two vectors, straight only where they are parallel; lengths are mixed as well."""
    lengths = max(np.linalg.norm(a), 1e-7) * max(np.linalg.norm(b), 1e-7)
    cosine = np.clip(a @ b / lengths, -1, 1)
    if 1 - cosine**2 <= 1e-16:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def multislerp(
    xs: Sequence[Array], weights: Sequence[float], normalize: bool, eps: float = 1e-8
) -> Array:
    """In the plane that touches the sphere at the weighted mean direction, then back to it."""
    if len(xs) == 1:
        return xs[0]
    shares = np.array(weights) / (sum(weights) if normalize else 1)
    flat = np.stack([x.ravel() for x in xs])
    lengths = np.linalg.norm(flat, axis=1)
    units = flat / (lengths[:, None] + eps)
    pole = shares @ units
    if np.linalg.norm(pole) < eps:  # two that cancel out: more are an error
        return (shares @ flat).reshape(xs[0].shape)
    pole /= np.linalg.norm(pole)
    tangent = shares @ (units - np.outer(units @ pole, pole))
    angle = np.linalg.norm(tangent) + eps
    direction = np.cos(angle) * pole + np.sin(angle) / angle * tangent
    return (shares @ lengths * direction).reshape(xs[0].shape)


def karcher(xs: Sequence[Array], max_iter: int = 10, tol: float = 1e-5) -> Array:
    """The point of the sphere with the least sum of squared angles to all directions, by
    Riemannian gradient descent, times the mean length."""
    flat = [x.ravel() for x in xs]
    lengths = [np.linalg.norm(x) for x in flat]
    units = [x / length for x, length in zip(flat, lengths, strict=True) if length > tol]
    if len(xs) == 1 or not units:
        return xs[0]
    mean = sum(units) / len(units)
    mean = units[0] if np.linalg.norm(mean) < tol else mean / np.linalg.norm(mean)
    for _ in range(max_iter):
        step = sum(_logarithm(mean, unit, tol) for unit in units) / len(units)
        length = np.linalg.norm(step)
        if length < tol:
            break
        mean = np.cos(length) * mean + np.sin(length) * step / length
    return (np.mean(lengths) * mean).reshape(xs[0].shape)


def _logarithm(at: Array, unit: Array, tol: float) -> Array:
    """The tangent at one point of the unit sphere that leads to another."""
    cosine = at @ unit
    away = unit - cosine * at
    angle = np.arctan2(np.linalg.norm(away), cosine)
    return np.zeros_like(at) if angle < tol else angle * away / np.linalg.norm(away)


def model_stock(base: Array, xs: Sequence[Array], filter_wise: bool) -> Array:
    """Between base and average, as far as the mean cosine between task vectors says:
    t = N cos / (1 + (N - 1) cos). A filter is a row."""
    if filter_wise and base.ndim > 1:
        rows = [model_stock(base[i], [x[i] for x in xs], True) for i in range(len(base))]
        return np.stack(rows)
    n = len(xs)
    ds = [(x - base).ravel() for x in xs]
    cosines = []
    for i in range(n):
        for j in range(i):
            lengths = max(np.linalg.norm(ds[i]) * np.linalg.norm(ds[j]), 1e-6)
            cosines.append(np.clip(ds[i] @ ds[j] / lengths, -1, 1))
    cosine = np.mean(cosines)
    divisor = 1 + (n - 1) * cosine
    t = 0 if abs(divisor) < 1e-6 else n * cosine / divisor
    return t * sum(xs) / n + (1 - t) * base


def task_arithmetic(
    base: Array, ds: Sequence[Array], weights: Sequence[float], normalize: bool, scale: float
) -> Array:
    return base + scale * linear(ds, weights, normalize)


def trimmed(d: Array, density: float) -> Array:
    """Only the largest magnitudes; those of `d` are all different."""
    count = max(1, int(density * d.size))
    threshold = sorted(abs(d).ravel())[-count]
    return np.where(abs(d) >= threshold, d, 0)


def without_outliers(d: Array, density: float, gamma: float) -> Array:
    """Neither the largest magnitudes nor the smallest (Breadcrumbs); those of `d` all differ."""
    if density >= 1:
        return d
    count, outliers = int(density * d.size), int(gamma * d.size)
    first = max(0, d.size - count - outliers)
    kept = np.zeros(d.size)
    kept[np.argsort(abs(d).ravel())[first : first + count]] = 1
    return d * kept.reshape(d.shape)


def keep_probabilities(d: Array, density: float, epsilon: float) -> Array:
    """Of MagPrune (DELLA): from density - epsilon for the smallest magnitude of a row to density +
    epsilon for the largest, in equal steps. A row runs along axis 1; a vector is one row."""
    rows = np.moveaxis(d if d.ndim > 1 else d[None], 1, -1)
    found = np.empty_like(rows)
    for at in np.ndindex(rows.shape[:-1]):
        ranks = [int((abs(rows[at]) < abs(x)).sum()) for x in rows[at]]
        found[at] = density - epsilon + 2 * epsilon * np.array(ranks) / (len(ranks) - 1)
    return np.moveaxis(found, -1, 1).reshape(d.shape)


def unbiased(sparse: Array, keep_probability: Array | float) -> Array:
    """What the papers of DARE and DELLA do where mergekit restores the L1 norm: divide by the
    probability of being kept, so that the expectation is the task vector."""
    return sparse / keep_probability


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


def sce(base: Array, ds: Sequence[Array], select_topk: float) -> Array:
    """Select the elements that vary most over the models, Calculate a weight for each model from
    its mean square, Erase what disagrees with the majority sign."""
    stack = np.stack(ds)
    if select_topk < 1:
        variances = stack.var(axis=0)
        count = int(np.count_nonzero(variances) * max(select_topk, 0))
        threshold = np.sort(variances.ravel())[::-1][count - 1] if count else np.inf
        stack = stack * (variances >= threshold)
    squares = (stack**2).reshape(len(ds), -1).mean(axis=1)
    even = np.full(len(ds), 1 / len(ds))
    shares = even if squares.sum() < 1e-6 else squares / squares.sum()
    merged = base.copy()
    for at in np.ndindex(base.shape):
        values = stack[(slice(None), *at)]
        agreed = np.sign(values) == (1 if values.sum() >= 0 else -1)
        merged[at] += (shares * values)[agreed].sum() / max(shares[agreed].sum(), 1e-6)
    return merged


def nearswap(base: Array, x: Array, t: float) -> Array:
    """The other model's value where it is near; further off, a share that falls with distance."""
    share = np.clip(t / np.maximum(abs(base - x), 1e-6), 0, 1)
    return share * x + (1 - share) * base


def arcee_fusion(base: Array, x: Array) -> Array:
    """The other model's value where |d| times its row's divergence is an outlier upwards."""
    after, before = _softmax(x) + 1e-8, _softmax(base) + 1e-8
    divergence = (after * np.log(after / before)).sum(axis=-1, keepdims=True)
    importance = abs(x - base) * divergence
    ordered = np.sort(importance.ravel())
    low, middle, high = (ordered[int(q * (ordered.size - 1))] for q in (0.25, 0.5, 0.75))
    return np.where(importance >= middle + 1.5 * (high - low), x, base)


def _softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def ram(base: Array, ds: Sequence[Array], epsilon: float, r: float = 0, alpha: float = 0) -> Array:
    """Changes that one model makes are kept, those that several make are averaged. RAM+ makes the
    former larger, by r for a model whose changes are mostly shared, but by no more than r alpha."""
    touched = [abs(d) > epsilon for d in ds]
    count = sum(x.astype(int) for x in touched)
    merged = base.copy()
    for d, own in zip(ds, touched, strict=True):
        shared, alone = own & (count > 1), own & (count == 1)
        ratio = shared.sum() / max(alone.sum(), epsilon)
        merged += d * alone * (1 + r * np.clip(ratio, 0, alpha))
        merged += d * shared / np.maximum(count, 1)
    return merged


def aim(merged: Array, base: Array, activation: Array, omega: float) -> Array:
    """Activation-informed merging (2502.02421): what a method merged keeps the less of its change,
    the more active its input is; activations are relative to the most active input."""
    importance = activation / activation.max()
    return base + (merged - base) * (1 - importance * (1 - omega))
