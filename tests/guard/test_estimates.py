"""Estimates and gains: against known values, by hand, and by simulation of what they promise."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evomerge.fitness.results import Scores
from evomerge.guard.estimates import (
    Estimate,
    Gain,
    combined,
    detectable_gain,
    paired_gain,
    promoted,
    score_estimate,
    wilson,
)

ONE = {"a": 1.0}


def scores(values: NDArray[np.floating] | list[float], first: int = 0) -> Scores:
    n = len(values)
    examples = np.arange(first, first + n, dtype=np.uint32)
    return Scores(examples, np.asarray(values, np.float32), *zeros(n))


def zeros(n: int) -> tuple[NDArray[np.generic], ...]:
    """Of Scores, what follows the scores themselves."""
    none = np.zeros(n, np.bool_)
    return np.zeros(n, np.float32), none, np.zeros(n, np.uint32), none


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


@settings(max_examples=60, deadline=None, derandomize=True)
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


def flipped(differences: list[float]) -> float:
    """The two-sided p-value by every combination of signs."""
    observed = abs(sum(differences)) - 1e-9
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    return float(np.mean([total >= observed for total in sums]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    quarters=st.lists(st.integers(-4, 4), min_size=1, max_size=10),
    others=st.lists(st.integers(-1, 1), max_size=4),
)
def test_a_p_value_is_that_of_every_combination_of_signs(
    quarters: list[int], others: list[int]
) -> None:
    def task(differences: list[float]) -> tuple[Scores, Scores]:
        ours = [max(0.0, d) for d in differences]
        return scores(ours), scores([o - d for o, d in zip(ours, differences, strict=True)])

    first, second = [q / 4 for q in quarters], [float(d) for d in others]
    ours, theirs = task(first)
    found = paired_gain({"a": ours}, {"a": theirs}, ONE, random())
    assert found.p_value == pytest.approx(flipped(first))
    if not second:
        return
    more, less = task(second)
    weights = {"a": 2.0, "b": 1.0}
    both = paired_gain({"a": ours, "b": more}, {"a": theirs, "b": less}, weights, random())
    weighted = [2 * d / len(first) for d in first] + [d / len(second) for d in second]
    assert both.p_value == pytest.approx(flipped(weighted))


@pytest.mark.parametrize(("wins", "losses"), [(40, 5), (400, 250)])
def test_a_p_value_may_be_as_small_as_many_looks_ask_for(wins: int, losses: int) -> None:
    n = wins + losses
    exact = 2 * sum(math.comb(n, k) for k in range(wins, n + 1)) / 2**n
    ours, theirs = pair(wins, losses)
    found = paired_gain({"a": ours}, {"a": theirs}, ONE, random()).p_value
    assert found == pytest.approx(exact, rel=1e-6)
    assert found < 1e-5


def test_signs_are_flipped_at_random_where_the_combinations_are_too_many() -> None:
    draw = random(1)
    ours, theirs = draw.random(300), draw.random(300)
    found = paired_gain({"a": scores(ours)}, {"a": scores(theirs)}, ONE, random()).p_value
    d = (ours - theirs).astype(np.float32)
    normal = math.erfc(abs(float(d.sum())) / math.sqrt(2 * float(d @ d)))
    assert found == pytest.approx(normal, abs=0.01)
    large = paired_gain({"a": scores(ours)}, {"a": scores(ours / 2)}, ONE, random()).p_value
    assert large == 1 / 100_001  # no flip is as extreme


def test_a_gain_is_the_weighted_mean_over_the_tasks() -> None:
    (a, a0), (b, b0) = pair(4, 0, ties=4), pair(0, 5, ties=5)
    weights = {"a": 3.0, "b": 1.0}
    gain = paired_gain({"a": a, "b": b}, {"a": a0, "b": b0}, weights, random())
    assert gain.estimate.value == pytest.approx(0.75 * 0.5 - 0.25 * 0.5)
    assert gain.n == 18
    assert holds(gain.estimate, gain.estimate.value)


def test_a_gain_is_deterministic_for_a_seed() -> None:
    draw = random()
    ours, theirs = {"a": scores(draw.random(60))}, {"a": scores(draw.random(60))}
    one, same = (paired_gain(ours, theirs, ONE, random(4)) for _ in range(2))
    assert one == same
    other = paired_gain(ours, theirs, ONE, random(5))
    assert one.p_value != other.p_value
    assert one.estimate.interval != other.estimate.interval
    assert one.estimate.value == other.estimate.value


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
    assert (gain.estimate.value, gain.p_value) == (0.0, 1.0)
    low, high = gain.estimate.interval
    expected = 1.959964 * math.sqrt(2) / (n + 2)  # Bonett and Price, of no difference
    assert (-low, high) == pytest.approx((expected, expected), abs=1.01 / (n + 2))


def test_a_gain_on_every_example_is_not_certain() -> None:
    gain = paired_gain({"a": scores([1] * 16)}, {"a": scores([0] * 16)}, ONE, random())
    assert gain.estimate.value == 1.0
    assert 0.5 < gain.estimate.interval[0] < 0.85
    assert gain.estimate.interval[1] == 1.0


def test_a_task_without_a_difference_widens_a_gain_by_its_weight() -> None:
    (a, a0), same = pair(60, 20, ties=120), scores([1] * 30)
    alone = paired_gain({"a": a}, {"a": a0}, ONE, random()).estimate
    weights = {"a": 1.0, "b": 1.0}
    found = paired_gain({"a": a, "b": same}, {"a": a0, "b": same}, weights, random()).estimate
    none = paired_gain({"b": same}, {"b": same}, {"b": 1.0}, random()).estimate
    below = math.hypot(0.5 * (alone.value - alone.interval[0]), 0.5 * none.interval[0])
    assert found.value == pytest.approx(0.5 * alone.value)
    assert found.value - found.interval[0] == pytest.approx(below, rel=0.15)


@pytest.mark.parametrize("n", [10, 40])
@pytest.mark.parametrize(
    ("wins", "losses"), [(0.01, 0.0), (0.03, 0.01), (0.1, 0.0), (0.2, 0.1), (0.5, 0.0), (0.8, 0.2)]
)
def test_the_interval_of_a_gain_covers_the_truth_where_few_differ(
    wins: float, losses: float, n: int
) -> None:
    """Over every outcome, each as often as it comes up."""
    covered = 0.0
    for won in range(n + 1):
        for lost in range(n + 1 - won):
            chance = math.comb(n, won) * math.comb(n - won, lost) * wins**won * losses**lost
            chance *= (1 - wins - losses) ** (n - won - lost)
            if chance > 1e-4:
                ours, theirs = pair(won, lost, n - won - lost)
                gain = paired_gain({"a": ours}, {"a": theirs}, ONE, random())
                covered += chance * holds(gain.estimate, wins - losses)
    assert covered > 0.91


def test_the_interval_of_groups_covers_the_truth_and_is_wider_than_that_of_examples() -> None:
    """Ten variants of each question, which are solved together or not at all, by either model."""
    numbers, covered, flat, narrow = np.arange(400) // 10, [], [], []
    for seed in range(150):
        draw = random(seed)
        ours = np.repeat(draw.random(40) < 0.5, 10)
        other = np.repeat(draw.random(40) < 0.2, 10)
        theirs = np.where(other, ~ours, ours) & np.repeat(draw.random(40) < 0.9, 10)
        true = 0.5 - 0.5 * 0.9
        pair_ = {"a": scores(ours)}, {"a": scores(theirs)}
        grouped = paired_gain(*pair_, ONE, random(seed), {"a": numbers})
        alone = paired_gain(*pair_, ONE, random(seed))
        assert grouped.estimate.value == alone.estimate.value
        covered.append(holds(grouped.estimate, true))
        flat.append(holds(alone.estimate, true))
        narrow.append(np.ptp(alone.estimate.interval) < np.ptp(grouped.estimate.interval))
    assert np.mean(covered) >= 0.9
    assert np.mean(flat) < 0.7
    assert np.mean(narrow) > 0.95


def test_groups_are_flipped_whole() -> None:
    """Twelve wins in three groups are three coins, not twelve."""
    ours, theirs = {"a": scores([1] * 12)}, {"a": scores([0] * 12)}
    assert paired_gain(ours, theirs, ONE, random()).p_value == pytest.approx(2 / 2**12)
    groups = {"a": np.repeat([7, 3, 9], 4)}
    assert paired_gain(ours, theirs, ONE, random(), groups).p_value == pytest.approx(2 / 2**3)


def test_groups_go_by_the_position_in_the_split() -> None:
    values = [1, 1, 1, 0, 0, 1, 0, 1]
    examples = np.array([9, 2, 5, 7, 0, 4, 3, 8], np.uint32)
    ours, theirs = (Scores(examples, np.array(v, np.float32), *zeros(8)) for v in (values, [0] * 8))
    numbers = np.full(10, -1)
    numbers[[9, 2]], numbers[[5, 7, 0]], numbers[[4, 3, 8]] = 5, 1, 2
    found = paired_gain({"a": ours}, {"a": theirs}, ONE, random(), {"a": numbers})
    assert found.p_value == pytest.approx(2 / 2**3)  # each group has a win
    assert found.n == 8


def test_groups_of_one_and_no_groups_are_the_same() -> None:
    (a, a0), (b, b0) = pair(7, 2), pair(3, 3)
    weights = {"a": 2.0, "b": 1.0}
    tasks = {"a": a, "b": b}, {"a": a0, "b": b0}
    plain = paired_gain(*tasks, weights, random())
    assert paired_gain(*tasks, weights, random(), {}) == plain
    assert paired_gain(*tasks, weights, random(), {"b": np.arange(50)[::-1]}).p_value == (
        pytest.approx(plain.p_value)
    )


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
    for seed in range(100):
        draw = random(seed)
        ours, theirs = {"a": scores(draw.random(11))}, {"a": scores(draw.random(11))}
        values.append(paired_gain(ours, theirs, ONE, draw).p_value)
    assert 0.01 <= np.mean(np.array(values) < 0.1) <= 0.16
    assert min(values) > 0


def test_a_large_gain_of_partial_scores_has_a_small_p_value() -> None:
    ours, theirs = {"a": scores([0.9] * 20)}, {"a": scores([0.3] * 20)}
    gain = paired_gain(ours, theirs, ONE, random())
    assert gain.p_value == pytest.approx(2 / 2**20)  # all of them one way


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
    tails = {
        int(m): np.cumsum([math.comb(m, k) / 2**m for k in range(m, -1, -1)])[::-1]
        for m in set(discordant.tolist())
    }
    found = [tails[m][w] < 0.05 for m, w in zip(discordant.tolist(), wins.tolist(), strict=True)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_more_examples_fewer_looks_or_less_disagreement_show_smaller_gains() -> None:
    gain = detectable_gain(500, 0.05)
    assert detectable_gain(2000, 0.05) == pytest.approx(gain / 2)
    assert detectable_gain(500, 0.01) > gain
    assert detectable_gain(500, 0.05, discordance=0.05) == pytest.approx(gain / 2)
    assert detectable_gain(500, 0.05, power=0.9) > gain


def test_a_task_without_a_weight_is_no_part_of_any_estimate() -> None:
    (a, a0), (b, b0) = pair(5, 0), pair(0, 40)
    weights = {"a": 1.0, "b": 0.0}
    alone = paired_gain({"a": a}, {"a": a0}, ONE, random())
    assert paired_gain({"a": a, "b": b}, {"a": a0, "b": b0}, weights, random()) == alone
    both = {"a": a, "b": b}
    assert score_estimate(both, weights).value == pytest.approx(a.mean)
    assert score_estimate(both, weights).interval == pytest.approx(wilson(a.mean, len(a)).interval)
