"""Methods that add task vectors to the base: as they are, where they agree, or where they stand
alone.

What decides the bits: values are rounded to the dtype of the inputs after every operation, except
that a sum over parents is one reduction.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.merge import bits
from evomerge.merge.methods.reduction import summed
from evomerge.merge.operand import Operand, Selection


def task_arithmetic(
    base: Operand, ds: Sequence[Operand], weights: Sequence[float], normalize: bool, scale: float
) -> Operand:
    """base + scale sum(w d) [/ sum(w)] (arXiv 2212.04089, section 3)."""
    rounded = torch.tensor(weights, dtype=base.dtype)
    divisor = float(rounded.sum())
    values = rounded.tolist()

    def read(start: int, stop: int) -> Tensor:
        mixed = summed([d.span(start, stop) * w for d, w in zip(ds, values, strict=True)])
        if normalize and abs(divisor) >= 1e-8:
            mixed /= divisor
        if scale != 1:
            mixed *= scale
        return mixed.add_(base.span(start, stop))

    return base.derived(read, unit=_unit(ds))


def sign_consensus(
    base: Operand, ds: Sequence[Operand], weights: Sequence[float], normalize: bool, scale: float
) -> Operand:
    """base + scale sum(w d mask) [/ sum(w mask)], where the mask keeps the values whose sign is
    that of sum(w d), 0 counting as positive (TIES, arXiv 2306.01708, section 4)."""
    values = torch.tensor(weights, dtype=base.dtype).tolist()
    one, *patterns = (bits.pattern(w, base.dtype) for w in (1.0, *values))

    def read(start: int, stop: int) -> Tensor:
        parts = [d.span(start, stop) * w for d, w in zip(ds, values, strict=True)]
        masks = _agreeing(parts)
        mixed = summed([bits.masked(part, m) for part, m in zip(parts, masks, strict=True)])
        if normalize:
            divisor = _divisor(masks, patterns, base.dtype)
            nothing = bits.below(bits.codes(divisor), 1)
            mixed /= divisor.add_(bits.filled(one, nothing, base.dtype))
        if scale != 1:
            mixed *= scale
        return mixed.add_(base.span(start, stop))

    return base.derived(read, unit=_unit(ds))


def _agreeing(parts: Sequence[Tensor]) -> list[Tensor]:
    """Masks of bits: where parts have the sign of their sum; zeros never have."""
    sign = bits.signs(summed(parts))
    return [bits.of_sign(part, sign) for part in parts]


def _divisor(masks: Sequence[Tensor], weights: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The sum of the weights (as bit patterns) of the parts that agree."""
    return summed([bits.filled(w, mask, dtype) for mask, w in zip(masks, weights, strict=True)])


def _unit(ds: Sequence[Operand]) -> int:
    """That of spans that suit all task vectors."""
    return math.lcm(*(d.unit for d in ds))


def sce(base: Operand, ds: Sequence[Operand], top: float) -> Operand:
    """Select the `top` share of the values that vary most over parents, calculate a weight for
    each parent from the energy of what it has left, erase minority signs (arXiv 2408.07990,
    section 3.2)."""
    variance = base.derived(lambda i, j: _variance([d.span(i, j) for d in ds]))
    kept: Selection | None = None
    if top < 1:
        kept = variance.selection(int(torch.tensor(variance.count_nonzero) * torch.tensor(top)))

    def selected(start: int, stop: int) -> list[Tensor]:
        parts = [d.span(start, stop) for d in ds]
        if kept is None:
            return parts
        mask = kept.mask(variance.span(start, stop), start)
        return [bits.masked(part, mask) for part in parts]

    def energy(start: int, stop: int) -> Tensor:
        return torch.stack([(x * x).sum(dtype=base.wide) for x in selected(start, stop)])

    energies = (base.total(energy).to(base.wide) / base.numel).to(base.dtype)
    total = float(energies.sum())
    shares = [1 / len(ds)] * len(ds) if abs(total) < 1e-6 else (energies / total).tolist()
    weights = torch.tensor(shares, dtype=base.dtype).tolist()
    patterns = [bits.pattern(w, base.dtype) for w in weights]

    def read(start: int, stop: int) -> Tensor:
        parts = selected(start, stop)
        masks = _agreeing(parts)
        pairs = zip(parts, masks, weights, strict=True)
        mixed = summed([bits.masked(part * w, mask) for part, mask, w in pairs])
        divisor = _divisor(masks, patterns, base.dtype).clamp_(min=1e-6)
        return mixed.div_(divisor).add_(base.span(start, stop))

    return base.derived(read)


def _variance(parts: Sequence[Tensor]) -> Tensor:
    """Over parents, of the population, in float64 and rounded to the dtype."""
    doubles = [part.double() for part in parts]
    mean = torch.stack(doubles).sum(dim=0).div_(len(parts))
    squares = torch.zeros_like(mean)
    for x in doubles:
        squares += x.sub_(mean).square_()
    return squares.div_(len(parts)).to(parts[0].dtype)


def ram(base: Operand, ds: Sequence[Operand], epsilon: float) -> Operand:
    """Values that one task vector alone changes are kept whole, those that several change are
    averaged over these (reinforced agent merging, arXiv 2601.13572, section 4)."""

    def read(start: int, stop: int) -> Tensor:
        parts = [d.span(start, stop) for d in ds]
        changed, count = _changed(parts, epsilon)
        divisor = count.clamp(min=1)
        mixed = summed([p / divisor * c for p, c in zip(parts, changed, strict=True)])
        return mixed.add_(base.span(start, stop))

    return base.derived(read)


def ram_plus(
    base: Operand, ds: Sequence[Operand], epsilon: float, r: float, alpha: float
) -> Operand:
    """As ram, what is a task vector's own strengthened by 1 + r min(shared / own, alpha): the more
    of it is diluted by the others (RAM+, same paper). In float32 at least."""
    factors = [1 + r * share.clamp(0, alpha) for share in _overlaps(base, ds, epsilon)]

    def read(start: int, stop: int) -> Tensor:
        parts = [d.span(start, stop) for d in ds]
        changed, count = _changed(parts, epsilon)
        own = (2 - count).clamp(0, 1).to(base.wide)  # 1 where a single one changes it
        divisor = count.clamp(min=1)
        mixed = summed(
            [
                (p / divisor * c).to(base.wide).mul_(own * (f - 1) + 1)
                for p, c, f in zip(parts, changed, factors, strict=True)
            ]
        )
        return mixed.add_(base.span(start, stop))

    return base.derived(read, dtype=base.wide)


def _changed(parts: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Where each task vector changes something, 1 or 0, and how many do; in their dtype."""
    dtype = parts[0].dtype
    changed = [(part.abs() > epsilon).to(dtype) for part in parts]
    return changed, summed(changed)


def _overlaps(base: Operand, ds: Sequence[Operand], epsilon: float) -> list[Tensor]:
    """For each task vector how many of its changes are shared, by how many are its own."""

    def counts(start: int, stop: int) -> Tensor:
        changed, count = _changed([d.span(start, stop) for d in ds], epsilon)
        own = (2 - count).clamp(0, 1)
        whole = torch.stack([c.sum(dtype=torch.float64) for c in changed])
        return torch.stack(
            [whole, torch.stack([(c * own).sum(dtype=torch.float64) for c in changed])]
        )

    def find() -> list[Tensor]:
        changed, own = base.total(counts)
        shared = (changed - own).to(torch.float32)
        return list(shared / own.to(torch.float32).clamp(min=epsilon))

    return base.known(("overlaps", epsilon, *(d.facts for d in ds)), find)
