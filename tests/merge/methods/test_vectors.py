"""Sums of task vectors, plain, elected and shared: against a slow float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.merge import reference
from tests.merge.conftest import spans_of
from tests.merge.methods.calls import (
    ON_TASK_VECTORS,
    Sum,
    apart,
    call,
    drawn,
    given_to,
    in_both_dtypes,
    largest,
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
@given(
    shape=shapes,
    seed=seeds,
    weights=st.lists(positive, min_size=1, max_size=7),
    scale=st.floats(0.1, 2),
)
def test_task_arithmetic_adds_task_vectors(
    dtype: torch.dtype,
    normalize: bool,
    shape: tuple[int, ...],
    seed: int,
    weights: list[float],
    scale: float,
) -> None:
    base, *ds = drawn(seed, shape, dtype, 1 + len(weights))
    found = call(
        "task_arithmetic", ds, base, weighted(weights), normalize=normalize, **{"lambda": scale}
    )
    assert found.dtype == dtype
    Sum(base, [wide(d) for d in ds], weights, normalize, scale).is_plain(found)


@in_both_dtypes
@pytest.mark.parametrize("top", [1.0, 0.5, 0.1, 0.01])
@modestly
@given(shape=shapes, seed=seeds, n=st.integers(2, 5))
def test_sce_selects_calculates_and_erases(
    dtype: torch.dtype, top: float, shape: tuple[int, ...], seed: int, n: int
) -> None:
    base, *ds = drawn(seed, shape, dtype, n + 1)
    found = call("sce", ds, base, select_topk=top)
    kept = [wide(d) for d in ds]
    if top < 1:
        variance = torch.from_numpy(np.stack(kept).var(axis=0)).to(dtype).flatten()
        count = int(np.float32(np.count_nonzero(wide(variance))) * np.float32(top))
        mask = np.zeros(variance.numel())
        mask[np.argsort(-wide(variance), kind="stable")[:count]] = 1
        kept = [k * mask.reshape(shape) for k in kept]
    expected = reference.sce(wide(base), kept, 1.0)
    decided = ~reference.undecided(kept, [1.0] * n, 4 * torch.finfo(dtype).eps)
    assert found.dtype == dtype
    agreed = torch.from_numpy(decided)
    assert apart(found[agreed], expected[decided], largest(base) + largest(*ds)) < 8


def test_sce_of_one_parent_keeps_nothing_of_a_share() -> None:
    base, d = drawn(3, (5, 6), torch.float32, 2)
    assert torch.equal(call("sce", [d], base, select_topk=0.9), base)  # nothing varies
    assert apart(call("sce", [d], base), wide(base) + wide(d), abs(wide(base)) + abs(wide(d))) <= 1


def test_sce_of_small_task_vectors_weighs_them_alike() -> None:
    ds = [torch.full((4,), 1e-4), torch.full((4,), 3e-4)]
    assert call("sce", ds, torch.zeros(4)).tolist() == pytest.approx([2e-4] * 4)
    large = [1e4 * d for d in ds]
    assert call("sce", large, torch.zeros(4)).tolist() == pytest.approx([0.1 + 0.9 * 3] * 4)


def sparse(seed: int, shape: tuple[int, ...], dtype: torch.dtype, n: int) -> list[Tensor]:
    """Task vectors of which about half is exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    keep = [torch.rand(shape, generator=generator) < 0.5 for _ in range(n)]
    return [d * k for d, k in zip(drawn(seed, shape, dtype, n), keep, strict=True)]


@in_both_dtypes
@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
@modestly
@given(
    shape=shapes,
    seed=seeds,
    n=st.integers(1, 5),
    r=st.floats(0, 1),
    alpha=st.floats(0, 1),
)
def test_ram_averages_what_is_shared(
    dtype: torch.dtype,
    method: str,
    shape: tuple[int, ...],
    seed: int,
    n: int,
    r: float,
    alpha: float,
) -> None:
    (base,), ds = drawn(seed, shape, dtype, 1), sparse(seed + 1, shape, dtype, n)
    more = {"r": r, "alpha": alpha} if method == "ramplus_tl" else {}
    found = call(method, ds, base, epsilon=1e-6, **more)
    expected = reference.ram(wide(base), [wide(d) for d in ds], 1e-6, **more)
    bound = abs(wide(base)) + (1 + r) * sum(abs(wide(d)) for d in ds)
    assert found.dtype == (dtype if method == "ram" else torch.float32)
    # What is shared is rounded before it is added up.
    precision = torch.finfo(dtype).eps / torch.finfo(found.dtype).eps
    assert apart(found, expected, bound) < 4 * precision


def test_ram_plus_keeps_what_is_a_models_own_in_float32() -> None:
    d, other = (torch.tensor(x, dtype=torch.bfloat16) for x in ([1.0, 1.0], [1.0, 0.0]))
    base = torch.zeros_like(d)
    found = call("ramplus_tl", [d, other], base, r=0.001, alpha=1.0)
    assert found.tolist() == pytest.approx([1.0, 1.001], abs=1e-6)


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_ram_drops_changes_that_are_none(method: str) -> None:
    d = torch.tensor([1e-3, -1e-3, 0.5, -0.5, 1e-2])
    found = call(method, [d], torch.zeros(5), epsilon=1e-2)
    assert found.tolist() == [0, 0, 0.5, -0.5, 0]


@pytest.mark.parametrize("method", ["sce", "ram", "task_arithmetic", "ties"])
def test_task_vectors_that_do_not_touch_are_added_up(method: str) -> None:
    ds = [torch.tensor(d) for d in ([1.0, -2.0, 0, 0, 0], [0, 0, 3.0, 0, 0], [0, 0, 0, -0.5, 0])]
    base = torch.ones(5)
    parameters = given_to(method, 3, weight=1.0, density=1.0)
    assert call(method, ds, base, parameters).tolist() == [2.0, -1.0, 4.0, 0.5, 1.0]


def test_ram_plus_leaves_task_vectors_that_do_not_touch_as_they_are() -> None:
    ds = [torch.tensor(d) for d in ([1.0, -2.0, 0], [0, 0, 3.0])]
    assert call("ramplus_tl", ds, torch.ones(3), r=1.0, alpha=1.0).tolist() == [2.0, -1.0, 4.0]


@pytest.mark.parametrize(
    ("columns", "weights", "expected"),
    [
        pytest.param([[3.0], [-1.0], [-1.0]], [1, 1, 1], [3.0], id="sum-elects-not-number"),
        pytest.param([[1.0], [-1.0]], [1, 1], [1.0], id="zero-sum-is-positive"),
        pytest.param([[2.0], [-1.0]], [1, 2], [2.0], id="zero-weighted-sum-is-positive"),
        pytest.param([[2.0], [-1.0]], [1, 3], [-3.0], id="weights-vote"),
        pytest.param([[2.0], [1.0]], [-1, 1], [-2.0], id="negative-weight-flips-its-vote"),
        pytest.param([[0.0], [-2.0]], [9, 1], [-2.0], id="zeros-have-no-vote"),
        pytest.param([[0.0], [0.0]], [1, 1], [0.0], id="nothing-to-elect"),
    ],
)
def test_sign_consensus_by_hand(
    columns: list[list[float]], weights: list[float], expected: list[float]
) -> None:
    ds = [torch.tensor(column) for column in columns]
    zeros = torch.zeros_like(ds[0])
    found = call("ties", ds, zeros, weighted(weights), normalize=False)
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("columns", "weights", "expected"),
    [
        pytest.param([[4.0], [2.0], [-1.0]], [1, 3, 1], [2.5], id="only-who-agrees-counts"),
        pytest.param([[0.0], [0.0]], [1, 1], [0.0], id="nobody-agrees"),
        pytest.param([[2.0], [3.0]], [-1, -3], [2.75], id="negative-weights-divide-too"),
        pytest.param([[3.0], [0.0]], [2, 5], [3.0], id="zeros-are-no-part-of-the-mean"),
    ],
)
def test_normalized_consensus_divides_by_the_weights_that_agree(
    columns: list[list[float]], weights: list[float], expected: list[float]
) -> None:
    ds = [torch.tensor(column) for column in columns]
    found = call("ties", ds, torch.zeros_like(ds[0]), weighted(weights), normalize=True)
    assert found.tolist() == expected


def test_normalized_consensus_of_weights_that_cancel_is_not_divided() -> None:
    """The task vectors agree, yet the weights behind them sum to nothing."""
    ds = [torch.tensor([2.0]), torch.tensor([-4.0])]
    found = call("ties", ds, torch.zeros(1), weighted([0.5, -0.5]), normalize=True)
    assert found.tolist() == [3.0]


LARGE = (577, 521)  # more than one span, and of an odd length


@in_both_dtypes
@pytest.mark.parametrize("n", [1, 2, 4, 5, 6, 8, 11])
@pytest.mark.parametrize("shape", [(3,), (31, 7), LARGE], ids=str)
def test_task_vectors_are_summed_as_one_reduction(
    dtype: torch.dtype, n: int, shape: tuple[int, ...]
) -> None:
    base, *ds = drawn(10, shape, dtype, 1 + n)
    weights = torch.linspace(-0.7, 1.1, n).tolist()
    rounded = torch.tensor(weights, dtype=dtype).view(-1, *[1] * len(shape))
    expected = base + (torch.stack(ds) * rounded).sum(dim=0)
    assert torch.equal(call("task_arithmetic", ds, base, weighted(weights)), expected)


def test_the_last_few_values_of_a_long_tensor_are_summed_like_the_rest() -> None:
    base, *ds = drawn(11, (2 * 1024 + 4,), torch.float32, 6)
    expected = base + torch.stack(ds).sum(dim=0)
    with spans_of(1024):
        assert torch.equal(call("task_arithmetic", ds, base, weighted([1.0] * 5)), expected)


@pytest.mark.parametrize("method", ON_TASK_VECTORS)
def test_task_vectors_without_a_base_are_refused(method: str) -> None:
    with pytest.raises(TypeError, match="base"):
        call(method, [torch.ones(2)], None, given_to(method, 1))
