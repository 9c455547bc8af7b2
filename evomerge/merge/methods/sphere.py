"""Methods on directions: parents, or their task vectors, as points of a sphere.

What decides the bits: slerp is in float32 at least and rounded once; the others round to the dtype
of their inputs after every operation, a sum over values or parents being one.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.merge.methods.reduction import summed
from evomerge.merge.operand import Operand


def slerp(a: Operand, b: Operand, t: float) -> Operand:
    """Along the great circle from a (t = 0) to b (t = 1), the whole tensor as one vector
    (Shoemake, Animating rotation with quaternion curves, 1985, section 3.3).

    A straight line where both point the same way or opposite ways.
    """
    cosine = a.cosine(b)
    share = torch.tensor(t, dtype=cosine.dtype, device=cosine.device)
    if cosine.abs() > 0.9995:
        of_a, of_b = 1 - share, share
    else:
        angle = torch.acos(cosine)
        of_a = torch.sin((1 - share) * angle) / torch.sin(angle)
        of_b = torch.sin(share * angle) / torch.sin(angle)

    def read(start: int, stop: int) -> Tensor:
        mixed = a.span(start, stop).to(a.wide) * of_a
        return mixed.add_(b.span(start, stop).to(a.wide) * of_b).to(a.dtype)

    return a.derived(read)


def nuslerp(
    a: Operand, b: Operand, base: Operand | None, weights: Sequence[float], vectors: str
) -> Operand:
    """Along the great circle from a to b by their normalised weights (slerp's formula), added to
    the base if there is one. vectors: 'whole' tensors, or their 'rows' or 'columns'."""
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    if len(a.shape) < 2:
        vectors = "whole"
    width = {
        "whole": 1,
        "rows": a.row,
        "columns": math.prod(a.shape[1:]),
    }[vectors]
    shape = (-1,) if vectors == "whole" else (-1, width)
    across = None if vectors == "rows" else _cosines(a, b, shape)

    def read(start: int, stop: int) -> Tensor:
        x, y = (v.span(start, stop).view(shape) for v in (a, b))
        cosine = _row_cosines(x, y) if across is None else across
        angle = cosine.acos()
        bent = (((1 - t) * angle).sin() * x + (t * angle).sin() * y) / angle.sin()
        straight = (1 - t) * x + t * y
        result = torch.where(1 - cosine * cosine <= 1e-16, straight, bent).view(-1)
        return result if base is None else base.span(start, stop) + result

    return a.derived(read, unit=width)


def _cosines(a: Operand, b: Operand, shape: tuple[int, ...]) -> Tensor:
    """Of the angles between whole tensors, or the columns of `shape`, across all spans."""

    def find() -> Tensor:
        unit = shape[-1] if len(shape) > 1 else 1
        aligned = a.derived(a.span, unit=unit)

        def norm(x: Operand) -> Tensor:
            def square(start: int, stop: int) -> Tensor:
                values = x.span(start, stop).view(shape).to(a.wide)
                length: Tensor = torch.linalg.vector_norm(values, dim=0)
                return length.double().square()

            whole = aligned.total(square).sqrt().to(a.wide)
            return whole.to(a.dtype).clamp(min=1e-7)

        of_a, of_b = norm(a), norm(b)

        def product(start: int, stop: int) -> Tensor:
            x, y = (v.span(start, stop).view(shape) for v in (a, b))
            return ((x / of_a) * (y / of_b)).sum(dim=0, dtype=a.wide)

        return aligned.total(product).to(a.wide).to(a.dtype).clamp(-1, 1)

    return a.known(("cosines", b.facts, shape), find)


def _row_cosines(x: Tensor, y: Tensor) -> Tensor:
    a, b = (v / v.norm(dim=1, keepdim=True).clamp(min=1e-7) for v in (x, y))
    cosines: Tensor = (a * b).sum(dim=1, keepdim=True).clamp(-1, 1)
    return cosines


def multislerp(
    xs: Sequence[Operand],
    base: Operand | None,
    weights: Sequence[float],
    normalize: bool,
    epsilon: float,
) -> Operand:
    """Weighted mean of directions in the tangent space of their mean direction, times the weighted
    mean of the lengths, added to the base if there is one (Buss and Fillmore, Spherical averages,
    2001, section 3: the first step of its iteration). Raises RecipeError where directions cancel.
    """
    one = xs[0]
    if len(xs) == 1:
        return one if base is None else one.derived(lambda i, j: base.span(i, j) + one.span(i, j))
    shares = torch.tensor(weights, dtype=one.dtype, device=one.device)
    if normalize:
        shares = shares / shares.sum()
    lengths = [x.norm.to(x.dtype) for x in xs]
    if not any(lengths):
        return one if base is None else base  # nothing was trained here

    def weighted(vectors: Sequence[Operand]) -> Operand:
        pairs = list(zip(vectors, shares, strict=True))
        return one.derived(lambda i, j: summed([v.span(i, j) * w for v, w in pairs]))

    def added(result: Operand) -> Operand:
        if base is None:
            return result
        return base.derived(lambda i, j: result.span(i, j) + base.span(i, j))

    units = [_over(x, _not_zero(n + epsilon)) for x, n in zip(xs, lengths, strict=True)]
    mean = weighted(units)
    length = mean.norm.to(one.dtype)
    if length < epsilon:
        if len(xs) > 2:
            raise RecipeError(
                "multislerp: the weighted directions cancel out, so that there is no mean: "
                "change the weights, or leave a model out"
            )
        return added(weighted(xs))
    mean = _over(mean, length)
    tangents = [_rejected(unit, mean) for unit in units]
    tangent = weighted(tangents)
    turn = tangent.norm.to(one.dtype) + epsilon
    bend = turn.sin() / _not_zero(turn)
    size = (torch.stack(lengths) * shares).sum()

    def read(start: int, stop: int) -> Tensor:
        moved = tangent.span(start, stop) * bend
        return (mean.span(start, stop) * turn.cos() + moved) * size

    return added(one.derived(read))


def _not_zero(divisor: Tensor) -> Tensor:
    """1 in the place of 0: in float16 an epsilon is nothing."""
    return torch.where(divisor == 0, 1, divisor)


def _rejected(x: Operand, unit: Operand) -> Operand:
    """What of x is at right angles to a unit vector."""
    along = x.dot(unit).to(x.dtype)
    return x.derived(lambda i, j: x.span(i, j) - along * unit.span(i, j))


def karcher(xs: Sequence[Operand], max_iter: int, tol: float) -> Operand:
    """The Riemannian mean of the directions, times the mean length (Karcher, Riemannian center of
    mass and mollifier smoothing, 1977, section 1; the fixed-point iteration on the sphere)."""
    one = xs[0]
    if len(xs) == 1:
        return one
    lengths = [x.norm for x in xs]
    valid = [(_over(x, n), n) for x, n in zip(xs, lengths, strict=True) if n > tol]
    if not valid:
        return one.derived(lambda i, j: torch.zeros_like(one.span(i, j)))
    units = [unit for unit, _ in valid]
    share = 1 / len(xs)
    share /= sum(share for _ in units)
    mean = _accumulated([(share, unit) for unit in units])
    mean = units[0] if mean.norm < tol else _over(mean, mean.norm)
    for _ in range(max_iter):
        moved = _karcher_step(mean, units, share, tol)
        if moved is None:
            break
        mean = moved.held()
    scale = torch.zeros_like(lengths[0])
    for length in lengths:
        scale = scale + (1 / len(xs)) * length
    return mean.derived(lambda i, j: mean.span(i, j) * scale.to(one.dtype))


def _karcher_step(
    mean: Operand, units: Sequence[Operand], share: float, tol: float
) -> Operand | None:
    """One step along the mean of the logarithms; None where the mean stands still."""
    terms = []
    for unit in units:
        cosine = mean.inner(unit).to(mean.dtype).clamp(-1, 1)
        angle = cosine.acos()
        if angle >= tol:
            terms.append((share * (angle / angle.sin()), _minus_multiple(unit, cosine, mean)))
    if not terms:
        return None
    tangent = _accumulated(terms)
    turn = tangent.norm
    if turn < tol:
        return None
    cosine, sine = turn.cos().to(mean.dtype), turn.sin().to(mean.dtype)
    moved = mean.derived(lambda i, j: cosine * mean.span(i, j) + sine * (tangent.span(i, j) / turn))
    return _over(moved, moved.norm) if moved.norm > tol else moved


def _minus_multiple(x: Operand, factor: Tensor, y: Operand) -> Operand:
    return x.derived(lambda i, j: x.span(i, j) - factor * y.span(i, j))


def _over(x: Operand, divisor: Tensor) -> Operand:
    """x / divisor, which may be of a wider dtype and is not rounded first."""
    return x.derived(lambda i, j: x.span(i, j) / divisor)


def _accumulated(terms: Sequence[tuple[float | Tensor, Operand]]) -> Operand:
    """sum(c x), rounded after every product and every addition."""

    def read(start: int, stop: int) -> Tensor:
        factor, x = terms[0]
        total = factor * x.span(start, stop)
        for factor, x in terms[1:]:
            total += factor * x.span(start, stop)
        return total

    return terms[0][1].derived(read)


def model_stock(base: Operand, xs: Sequence[Operand], filter_wise: bool) -> Operand:
    """t mean(x) + (1 - t) base, t = N c / (1 + (N - 1) c), c the mean cosine between two task
    vectors (arXiv 2403.19522, section 4, equation 2); of whole tensors, or of each row."""
    ds = [x.minus(base) for x in xs]
    pairs = list(itertools.combinations(range(len(xs)), 2))

    def interpolated(start: int, stop: int, t: Tensor) -> Tensor:
        shape = (-1,) if t.dim() == 0 else (-1, base.row)
        mean = xs[0].span(start, stop) + xs[1].span(start, stop)
        for x in xs[2:]:
            mean += x.span(start, stop)
        mean = mean.div_(len(xs)).view(shape).mul_(t)
        return mean.add_((1 - t) * base.span(start, stop).view(shape)).view(-1)

    def read(start: int, stop: int) -> Tensor:
        rows = [d.span(start, stop).view(-1, base.row) for d in ds]
        norms = [d.norm(dim=1, keepdim=True) for d in rows]
        cosines = [
            (rows[i] * rows[j]).sum(dim=1, keepdim=True) / (norms[i] * norms[j]).clamp(min=1e-6)
            for i, j in pairs
        ]
        return interpolated(start, stop, _stock_share(cosines, len(xs)))

    if filter_wise:
        return base.derived(read, unit=base.row)

    def sums(start: int, stop: int) -> Tensor:
        """The squares of all lengths, then the products of all pairs."""
        spans = [d.span(start, stop) for d in ds]
        norms = [torch.linalg.vector_norm(x.to(base.wide)).double().square() for x in spans]
        dots = [(spans[i] * spans[j]).sum(dtype=base.wide).double() for i, j in pairs]
        return torch.stack([*norms, *dots])

    def find() -> Tensor:
        found = base.total(sums)
        norms = found[: len(ds)].sqrt().to(base.wide).to(base.dtype)
        dots = found[len(ds) :].to(base.wide).to(base.dtype)
        cosines = [
            dot / (norms[a] * norms[b]).clamp(min=1e-6)
            for dot, (a, b) in zip(dots, pairs, strict=True)
        ]
        return _stock_share(cosines, len(xs))

    t = base.known(("stock", *(x.facts for x in xs)), find)
    return base.derived(lambda i, j: interpolated(i, j, t))


def _stock_share(cosines: Sequence[Tensor], count: int) -> Tensor:
    cosine = torch.stack([c.clamp(-1, 1) for c in cosines]).mean(dim=0)
    divisor = 1 + (count - 1) * cosine
    flat = divisor.abs() < 1e-6
    share: Tensor = torch.where(flat, 0, count * cosine / divisor.masked_fill(flat, 1))
    return share
