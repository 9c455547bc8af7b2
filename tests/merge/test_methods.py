"""Every merge method against a slow float64 reference, and what must hold of its bits."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.merge import methods
from evomerge.merge.methods.sparsity import dropped_by_rank
from evomerge.merge.operand import Operand, Read
from evomerge.recipe import METHODS
from evomerge.seeds import derive
from tests.merge import reference
from tests.merge.conftest import spans_of, threads_of_torch

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
densities = st.floats(0.01, 1)

Draws = Callable[[int], Read]


def drawn(seed: int, shape: tuple[int, ...], dtype: torch.dtype, n: int) -> list[Tensor]:
    """n tensors of normal values."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(n)]


def related(seed: int, shape: tuple[int, ...], dtype: torch.dtype, n: int) -> list[Tensor]:
    """n tensors that point into about the same direction."""
    common, *own = drawn(seed, shape, torch.float32, n + 1)
    return [(common + 0.7 * x).to(dtype) for x in own]


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


def test_every_method_of_the_recipe_has_a_formula() -> None:
    assert set(methods._FORMULAS) == set(METHODS)


# Averages


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


# Directions


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


VECTORS = {
    "whole": ({}, None),
    "rows": ({"nuslerp_flatten": False}, -1),
    "columns": ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, 0),
}


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


# Task vectors


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
    assert_sum(found, base, [wide(d) for d in ds], weights, normalize, scale)


def assert_sum(
    found: Tensor,
    base: Tensor,
    kept: list[reference.Array],
    weights: list[float],
    normalize: bool,
    scale: float,
) -> None:
    """Equal to the reference of task arithmetic."""
    expected = reference.task_arithmetic(wide(base), kept, weights, normalize, scale)
    magnitudes = [abs(k) for k in kept]
    bound = reference.task_arithmetic(abs(wide(base)), magnitudes, weights, normalize, scale)
    assert apart(found, expected, bound) < 8


def assert_consensus(
    found: Tensor,
    base: Tensor,
    kept: list[reference.Array],
    weights: list[float],
    normalize: bool,
    scale: float,
) -> None:
    """Equal to the reference of sign consensus, save where rounding elects the sign."""
    expected = reference.consensus(wide(base), kept, weights, normalize, scale)
    total = scale * sum(w * abs(k) for w, k in zip(weights, kept, strict=True))
    bound = abs(wide(base)) + total / (min(weights) if normalize else 1)
    open_votes = reference.undecided(kept, weights, 4 * torch.finfo(base.dtype).eps)
    open_votes &= total > 0
    decided = torch.from_numpy(~open_votes)
    assert found.dtype == base.dtype
    assert apart(found[decided], expected[~open_votes], bound[~open_votes]) < 8


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
    assert_consensus(found, base, kept, weights, normalize, scale)


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
    check = assert_consensus if method == "breadcrumbs_ties" else assert_sum
    check(found, base, kept, weights, normalize, 1.0)


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
    check = assert_consensus if method in ("dare_ties", "della") else assert_sum
    check(found, base, kept, weights, normalize, 0.5)


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


# Identities


PARENTS = {"slerp": 2, "nuslerp": 2, "nearswap": 2, "arcee_fusion": 2, "passthrough": 1}
SHARED: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.3},
    "nearswap": {"t": 0.3},
    "karcher": {"max_iter": 3},
}
SETTINGS: dict[str, dict[str, Any]] = {
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
    check = assert_consensus if consensus else assert_sum
    check(found[0], base, kept, weights, normalize, 1.0)


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


@pytest.mark.parametrize("method", ["sce", "ram", "task_arithmetic", "ties"])
def test_task_vectors_that_do_not_touch_are_added_up(method: str) -> None:
    ds = [torch.tensor(d) for d in ([1.0, -2.0, 0, 0, 0], [0, 0, 3.0, 0, 0], [0, 0, 0, -0.5, 0])]
    base = torch.ones(5)
    parameters = given_to(method, 3, weight=1.0, density=1.0)
    assert call(method, ds, base, parameters).tolist() == [2.0, -1.0, 4.0, 0.5, 1.0]


def test_ram_plus_leaves_task_vectors_that_do_not_touch_as_they_are() -> None:
    ds = [torch.tensor(d) for d in ([1.0, -2.0, 0], [0, 0, 3.0])]
    assert call("ramplus_tl", ds, torch.ones(3), r=1.0, alpha=1.0).tolist() == [2.0, -1.0, 4.0]


# Sign consensus by hand


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


# Sparsity


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


# Spans, threads, memory


LARGE = (577, 521)  # more than one span, and of an odd length
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
@pytest.mark.parametrize("shape", [(33, 65), (3, 5, 7), (301,), ()], ids=str)
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


@in_both_dtypes
@pytest.mark.parametrize("method", DROPPING)
@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 4), (2, 0, 3)], ids=str)
def test_masks_of_empty_tensors_are_empty(
    dtype: torch.dtype, method: str, shape: tuple[int, ...]
) -> None:
    inputs, base, parameters, shared = case(method, dtype, shape)
    assert call(method, inputs, base, parameters, **shared).shape == shape


@pytest.mark.parametrize("method", [m for m, s in METHODS.items() if "rescale" in s.shared])
def test_norms_may_be_larger_than_any_float16(method: str) -> None:
    base, d = (torch.full((400, 300), value, dtype=torch.float16) for value in (0.0, 2.0))
    d[:, ::2] = -1.0
    found = call(method, [d], base, given_to(method, 1, weight=1.0), rescale=True)
    assert found.isfinite().all()
    assert float(found.double().abs().sum()) == pytest.approx(180_000, rel=2e-3)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_nearswap_at_0_is_the_first(dtype: torch.dtype) -> None:
    a, b = drawn(21, (20, 7), dtype, 2)
    b[:10] = a[:10]
    assert torch.equal(call("nearswap", [a, b], t=0.0), a)


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
