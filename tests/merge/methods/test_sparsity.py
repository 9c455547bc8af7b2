"""Sparse task vectors: which values are kept, what rescaling restores, what draws follow from."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evomerge.merge import methods
from evomerge.merge.methods.sparsity import dropped_by_rank
from evomerge.merge.operand import Operand
from evomerge.signatures import METHODS
from tests.merge import reference
from tests.merge.conftest import spans_of, threads_of_torch
from tests.merge.methods.calls import (
    DROPPING,
    Draws,
    Sum,
    apart,
    call,
    case,
    drawn,
    given_to,
    in_both_dtypes,
    keyed,
    matrices,
    modestly,
    positive,
    seeds,
    shapes,
    weighted,
    wide,
)

densities = st.floats(0.01, 1)


def distinct(seed: int, shape: tuple[int, ...], dtype: torch.dtype, n: int) -> list[Tensor]:
    """n tensors whose magnitudes all differ within one tensor, exactly so in bfloat16 too."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape)
    found = []
    for _ in range(n):
        order = torch.randperm(size, generator=generator)
        # 128 multiples of 2^-7 in each power of two
        magnitudes = (1 + (order % 128) / 128) * 2.0 ** -(order // 128)
        signs = torch.randint(2, (size,), generator=generator) * 2 - 1
        found.append((signs * magnitudes).to(dtype).view(shape))
    return found


def rescaled(ds: list[Tensor], kept: list[reference.Array]) -> list[reference.Array]:
    return [reference.rescaled(wide(d), k) for d, k in zip(ds, kept, strict=True)]


@in_both_dtypes
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@modestly
@given(
    shape=shapes,
    seed=seeds,
    weights=st.lists(positive, min_size=1, max_size=6),
    density=densities,
    scale=st.floats(0.1, 2),
)
def test_ties_trims_elects_and_adds_up(
    dtype: torch.dtype,
    normalize: bool,
    rescale: bool,
    shape: tuple[int, ...],
    seed: int,
    weights: list[float],
    density: float,
    scale: float,
) -> None:
    (base,) = drawn(seed, shape, dtype, 1)
    ds = distinct(seed, shape, dtype, len(weights))
    flags = {"normalize": normalize, "rescale": rescale, "lambda": scale}
    found = call("ties", ds, base, weighted(weights, density=density), **flags)
    kept = [reference.trimmed(wide(d), density) for d in ds]
    if rescale:
        kept = rescaled(ds, kept)
    Sum(base, kept, weights, normalize, scale).is_elected(found)


@in_both_dtypes
@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("rescale", [True, False])
@modestly
@given(
    shape=shapes,
    seed=seeds,
    weights=st.lists(positive, min_size=1, max_size=4),
    density=densities,
    gamma=st.floats(0, 0.9),
    normalize=st.booleans(),
)
def test_breadcrumbs_drops_both_ends(
    dtype: torch.dtype,
    method: str,
    rescale: bool,
    shape: tuple[int, ...],
    seed: int,
    weights: list[float],
    density: float,
    gamma: float,
    normalize: bool,
) -> None:
    (base,) = drawn(seed, shape, dtype, 1)
    ds = distinct(seed, shape, dtype, len(weights))
    parameters = weighted(weights, density=density, gamma=gamma)
    found = call(method, ds, base, parameters, normalize=normalize, rescale=rescale)
    kept = [reference.without_outliers(wide(d), density, gamma) for d in ds]
    if rescale:
        kept = rescaled(ds, kept)
    added = Sum(base, kept, weights, normalize, 1.0)
    check = added.is_elected if method == "breadcrumbs_ties" else added.is_plain
    check(found)


def kept_of_each(
    method: str, ds: list[Tensor], draws: Draws, **parameters: Any
) -> list[reference.Array]:
    """What a method's masks leave of each task vector: merged alone onto zeros."""
    zeros = torch.zeros_like(ds[0])
    found = []
    for i, d in enumerate(ds):
        inputs = [d if j == i else zeros for j in range(len(ds))]
        settings = weighted([1.0] * len(ds), **parameters)
        kept = call(method, inputs, zeros, settings, draws, rescale=False, normalize=False)
        assert ((kept == d) | (kept == 0)).all()
        found.append(wide(kept))
    return found


@in_both_dtypes
@pytest.mark.parametrize("method", DROPPING)
@pytest.mark.parametrize("rescale", [True, False])
@modestly
@given(
    shape=matrices,
    seed=seeds,
    weights=st.lists(positive, min_size=1, max_size=4),
    density=st.floats(0.2, 0.8),
    normalize=st.booleans(),
)
def test_random_masks_are_merged_like_any(
    dtype: torch.dtype,
    method: str,
    rescale: bool,
    shape: tuple[int, ...],
    seed: int,
    weights: list[float],
    density: float,
    normalize: bool,
) -> None:
    (base,) = drawn(seed, shape, dtype, 1)
    ds = distinct(seed, shape, dtype, len(weights))
    draws = keyed(seed, "model.norm.weight")
    flags = {"normalize": normalize, "rescale": rescale, "lambda": 0.5}
    found = call(method, ds, base, weighted(weights, density=density), draws, **flags)
    kept = kept_of_each(method, ds, draws, density=density)
    if rescale:
        kept = rescaled(ds, kept)
    added = Sum(base, kept, weights, normalize, 0.5)
    check = added.is_elected if method in ("dare_ties", "della") else added.is_plain
    check(found)


@in_both_dtypes
@pytest.mark.parametrize("method", ["dare_ties", "dare_linear"])
def test_dare_may_divide_by_the_density(dtype: torch.dtype, method: str) -> None:
    (d,) = drawn(3, (40, 30), dtype, 1)
    parameters = weighted([1.0], density=0.3)
    found = call(method, [d], torch.zeros_like(d), parameters, rescale_by_density=True)
    (kept,) = kept_of_each(method, [d], keyed(0), density=0.3)
    assert apart(found, reference.unbiased(kept, 0.3), abs(wide(d)) / 0.3 + 1e-30) < 1
    assert float(found.double().mean()) == pytest.approx(float(d.double().mean()), abs=0.2)


@in_both_dtypes
@pytest.mark.parametrize(
    ("consensus", "methods_"),
    [
        (True, ["ties", "dare_ties", "breadcrumbs_ties", "della"]),
        (False, ["task_arithmetic", "dare_linear", "breadcrumbs", "della_linear"]),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_density_1_is_no_sparsity(
    dtype: torch.dtype, consensus: bool, methods_: list[str], normalize: bool
) -> None:
    base, *ds = drawn(6, (6, 10), dtype, 4)
    found = []
    for method in methods_:
        parameters = given_to(method, 3, density=1.0)
        more = {"rescale": True} if "rescale" in METHODS[method].shared else {}
        found.append(call(method, ds, base, parameters, normalize=normalize, **more))
    assert all(torch.equal(found[0], other) for other in found[1:])
    kept, weights = [wide(d) for d in ds], [0.3, 0.5, 0.7]
    added = Sum(base, kept, weights, normalize, 1.0)
    check = added.is_elected if consensus else added.is_plain
    check(found[0])


@in_both_dtypes
@modestly
@given(shape=shapes, seed=seeds, density=densities)
def test_trimming_keeps_exactly_the_share_and_the_first_of_the_largest(
    dtype: torch.dtype, shape: tuple[int, ...], seed: int, density: float
) -> None:
    (d,) = drawn(seed, shape, dtype, 1)  # in bfloat16 some magnitudes are equal
    found = call("ties", [d], torch.zeros_like(d), weighted([1.0], density=density))
    count = d.numel() if density == 1 else max(1, int(density * d.numel()))
    expected = torch.zeros_like(d).view(-1)
    order = d.abs().view(-1).sort(descending=True, stable=True).indices[:count]
    expected[order] = d.view(-1)[order]
    assert torch.equal(found.view(-1), expected)


def test_breadcrumbs_of_equal_magnitudes_drops_the_first_as_outliers() -> None:
    d = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    parameters = weighted([1.0], density=0.4, gamma=0.2)
    assert call("breadcrumbs", [d], torch.zeros(5), parameters).tolist() == [0, -1, 1, 0, 0]


def test_breadcrumbs_may_keep_nothing() -> None:
    d, base = torch.ones(5), torch.full((5,), 2.0)
    parameters = weighted([1.0], density=0.1, gamma=0.0)
    assert torch.equal(call("breadcrumbs", [d], base, parameters, rescale=True), base)


@pytest.mark.parametrize("method", DROPPING)
@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_random_masks_keep_their_density(method: str, density: float) -> None:
    ones = [torch.ones(200, 200)] * 2
    kept = np.mean(kept_of_each(method, ones, keyed(0), density=density))
    assert abs(kept - density) < 5 * math.sqrt(density * (1 - density) / 80_000)


@pytest.mark.parametrize("method", DROPPING)
def test_masks_of_two_parents_are_independent(method: str) -> None:
    first, second = kept_of_each(method, [torch.ones(200, 200)] * 2, keyed(0), density=0.5)
    both = (first * second).mean()
    # With ranks, both parents tend to keep the same.
    expected = 0.25 if method.startswith("dare") else 0.25 + 0.15**2 / 3
    assert abs(both - expected) < 5 * math.sqrt(0.25 * 0.75 / 40_000)


@pytest.mark.parametrize("method", DROPPING)
def test_masks_follow_from_seed_name_and_parent_alone(method: str) -> None:
    def masks(draws: Draws) -> list[reference.Array]:
        return kept_of_each(method, [torch.ones(16, 16)] * 3, draws, density=0.5)

    torch.manual_seed(1)
    first = masks(keyed(7, "a"))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    with spans_of(5), threads_of_torch(3):
        second = masks(keyed(7, "a"))
    assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert not np.array_equal(first[i], first[j])
    for other in (keyed(8, "a"), keyed(7, "b")):
        assert not np.array_equal(first[0], masks(other)[0])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 9), (3, 9, 4), (20,)])
def test_della_keeps_more_of_what_is_larger_in_its_row(shape: tuple[int, ...]) -> None:
    """Rates over many masks, against the probabilities of the paper."""
    d, times = distinct(4, shape, torch.float32, 1)[0], 3000
    kept = torch.zeros(shape)
    operand = Operand.of(d)
    for seed in range(times):
        kept += dropped_by_rank(operand, 0.5, 0.3, methods.drawn(seed)).whole() != 0
    expected = reference.keep_probabilities(wide(d), 0.5, 0.3)
    assert expected.min() == pytest.approx(0.2)
    assert expected.max() == pytest.approx(0.8)
    assert abs(wide(kept) / times - expected).max() < 5 * math.sqrt(0.25 / times)


@modestly
@given(seed=seeds, size=st.integers(1, 300), data=st.data())
def test_random_numbers_are_the_same_in_any_spans(
    seed: int, size: int, data: st.DataObject
) -> None:
    read = methods.drawn(seed)
    whole = read(0, size)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    assert torch.equal(read(start, stop), whole[start:stop])
    assert torch.equal(methods.drawn(seed)(0, size), whole)


def test_random_numbers_are_uniform() -> None:
    numbers = methods.drawn(3)(0, 1 << 20)
    assert numbers.dtype == torch.int16
    assert int(numbers.min()) >= 0
    for part in (numbers >> 7, numbers & 255):  # high and low digits
        counts = torch.bincount(part.int(), minlength=256)
        expected = (1 << 20) / 256
        assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * math.sqrt(2 * 255)
    centred = numbers.double() - numbers.double().mean()
    assert abs(float((centred[1:] * centred[:-1]).mean() / centred.var())) < 0.01


@in_both_dtypes
@pytest.mark.parametrize("method", [m for m, s in METHODS.items() if "rescale" in s.shared])
def test_rescale_restores_the_sum_of_magnitudes(dtype: torch.dtype, method: str) -> None:
    (d,) = drawn(7, (40, 30), dtype, 1)
    zeros = torch.zeros_like(d)
    parameters = given_to(method, 1, weight=1.0)
    sums = {
        rescale: float(call(method, [d], zeros, parameters, rescale=rescale).double().abs().sum())
        for rescale in (True, False)
    }
    before = float(d.double().abs().sum())
    assert sums[False] < 0.8 * before
    assert sums[True] == pytest.approx(before, rel=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("method", [m for m, s in METHODS.items() if "rescale" in s.shared])
def test_rescaling_a_task_vector_of_zeros_gives_zeros(method: str) -> None:
    zeros, (base,) = torch.zeros(5, 6), drawn(8, (5, 6), torch.float32, 1)
    found = call(method, [zeros], base, given_to(method, 1), rescale=True)
    assert torch.equal(found, base)


@in_both_dtypes
@pytest.mark.parametrize("method", DROPPING)
@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 4), (2, 0, 3)], ids=str)
def test_masks_of_empty_tensors_are_empty(
    dtype: torch.dtype, method: str, shape: tuple[int, ...]
) -> None:
    inputs, base, parameters, shared = case(method, dtype, shape)
    assert call(method, inputs, base, parameters, **shared).shape == shape
