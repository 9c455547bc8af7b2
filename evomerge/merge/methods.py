"""Merge methods: pure functions from tensors to a tensor, bit for bit as mergekit 0.1.5.

Two things decide the bits. Every operation happens in the dtype of its inputs, as in mergekit
(weights are rounded to it first); and a sum over parents is one reduction that accumulates in
float32 and rounds once. Element-wise methods run over chunks that stay in the cache, so that a
merge costs little more than reading its inputs.

Knows nothing of models, files or recipes. `x` stands for a parent's tensor, `d` for a task vector
(parent minus base); all tensors of a call have one shape and one dtype.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.seeds import derive

_CHUNK = 1 << 15  # elements: a handful of float32 chunks fit into a core's own cache


def merge(
    method: str,
    base: Tensor | None,
    inputs: Sequence[Tensor],
    per_model: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
    mask_key: tuple[int, str],
    out: Tensor | None = None,
) -> Tensor:
    """Merge one tensor.

    inputs: task vectors for the methods that take them, else the parents' tensors.
    per_model: the parameters of each input; shared: those of the merge (see recipe.METHODS).
    mask_key: (seed, tensor name) of stochastic masks. out: where to write, if anywhere.
    """
    formula = _FORMULAS[method]
    return formula(base, inputs, per_model, shared, mask_key, out)


def linear(
    xs: Sequence[Tensor], weights: Sequence[float], normalize: bool, out: Tensor | None = None
) -> Tensor:
    """sum(w x) / sum(w) (model soups: arXiv 2203.05482, section 2)."""
    rounded = _rounded(weights, xs[0].dtype)
    divisor = _total(rounded, xs[0].dtype) if normalize else None
    return _elementwise(xs, out, lambda chunk: _combined(chunk, rounded, divisor, 1.0))


def task_arithmetic(
    base: Tensor,
    ds: Sequence[Tensor],
    weights: Sequence[float],
    normalize: bool,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """base + scale sum(w d) [/ sum(w)] (arXiv 2212.04089, section 3)."""
    rounded = _rounded(weights, base.dtype)
    divisor = _total(rounded, base.dtype) if normalize else None
    if divisor is not None and abs(divisor) < 1e-8:
        divisor = 1.0

    def formula(chunk: Sequence[Tensor]) -> Tensor:
        return chunk[0] + _combined(chunk[1:], rounded, divisor, scale)

    return _elementwise([base, *ds], out, formula)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Along the great circle from a (t = 0) to b (t = 1), the whole tensor as one vector.

    Falls back to a straight line when the two point the same way or opposite ways. Computed in
    float32 and rounded to the dtype of `a`.
    """
    v0, v1 = a.float(), b.float()
    norm0, norm1 = v0.norm(), v1.norm()
    unit0 = v0 / norm0 if norm0 > 1e-8 else v0
    unit1 = v1 / norm1 if norm1 > 1e-8 else v1
    cosine = (unit0 * unit1).sum()
    if cosine.abs() > 0.9995:
        return ((1 - t) * v0 + t * v1).to(a.dtype)
    angle = torch.arccos(cosine)
    share0 = torch.sin((1 - t) * angle) / torch.sin(angle)
    share1 = torch.sin(t * angle) / torch.sin(angle)
    return (share0 * v0 + share1 * v1).to(a.dtype)


def sparsified(
    ds: Sequence[Tensor],
    densities: Sequence[float],
    trim: Callable[[Tensor, float, int], Tensor],
    rescale: bool,
) -> list[Tensor]:
    """Each task vector trimmed to its density; `rescale` restores its L1 norm afterwards."""
    return [
        d if density >= 1 else _rescaled(d, trim(d, density, i), rescale)
        for i, (d, density) in enumerate(zip(ds, densities, strict=True))
    ]


def largest(d: Tensor, density: float) -> Tensor:
    """Keep the max(1, int(density n)) largest by magnitude (TIES, arXiv 2306.01708, section 4)."""
    count = max(1, int(density * d.numel()))
    kept = d.abs().flatten().float().topk(count, sorted=False).indices
    mask = torch.zeros(d.numel(), dtype=torch.bool, device=d.device)
    mask[kept] = True
    return d * mask.view_as(d)


def dropped(d: Tensor, density: float, seed: int) -> Tensor:
    """Keep each value with probability `density` (DARE, arXiv 2311.03099, section 3.2)."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(d.shape, generator=random) < density
    return d * mask.to(d.device)


def combine_task_vectors(
    base: Tensor,
    ds: Sequence[Tensor],
    weights: Sequence[float],
    *,
    consensus: bool,
    normalize: bool,
    scale: float,
) -> Tensor:
    """base + scale sum(w d mask) [/ sum(w mask)].

    With `consensus`, only values whose sign is that of sum(w d) count (0 counts as positive;
    TIES, arXiv 2306.01708, section 4); without, all do.
    """
    if not consensus:
        return task_arithmetic(base, ds, weights, normalize, scale)
    stacked = torch.stack(list(ds))
    shape = (-1, *[1] * base.dim())
    column = torch.tensor(weights, dtype=base.dtype, device=base.device).view(shape)
    weighted = stacked * column
    majority = torch.where(weighted.sum(dim=0) >= 0, 1, -1)
    mask = (weighted.sign() == majority).to(base.dtype)
    mixed = (weighted * mask).sum(dim=0)
    if normalize:
        divisor = (column * mask).sum(dim=0)
        divisor[divisor == 0] = 1
        mixed = mixed / divisor
    if scale != 1:
        mixed = mixed * scale
    return base + mixed


def passthrough(x: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """The tensor itself, scaled."""
    scaled = x if scale == 1 else x * scale
    return scaled if out is None else out.copy_(scaled)


def _rescaled(d: Tensor, trimmed: Tensor, rescale: bool) -> Tensor:
    if not rescale:
        return trimmed
    before, after = d.abs().sum(), trimmed.abs().sum()
    return trimmed if after == 0 else trimmed * (before / after)


def _rounded(weights: Sequence[float], dtype: torch.dtype) -> list[float]:
    """Weights as values of the dtype."""
    values: list[float] = torch.tensor(weights, dtype=dtype).tolist()
    return values


def _total(weights: Sequence[float], dtype: torch.dtype) -> float:
    return float(torch.tensor(weights, dtype=dtype).sum())


def _combined(
    xs: Sequence[Tensor], weights: Sequence[float], divisor: float | None, scale: float
) -> Tensor:
    """scale sum(w x) [/ divisor] of chunks."""
    if xs[0].dtype in (torch.float16, torch.bfloat16):  # a reduction sums in float32
        total = (xs[0] * weights[0]).float()
        for x, weight in zip(xs[1:], weights[1:], strict=True):
            total += x * weight
        total = total.to(xs[0].dtype)
    else:
        total = xs[0] * weights[0]
        for x, weight in zip(xs[1:], weights[1:], strict=True):
            total += x * weight
    if divisor is not None:
        total /= divisor
    if scale != 1:
        total *= scale
    return total


def _elementwise(
    inputs: Sequence[Tensor], out: Tensor | None, formula: Callable[[Sequence[Tensor]], Tensor]
) -> Tensor:
    """Apply a formula chunk by chunk; contiguous inputs are never copied."""
    result = torch.empty_like(inputs[0]) if out is None else out
    if inputs[0].device.type != "cpu" or not result.is_contiguous():
        return result.copy_(formula(inputs))
    flat = [x.contiguous().view(-1) for x in inputs]
    target = result.view(-1)
    for start, end in _chunks(target.numel()):
        target[start:end] = formula([x[start:end] for x in flat])
    return result


def _chunks(n: int) -> Iterator[tuple[int, int]]:
    size = _CHUNK * torch.get_num_threads()
    return ((start, min(start + size, n)) for start in range(0, n, size))


def _written(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def _column(per_model: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [parameters[name] for parameters in per_model]


def _present(base: Tensor | None) -> Tensor:
    if base is None:  # the recipe's own check makes this unreachable
        raise TypeError("this method needs a base tensor")
    return base


def _linear(base: Any, xs: Any, per_model: Any, shared: Any, key: Any, out: Any) -> Tensor:
    return linear(xs, _column(per_model, "weight"), bool(shared["normalize"]), out)


def _slerp(base: Any, xs: Any, per_model: Any, shared: Any, key: Any, out: Any) -> Tensor:
    return _written(slerp(xs[0], xs[1], shared["t"]), out)


def _task_arithmetic(base: Any, ds: Any, per_model: Any, shared: Any, key: Any, out: Any) -> Tensor:
    weights = _column(per_model, "weight")
    return task_arithmetic(base, ds, weights, bool(shared["normalize"]), shared["lambda"], out)


def _sparse(trim: Callable[[Tensor, float, int], Tensor], consensus: bool) -> Callable[..., Tensor]:
    def formula(
        base: Tensor | None, ds: Any, per_model: Any, shared: Any, key: tuple[int, str], out: Any
    ) -> Tensor:
        seed, name = key
        kept = sparsified(
            ds,
            _column(per_model, "density"),
            lambda d, density, i: trim(d, density, derive(seed, name, i)),
            bool(shared["rescale"]),
        )
        merged = combine_task_vectors(
            _present(base),
            kept,
            _column(per_model, "weight"),
            consensus=consensus,
            normalize=bool(shared["normalize"]),
            scale=shared["lambda"],
        )
        return _written(merged, out)

    return formula


def _passthrough(base: Any, xs: Any, per_model: Any, shared: Any, key: Any, out: Any) -> Tensor:
    return passthrough(xs[0], per_model[0]["scale"], out)


_FORMULAS: dict[str, Callable[..., Tensor]] = {
    "linear": _linear,
    "slerp": _slerp,
    "task_arithmetic": _task_arithmetic,
    "ties": _sparse(lambda d, density, seed: largest(d, density), consensus=True),
    "dare_ties": _sparse(dropped, consensus=True),
    "dare_linear": _sparse(dropped, consensus=False),
    "passthrough": _passthrough,
}
