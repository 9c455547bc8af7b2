"""Masks on bit patterns do what comparisons and products with booleans do."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.merge import bits

modestly = settings(max_examples=60, deadline=None, derandomize=True)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
in_all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

special = st.sampled_from([0.0, -0.0, math.inf, -math.inf, 1e-7, -1e-7, 6e-8, 60_000.0, -1.0])
lists = st.lists(st.one_of(special, st.floats(-100, 100)), min_size=1, max_size=40)


def mask(flags: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return -flags.to(bits.KINDS[dtype.itemsize])


@in_all_dtypes
@modestly
@given(numbers=lists)
def test_codes_sort_like_magnitudes(dtype: torch.dtype, numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    codes = bits.codes(values)
    assert (codes >= 0).all()
    magnitudes = values.abs()
    assert torch.equal(codes[:, None] < codes, magnitudes[:, None] < magnitudes)
    assert torch.equal(codes[:, None] == codes, magnitudes[:, None] == magnitudes)


@in_all_dtypes
@modestly
@given(numbers=lists, data=st.data())
def test_masks_keep_values_and_leave_zeros(
    dtype: torch.dtype, numbers: list[float], data: st.DataObject
) -> None:
    values = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    chosen = data.draw(st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers)))
    flags = torch.tensor(chosen)
    expected = torch.where(flags, values, 0)
    for kind in (torch.int16, torch.int32, torch.int64):
        assert torch.equal(bits.masked(values, -flags.to(kind)), expected)


@pytest.mark.slow
@in_all_dtypes
@modestly
@given(numbers=lists)
def test_signs_are_those_of_the_values(dtype: torch.dtype, numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    assert torch.equal(bits.signs(values), mask(values < 0, dtype))
    other = values.roll(1)
    agreed = (values != 0) & ((values < 0) == (other < 0))
    assert torch.equal(bits.of_sign(values, bits.signs(other)), mask(agreed, dtype))


@pytest.mark.parametrize("kind", [torch.int16, torch.int32, torch.int64], ids=str)
def test_numbers_below_a_bound(kind: torch.dtype) -> None:
    largest = torch.iinfo(kind).max
    numbers = torch.tensor([0, 1, 5, largest - 1, largest], dtype=kind)
    for bound in (0, 1, 5, 6, largest):
        assert torch.equal(bits.below(numbers, bound), -(numbers < bound).to(kind))
        assert torch.equal(bits.below(bound, numbers), -(numbers > bound).to(kind))
    assert torch.equal(bits.below(-1, numbers), torch.full((5,), -1, dtype=kind))


@in_all_dtypes
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 0.3, -7.5])
def test_a_number_where_the_mask_is(dtype: torch.dtype, value: float) -> None:
    number = bits.pattern(value, dtype)
    flags = torch.tensor([True, False, True])
    found = bits.filled(number, mask(flags, dtype), dtype)
    assert torch.equal(found, flags * torch.tensor(value, dtype=dtype))
