"""Inputs of merge methods, calls of them, and how far results are from a reference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.merge import methods
from evomerge.merge.operand import Operand, Read
from evomerge.seeds import derive
from evomerge.signatures import METHODS
from tests.merge import reference

DTYPES = (torch.float32, torch.bfloat16)
ON_TASK_VECTORS = tuple(
    name
    for name, signature in METHODS.items()
    if signature.task_vectors and signature.base != "optional"
)
DROPPING = ("dare_ties", "dare_linear", "della", "della_linear")

modestly = settings(max_examples=40, deadline=None, derandomize=True)
in_both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple).filter(lambda s: s != (1,))
matrices = st.tuples(st.integers(2, 9), st.integers(2, 9))
seeds = st.integers(0, 2**32)
positive = st.floats(0.1, 2)

Draws = Callable[[int], Read]


def drawn(seed: int, shape: tuple[int, ...], dtype: torch.dtype, n: int) -> list[Tensor]:
    """n tensors of normal values."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(n)]


def related(seed: int, shape: tuple[int, ...], dtype: torch.dtype, n: int) -> list[Tensor]:
    """n tensors that point into about the same direction."""
    common, *own = drawn(seed, shape, torch.float32, n + 1)
    return [(common + 0.7 * x).to(dtype) for x in own]


def wide(tensor: Tensor) -> reference.Array:
    return tensor.double().numpy()


def keyed(seed: int, name: str = "x") -> Draws:
    """The random numbers of a tensor's masks, as a merge draws them."""
    return lambda i: methods.drawn(derive(seed, name, i))


def call(
    method: str,
    inputs: list[Tensor],
    base: Tensor | None = None,
    per_model: list[dict[str, Any]] | None = None,
    draws: Draws | None = None,
    **shared: Any,
) -> Tensor:
    """Merge with the method's own defaults for what is not given."""
    signature = METHODS[method]
    given = per_model or [{}] * len(inputs)
    merged = methods.merge(
        method,
        methods.Call(
            None if base is None else Operand.of(base),
            [Operand.of(x) for x in inputs],
            [{**signature.per_model, **parameters} for parameters in given],
            {**signature.shared, **shared},
            draws or keyed(0),
        ),
    )
    return merged.whole()


def weighted(weights: list[float], **more: Any) -> list[dict[str, Any]]:
    return [{"weight": weight, **more} for weight in weights]


def apart(found: Tensor, expected: reference.Array, scale: reference.Array | float) -> float:
    """The largest difference in units of the dtype's precision at `scale`."""
    difference = abs(wide(found) - expected) / (scale * torch.finfo(found.dtype).eps)
    return float(difference.max(initial=0))


def largest(*tensors: Tensor) -> float:
    return max(float(abs(wide(x)).max(initial=0)) for x in tensors)


VECTORS = {
    "whole": ({}, None),
    "rows": ({"nuslerp_flatten": False}, -1),
    "columns": ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, 0),
}


@dataclass(frozen=True)
class Sum:
    """What is left of task vectors, added to a base with these weights."""

    base: Tensor
    kept: list[reference.Array]
    weights: list[float]
    normalize: bool
    scale: float

    def is_plain(self, found: Tensor) -> None:
        """Equal to the reference of task arithmetic."""
        base, more = wide(self.base), (self.weights, self.normalize, self.scale)
        expected = reference.task_arithmetic(base, self.kept, *more)
        bound = reference.task_arithmetic(abs(base), [abs(k) for k in self.kept], *more)
        assert apart(found, expected, bound) < 8

    def is_elected(self, found: Tensor) -> None:
        """Equal to the reference of sign consensus, save where rounding elects the sign."""
        base, more = wide(self.base), (self.weights, self.normalize, self.scale)
        expected = reference.consensus(base, self.kept, *more)
        pairs = zip(self.weights, self.kept, strict=True)
        total = self.scale * sum(weight * abs(k) for weight, k in pairs)
        bound = abs(base) + total / (min(self.weights) if self.normalize else 1)
        precision = torch.finfo(self.base.dtype).eps
        open_votes = reference.undecided(self.kept, self.weights, 4 * precision) & (total > 0)
        decided = torch.from_numpy(~open_votes)
        assert found.dtype == self.base.dtype
        assert apart(found[decided], expected[~open_votes], bound[~open_votes]) < 8


PARENTS = {"slerp": 2, "nuslerp": 2, "nearswap": 2, "arcee_fusion": 2, "passthrough": 1}
SHARED: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.3},
    "nearswap": {"t": 0.3},
    "karcher": {"max_iter": 3},
}
SETTINGS: dict[str, float] = {
    "weight": 0.3,
    "density": 0.4,
    "gamma": 0.1,
    "epsilon": 0.2,
    "scale": 0.7,
}


def given_to(method: str, n: int, **fixed: Any) -> list[dict[str, Any]]:
    """Parameters for n parents, each with a weight of its own."""
    names = METHODS[method].per_model
    parameters = [{k: SETTINGS[k] for k in names} | {"weight": 0.3 + 0.2 * i} for i in range(n)]
    return [{k: v for k, v in (p | fixed).items() if k in names} for p in parameters]


def case(
    method: str, dtype: torch.dtype, shape: tuple[int, ...], n: int = 3
) -> tuple[list[Tensor], Tensor | None, list[dict[str, Any]], dict[str, Any]]:
    """What a call of the method takes: inputs, base, parameters of each and of all."""
    n = PARENTS.get(method, n)
    base, *inputs = drawn(9, shape, dtype, 1 + n)
    on = base if method in ON_TASK_VECTORS else None
    return inputs, on, given_to(method, n), dict(SHARED.get(method, {}))
