"""Which coordinates of the cube the fitness depends on, judged from points that were proposed.

Knows nothing of what a coordinate means, nor of how the points came about.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.optimizer import Fitness, Genotypes

_BEST = 0.1  # share of the points that are the best
_BINS = 50


def ped_anova(
    genotypes: Genotypes, fitness: Fitness, choices: Sequence[int]
) -> NDArray[np.float64]:
    """How far the best tenth of points, (n, d) with fitness (n,), is spread otherwise than all are,
    along each coordinate: (d,), 0 or more, 0 where it is spread alike.

    PED-ANOVA's local importance (Watanabe, Bansal and Hutter 2023, arXiv 2304.10255, theorem 1 and
    section 3): the Pearson divergence of the two marginal densities, times the squared share of the
    best, which all coordinates have in common. Densities are those of points in _BINS equal parts,
    smoothed by a Gaussian kernel of Scott's width; of a coordinate with choices, their shares, each
    choice counted once more than it was met.

    choices: of each coordinate, 0 for a continuous one. It says what sets the best of these points
    apart, which is not all that they might have been: points that an optimizer proposed late are
    better, and elsewhere. Along one coordinate at a time: what matters only together with
    another may be missed.
    """
    count = max(1, round(_BEST * len(fitness)))
    best = np.argsort(-fitness, kind="stable")[:count]
    found = np.zeros(genotypes.shape[1])
    for i, own in enumerate(choices):
        column = genotypes[:, i]
        all_, few = (_density(values, own) for values in (column, column[best]))
        found[i] = _BEST**2 * float((all_ * (few / all_ - 1) ** 2).sum())
    return found


def _density(values: NDArray[np.float64], choices: int) -> NDArray[np.float64]:
    """Over the parts of [0, 1], or over the choices; nowhere 0, of sum 1."""
    bins = choices or _BINS
    counts = np.bincount(np.minimum((values * bins).astype(np.int64), bins - 1), minlength=bins)
    if choices:
        shares: NDArray[np.float64] = (counts + 1.0) / (len(values) + choices)
        return shares
    width = max(float(values.std()) * len(values) ** -0.2, 1 / bins)  # Scott 1992
    middles = (np.arange(bins) + 0.5) / bins
    kernel = np.exp(-0.5 * ((middles[:, None] - middles) / width) ** 2)
    kernel /= kernel.sum(axis=0)  # what would fall outside the cube is inside
    smoothed: NDArray[np.float64] = (kernel @ counts + 1.0 / bins) / (len(values) + 1.0)
    return smoothed
