"""Every merge method against a slow float64 reference, and what must hold of its bits."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.merge import methods
from evomerge.recipe import METHODS
from tests.merge import reference

DTYPES = (torch.float32, torch.bfloat16)
TASK_VECTORS = tuple(name for name, signature in METHODS.items() if signature.task_vectors)

modestly = settings(max_examples=40, deadline=None, derandomize=True)
in_both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple).filter(lambda s: s != (1,))
seeds = st.integers(0, 2**32)
signed = st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3)
positive = st.floats(0.1, 2)
densities = st.floats(0.01, 1)


def drawn(seed: int, shape: tuple[int, ...], dtype: torch.dtype, n: int) -> list[Tensor]:
    """n tensors of normal values."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(n)]


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


def call(
    method: str,
    inputs: list[Tensor],
    base: Tensor | None = None,
    per_model: list[dict[str, Any]] | None = None,
    key: tuple[int, str] = (0, "x"),
    out: Tensor | None = None,
    **shared: Any,
) -> Tensor:
    """Merge with the method's own defaults for what is not given."""
    signature = METHODS[method]
    given = per_model or [{}] * len(inputs)
    columns = [{**signature.per_model, **parameters} for parameters in given]
    return methods.merge(
        method,
        methods.Call(
            base, inputs, columns, {**signature.shared, **shared}, key, out, methods.Spare()
        ),
    )


def weighted(weights: list[float], **more: Any) -> list[dict[str, Any]]:
    return [{"weight": weight, **more} for weight in weights]


def apart(found: Tensor, expected: reference.Array, scale: reference.Array | float) -> float:
    """The largest difference in units of the dtype's precision at `scale`."""
    return float((abs(wide(found) - expected) / (scale * torch.finfo(found.dtype).eps)).max())


def masks(method: str, n: int, shape: tuple[int, ...], density: float, **options: Any) -> Tensor:
    """What a stochastic method keeps of each of n parents: ones merged alone onto zeros."""
    zeros, ones = torch.zeros(shape), torch.ones(shape)
    kept = []
    for i in range(n):
        inputs = [ones if j == i else zeros for j in range(n)]
        settings = weighted([1.0] * n, density=density)
        kept.append(call(method, inputs, zeros, settings, rescale=False, **options))
    return torch.stack(kept)


def test_every_method_of_the_recipe_has_a_formula() -> None:
    assert set(methods._FORMULAS) == set(METHODS)


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
@modestly
@given(shape=shapes, seed=seeds, t=st.floats(0, 1))
def test_slerp_follows_the_great_circle(
    dtype: torch.dtype, shape: tuple[int, ...], seed: int, t: float
) -> None:
    a, b = drawn(seed, shape, dtype, 2)
    cosine = torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0)
    if abs(cosine) > 0.999:
        return  # which of the two formulas holds is a matter of rounding
    expected = reference.slerp(wide(a), wide(b), t)
    scale = (abs(wide(a)) + abs(wide(b))).max() / float((1 - cosine**2).sqrt()) ** 2
    assert apart(call("slerp", [a, b], t=t), expected, scale) < 8


@in_both_dtypes
@pytest.mark.parametrize("t", [0, 1])
def test_slerp_ends_are_the_models_themselves(dtype: torch.dtype, t: int) -> None:
    pair = drawn(1, (7, 11), dtype, 2)
    assert torch.equal(call("slerp", pair, t=t), pair[t])


@in_both_dtypes
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_slerp_of_equal_tensors_is_that_tensor(dtype: torch.dtype, t: float) -> None:
    (a,) = drawn(2, (7, 11), dtype, 1)
    assert apart(call("slerp", [a, a.clone()], t=t), wide(a), abs(wide(a))) <= 1


def test_slerp_of_opposite_tensors_is_a_straight_line() -> None:
    (a,) = drawn(3, (64,), torch.float32, 1)
    assert apart(call("slerp", [a, -a], t=0.25), 0.5 * wide(a), abs(wide(a))) <= 1


def test_slerp_with_zeros_takes_a_right_angle() -> None:
    (a,) = drawn(3, (64,), torch.float32, 1)
    found = call("slerp", [torch.zeros_like(a), a], t=0.5)
    assert apart(found, math.sqrt(0.5) * wide(a), abs(wide(a))) < 4


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
    parts = [wide(d) for d in ds]
    found = call(
        "task_arithmetic", ds, base, weighted(weights), normalize=normalize, **{"lambda": scale}
    )
    expected = reference.task_arithmetic(wide(base), parts, weights, normalize, scale)
    magnitudes = [abs(part) for part in parts]
    bound = reference.task_arithmetic(abs(wide(base)), magnitudes, weights, normalize, scale)
    assert found.dtype == dtype
    assert apart(found, expected, bound) < 5


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
    found = call(
        "ties",
        ds,
        base,
        weighted(weights, density=density),
        normalize=normalize,
        rescale=rescale,
        **{"lambda": scale},
    )
    kept = [reference.trimmed(wide(d), density) for d in ds]
    if rescale:
        kept = [reference.rescaled(wide(d), k) for d, k in zip(ds, kept, strict=True)]
    assert_consensus(found, base, kept, weights, normalize, scale)


def assert_consensus(
    found: Tensor,
    base: Tensor,
    kept: list[reference.Array],
    weights: list[float],
    normalize: bool,
    scale: float,
) -> None:
    """Equal to the reference, save where rounding elects the sign."""
    expected = reference.consensus(wide(base), kept, weights, normalize, scale)
    total = scale * sum(w * abs(k) for w, k in zip(weights, kept, strict=True))
    bound = abs(wide(base)) + total / (min(weights) if normalize else 1)
    open_votes = reference.undecided(kept, weights, 4 * torch.finfo(base.dtype).eps)
    open_votes &= total > 0
    decided = torch.from_numpy(~open_votes)
    assert found.dtype == base.dtype
    if decided.any():
        assert apart(found[decided], expected[~open_votes], bound[~open_votes]) < 8


@in_both_dtypes
@pytest.mark.parametrize("method", ["dare_ties", "dare_linear"])
@pytest.mark.parametrize("rescale", [True, False])
@modestly
@given(
    shape=shapes,
    seed=seeds,
    weights=st.lists(positive, min_size=1, max_size=4),
    density=densities,
    normalize=st.booleans(),
)
def test_dare_merges_what_its_masks_keep(
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
    key = (seed, "model.norm.weight")
    found = call(
        method,
        ds,
        base,
        weighted(weights, density=density),
        key,
        normalize=normalize,
        rescale=rescale,
        **{"lambda": 0.5},
    )
    drops = masks(method, len(weights), shape, density, key=key)
    kept = [wide(d) * wide(drop) for d, drop in zip(ds, drops, strict=True)]
    if rescale:
        kept = [reference.rescaled(wide(d), k) for d, k in zip(ds, kept, strict=True)]
    if method == "dare_ties":
        assert_consensus(found, base, kept, weights, normalize, 0.5)
        return
    expected = reference.task_arithmetic(wide(base), kept, weights, normalize, 0.5)
    magnitudes = [abs(k) for k in kept]
    bound = reference.task_arithmetic(abs(wide(base)), magnitudes, weights, normalize, 0.5)
    assert apart(found, expected, bound) < 8


@in_both_dtypes
@pytest.mark.parametrize("scale", [1.0, 0.7, 0.0, -1.5])
def test_passthrough_scales(dtype: torch.dtype, scale: float) -> None:
    (x,) = drawn(4, (5, 7), dtype, 1)
    found = call("passthrough", [x], per_model=[{"scale": scale}])
    assert apart(found, wide(x) * scale, abs(wide(x) * scale) + 1e-30) <= 1


@in_both_dtypes
@pytest.mark.parametrize("method", ["linear", *TASK_VECTORS])
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_weight_on_one_parent_alone_gives_that_parent(
    dtype: torch.dtype, method: str, chosen: int
) -> None:
    base, *parents = drawn(5, (6, 10), dtype, 4)
    parameters = weighted([float(i == chosen) for i in range(3)])
    if method == "linear":
        found = call(method, parents, per_model=parameters)
        assert torch.equal(found, parents[chosen])
        return
    found = call(method, [x - base for x in parents], base, parameters)
    scale = abs(wide(base)) + abs(wide(parents[chosen]))
    assert apart(found, wide(parents[chosen]), scale) <= 1


@in_both_dtypes
@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
def test_density_1_and_one_parent_is_task_arithmetic(dtype: torch.dtype, method: str) -> None:
    base, d = drawn(6, (6, 10), dtype, 2)
    parameters = weighted([0.625])
    expected = call("task_arithmetic", [d], base, parameters)
    assert torch.equal(call(method, [d], base, parameters, normalize=False), expected)


@in_both_dtypes
@modestly
@given(shape=shapes, seed=seeds, density=densities)
def test_trimming_keeps_exactly_the_share_and_the_largest(
    dtype: torch.dtype, shape: tuple[int, ...], seed: int, density: float
) -> None:
    (d,) = drawn(seed, shape, dtype, 1)  # in bfloat16 some magnitudes are equal
    count = max(1, int(density * d.numel()))
    kept = methods.largest(d, density)
    where = kept != 0
    assert int(where.sum()) == count
    assert torch.equal(kept[where], d[where])
    magnitudes = d.abs().flatten().sort(descending=True).values[:count]
    assert torch.equal(kept.abs()[where].sort(descending=True).values, magnitudes)


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


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_its_density(method: str, density: float) -> None:
    shape, n = (200, 200), 2
    kept = masks(method, n, shape, density).mean().item()
    size = n * math.prod(shape)
    assert abs(kept - density) < 5 * math.sqrt(density * (1 - density) / size)


def test_dare_masks_of_two_parents_are_independent() -> None:
    first, second = masks("dare_linear", 2, (200, 200), 0.5)
    both = (first * second).mean().item()
    assert abs(both - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 40_000)


def test_dare_masks_follow_from_the_key_alone() -> None:
    torch.manual_seed(1)
    first = masks("dare_linear", 2, (8, 8), 0.5, key=(7, "a"))
    torch.manual_seed(2)
    assert torch.equal(first, masks("dare_linear", 2, (8, 8), 0.5, key=(7, "a")))


@pytest.mark.parametrize("key", [(8, "a"), (7, "b")], ids=["seed", "tensor"])
def test_another_key_gives_another_dare_mask(key: tuple[int, str]) -> None:
    first = masks("dare_linear", 1, (8, 8), 0.5, key=(7, "a"))
    assert not torch.equal(first, masks("dare_linear", 1, (8, 8), 0.5, key=key))


def test_every_parent_has_a_dare_mask_of_its_own() -> None:
    first, second, third = masks("dare_linear", 3, (8, 8), 0.5)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert not torch.equal(first, third)


def test_dare_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    masks("dare_ties", 2, (8, 8), 0.5)
    assert torch.equal(torch.get_rng_state(), before)


@in_both_dtypes
@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
def test_rescale_restores_the_sum_of_magnitudes(dtype: torch.dtype, method: str) -> None:
    (d,) = drawn(7, (40, 30), dtype, 1)
    parameters = weighted([1.0], density=0.3)
    zeros = torch.zeros_like(d)
    sums = {
        rescale: float(call(method, [d], zeros, parameters, rescale=rescale).double().abs().sum())
        for rescale in (True, False)
    }
    before = float(d.double().abs().sum())
    assert sums[False] < 0.8 * before
    assert sums[True] == pytest.approx(before, rel=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
def test_rescaling_a_task_vector_of_zeros_gives_zeros(method: str) -> None:
    zeros, (base,) = torch.zeros(5, 6), drawn(8, (5, 6), torch.float32, 1)
    parameters = weighted([1.0], density=0.3)
    assert torch.equal(call(method, [zeros], base, parameters, rescale=True), base)


ELEMENTWISE = {
    "linear": {"normalize": True},
    "task_arithmetic": {"normalize": True, "lambda": 0.3},
    "passthrough": {},
}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "linear": weighted([0.3, 0.9, -0.1, 0.7, 0.2]),
    "slerp": [{}, {}],
    "task_arithmetic": weighted([0.3, 0.9, -0.1, 0.7]),
    "ties": weighted([0.3, 0.9, 0.7], density=0.4),
    "dare_ties": weighted([0.3, 0.9, 0.7], density=0.4),
    "dare_linear": weighted([0.3, 0.9, 0.7], density=0.4),
    "passthrough": [{"scale": 0.7}],
}
LARGE = (577, 521)  # more than any chunk, and of an odd length


def case(method: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None, dict[str, Any]]:
    """Large inputs, their base and shared parameters."""
    base, *inputs = drawn(9, LARGE, dtype, 1 + len(SETTINGS[method]))
    shared = ELEMENTWISE.get(method, {"t": 0.3} if method == "slerp" else {})
    return inputs, base if METHODS[method].task_vectors else None, shared


@in_both_dtypes
@pytest.mark.parametrize("method", ELEMENTWISE)
def test_a_tensor_merges_like_its_parts(dtype: torch.dtype, method: str) -> None:
    inputs, base, shared = case(method, dtype)
    whole = call(method, inputs, base, SETTINGS[method], **shared).view(-1)
    for start, end in ((0, 1), (1, 32_770), (32_770, 131_073), (131_073, whole.numel())):
        parts = [x.view(-1)[start:end].clone() for x in inputs]
        part = None if base is None else base.view(-1)[start:end].clone()
        found = call(method, parts, part, SETTINGS[method], **shared)
        assert torch.equal(found, whole[start:end])


@in_both_dtypes
@pytest.mark.parametrize("method", METHODS)
def test_where_the_result_is_written_does_not_matter(dtype: torch.dtype, method: str) -> None:
    inputs, base, shared = case(method, dtype)
    expected = call(method, inputs, base, SETTINGS[method], **shared)
    strided = torch.full((LARGE[0], 2 * LARGE[1]), math.nan, dtype=dtype)[:, ::2]
    for out in (torch.full(LARGE, math.nan, dtype=dtype), strided):
        found = call(method, inputs, base, SETTINGS[method], out=out, **shared)
        assert found is out
        assert torch.equal(out, expected)


@in_both_dtypes
@pytest.mark.parametrize("method", METHODS)
def test_how_the_inputs_lie_in_memory_does_not_matter(dtype: torch.dtype, method: str) -> None:
    inputs, base, shared = case(method, dtype)
    expected = call(method, inputs, base, SETTINGS[method], **shared)
    columns = [x.t().contiguous().t() for x in inputs]
    assert not columns[0].is_contiguous()
    base_columns = None if base is None else base.t().contiguous().t()
    found = call(method, columns, base_columns, SETTINGS[method], **shared)
    assert torch.equal(found, expected)


@in_both_dtypes
@pytest.mark.parametrize("method", METHODS)
def test_inputs_stay_as_they_are(dtype: torch.dtype, method: str) -> None:
    inputs, base, shared = case(method, dtype)
    before = [x.clone() for x in inputs]
    base_before = None if base is None else base.clone()
    call(method, inputs, base, SETTINGS[method], **shared)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    if base is not None:
        assert torch.equal(base, base_before)


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
    base, *ds = drawn(11, (methods._CHUNK + 4,), torch.float32, 6)
    expected = base + torch.stack(ds).sum(dim=0)
    assert torch.equal(call("task_arithmetic", ds, base, weighted([1.0] * 5)), expected)


@pytest.mark.parametrize("method", TASK_VECTORS)
def test_task_vectors_without_a_base_are_refused(method: str) -> None:
    with pytest.raises(TypeError, match="base"):
        call(method, [torch.ones(2)], None, weighted([1.0]))


def test_float64_inputs_merge_in_float64() -> None:
    a, b = (torch.tensor([x], dtype=torch.float64) for x in (1.0, 1.0 + 1e-12))
    assert float(call("linear", [a, b], per_model=weighted([0.0, 1.0]))) == float(b)
    assert np.isclose(float(call("slerp", [a, b], t=0.5)), 1 + 5e-13, rtol=1e-15)
