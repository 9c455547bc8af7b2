"""Ways of making a task vector sparse, before it is added to the base.

Random masks are our own: mergekit draws them in its order of work, here they depend on (seed,
tensor name, parent) alone. Of equal magnitudes the first ones are kept.
"""

import math

import numpy as np
import torch
from torch import Tensor

from evomerge.merge import bits
from evomerge.merge.operand import Operand, Read

_PER_DRAW = 4  # numbers of 16 bits in one of 64
_LEVELS = 1 << 15


def trimmed(d: Operand, density: float) -> Operand:
    """Keep the max(1, int(density n)) largest by magnitude (TIES, arXiv 2306.01708, section 4)."""
    kept = d.selection(min(d.numel, max(1, int(density * d.numel))))
    return _masked(d, lambda i, j: kept.mask(d.span(i, j), i))


def without_outliers(d: Operand, density: float, gamma: float) -> Operand:
    """Drop the int(gamma n) largest by magnitude and keep the next int(density n) (model
    breadcrumbs, arXiv 2312.06795, section 3.1)."""
    count, outliers = int(density * d.numel), int(gamma * d.numel)
    below = max(0, d.numel - count - outliers)
    kept, dropped = d.selection(d.numel - below), d.selection(d.numel - below - count)

    def keep(start: int, stop: int) -> Tensor:
        values = d.span(start, stop)
        return kept.mask(values, start) & ~dropped.mask(values, start)

    return _masked(d, keep)


def dropped(d: Operand, density: float, draws: Read) -> Operand:
    """Keep each value with probability `density` (DARE, arXiv 2311.03099, section 3.2).

    draws: as `drawn` gives them.
    """
    bound = min(round(density * _LEVELS), _LEVELS - 1)
    return _masked(d, lambda i, j: bits.below(draws(i, j), bound))


def dropped_by_rank(d: Operand, density: float, epsilon: float, draws: Read) -> Operand:
    """Keep each value with a probability from density - epsilon for the smallest magnitude of its
    row to density + epsilon for the largest (DELLA, arXiv 2406.11617, section 3.1: MAGPRUNE).

    A row runs along the second dimension, or is all of a vector. draws: as `drawn` gives them.
    """
    if not d.numel:
        return d
    length = d.shape[1] if len(d.shape) > 1 else d.numel
    inner = math.prod(d.shape[2:])
    spread = torch.linspace(-epsilon, epsilon, length) if length > 1 else torch.zeros(1)
    bounds = ((density + spread) * _LEVELS).to(torch.int16).to(d.device)

    def keep(start: int, stop: int) -> Tensor:
        shape = (-1, length, inner)
        order = _order(d.span(start, stop).view(shape))
        # Every number is as likely as any other, so they may as well be dealt out by rank.
        kept = bits.below(draws(start, stop).view(shape), bounds[None, :, None])
        return torch.empty_like(kept).scatter_(1, order, kept).view(-1)

    return _masked(d, keep, unit=length * inner)


def _order(values: Tensor) -> Tensor:
    """Positions along the second dimension by rising magnitude, equal ones in their order."""
    found = bits.codes(values)
    if found.dtype == torch.int16 and found.device.type == "cpu":
        # NumPy sorts short integers by their digits, fifteen times as fast as torch.
        return torch.from_numpy(np.argsort(found.numpy(), axis=1, kind="stable"))
    return found.argsort(dim=1, stable=True)


def l1_rescaled(d: Operand, sparse: Operand) -> Operand:
    """The sparse task vector, scaled back to the L1 norm that it had before."""

    def magnitudes(start: int, stop: int) -> Tensor:
        pair = (d.span(start, stop), sparse.span(start, stop))
        return torch.stack([x.abs().sum(dtype=d.wide) for x in pair])

    sums = sparse.total(magnitudes).to(d.wide)
    rounded = sums.to(d.dtype)
    before, after = rounded if rounded.isfinite().all() else sums  # float16 ends at 65504
    if before < 1e-7 or after < 1e-7:
        return sparse
    ratio = before / after
    return sparse.derived(lambda i, j: sparse.span(i, j) * ratio)


def density_rescaled(sparse: Operand, density: float) -> Operand:
    """The sparse task vector divided by its density: the same in the mean (DARE, arXiv 2311.03099,
    section 3.2)."""
    return sparse.derived(lambda i, j: sparse.span(i, j) / density)


def drawn(seed: int) -> Read:
    """Random numbers for a mask: int16 from 0 to 2^15 - 1, each as likely as any other; the same
    for any spans.

    Drawn on the CPU, so that every device drops the same values.
    """
    source = np.random.PCG64DXSM(seed)
    beginning = source.state

    def read(start: int, stop: int) -> Tensor:
        first, last = start // _PER_DRAW, -(-stop // _PER_DRAW)
        source.state = beginning
        source.advance(first)
        numbers = torch.from_numpy(source.random_raw(last - first).view(np.int16))
        return numbers[start - first * _PER_DRAW :][: stop - start] & (_LEVELS - 1)

    return read


def _masked(d: Operand, keep: Read, unit: int = 1) -> Operand:
    return d.derived(lambda i, j: bits.masked(d.span(i, j), keep(i, j)), unit=unit)
