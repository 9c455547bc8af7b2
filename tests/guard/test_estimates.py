"""Estimates: against known values, by hand, and by simulation of what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evomerge.fitness.results import Scored, Scores
from evomerge.guard.estimates import (
    Estimate,
    Gain,
    bbc_cv,
    binomial_tail,
    combined,
    detectable_gain,
    paired_gain,
    promoted,
    score_estimate,
    shrunk,
    weighted_row,
    wilson,
)

ONE = {"a": 1.0}


def scores(values: NDArray[np.floating] | list[float], first: int = 0) -> Scores:
    n = len(values)
    examples = np.arange(first, first + n, dtype=np.uint32)
    zeros = np.zeros(n, np.float32)
    none, tokens = examples < 0, np.zeros(n, np.uint32)
    return Scores(examples, np.asarray(values, np.float32), zeros, none, tokens, none)


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def holds(estimate: Estimate, truth: float) -> bool:
    return estimate.interval[0] <= truth <= estimate.interval[1]


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
        (5, 10, 0.2366, 0.7634),
    ],
)
def test_wilsons_interval_has_its_published_values(
    hits: int, n: int, low: float, high: float
) -> None:
    found = wilson(hits / n, n)
    assert found.value == hits / n
    assert found.interval == pytest.approx((low, high), abs=5e-5)


@settings(max_examples=60, deadline=None)
@given(hits=st.integers(0, 400), n=st.integers(1, 400))
def test_wilsons_interval_holds_its_value_and_lies_in_the_unit_interval(hits: int, n: int) -> None:
    found = wilson(min(hits, n) / n, n)
    low, high = found.interval
    assert 0 <= low <= found.value + 1e-12
    assert found.value - 1e-12 <= high <= 1
    assert low < high


@pytest.mark.parametrize(("p", "n"), [(0.5, 50), (0.3, 200), (0.9, 500)])
def test_wilsons_interval_covers_the_truth_as_often_as_it_says(p: float, n: int) -> None:
    hits = random().binomial(n, p, size=4000)
    covered = [holds(wilson(k / n, n), p) for k in hits.tolist()]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.025)


def test_wilsons_interval_is_never_too_narrow_for_partial_scores() -> None:
    means = random().random((2000, 60)).mean(axis=1)
    assert np.mean([holds(wilson(float(mean), 60), 0.5) for mean in means]) > 0.95


def test_several_tasks_are_estimated_by_their_wilson_distances_in_quadrature() -> None:
    a, b = scores([1, 1, 1, 0]), scores([1, 0])
    assert score_estimate({"a": a}, {"a": 7.0}) == wilson(0.75, 4)
    found = score_estimate({"a": a, "b": b}, {"a": 3.0, "b": 1.0})
    assert found.value == pytest.approx(0.6875)
    (a_low, a_high), (b_low, b_high) = wilson(0.75, 4).interval, wilson(0.5, 2).interval
    low = 0.6875 - math.hypot(0.75 * (0.75 - a_low), 0.25 * (0.5 - b_low))
    high = 0.6875 + math.hypot(0.75 * (a_high - 0.75), 0.25 * (b_high - 0.5))
    assert found.interval == pytest.approx((low, high))
    assert found == combined({"a": (0.75, 4), "b": (0.5, 2)}, {"a": 3.0, "b": 1.0})


@pytest.mark.parametrize("hit", [0, 1])
def test_several_tasks_all_wrong_or_all_right_are_not_certain(hit: int) -> None:
    tasks = {"a": scores([hit] * 16), "b": scores([hit] * 16)}
    low, high = score_estimate(tasks, {"a": 1.0, "b": 1.0}).interval
    bound = 0.1936 / math.sqrt(2)  # Wilson's of 0 of 16, of two equal tasks
    assert (low, high) == pytest.approx((1 - bound, 1) if hit else (0, bound), abs=1e-4)


@pytest.mark.parametrize("p", [(0.5, 0.9), (0.02, 0.98), (0.0, 0.3)])
def test_the_interval_over_several_tasks_covers_the_truth(p: tuple[float, float]) -> None:
    weights, truth = {"a": 2.0, "b": 1.0}, (2 * p[0] + p[1]) / 3
    draw, covered = random(), []
    for a, b in zip(draw.binomial(40, p[0], 2000), draw.binomial(25, p[1], 2000), strict=True):
        means = {"a": (a / 40, 40), "b": (b / 25, 25)}
        covered.append(holds(combined(means, weights), truth))
    assert np.mean(covered) >= 0.93


def test_an_estimate_is_written_as_value_and_interval() -> None:
    assert Estimate(0.5, (0.25, 0.75)).as_dict() == {"value": 0.5, "interval": [0.25, 0.75]}


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 300), least=st.integers(0, 300))
def test_the_binomial_tail_is_exact(n: int, least: int) -> None:
    least = min(least, n)
    exact = sum(math.comb(n, k) for k in range(least, n + 1)) / 2**n
    assert binomial_tail(n, least) == pytest.approx(exact, rel=1e-9)


def pair(wins: int, losses: int, ties: int = 10) -> tuple[Scores, Scores]:
    """Two models that differ on these many examples."""
    ours = [1] * wins + [0] * losses + [1] * ties
    theirs = [0] * wins + [1] * losses + [1] * ties
    return scores(ours), scores(theirs)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (5, 0, 2 / 2**5),
        (0, 5, 2 / 2**5),
        (10, 2, 2 * (66 + 12 + 1) / 2**12),
        (2, 10, 2 * (66 + 12 + 1) / 2**12),
        (3, 3, 1.0),
        (1, 0, 1.0),
        (0, 0, 1.0),
    ],
)
def test_one_task_of_hits_and_misses_is_tested_exactly(wins: int, losses: int, p: float) -> None:
    ours, theirs = pair(wins, losses)
    gain = paired_gain({"a": ours}, {"a": theirs}, ONE, random())
    assert gain.p_value == pytest.approx(p)
    assert gain.estimate.value == pytest.approx((wins - losses) / (wins + losses + 10))
    assert gain.n == wins + losses + 10


def test_a_gain_is_the_weighted_mean_over_the_tasks() -> None:
    (a, a0), (b, b0) = pair(4, 0, ties=4), pair(0, 5, ties=5)
    weights = {"a": 3.0, "b": 1.0}
    gain = paired_gain({"a": a, "b": b}, {"a": a0, "b": b0}, weights, random())
    assert gain.estimate.value == pytest.approx(0.75 * 0.5 - 0.25 * 0.5)
    assert gain.n == 18
    assert holds(gain.estimate, gain.estimate.value)


def test_a_gain_is_deterministic_for_a_seed() -> None:
    ours, theirs = {"a": scores([0.5, 1, 0.25, 0, 1])}, {"a": scores([0, 1, 0.5, 0, 0.5])}
    one, same = (paired_gain(ours, theirs, ONE, random(4)) for _ in range(2))
    assert one == same
    assert one.p_value != paired_gain(ours, theirs, ONE, random(5)).p_value


def test_the_interval_of_a_gain_covers_the_truth() -> None:
    covered = []
    for seed in range(150):
        draw = random(seed)
        theirs = draw.random(120) < 0.5
        ours = np.where(draw.random(120) < 0.3, draw.random(120) < 0.9, theirs)
        gain = paired_gain({"a": scores(ours)}, {"a": scores(theirs)}, ONE, draw)
        covered.append(holds(gain.estimate, 0.3 * (0.9 - 0.5)))
    assert 0.9 <= np.mean(covered) < 1


@pytest.mark.parametrize("hit", [0, 1])
@pytest.mark.parametrize("n", [1, 16, 200])
def test_models_that_never_differed_may_still_differ(hit: int, n: int) -> None:
    same = {"a": scores([hit] * n)}
    gain = paired_gain(same, same, ONE, random())
    bound = 1.959964**2 / (n + 1.959964**2)  # Wilson's of 0 of n
    assert (gain.estimate.value, gain.p_value) == (0.0, 1.0)
    assert gain.estimate.interval == pytest.approx((-bound, bound), abs=1e-6)


def test_a_gain_on_every_example_is_not_certain() -> None:
    gain = paired_gain({"a": scores([1] * 16)}, {"a": scores([0] * 16)}, ONE, random())
    assert gain.estimate.value == 1.0
    assert gain.estimate.interval == pytest.approx((1 - 2 * 0.1936, 1.0), abs=1e-4)


def test_a_task_without_a_difference_widens_a_gain_by_its_weight() -> None:
    (a, a0), same = pair(6, 2), scores([1] * 30)
    alone = paired_gain({"a": a}, {"a": a0}, ONE, random()).estimate
    weights = {"a": 3.0, "b": 1.0}
    found = paired_gain({"a": a, "b": same}, {"a": a0, "b": same}, weights, random()).estimate
    bound = 0.25 * wilson(0.0, 30).interval[1]
    below, above = alone.value - alone.interval[0], alone.interval[1] - alone.value
    expected = (math.hypot(0.75 * below, bound), math.hypot(0.75 * above, bound))
    distances = (found.value - found.interval[0], found.interval[1] - found.value)
    assert found.value == pytest.approx(0.75 * alone.value)
    assert distances == pytest.approx(expected, abs=0.02)


def test_the_interval_of_a_rare_gain_covers_the_truth() -> None:
    covered = []
    for seed in range(300):
        draw = random(seed)
        ours = draw.random(40) < 0.01  # most draws show no difference at all
        if ours.any():
            continue
        gain = paired_gain({"a": scores(ours)}, {"a": scores([0] * 40)}, ONE, draw)
        covered.append(holds(gain.estimate, 0.01))
    assert np.mean(covered) == 1.0


def test_a_p_value_by_flipped_signs_is_small_no_more_often_than_it_says() -> None:
    values = []
    for seed in range(200):
        draw = random(seed)
        ours, theirs = {"a": scores(draw.random(15))}, {"a": scores(draw.random(15))}
        values.append(paired_gain(ours, theirs, ONE, draw).p_value)
    assert 0.01 <= np.mean(np.array(values) < 0.1) <= 0.16
    assert min(values) > 0


def test_a_large_gain_of_partial_scores_has_a_small_p_value() -> None:
    ours, theirs = {"a": scores([0.9] * 20)}, {"a": scores([0.3] * 20)}
    gain = paired_gain(ours, theirs, ONE, random())
    assert gain.p_value == 1 / 2001  # no flip is as extreme


@pytest.mark.parametrize("theirs", [scores([1, 0], first=1), scores([1]), scores([0, 1, 1])])
def test_a_gain_on_different_examples_is_refused(theirs: Scores) -> None:
    with pytest.raises(ValueError, match="task 'a': the two were scored on different examples"):
        paired_gain({"a": scores([1, 0])}, {"a": theirs}, ONE, random())


@pytest.mark.parametrize(
    ("value", "p_value", "alpha", "looks", "verdict"),
    [
        (0.1, 0.03, 0.05, 3, True),  # 0.015 < 0.05 / 3
        (0.1, 0.03, 0.05, 4, False),  # 0.015 > 0.05 / 4
        (0.1, 0.03, 0.01, 1, False),
        (0.1, 0.0, 0.05, 100, True),
        (-0.1, 0.0, 0.05, 1, False),
        (0.0, 0.0, 0.05, 1, False),
        (0.1, 0.1, 0.05, 1, False),  # not below, but at the level
    ],
)
def test_only_a_gain_that_survives_all_looks_is_promoted(
    value: float, p_value: float, alpha: float, looks: int, verdict: bool
) -> None:
    gain = Gain(Estimate(value, (-1, 1)), p_value, 100)
    assert promoted(gain, alpha, looks) is verdict


def test_a_search_without_a_gain_is_seldom_promoted() -> None:
    promotions = 0
    for seed in range(200):
        draw = random(seed)
        theirs = draw.random(60) < 0.6
        looks = [np.where(draw.random(60) < 0.3, draw.random(60) < 0.6, theirs) for _ in range(5)]
        best = max(looks, key=np.mean)
        gain = paired_gain({"a": scores(best)}, {"a": scores(theirs)}, ONE, draw)
        promotions += promoted(gain, 0.05, looks=5)
    assert promotions / 200 <= 0.05


def test_about_1370_examples_show_a_gain_of_3_points() -> None:
    assert detectable_gain(1370, alpha=0.05) == pytest.approx(0.03, abs=1e-4)
    n = 0.2 * (1.644854 + 0.841621) ** 2 / 0.03**2
    assert detectable_gain(round(n), alpha=0.05, discordance=0.2, power=0.8) == pytest.approx(
        0.03, abs=1e-5
    )


def test_the_detectable_gain_is_found_with_the_power_that_it_says() -> None:
    draw, n, discordance = random(), 1370, 0.2
    gain = detectable_gain(n, 0.05, discordance)
    discordant = draw.binomial(n, discordance, size=2000)
    wins = draw.binomial(discordant, (1 + gain / discordance) / 2)
    found = [binomial_tail(m, w) < 0.05 for m, w in zip(discordant, wins, strict=True)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_more_examples_fewer_looks_or_less_disagreement_show_smaller_gains() -> None:
    gain = detectable_gain(500, 0.05)
    assert detectable_gain(2000, 0.05) == pytest.approx(gain / 2)
    assert detectable_gain(500, 0.01) > gain
    assert detectable_gain(500, 0.05, discordance=0.05) == pytest.approx(gain / 2)
    assert detectable_gain(500, 0.05, power=0.9) > gain


@settings(max_examples=80, deadline=None)
@given(hits=st.lists(st.integers(0, 50), min_size=2, max_size=30), n=st.integers(50, 1000))
def test_a_shrunk_score_lies_between_the_population_and_the_raw_score(
    hits: list[int], n: int
) -> None:
    means = np.array(hits) / 50
    best = int(means.argmax())
    found = shrunk(means, n, best)
    assert means.mean() - 1e-9 <= found.value <= means[best] + 1e-9
    low, high = found.interval
    assert 0 <= low <= found.value + 1e-12
    assert found.value <= high + 1e-12
    assert high <= 1


def test_what_noise_explains_is_all_luck() -> None:
    means = random().binomial(100, 0.5, size=500) / 100
    assert means.max() > 0.62
    assert shrunk(means, 100, int(means.argmax())).value == pytest.approx(0.5, abs=0.03)


def test_a_real_spread_is_kept() -> None:
    means = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    assert shrunk(means, 10_000, 4).value == pytest.approx(0.9, abs=0.001)


@pytest.mark.parametrize(
    ("centre", "spread", "n"), [(0.5, 0.1, 100), (0.85, 0.05, 50), (0.93, 0.03, 20)]
)
def test_a_shrunk_score_is_close_to_the_truth_where_the_raw_one_is_not(
    centre: float, spread: float, n: int
) -> None:
    raw, bias, covered = [], [], []
    for seed in range(300):
        draw = random(seed)
        truth = np.clip(draw.normal(centre, spread, size=200), 0, 1)
        means = draw.binomial(n, truth) / n
        best = int(means.argmax())
        found = shrunk(means, n, best)
        raw.append(means[best] - truth[best])
        bias.append(found.value - truth[best])
        covered.append(holds(found, float(truth[best])))
    assert np.mean(raw) > 0.03
    assert abs(np.mean(bias)) < 0.015
    assert np.mean(covered) > 0.8


def test_a_perfect_score_on_a_few_examples_is_not_certain() -> None:
    means = np.array([0.5, 0.6, 0.7, 0.8, 1.0])
    found = shrunk(means, 10, 4)
    assert found.value < 0.98
    assert found.interval[1] - found.interval[0] > 0.1


def test_bbc_cv_takes_the_luck_out_of_pure_noise() -> None:
    values = []
    for seed in range(10):
        matrix = (random(seed).random((150, 100)) < 0.5).astype(np.float32)
        found = bbc_cv(matrix, random(seed))
        best = float(matrix.mean(axis=1).max())
        assert best > 0.58
        assert found.value < best
        assert found.interval[0] < 0.5 < found.interval[1]
        values.append(found.value)
    assert np.mean(values) == pytest.approx(0.5, abs=0.025)


def test_bbc_cv_keeps_a_real_difference() -> None:
    draw = random()
    matrix = (draw.random((50, 400)) < 0.5).astype(np.float32)
    matrix[7] = draw.random(400) < 0.9
    found = bbc_cv(matrix, random())
    assert found.value == pytest.approx(float(matrix[7].mean()), abs=0.01)
    assert holds(found, 0.9)


def test_bbc_cv_is_deterministic_for_a_seed() -> None:
    matrix = (random().random((20, 30)) < 0.5).astype(np.float32)
    assert bbc_cv(matrix, random(1)) == bbc_cv(matrix, random(1))
    assert bbc_cv(matrix, random(1)) != bbc_cv(matrix, random(2))


def test_bbc_cv_claims_nothing_from_a_single_example() -> None:
    matrix = np.array([[0.0], [1.0]], np.float32)
    assert bbc_cv(matrix, random()) == Estimate(1.0, (0.0, 1.0))


@settings(max_examples=50, deadline=None)
@given(
    a=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20),
    b=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20),
    weight=st.floats(0.1, 10),
)
def test_the_mean_of_a_weighted_row_is_the_weighted_score(
    a: list[float], b: list[float], weight: float
) -> None:
    tasks = {"a": scores(a), "b": scores(b)}
    weights = {"a": weight, "b": 1.0}
    row = weighted_row(tasks, weights)
    assert row.shape == (len(a) + len(b),)
    assert row.dtype == np.float32
    assert row.mean(dtype=float) == pytest.approx(Scored(tasks, 0, 0).score(weights), abs=1e-5)


def test_a_weighted_row_of_one_task_is_its_scores() -> None:
    assert weighted_row({"a": scores([1, 0, 0.5])}, {"a": 3.0}).tolist() == [1, 0, 0.5]


def test_a_task_without_a_weight_is_no_part_of_any_estimate() -> None:
    (a, a0), (b, b0) = pair(5, 0), pair(0, 40)
    weights = {"a": 1.0, "b": 0.0}
    alone = paired_gain({"a": a}, {"a": a0}, ONE, random())
    assert paired_gain({"a": a, "b": b}, {"a": a0, "b": b0}, weights, random()) == alone
    both = {"a": a, "b": b}
    assert score_estimate(both, weights).value == pytest.approx(a.mean)
    assert score_estimate(both, weights).interval == pytest.approx(wilson(a.mean, len(a)).interval)
    assert weighted_row(both, weights).tolist() == weighted_row({"a": a}, ONE).tolist()
