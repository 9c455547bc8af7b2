"""Methods that merge value by value: against a slow float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.merge import reference
from tests.merge.methods.calls import (
    apart,
    call,
    drawn,
    in_both_dtypes,
    matrices,
    modestly,
    positive,
    seeds,
    shapes,
    weighted,
    wide,
)


@in_both_dtypes
@pytest.mark.parametrize("normalize", [True, False])
@modestly
@given(shape=shapes, seed=seeds, weights=st.lists(positive, min_size=1, max_size=7))
def test_linear_is_the_weighted_mean_or_sum(
    dtype: torch.dtype, normalize: bool, shape: tuple[int, ...], seed: int, weights: list[float]
) -> None:
    xs = drawn(seed, shape, dtype, len(weights))
    found = call("linear", xs, per_model=weighted(weights), normalize=normalize)
    expected = reference.linear([wide(x) for x in xs], weights, normalize)
    scale = reference.linear([abs(wide(x)) for x in xs], weights, normalize)
    assert found.dtype == dtype
    assert found.shape == shape
    assert apart(found, expected, scale) < (4 if dtype == torch.float32 else 0.51)


@in_both_dtypes
@pytest.mark.parametrize("scale", [1.0, 0.7, 0.0, -1.5])
def test_passthrough_scales(dtype: torch.dtype, scale: float) -> None:
    (x,) = drawn(4, (5, 7), dtype, 1)
    found = call("passthrough", [x], per_model=[{"scale": scale}])
    assert apart(found, wide(x) * scale, abs(wide(x) * scale) + 1e-30) <= 1


@in_both_dtypes
@modestly
@given(shape=shapes, seed=seeds, t=st.floats(0, 2))
def test_nearswap_moves_what_is_near(
    dtype: torch.dtype, shape: tuple[int, ...], seed: int, t: float
) -> None:
    a, b = drawn(seed, shape, dtype, 2)
    found = call("nearswap", [a, b], t=t)
    assert found.dtype == dtype
    assert apart(found, reference.nearswap(wide(a), wide(b), t), abs(wide(a)) + abs(wide(b))) < 4


@pytest.mark.parametrize(("t", "which"), [(0.0, 0), (100.0, 1)])
def test_nearswap_of_nothing_and_of_everything(t: float, which: int) -> None:
    pair = drawn(1, (7, 11), torch.float32, 2)
    assert torch.equal(call("nearswap", pair, t=t), pair[which])


@modestly
@given(shape=matrices, seed=seeds)
def test_arcee_fusion_takes_what_matters(shape: tuple[int, ...], seed: int) -> None:
    a, b = drawn(seed, shape, torch.float32, 2)
    found = call("arcee_fusion", [a, b])
    score, threshold = importance(a, b)
    clear = torch.from_numpy(abs(score - threshold) > 1e-4 * abs(score).max())
    expected = reference.arcee_fusion(wide(a), wide(b))
    scale = abs(wide(a)) + abs(wide(b))
    assert apart(found[clear], expected[clear.numpy()], scale[clear.numpy()]) < 2


def test_arcee_fusion_in_bfloat16_takes_what_clearly_matters() -> None:
    a, b = drawn(1, (40, 50), torch.bfloat16, 2)
    found = call("arcee_fusion", [a, b])
    changed = a.float() + (b - a).float()
    assert found.dtype == torch.float32
    taken = (found == changed) & (found != a.float())
    assert torch.equal(found[~taken], a.float()[~taken])
    score, threshold = importance(a, b)
    assert taken[torch.from_numpy(score > 1.3 * threshold)].all()
    assert not taken[torch.from_numpy(score < 0.7 * threshold)].any()
    assert 0.01 < float(taken.float().mean()) < 0.2


def importance(a: Tensor, b: Tensor) -> tuple[reference.Array, float]:
    """Of each value, and the threshold that it has to reach."""
    after, before = (x.double().softmax(dim=-1) + 1e-8 for x in (b, a))
    divergence = (after * (after / before).log()).sum(dim=-1, keepdim=True)
    score = wide((b.double() - a.double()).abs() * divergence)
    low, middle, high = (
        np.sort(score.ravel())[int(q * (score.size - 1))] for q in (0.25, 0.5, 0.75)
    )
    return score, middle + 1.5 * (high - low)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_nearswap_at_0_is_the_first(dtype: torch.dtype) -> None:
    a, b = drawn(21, (20, 7), dtype, 2)
    b[:10] = a[:10]
    assert torch.equal(call("nearswap", [a, b], t=0.0), a)
