"""Methods on directions: against a slow float64 reference, and where directions cancel."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from tests.merge import reference
from tests.merge.methods.calls import (
    VECTORS,
    apart,
    call,
    drawn,
    in_both_dtypes,
    largest,
    matrices,
    modestly,
    positive,
    related,
    seeds,
    shapes,
    weighted,
    wide,
)


@in_both_dtypes
@modestly
@given(shape=shapes, seed=seeds, t=st.floats(0, 1))
def test_slerp_follows_the_great_circle(
    dtype: torch.dtype, shape: tuple[int, ...], seed: int, t: float
) -> None:
    a, b = drawn(seed, shape, dtype, 2)
    cosine = torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0)
    assume(abs(cosine) < 0.999)  # which of the two formulas holds is a matter of rounding
    expected = reference.slerp(wide(a), wide(b), t)
    scale = (abs(wide(a)) + abs(wide(b))).max() / float((1 - cosine**2).sqrt()) ** 2
    assert apart(call("slerp", [a, b], t=t), expected, scale) < 8


@in_both_dtypes
@pytest.mark.parametrize("t", [0, 1])
def test_slerp_ends_are_the_models_themselves(dtype: torch.dtype, t: int) -> None:
    pair = drawn(1, (7, 11), dtype, 2)
    assert torch.equal(call("slerp", pair, t=t), pair[t])


def test_slerp_of_opposite_tensors_is_a_straight_line() -> None:
    (a,) = drawn(3, (64,), torch.float32, 1)
    assert apart(call("slerp", [a, -a], t=0.25), 0.5 * wide(a), abs(wide(a))) <= 1


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_from_zeros_the_great_circle_is_a_right_angle(method: str) -> None:
    (a,) = drawn(3, (64,), torch.float32, 1)
    shared = {"t": 0.5} if method == "slerp" else {}
    per_model = [{}, {}] if method == "slerp" else weighted([1.0, 1.0])
    found = call(method, [torch.zeros_like(a), a], per_model=per_model, **shared)
    assert apart(found, math.sqrt(0.5) * wide(a), abs(wide(a))) < 4


@in_both_dtypes
@pytest.mark.parametrize("vectors", VECTORS)
@modestly
@given(
    shape=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    seed=seeds,
    weights=st.tuples(positive, positive),
    on_base=st.booleans(),
)
def test_nuslerp_turns_each_vector(
    dtype: torch.dtype,
    vectors: str,
    shape: tuple[int, ...],
    seed: int,
    weights: tuple[float, float],
    on_base: bool,
) -> None:
    a, b, base = drawn(seed, shape, dtype, 3)
    flags, axis = VECTORS[vectors]
    x, y = (v.double().flatten() if axis is None else v.double() for v in (a, b))
    cosines = torch.cosine_similarity(x, y, dim=-1 if axis is None else axis)
    sines = (1 - cosines**2).sqrt().min()
    assume(sines > 0.15)  # nearer, bfloat16 knows no angle
    found = call("nuslerp", [a, b], base if on_base else None, weighted([*weights]), **flags)
    t = weights[1] / sum(weights)
    expected = reference.nuslerp(wide(a), wide(b), t, axis)
    if on_base:
        expected = wide(base) + expected
    scale = largest(base) + 2 * largest(a, b) / float(sines) ** 2
    assert found.dtype == dtype
    assert apart(found, expected, scale) < 8


def test_nuslerp_of_a_vector_has_no_rows() -> None:
    a, b = drawn(2, (50,), torch.float32, 2)
    found = [call("nuslerp", [a, b], per_model=weighted([1, 2]), **f) for f, _ in VECTORS.values()]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_nuslerp_of_weights_that_cancel_stops_half_way() -> None:
    a, b = drawn(2, (5, 10), torch.float32, 2)
    found = call("nuslerp", [a, b], per_model=weighted([1.0, -1.0]))
    assert torch.equal(found, call("nuslerp", [a, b], per_model=weighted([1.0, 1.0])))


@in_both_dtypes
@pytest.mark.parametrize("normalize", [True, False])
@modestly
@given(
    shape=matrices,
    seed=seeds,
    weights=st.lists(positive, min_size=2, max_size=5),
    on_base=st.booleans(),
)
def test_multislerp_is_a_mean_of_directions_and_lengths(
    dtype: torch.dtype,
    normalize: bool,
    shape: tuple[int, ...],
    seed: int,
    weights: list[float],
    on_base: bool,
) -> None:
    base, *xs = related(seed, shape, dtype, 1 + len(weights))
    found = call(
        "multislerp",
        xs,
        base if on_base else None,
        weighted(weights),
        normalize_weights=normalize,
    )
    expected = reference.multislerp([wide(x) for x in xs], weights, normalize)
    if on_base:
        expected = wide(base) + expected
    scale = largest(*xs, base) * (1 if normalize else max(1, sum(weights)))
    assert found.dtype == dtype
    assert apart(found, expected, scale) < 24


def test_multislerp_of_directions_that_cancel() -> None:
    a, b = (torch.tensor([x, 0.0]) for x in (2.0, -1.0))
    straight = call("multislerp", [a, b], per_model=weighted([0.5, 0.5]))
    assert straight.tolist() == [0.5, 0.0]
    c, d = (torch.tensor([0.0, x]) for x in (2.0, -1.0))
    with pytest.raises(RecipeError, match="multislerp: the weighted directions cancel out"):
        call("multislerp", [a, b, c, d], per_model=weighted([0.25] * 4))


@in_both_dtypes
@modestly
@given(shape=st.tuples(st.integers(4, 9), st.integers(4, 9)), seed=seeds, n=st.integers(1, 5))
def test_karcher_is_the_mean_on_the_sphere(
    dtype: torch.dtype, shape: tuple[int, ...], seed: int, n: int
) -> None:
    xs = related(seed, shape, dtype, n)
    found = call("karcher", xs, max_iter=10, tol=1e-5)
    expected = reference.karcher([wide(x) for x in xs])
    assert found.dtype == dtype
    assert apart(found, expected, largest(*xs)) < 24  # each step rounds, in bfloat16 coarsely


def test_karcher_leaves_out_directions_of_zeros_but_not_their_length() -> None:
    (a,) = drawn(1, (6, 5), torch.float32, 1)
    assert apart(call("karcher", [a, torch.zeros_like(a)]), 0.5 * wide(a), abs(wide(a))) < 4
    assert not call("karcher", [torch.zeros(3), torch.zeros(3)]).any()


def test_karcher_steps_as_often_as_it_may() -> None:
    xs = drawn(1, (6, 5), torch.float32, 3)
    found = [call("karcher", xs, max_iter=n) for n in (1, 2, 100)]
    far, near = (float((x - found[2]).norm()) for x in found[:2])
    assert far > near > 0
    assert torch.equal(call("karcher", xs, max_iter=5, tol=10.0), torch.zeros_like(xs[0]))


@in_both_dtypes
@pytest.mark.parametrize("filter_wise", [True, False])
@modestly
@given(shape=st.tuples(st.integers(3, 9), st.integers(3, 9)), seed=seeds, n=st.integers(2, 4))
def test_model_stock_goes_from_the_base_towards_the_mean(
    dtype: torch.dtype, filter_wise: bool, shape: tuple[int, ...], seed: int, n: int
) -> None:
    base, common, *own = drawn(seed, shape, torch.float32, n + 2)
    ds = [common + 0.5 * x for x in own]
    base, *xs = (x.to(dtype) for x in (base, *(base + d for d in ds)))
    pairs = [(i, j) for i in range(n) for j in range(i)]
    cosines = torch.stack(
        [
            torch.cosine_similarity(
                *(
                    (xs[k].double() - base.double()).view(-1 if not filter_wise else shape)
                    for k in p
                ),
                dim=-1,
            )
            for p in pairs
        ]
    ).mean(dim=0)
    assume(float(cosines.min()) > 0)  # towards -1 / (n - 1), t grows without bound
    found = call("model_stock", [base, *xs], filter_wise=filter_wise)
    expected = reference.model_stock(wide(base), [wide(x) for x in xs], filter_wise)
    assert found.dtype == dtype
    assert apart(found, expected, n * largest(base, *xs)) < 12


def test_model_stock_of_task_vectors_at_right_angles_is_the_base() -> None:
    base = torch.ones(4)
    xs = [base + torch.tensor(d) for d in ([1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 3.0])]
    assert torch.equal(call("model_stock", [base, *xs]), base)


def test_multislerp_in_float16_of_a_parent_that_was_not_trained() -> None:
    """An epsilon of 1e-8 is 0 there."""
    base, d = drawn(20, (30, 7), torch.float16, 2)
    found = call("multislerp", [d, torch.zeros_like(d)], base, weighted([1.0, 1.0]))
    wide_found = call(
        "multislerp", [d.float(), torch.zeros(30, 7)], base.float(), weighted([1.0, 1.0])
    )
    torch.testing.assert_close(found.float(), wide_found, rtol=0, atol=0.02)


def test_multislerp_in_float16_of_one_direction() -> None:
    half = torch.tensor([0.5, 0.0], dtype=torch.float16)
    found = call("multislerp", [half, half], None, weighted([1.0, 1.0]))
    assert found.tolist() == [0.5, 0.0]
