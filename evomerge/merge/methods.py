"""Merge methods: pure functions from tensors to a tensor, with the bits of mergekit 0.1.5.

What decides the bits: linear and slerp compute in float32 whatever the inputs are, and round once;
the methods on task vectors round to the dtype of their inputs after every operation, except that a
sum over parents is one reduction. Element-wise methods run over chunks that stay in the cache, so
that a merge costs little more than reading its inputs. Random masks are our own: mergekit draws
them in its order of work, here they depend on (seed, tensor name, parent) alone.

Knows nothing of models, files or recipes. `x` stands for a parent's tensor, `d` for a task vector
(parent minus base); all tensors of a call have one shape, one floating dtype and one device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from evomerge.seeds import derive

_CHUNK = 1 << 19  # elements: two float32 buffers of this size stay in the last-level cache
_SEQUENTIAL = 4  # torch sums up to this many float32 tensors one after the other


class Spare:
    """Working memory, kept from one tensor to the next: getting it from the operating system anew
    costs as much as merging. Not for several threads at once."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def like(self, x: Tensor, number: int, dtype: torch.dtype) -> Tensor:
        """Buffer `number`, as long as the flat tensor x; its values are whatever they are."""
        key = number, dtype, x.device
        if key not in self._buffers or self._buffers[key].numel() < x.numel():
            self._buffers[key] = torch.empty(x.numel(), dtype=dtype, device=x.device)
        return self._buffers[key][: x.numel()]


@dataclass(frozen=True)
class Call:
    """Everything that one output tensor is merged from.

    inputs: task vectors for the methods that take them, else the parents' tensors.
    per_model: the parameters of each input; shared: those of the merge (see recipe.METHODS).
    mask_key: (seed, tensor name), which stochastic masks are drawn from. out: where to write.
    spare: working memory.
    """

    base: Tensor | None
    inputs: Sequence[Tensor]
    per_model: Sequence[Mapping[str, Any]]
    shared: Mapping[str, Any]
    mask_key: tuple[int, str]
    out: Tensor | None
    spare: Spare

    def column(self, name: str) -> list[float]:
        """A parameter's value for each input."""
        return [parameters[name] for parameters in self.per_model]

    def flag(self, name: str) -> bool:
        """A parameter of the merge that is true or false."""
        return bool(self.shared[name])


def merge(method: str, call: Call) -> Tensor:
    """Merge one tensor; gives `call.out` if there is one."""
    base = None if call.base is None else call.base.contiguous()
    inputs = [x.contiguous() for x in call.inputs]  # the order of a sum depends on strides
    merged = _FORMULAS[method](replace(call, base=base, inputs=inputs))
    if call.out is None or merged is call.out:
        return merged
    return call.out.copy_(merged)


def linear(
    xs: Sequence[Tensor],
    weights: Sequence[float],
    normalize: bool,
    out: Tensor | None = None,
    spare: Spare | None = None,
) -> Tensor:
    """sum(w x) / sum(w) (model soups: arXiv 2203.05482, section 2), in float32 at least."""
    wide = torch.promote_types(xs[0].dtype, torch.float32)
    total_weight = float(torch.tensor(weights, dtype=wide).sum())

    def formula(target: Tensor, spare: Spare, chunk: Sequence[Tensor]) -> None:
        total = spare.like(target, 0, wide).copy_(chunk[0]).mul_(weights[0])
        for x, weight in zip(chunk[1:], weights[1:], strict=True):
            widened = x if x.dtype == wide else spare.like(target, 1, wide).copy_(x)
            total.add_(widened, alpha=weight)  # fused: w x is not rounded on its own
        target.copy_(total.div_(total_weight) if normalize else total)

    return _elementwise(xs, out, spare or Spare(), formula)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Along the great circle from a (t = 0) to b (t = 1), the whole tensor as one vector.

    A straight line where both point the same way or opposite ways. In float32 at least.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    x, y = a.to(wide).flatten(), b.to(wide).flatten()
    share = torch.tensor(t, dtype=wide, device=a.device)
    cosine = (_unit(x) * _unit(y)).sum().clamp(-1, 1)
    if cosine.abs() > 0.9995:
        of_x, of_y = 1 - share, share
    else:
        angle = torch.acos(cosine)
        of_x = torch.sin((1 - share) * angle) / torch.sin(angle)
        of_y = torch.sin(share * angle) / torch.sin(angle)
    return (of_x * x + of_y * y).to(a.dtype).view_as(a)


def task_arithmetic(
    base: Tensor,
    ds: Sequence[Tensor],
    weights: Sequence[float],
    normalize: bool,
    scale: float,
    out: Tensor | None = None,
    spare: Spare | None = None,
) -> Tensor:
    """base + scale sum(w d) [/ sum(w)] (arXiv 2212.04089, section 3)."""
    rounded = torch.tensor(weights, dtype=base.dtype)
    divisor = float(rounded.sum())
    values = rounded.tolist()

    def formula(target: Tensor, spare: Spare, chunk: Sequence[Tensor]) -> None:
        mixed = _weighted_sum(chunk[1:], values, spare)
        if normalize and abs(divisor) >= 1e-8:
            mixed /= divisor
        if scale != 1:
            mixed *= scale
        torch.add(chunk[0], mixed, out=target)

    return _elementwise([base, *ds], out, spare or Spare(), formula)


def sign_consensus(
    base: Tensor, ds: Sequence[Tensor], weights: Sequence[float], normalize: bool, scale: float
) -> Tensor:
    """base + scale sum(w d mask) [/ sum(w mask)], where the mask keeps the values whose sign is
    that of sum(w d), 0 counting as positive (TIES, arXiv 2306.01708, section 4)."""
    shape = (-1, *[1] * base.dim())
    column = torch.tensor(weights, dtype=base.dtype, device=base.device).view(shape)
    weighted = torch.stack(list(ds)) * column
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


def largest(d: Tensor, density: float) -> Tensor:
    """Keep the max(1, int(density n)) largest by magnitude, zeros elsewhere (TIES, arXiv
    2306.01708, section 4). Which of equal magnitudes are kept is up to torch's own sort."""
    count = max(1, int(density * d.numel()))
    order = d.abs().float().flatten().argsort(descending=True)
    mask = torch.zeros_like(d).view(-1)
    mask[order[:count]] = 1
    return d * mask.view_as(d)


def dropped(d: Tensor, density: float, seed: int) -> Tensor:
    """Keep each value with probability `density`, zeros elsewhere (DARE, arXiv 2311.03099,
    section 3.2). Drawn on the CPU, so that every device drops the same values."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(d.shape, generator=random) < density
    return d * mask.to(d.device)


def rescaled(d: Tensor, sparse: Tensor) -> Tensor:
    """The sparse task vector, scaled back to the L1 norm that it had before."""
    before, after = d.abs().sum(), sparse.abs().sum()
    if before < 1e-7 or after < 1e-7:
        return sparse
    return sparse * (before / after)


def passthrough(x: Tensor, scale: float) -> Tensor:
    """The tensor itself, scaled."""
    return x if scale == 1 else x * scale


def _weighted_sum(ds: Sequence[Tensor], weights: Sequence[float], spare: Spare) -> Tensor:
    """sum(w d): each product rounded to the dtype, the sum rounded once for 16-bit ones."""
    dtype = ds[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    if dtype == wide and len(ds) > _SEQUENTIAL:
        return torch.stack([d * w for d, w in zip(ds, weights, strict=True)]).sum(dim=0)
    product = torch.mul(ds[0], weights[0], out=spare.like(ds[0], 0, dtype))
    total = product if dtype == wide else spare.like(product, 1, wide).copy_(product)
    for d, weight in zip(ds[1:], weights[1:], strict=True):
        total += torch.mul(d, weight, out=spare.like(product, 2, dtype))
    return total if dtype == wide else product.copy_(total)


def _unit(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x)
    return x / norm if norm > 1e-8 else x


def _elementwise(
    inputs: Sequence[Tensor],
    out: Tensor | None,
    spare: Spare,
    formula: Callable[[Tensor, Spare, Sequence[Tensor]], None],
) -> Tensor:
    """Apply a formula chunk by chunk, in the dtype of the first input; contiguous inputs are
    never copied. formula(target, spare, chunk) writes a chunk into the target."""
    if out is not None and not out.is_contiguous():
        return out.copy_(_elementwise(inputs, None, spare, formula))
    result = out
    if result is None:
        result = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
    sizes = _chunk_sizes(result)
    flat = [torch.split(x.contiguous().view(-1), sizes) for x in (result, *inputs)]
    for target, *chunk in zip(*flat, strict=True):
        formula(target, spare, chunk)
    return result


def _chunk_sizes(x: Tensor) -> list[int]:
    """Lengths of the chunks of a tensor. A short tail joins its neighbour: torch adds up the last
    few values of a reduction in another order. A GPU has no use for chunks."""
    n = x.numel()
    count = max(1, n // _CHUNK) if x.device.type == "cpu" else 1
    return [_CHUNK] * (count - 1) + [n - _CHUNK * (count - 1)]


def _sparsified(call: Call, trim: Callable[[Tensor, float, int], Tensor]) -> list[Tensor]:
    """The task vectors, each trimmed to its density; trim gets a seed of its own for each."""
    seed, name = call.mask_key
    found = []
    for i, (d, density) in enumerate(zip(call.inputs, call.column("density"), strict=True)):
        sparse = d if density >= 1 else trim(d, density, derive(seed, name, i))
        found.append(rescaled(d, sparse) if call.flag("rescale") and sparse is not d else sparse)
    return found


def _base(call: Call) -> Tensor:
    if call.base is None:
        raise TypeError("this method merges task vectors and needs their base")
    return call.base


def _magnitude(d: Tensor, density: float, seed: int) -> Tensor:
    return largest(d, density)


def _added(call: Call, ds: Sequence[Tensor]) -> Tensor:
    weights, scale = call.column("weight"), call.shared["lambda"]
    normalize = call.flag("normalize")
    return task_arithmetic(_base(call), ds, weights, normalize, scale, call.out, call.spare)


def _agreed(call: Call, ds: Sequence[Tensor]) -> Tensor:
    weights, scale = call.column("weight"), call.shared["lambda"]
    return sign_consensus(_base(call), ds, weights, call.flag("normalize"), scale)


_FORMULAS: dict[str, Callable[[Call], Tensor]] = {
    "linear": lambda c: linear(c.inputs, c.column("weight"), c.flag("normalize"), c.out, c.spare),
    "slerp": lambda c: slerp(c.inputs[0], c.inputs[1], c.shared["t"]),
    "task_arithmetic": lambda c: _added(c, c.inputs),
    "ties": lambda c: _agreed(c, _sparsified(c, _magnitude)),
    "dare_ties": lambda c: _agreed(c, _sparsified(c, dropped)),
    "dare_linear": lambda c: _added(c, _sparsified(c, dropped)),
    "passthrough": lambda c: passthrough(c.inputs[0], c.per_model[0]["scale"]),
}
