"""What holds of every merge method: identities, and bits that are the same however computed."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evomerge.merge import methods
from evomerge.signatures import METHODS
from tests.merge.conftest import spans_of
from tests.merge.methods.calls import (
    DROPPING,
    ON_TASK_VECTORS,
    PARENTS,
    SHARED,
    VECTORS,
    apart,
    call,
    case,
    drawn,
    given_to,
    in_both_dtypes,
    largest,
    modestly,
    positive,
    related,
    seeds,
    shapes,
    weighted,
    wide,
)


def test_every_method_of_the_recipe_has_a_formula() -> None:
    assert set(methods._FORMULAS) == set(METHODS)


@in_both_dtypes
@pytest.mark.parametrize(
    "method", [m for m, signature in METHODS.items() if "weight" in signature.per_model]
)
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_weight_on_one_parent_alone_gives_that_parent(
    dtype: torch.dtype, method: str, chosen: int
) -> None:
    n = PARENTS.get(method, 3)
    base, *parents = drawn(5, (6, 10), dtype, n + 1)
    chosen = min(chosen, n - 1)
    parameters = given_to(method, n, density=1.0)
    parameters = [p | {"weight": float(i == chosen)} for i, p in enumerate(parameters)]
    if method in ON_TASK_VECTORS:
        found = call(method, [x - base for x in parents], base, parameters)
    else:
        found = call(method, parents, None, parameters)
    scale = abs(wide(base)) + abs(wide(parents[chosen]))
    bits = {"linear": 0, "nuslerp": 4, "multislerp": 8}.get(method, 1)
    assert apart(found, wide(parents[chosen]), scale) <= bits


@in_both_dtypes
@pytest.mark.parametrize("method", METHODS)
def test_equal_parents_give_that_parent(dtype: torch.dtype, method: str) -> None:
    base, x = drawn(2, (6, 10), dtype, 2)
    n = PARENTS.get(method, 3)
    parameters = given_to(method, n, density=1.0, scale=1.0)
    parameters = [p | ({"weight": 1 / n} if "weight" in p else {}) for p in parameters]
    shared = SHARED.get(method, {})
    if method in ON_TASK_VECTORS:
        found = call(method, [x - base] * n, base, parameters, **shared)
    elif method == "model_stock":
        found = call(method, [base, *[x] * n], **shared)
    else:
        found = call(method, [x] * n, None, parameters, **shared)
    scale = (
        largest(x, base) if method in ("karcher", "multislerp") else abs(wide(base)) + abs(wide(x))
    )
    assert apart(found.to(dtype), wide(x), scale) <= (16 if method == "karcher" else 4)


@in_both_dtypes
@pytest.mark.parametrize("method", [m for m in ON_TASK_VECTORS if m not in DROPPING])
def test_the_order_of_parents_does_not_matter(dtype: torch.dtype, method: str) -> None:
    ds, base, parameters, shared = case(method, dtype, (12, 10))
    assert base is not None
    found = call(method, ds, base, parameters, **shared)
    other = call(method, ds[::-1], base, parameters[::-1], **shared)
    assert apart(other, wide(found), largest(base) + largest(*ds)) <= 2


@in_both_dtypes
@pytest.mark.parametrize("method", ["linear", "karcher", "multislerp", "model_stock"])
def test_the_order_of_directions_does_not_matter(dtype: torch.dtype, method: str) -> None:
    base, *xs = related(3, (12, 10), dtype, 4)
    parameters = given_to(method, 3)
    if method == "model_stock":
        found, other = call(method, [base, *xs]), call(method, [base, *xs[::-1]])
    else:
        found = call(method, xs, None, parameters)
        other = call(method, xs[::-1], None, parameters[::-1])
    assert apart(other, wide(found), largest(base, *xs)) <= 8


NOT_HOMOGENEOUS = {
    "arcee_fusion",  # softmax
    "nearswap",  # t is a distance
    "ram",  # epsilon is one
    "ramplus_tl",
    "multislerp",  # eps is added to a length
}


@in_both_dtypes
@pytest.mark.parametrize("method", [m for m in METHODS if m not in NOT_HOMOGENEOUS])
def test_four_times_the_parents_give_four_times_the_merge(dtype: torch.dtype, method: str) -> None:
    inputs, base, parameters, shared = case(method, dtype, (12, 10))
    found = call(method, inputs, base, parameters, **shared)
    four = None if base is None else 4 * base
    assert torch.equal(call(method, [4 * x for x in inputs], four, parameters, **shared), 4 * found)


@in_both_dtypes
@modestly
@given(shape=shapes, seed=seeds, weights=st.lists(positive, min_size=1, max_size=5), t=positive)
def test_convex_methods_stay_between_the_parents(
    dtype: torch.dtype, shape: tuple[int, ...], seed: int, weights: list[float], t: float
) -> None:
    n = len(weights)
    base, *parents = drawn(seed, shape, dtype, n + 1)
    ds = [x - base for x in parents]
    mean = weighted(weights)
    assert_between(call("linear", parents, per_model=mean), parents)
    assert_between(call("nearswap", [base, parents[0]], t=t), [base, parents[0]])
    with_base = [base, *parents]
    share = [{"weight": w / sum(weights)} for w in weights]
    assert_between(call("task_arithmetic", ds, base, share), with_base)
    for method in ("ties", "breadcrumbs_ties"):
        assert_between(call(method, ds, base, mean, normalize=True), with_base)
    assert_between(call("sce", ds, base), with_base)
    assert_between(call("ram", ds, base), with_base)


def assert_between(found: Tensor, parents: list[Tensor]) -> None:
    stack = torch.stack(parents).double()
    slack = 4 * torch.finfo(found.dtype).eps * stack.abs().amax(dim=0)
    assert (found.double() >= stack.amin(dim=0) - slack).all()
    assert (found.double() <= stack.amax(dim=0) + slack).all()


ADDING_UP = {"slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce"}
FLAGS: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in METHODS),
    *(
        (m, {"rescale": not s.shared["rescale"]})
        for m, s in METHODS.items()
        if "rescale" in s.shared
    ),
    ("dare_linear", {"rescale_by_density": True}),
    ("nuslerp", VECTORS["rows"][0]),
    ("nuslerp", VECTORS["columns"][0]),
    ("model_stock", {"filter_wise": True}),
    ("sce", {"select_topk": 0.3}),
]
in_all_ways = pytest.mark.parametrize(
    ("method", "flags"), FLAGS, ids=[f"{m}{'-' if f else ''}{'-'.join(f)}" for m, f in FLAGS]
)


def adds_up(method: str, flags: dict[str, Any]) -> bool:
    """Whether the result rests on a sum over values, which may be rounded in one way or another."""
    if flags.get("filter_wise") or flags == VECTORS["rows"][0]:
        return False
    rescale = {**METHODS[method].shared, **flags}.get("rescale")
    return method in ADDING_UP or bool(rescale and not flags.get("rescale_by_density"))


@in_both_dtypes
@in_all_ways
@pytest.mark.parametrize(
    "shape",
    [
        (13, 21),
        *(pytest.param(s, marks=pytest.mark.slow) for s in ((33, 65), (3, 5, 7), (301,))),
        (),
    ],
    ids=str,
)
def test_the_length_of_spans_does_not_matter(
    dtype: torch.dtype, method: str, flags: dict[str, Any], shape: tuple[int, ...]
) -> None:
    inputs, base, parameters, shared = case(method, dtype, shape)
    whole = call(method, inputs, base, parameters, **shared, **flags)
    for length in (7, 64):
        with spans_of(length):
            found = call(method, inputs, base, parameters, **shared, **flags)
        if adds_up(method, flags):
            assert apart(found, wide(whole), largest(whole)) < 8
        else:
            assert torch.equal(found, whole)


@in_both_dtypes
@in_all_ways
def test_how_the_inputs_lie_in_memory_does_not_matter_and_they_stay_as_they_are(
    dtype: torch.dtype, method: str, flags: dict[str, Any]
) -> None:
    inputs, base, parameters, shared = case(method, dtype, (33, 65))
    before = [x.clone() for x in inputs]
    base_before = None if base is None else base.clone()
    expected = call(method, inputs, base, parameters, **shared, **flags)
    columns = [x.t().contiguous().t() for x in inputs]
    found = call(method, columns, base, parameters, **shared, **flags)
    assert torch.equal(found, expected)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert base is None or torch.equal(base, base_before)


@in_both_dtypes
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 5), (5, 1)], ids=str)
def test_the_smallest_tensors_are_merged(
    dtype: torch.dtype, method: str, shape: tuple[int, ...]
) -> None:
    inputs, base, parameters, shared = case(method, dtype, shape)
    found = call(method, inputs, base, parameters, **shared)
    assert found.shape == shape
    assert found.isfinite().all()
    assert found.dtype == methods.result_dtype(method, dtype)


@pytest.mark.parametrize("method", [m for m, s in METHODS.items() if "rescale" in s.shared])
def test_norms_may_be_larger_than_any_float16(method: str) -> None:
    base, d = (torch.full((400, 300), value, dtype=torch.float16) for value in (0.0, 2.0))
    d[:, ::2] = -1.0
    found = call(method, [d], base, given_to(method, 1, weight=1.0), rescale=True)
    assert found.isfinite().all()
    assert float(found.double().abs().sum()) == pytest.approx(180_000, rel=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_float64_inputs_merge_in_float64(method: str) -> None:
    inputs, base, parameters, shared = case(method, torch.float64, (12, 10))
    inputs = [x * (1 + 2**-40) for x in inputs]  # no values of float32
    found = call(method, inputs, base, parameters, **shared)
    assert found.dtype == torch.float64
    narrow = call(
        method,
        [x.float() for x in inputs],
        None if base is None else base.float(),
        parameters,
        **shared,
    )
    assert apart(narrow, wide(found), largest(found)) < 32
    assert not torch.equal(found, found.float().double())
