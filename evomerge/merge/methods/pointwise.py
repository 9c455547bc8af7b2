"""Methods that look at each value of the parents by itself: averages, copies and swaps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.merge.operand import Operand


def linear(xs: Sequence[Operand], weights: Sequence[float], normalize: bool) -> Operand:
    """sum(w x) / sum(w) (model soups: arXiv 2203.05482, section 2), in float32 at least."""
    dtype, wide = xs[0].dtype, xs[0].wide
    divisor = float(torch.tensor(weights, dtype=wide).sum())

    def read(start: int, stop: int) -> Tensor:
        total = xs[0].span(start, stop).to(wide) * weights[0]
        for x, weight in zip(xs[1:], weights[1:], strict=True):
            # Fused: w x is not rounded on its own.
            total.add_(x.span(start, stop).to(wide), alpha=weight)
        return (total.div_(divisor) if normalize else total).to(dtype)

    return xs[0].derived(read)


def passthrough(x: Operand, scale: float) -> Operand:
    """The tensor itself, scaled."""
    return x if scale == 1 else x.derived(lambda i, j: x.span(i, j) * scale)


def nearswap(a: Operand, b: Operand, t: float) -> Operand:
    """a, with b's value in so far as it is near: w b + (1 - w) a, w = t / |a - b| within [0, 1]
    (no paper: the method of the Arcee Nova and Sherlock merges, as mergekit defines it)."""
    if t == 0:
        return a  # where w would be 0 / 0, if 1 / |a - b| is beyond the dtype

    def read(start: int, stop: int) -> Tensor:
        x, y = a.span(start, stop), b.span(start, stop)
        w = (x - y).abs_().clamp_(min=1e-6).reciprocal_().mul_(t).clamp_(0, 1)
        return w * y + (1 - w) * x

    return a.derived(read)


def arcee_fusion(a: Operand, b: Operand) -> Operand:
    """a, with b's value where it matters: |b - a| x KL(softmax b || softmax a), the divergence of
    whole rows, is at least the median + 1.5 interquartile ranges over the tensor (no paper: the
    method of Arcee Fusion, as mergekit defines it). In float32 at least."""

    def scored(start: int, stop: int) -> Tensor:
        x, y = (v.span(start, stop).view(-1, a.row) for v in (a, b))
        p, q = (v.softmax(dim=-1) + 1e-8 for v in (y, x))
        divergence = (p * (p / q).log_()).sum(dim=-1, keepdim=True)
        return ((y - x).abs_() * divergence).view(-1)

    score = a.derived(scored, unit=a.row)
    low, middle, high = (score.quantile(q) for q in (0.25, 0.5, 0.75))
    threshold = middle + 1.5 * (high - low)

    def read(start: int, stop: int) -> Tensor:
        x, y = a.span(start, stop), b.span(start, stop)
        kept = (score.span(start, stop) >= threshold).to(a.wide)
        return x + (y - x) * kept

    return a.derived(read, dtype=a.wide, unit=a.row)
