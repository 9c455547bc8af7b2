"""What the luck of the best of many is worth: by hand, and by simulation of what is promised."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evomerge.fitness.results import Scores
from evomerge.guard.estimates import Estimate, wilson
from evomerge.guard.selection import Sampled, Tried, bbc_cv
from tests.guard.test_estimates import ONE, holds, random, scores


def hits(right: int, n: int) -> Scores:
    return scores([1.0] * right + [0.0] * (n - right))


def on(examples: NDArray[np.integer], values: NDArray[np.bool_]) -> Scores:
    """Scores on these examples."""
    n, none = len(examples), np.zeros(len(examples), np.bool_)
    return Scores(
        examples.astype(np.uint32),
        values.astype(np.float32),
        np.zeros(n, np.float32),
        none,
        np.zeros(n, np.uint32),
        none,
    )


def tried(rows: list[Scores]) -> Tried:
    """Of models '0', '1' and so on, on one task."""
    found = Tried()
    for number, row in enumerate(rows):
        found.add(str(number), {"a": row}, ONE)
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(right=st.lists(st.integers(0, 30), min_size=1, max_size=40))
def test_a_shrunk_score_lies_between_the_population_and_the_raw_score(right: list[int]) -> None:
    found = tried([hits(k, 30) for k in right]).shrunk()
    means = np.array(right) / 30
    for number, mean in enumerate(means.tolist()):
        low, high = sorted((float(means.mean()), mean))
        assert low - 1e-9 <= found[str(number)] <= high + 1e-9


@settings(max_examples=30, deadline=None, derandomize=True)
@given(right=st.lists(st.integers(0, 30), min_size=2, max_size=30))
def test_shrinking_on_the_same_examples_changes_no_order(right: list[int]) -> None:
    found = list(tried([hits(k, 30) for k in right]).shrunk().values())
    order = np.argsort(right, kind="stable")
    assert (np.diff(np.array(found)[order]) >= -1e-12).all()


def test_a_score_on_fewer_examples_is_shrunk_further() -> None:
    order = random().permutation(100)
    rows = [on(order, np.arange(100) < k) for k in (30, 40, 50, 60, 70, 90)]
    rows.append(on(np.arange(100, 110), np.arange(10) < 9))
    found = tried(rows).shrunk()
    assert rows[5].mean == pytest.approx(rows[6].mean)
    assert 0.5 < found["6"] < found["5"] < 0.9


def test_what_noise_explains_is_all_luck() -> None:
    right = random().binomial(100, 0.5, size=500)
    assert right.max() > 62
    found = tried([hits(int(k), 100) for k in right]).shrunk()
    assert max(found.values()) == pytest.approx(0.5, abs=0.03)


def test_a_real_spread_is_kept() -> None:
    rows = [hits(k, 10_000) for k in (1000, 3000, 5000, 7000, 9000)]
    assert tried(rows).shrunk()["4"] == pytest.approx(0.9, abs=0.001)


def test_the_prior_is_that_of_the_time_when_a_candidate_was_proposed() -> None:
    """A search that climbs from 10% to 60% leaves the luck of its last candidates no spread to
    hide in."""
    draw, truth = random(), np.linspace(0.1, 0.6, 2000)
    right = draw.binomial(100, truth)
    best = int(right.argmax())
    found = tried([hits(int(k), 100) for k in right]).shrunk()
    assert right[best] / 100 - truth[best] > 0.1
    assert abs(found[str(best)] - truth[best]) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize(
    ("centre", "spread", "n", "least"),
    # Close to 100%, where the noise of the best is less than its neighbours', it stays too low.
    [(0.5, 0.1, 100, 0.9), (0.85, 0.05, 50, 0.6), (0.93, 0.03, 20, 0.9)],
)
def test_a_shrunk_score_is_close_to_the_truth_where_the_raw_one_is_not(
    centre: float, spread: float, n: int, least: float
) -> None:
    raw, bias, covered = [], [], []
    for seed in range(100):
        draw = random(seed)
        truth = np.clip(draw.normal(centre, spread, size=200), 0, 1)
        right = draw.binomial(n, truth)
        best = int(right.argmax())
        found = tried([hits(int(k), n) for k in right]).estimate(str(best))
        raw.append(right[best] / n - truth[best])
        bias.append(found.value - truth[best])
        covered.append(holds(found, float(truth[best])))
    assert np.mean(raw) > 0.03
    assert abs(np.mean(bias)) < 0.025
    assert np.mean(covered) > least


def test_the_luck_of_the_examples_is_taken_out_where_they_differ() -> None:
    """Generations that meet other examples: whoever met easy ones is no better for it."""
    draw, rows, easy = random(), [], []
    chances = np.linspace(0.05, 0.95, 60)
    for _ in range(40):
        examples = draw.permutation(60)[:15]
        for _ in range(12):
            rows.append(on(examples, draw.random(15) < chances[examples]))
            easy.append(chances[examples].mean())
    found = np.array(list(tried(rows).shrunk().values()))
    raw = np.array([row.mean for row in rows])
    assert np.corrcoef(raw, easy)[0, 1] > 0.4
    assert abs(np.corrcoef(found, easy)[0, 1]) < 0.25
    assert raw.max() > 0.85
    assert found.max() == pytest.approx(0.5, abs=0.05)


def test_a_lucky_start_in_a_race_is_luck() -> None:
    """All alike; the best on 10 examples go on to 40, where they are compared with the rest."""
    draw, rows = random(), []
    for _ in range(100):
        values, examples = draw.random((12, 40)) < 0.5, draw.permutation(60)[:40]
        ranks = np.argsort(np.argsort(-values[:, :10].mean(axis=1)))
        for row, rank in zip(values, ranks.tolist(), strict=True):
            n = 40 if rank < 5 else 10
            rows.append(on(examples[:n], row[:n]))
    found = tried(rows).shrunk()
    assert max(row.mean for row in rows) > 0.7
    assert max(found.values()) < 0.56
    assert np.mean(list(found.values())) == pytest.approx(0.5, abs=0.01)


def test_a_model_that_comes_again_counts_once_on_the_more_examples() -> None:
    found, rows = Tried(), [hits(10, 20), hits(12, 20), hits(8, 20)]
    for number, row in enumerate(rows):
        found.add(str(number), {"a": row}, ONE)
    before = found.shrunk()
    found.add("1", {"a": hits(20, 20)}, ONE)
    assert found.shrunk() == before
    found.add("1", {"a": hits(24, 40)}, ONE)
    assert list(found.shrunk()) == ["0", "1", "2"]
    assert found.estimate("1").interval[1] - found.estimate("1").interval[0] < 0.35
    assert "1" in found
    assert "3" not in found


def test_other_results_of_a_model_are_held_against_the_same_neighbours() -> None:
    rows = [hits(k, 20) for k in (2, 6, 10, 14, 18)]
    found = tried(rows)
    same = found.reconsidered("4", {"a": rows[4]}, ONE)
    assert same == found.estimate("4")
    more = found.reconsidered("4", {"a": hits(180, 200)}, ONE)
    assert same.value < more.value < 0.9  # more of it is known
    assert np.ptp(more.interval) < np.ptp(same.interval)


def test_the_interval_is_that_of_as_many_examples() -> None:
    found = tried([hits(k, 50) for k in (20, 25, 30)]).estimate("2")
    assert found == wilson(found.value, 50)


def test_tasks_are_weighed() -> None:
    found = Tried()
    for number, (a, b) in enumerate([(4, 40), (5, 50), (8, 30), (3, 60)]):
        found.add(str(number), {"a": hits(a, 10), "b": hits(b, 100)}, {"a": 1.0, "b": 0.0})
    alone = tried([hits(k, 10) for k in (4, 5, 8, 3)])
    assert found.shrunk() == pytest.approx(alone.shrunk())


def test_a_candidate_may_be_alone() -> None:
    assert tried([hits(3, 4)]).shrunk() == {"0": 0.75}
    assert tried([hits(4, 4)]).estimate("0") == wilson(1.0, 4)


def test_what_a_score_rests_on_is_as_many_examples_of_one_task() -> None:
    found = Sampled.of({"a": hits(4, 8)}, ONE)
    assert (found.value, found.examples, found.variance) == (0.5, 8, 0.25)
    tasks, weights = {"a": hits(4, 8), "b": hits(50, 100)}, {"a": 8.0, "b": 100.0}
    assert Sampled.of(tasks, weights).examples == pytest.approx(108)
    small = Sampled.of(tasks, {"a": 1.0, "b": 1.0})
    assert small.examples == pytest.approx(1 / (0.25 / 8 + 0.25 / 100))
    assert Sampled.of({"a": hits(8, 8)}, ONE).standard_error > 0.1  # never certain


def test_bbc_cv_takes_the_luck_out_of_pure_noise() -> None:
    values = []
    for seed in range(10):
        matrix = (random(seed).random((150, 100)) < 0.5).astype(np.float32)
        found = bbc_cv({"a": matrix}, ONE, random(seed))
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
    found = bbc_cv({"a": matrix}, ONE, random())
    assert found.value == pytest.approx(float(matrix[7].mean()), abs=0.01)
    assert holds(found, 0.9)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_bbc_cv_of_scores_that_are_all_alike_is_not_certain(score: float) -> None:
    found = bbc_cv({"a": np.full((4, 80), score, np.float32)}, ONE, random())
    assert found.value == score
    assert found.interval == pytest.approx(wilson(score, 80).interval)


def test_bbc_cv_is_deterministic_for_a_seed() -> None:
    matrix = (random().random((20, 30)) < 0.5).astype(np.float32)
    assert bbc_cv({"a": matrix}, ONE, random(1)) == bbc_cv({"a": matrix}, ONE, random(1))
    assert bbc_cv({"a": matrix}, ONE, random(1)) != bbc_cv({"a": matrix}, ONE, random(2))


def test_bbc_cv_judges_on_what_was_scored() -> None:
    """Rows that were scored on other examples each: neither choice nor score knows the rest."""
    draw = random()
    matrix = (draw.random((4, 300)) < np.array([[0.3], [0.4], [0.8], [0.5]])).astype(np.float32)
    matrix[0, :100], matrix[1, 100:200], matrix[2, 200:] = (np.nan,) * 3
    found = bbc_cv({"a": matrix}, ONE, random())
    assert found.value == pytest.approx(float(np.nanmean(matrix[2])), abs=0.02)
    matrix[2] = np.nan  # a row without a score is never chosen
    assert bbc_cv({"a": matrix}, ONE, random()).value == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("n", [1, 2])
def test_bbc_cv_claims_nothing_from_a_single_example(n: int) -> None:
    matrix = np.array([[0.0], [1.0]], np.float32)
    whole = np.concatenate([matrix, np.full((2, n - 1), np.nan, np.float32)], axis=1)
    assert bbc_cv({"a": whole}, ONE, random()) == Estimate(1.0, (0.0, 1.0))


def test_bbc_cv_weighs_tasks_whatever_is_known_of_each() -> None:
    """Of a small and a large task as many examples are left out: neither gains weight by it."""
    draw, weights = random(), {"a": 1.0, "b": 1.0, "c": 0.0}
    small = (draw.random((4, 100)) < 0.9).astype(np.float32)
    large = (draw.random((4, 1000)) < 0.5).astype(np.float32)
    for row in range(4):
        small[row, draw.permutation(100)[:40]] = np.nan
        large[row, draw.permutation(1000)[:40]] = np.nan
    tasks = {"a": small, "b": large, "c": np.zeros((4, 10), np.float32)}
    found = bbc_cv(tasks, weights, random())
    assert found.value == pytest.approx((np.nanmean(small) + np.nanmean(large)) / 2, abs=0.03)
    assert holds(found, 0.7)


def test_bbc_cv_gives_no_score_that_is_none() -> None:
    tasks = {"a": np.ones((3, 10), np.float32), "b": np.ones((3, 200), np.float32)}
    found = bbc_cv(tasks, {"a": 1.0, "b": 1.0}, random())
    assert (found.value, found.interval[1]) == (1.0, 1.0)
