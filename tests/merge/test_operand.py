"""Operands: spans cover a tensor, facts about all of it are exact and found once."""

import errno
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from evomerge.errors import InputError
from evomerge.merge import operand
from evomerge.merge.operand import Facts, Operand, Selection
from tests.merge.conftest import spans_of

modestly = settings(max_examples=60, deadline=None, derandomize=True)

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
in_all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
in_two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# Near one another in each dtype, so that most are equal after rounding in the narrow ones.
close = st.sampled_from([1.0, 1 + 2**-7, 1 + 2**-10, 1 + 2**-23, 1 + 2**-40, 1 + 2**-52, 2.0])
values = st.one_of(
    close,
    close.map(lambda x: -x),
    st.sampled_from([0.0, -0.0, math.inf, -math.inf, 1e-7, -6e-8, 60_000.0]),
    st.floats(-100, 100),
)
lists = st.lists(values, min_size=1, max_size=60)
lengths = st.sampled_from([1, 7, 64])


def drawn(seed: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def counted(tensor: Tensor) -> tuple[Operand, list[tuple[int, int]]]:
    """An operand, and what is read of it."""
    flat, reads = tensor.reshape(-1), list[tuple[int, int]]()

    def read(start: int, stop: int) -> Tensor:
        reads.append((start, stop))
        return flat[start:stop]

    return Operand(read, tensor.shape, tensor.dtype), reads


def largest(tensor: Tensor, count: int) -> NDArray[np.bool_]:
    """The `count` largest magnitudes, of equal ones the first, by a stable sort."""
    kept = np.zeros(tensor.numel(), dtype=bool)
    kept[np.argsort(-abs(tensor.double().numpy()), kind="stable")[:count]] = True
    return kept


def selected(x: Operand, selection: Selection) -> NDArray[np.bool_]:
    masks = [selection.mask(x.span(i, j), i) for i, j in x.spans()]
    return as_flags(torch.cat(masks))


def as_flags(mask: Tensor) -> NDArray[np.bool_]:
    assert set(mask.tolist()) <= {0, -1}
    return mask.numpy() == -1


@in_all_dtypes
@modestly
@given(numbers=lists, length=lengths, data=st.data())
def test_a_selection_is_what_a_stable_sort_puts_first(
    dtype: torch.dtype, numbers: list[float], length: int, data: st.DataObject
) -> None:
    tensor = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    count = data.draw(st.integers(0, len(numbers)))
    with spans_of(length):
        x = Operand.of(tensor)
        found = selected(x, x.selection(count))
    assert found.sum() == count
    assert np.array_equal(found, largest(tensor, count))


@in_all_dtypes
@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.999])
def test_a_selection_of_many_values(dtype: torch.dtype, share: float) -> None:
    tensor = drawn(1, 20_011, dtype)
    count = int(share * tensor.numel())
    with spans_of(999):
        x = Operand.of(tensor)
        assert np.array_equal(selected(x, x.selection(count)), largest(tensor, count))


@in_all_dtypes
def test_a_selection_masks_any_part_of_the_tensor(dtype: torch.dtype) -> None:
    tensor = (drawn(2, 500) * 2).round().to(dtype)  # mostly ties
    x = Operand.of(tensor)
    for count in (0, 1, 37, 250, 499, 500):
        selection, expected = x.selection(count), largest(tensor, count)
        for start in range(0, 500, 23):
            for stop in (start, start + 1, min(start + 100, 500), 500):
                mask = selection.mask(tensor[start:stop], start)
                assert np.array_equal(as_flags(mask), expected[start:stop])


@pytest.mark.parametrize("count", [0, 1, 12])
def test_a_selection_among_equal_values_takes_the_first(count: int) -> None:
    with spans_of(5):
        x = Operand.of(torch.full((12,), -3.0))
        found = selected(x, x.selection(count))
    assert found.tolist() == [i < count for i in range(12)]


@in_all_dtypes
@modestly
@given(numbers=lists, share=st.floats(0, 1), length=lengths)
def test_a_quantile_is_a_place_among_the_sorted_values(
    dtype: torch.dtype, numbers: list[float], share: float, length: int
) -> None:
    tensor = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    place = int(np.float32(share) * np.float32(len(numbers) - 1))
    with spans_of(length):
        found = Operand.of(tensor).quantile(share)
    assert found.dtype == dtype
    assert found.shape == ()
    assert float(found) == sorted(tensor.tolist())[place]


@in_two_dtypes
@modestly
@given(size=st.integers(0, 200), seed=st.integers(0, 2**32), length=lengths)
def test_sums_are_those_of_float64(dtype: torch.dtype, size: int, seed: int, length: int) -> None:
    x, y = drawn(seed, size, dtype), drawn(seed + 1, size, dtype)
    a, b = x.double().numpy(), y.double().numpy()
    rounded = (x * y).double().numpy()
    with spans_of(length):
        one, other = Operand.of(x), Operand.of(y)
        for found, expected, terms in (
            (one.norm, np.linalg.norm(a), np.linalg.norm(a)),
            (one.dot(other), rounded.sum(), abs(rounded)),
            (one.inner(other), a @ b, abs(a * b)),
        ):
            assert found.dtype == torch.float32
            assert found.shape == ()
            assert abs(float(found) - expected) <= 2e-6 * np.sum(terms)
        assert one.count_nonzero == np.count_nonzero(a)
        lengths = np.linalg.norm(a) * np.linalg.norm(b)
        cosine = a @ b / lengths if lengths else 0
        assert float(one.cosine(other)) == pytest.approx(cosine, abs=2e-6)


def test_sums_of_float64_are_in_float64() -> None:
    x = Operand.of(torch.tensor([1.0, 2**-40], dtype=torch.float64))
    assert float(x.norm**2) == 1 + 2**-80
    assert float(x.inner(x)) == 1 + 2**-80 == float(x.dot(x))
    assert x.norm.dtype == x.cosine(x).dtype == torch.float64


def test_products_of_a_dot_are_rounded_and_those_of_an_inner_product_are_not() -> None:
    x = Operand.of(torch.tensor([1 + 2**-7], dtype=torch.bfloat16))
    assert float(x.dot(x)) == 1 + 2**-6
    assert float(x.inner(x)) == (1 + 2**-7) ** 2


@pytest.mark.parametrize(
    ("a", "b", "cosine"),
    [
        ([1.0, 2.0], [2.0, 4.0], 1.0),
        ([1.0, 2.0], [-1.0, -2.0], -1.0),
        ([1.0, 0.0], [0.0, 3.0], 0.0),
        ([0.0, 0.0], [1.0, 1.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
    ],
)
def test_cosines_by_hand(a: list[float], b: list[float], cosine: float) -> None:
    found = Operand.of(torch.tensor(a)).cosine(Operand.of(torch.tensor(b)))
    assert float(found) == pytest.approx(cosine, abs=1e-6)
    assert abs(float(found)) <= 1


FACTS: dict[str, Callable[[Operand, Operand], Any]] = {
    "norm": lambda x, y: x.norm,
    "dot": lambda x, y: x.dot(y),
    "inner": lambda x, y: x.inner(y),
    "cosine": lambda x, y: x.cosine(y),
    "count_nonzero": lambda x, y: x.count_nonzero,
    "quantile": lambda x, y: x.quantile(0.75),
    "selection": lambda x, y: x.selection(1000),
}


@pytest.mark.parametrize("fact", ["norm", "dot", "inner", "cosine", "count_nonzero"])
def test_a_fact_is_found_once(fact: str) -> None:
    (x, reads), other = counted(drawn(5, 300)), Operand.of(drawn(6, 300))
    with spans_of(100):
        first = FACTS[fact](x, other)
        assert reads
        reads.clear()
        assert FACTS[fact](x, other) == first
        again = Operand(x.span, x.shape, x.dtype, facts=x.facts)  # the same tensor, read anew
        assert FACTS[fact](again, other) == first
    assert reads == []


def test_facts_are_one_tensors_own() -> None:
    x = Operand.of(torch.full((3,), 2.0))
    assert float(x.norm) == pytest.approx(12**0.5)
    d = x.derived(lambda i, j: x.span(i, j) / 2)
    assert float(d.norm) == pytest.approx(3**0.5)
    assert len({Facts(), Facts()}) == 2


def test_a_fact_about_two_tensors_is_about_these_two() -> None:
    x, y, z = (Operand.of(torch.full((3,), value)) for value in (1.0, 2.0, 3.0))
    assert [float(x.dot(o)) for o in (y, z, y)] == [6.0, 9.0, 6.0]


def test_another_selection_counts_the_coarse_magnitudes_no_more() -> None:
    magnitudes = torch.arange(1, 101).to(torch.bfloat16)  # all different: two bytes tell them apart
    x, reads = counted(magnitudes)
    with spans_of(40):
        x.selection(10)
        reads.clear()
        assert selected(x, x.selection(30)).sum() == 30
    assert reads == [(0, 40), (40, 100)]  # for the mask alone


def test_the_last_span_is_kept() -> None:
    x, reads = counted(drawn(7, 100))
    for _ in range(3):
        x.span(0, 50)
    assert reads == [(0, 50)]
    x.span(50, 100)
    x.span(0, 50)
    assert reads == [(0, 50), (50, 100), (0, 50)]


def test_a_base_is_read_once_for_all_its_task_vectors() -> None:
    base, reads = counted(drawn(8, 100))
    ds = [Operand.of(drawn(seed, 100)).minus(base) for seed in (9, 10, 11)]
    with spans_of(25):
        for i, j in base.spans():
            for d in ds:
                d.span(i, j)
    assert reads == [(0, 25), (25, 50), (50, 75), (75, 100)]


@modestly
@given(
    rows=st.integers(0, 60), unit=st.integers(1, 20), length=st.sampled_from([1, 7, 64, 1 << 18])
)
def test_spans_cover_the_tensor_in_whole_units(rows: int, unit: int, length: int) -> None:
    x = Operand.of(torch.zeros(rows, unit))
    with spans_of(length):
        bounds = list(x.derived(x.span, unit=unit).spans())
    assert (bounds[0][0], bounds[-1][1]) == (0, rows * unit)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(bounds))
    assert all(start % unit == 0 for start, _ in bounds)
    whole = max(1, length // unit) * unit
    if rows * unit >= whole:
        assert all(whole <= stop - start < 2 * whole for start, stop in bounds)
    else:
        assert len(bounds) == 1


def test_units_of_derived_operands_add_up() -> None:
    x = Operand.of(torch.zeros(24))
    assert x.derived(x.span, unit=4).derived(x.span, unit=6).unit == 12
    assert x.derived(x.span, unit=0).unit == 1  # rows without values


@in_all_dtypes
def test_a_difference_is_rounded_to_the_dtype(dtype: torch.dtype) -> None:
    x, y = drawn(12, 200, dtype).view(10, 20), drawn(13, 200, dtype).view(10, 20)
    with spans_of(64):
        found = Operand.of(x).minus(Operand.of(y)).whole()
    assert torch.equal(found, x - y)
    assert found.dtype == dtype


def test_a_derived_operand_has_a_dtype_of_its_own() -> None:
    x = Operand.of(drawn(14, 10, torch.bfloat16))
    widened = x.derived(lambda i, j: x.span(i, j).float() + 2**-20, torch.float32)
    assert widened.whole().dtype == torch.float32 == widened.dtype
    assert torch.equal(x.derived(widened.span).whole(), x.whole())  # rounded where it is read


def test_the_whole_is_a_copy_in_shape_and_order() -> None:
    tensor = torch.arange(60.0).view(6, 10)
    for source in (tensor, tensor.t(), tensor[:, ::2], tensor[0, 0]):
        for length in (4, 1000):
            with spans_of(length):
                whole = Operand.of(source).whole()
            assert torch.equal(whole, source)
            assert whole.data_ptr() != source.data_ptr()


@pytest.mark.parametrize("shape", [(0,), (), (7,), (30, 11)], ids=str)
@pytest.mark.parametrize("in_memory", [1 << 24, 64], ids=["memory", "file"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_held_is_computed_once(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], in_memory: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(operand, "_IN_MEMORY", in_memory)
    values = drawn(15, math.prod(shape), dtype).view(shape)
    x, reads = counted(values)
    with spans_of(50):
        held = x.held()
        assert torch.equal(held.whole(), values)
        assert (held.dtype, held.shape) == (dtype, shape)
        found = len(reads)
        held.whole()
        assert len(reads) == found == len(list(x.spans()))


def test_totals_are_over_spans() -> None:
    x = Operand.of(torch.arange(10.0))
    with spans_of(3):
        bounds = list(x.spans())
        found = x.total(lambda i, j: torch.tensor([1.0, j - i]))
    assert found.tolist() == [len(bounds), 10.0]


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    x = Operand.of(torch.zeros(shape))
    assert list(x.spans()) == [(0, 0)]
    assert x.whole().shape == shape
    for fact in ("norm", "dot", "inner", "cosine", "count_nonzero"):
        assert float(FACTS[fact](x, x)) == 0
    assert selected(x, x.selection(0)).tolist() == []


def test_a_tensor_without_dimensions() -> None:
    x = Operand.of(torch.tensor(-2.0))
    assert (x.numel, x.row, x.shape) == (1, 1, ())
    assert x.whole().shape == ()
    assert [float(f) for f in (x.norm, x.quantile(0.5))] == [2.0, -2.0]
    assert selected(x, x.selection(1)).tolist() == [True]
    assert x.minus(x).whole().item() == 0


def test_integers_are_read_as_they_are() -> None:
    x = Operand.of(torch.tensor([[2**40, -1]]))
    assert torch.equal(x.whole(), torch.tensor([[2**40, -1]]))


def test_a_temporary_file_without_room_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(operand, "_IN_MEMORY", 100)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"of 400 bytes .* No space left on device: set TMPDIR"):
        Operand.of(torch.ones(100)).held()


def test_norms_are_read_in_whole_units() -> None:
    tensor = drawn(5, 21 * 7)

    def read(start: int, stop: int) -> Tensor:
        assert start % 7 == stop % 7 == 0
        return tensor[start:stop]

    with spans_of(16):
        x = Operand(read, tensor.shape, tensor.dtype, unit=7)
        assert float(x.norm) == pytest.approx(float(tensor.norm()))
