"""Results: means, standard errors, fitness, and parts put together and taken apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.fitness.results import Scored, Scores, troubles, weighted_mean


def scores(values: list[float], shaping: list[float] | None = None, first: int = 0) -> Scores:
    n = len(values)
    return Scores(
        np.arange(first, first + n, dtype=np.uint32),
        np.array(values, np.float32),
        np.array(shaping or [0.0] * n, np.float32),
        np.array([value == 0 for value in values]),
        np.arange(first, first + n, dtype=np.uint32) % 7,
        np.array([value == 1 for value in values]),
        {first + at: f"reason {at}" for at, value in enumerate(values) if value == 0},
    )


@pytest.mark.parametrize(
    ("values", "mean", "error"),
    [
        ([1, 0, 1, 1], 0.75, 0.25),  # variance 3/12 with n - 1; 0.5 / sqrt(4)
        ([0.5, 0.5], 0.5, 0.0),
        ([1], 1.0, 0.0),
        ([0, 1], 0.5, 0.5),
    ],
)
def test_mean_and_standard_error(values: list[float], mean: float, error: float) -> None:
    assert scores(values).mean == pytest.approx(mean)
    assert scores(values).standard_error == pytest.approx(error)


def test_a_mean_of_many_is_taken_in_double_precision() -> None:
    assert scores([0.1] * 10_000).mean == pytest.approx(float(np.float32(0.1)), abs=1e-12)


def test_fitness_is_the_score_plus_the_shaping_share_of_the_log_likelihood() -> None:
    part = scores([1, 0], [-1.0, -3.0])
    assert part.fitness(0.05) == pytest.approx(0.5 - 0.05 * 2.0)
    assert part.fitness(0.0) == part.mean


def test_only_gives_the_asked_examples_in_the_asked_order() -> None:
    all_of_them = scores([0.0, 0.25, 0.5, 0.75], [-1, -2, -3, -4], first=10)
    some = all_of_them.only(np.array([13, 10], np.uint32))
    assert some.examples.tolist() == [13, 10]
    assert some.scores.tolist() == [0.75, 0.0]
    assert some.shaping.tolist() == [-4, -1]
    assert some.truncated.tolist() == [False, True]
    assert some.tokens.tolist() == [6, 3]
    assert some.failures == {10: "reason 0"}


def test_only_refuses_an_example_that_was_not_scored() -> None:
    with pytest.raises(KeyError):
        scores([1, 0]).only(np.array([0, 2], np.uint32))


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(0, 1, width=32), min_size=2, max_size=20), cut=st.integers(1, 19))
def test_parts_joined_are_the_whole(values: list[float], cut: int) -> None:
    cut = min(cut, len(values) - 1)
    whole = scores(values)
    joined = Scores.joined([scores(values[:cut]), scores(values[cut:], first=cut)])
    assert len(joined) == len(whole)
    for field in ("examples", "scores", "shaping", "truncated", "tokens"):
        assert np.array_equal(getattr(joined, field), getattr(whole, field))


def test_an_evaluation_weighs_its_tasks_not_their_examples() -> None:
    found = Scored({"a": scores([1, 1, 1, 0]), "b": scores([0])}, 0.1, 0.2)
    weights = {"a": 1.0, "b": 3.0, "elsewhere": 5.0}
    assert found.score(weights) == pytest.approx(0.75 / 4)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(0.01, 10)), min_size=1, max_size=5),
    st.floats(0.1, 10),
)
def test_a_weighted_mean_lies_among_its_values_whatever_the_scale_of_the_weights(
    pairs: list[tuple[float, float]], scale: float
) -> None:
    values = {str(i): value for i, (value, _) in enumerate(pairs)}
    weights = {str(i): weight for i, (_, weight) in enumerate(pairs)}
    mean = weighted_mean(values, weights)
    assert min(values.values()) - 1e-9 <= mean <= max(values.values()) + 1e-9
    scaled = {key: weight * scale for key, weight in weights.items()}
    assert weighted_mean(values, scaled) == pytest.approx(mean)


def test_troubles_count_what_was_not_asked_or_not_graded() -> None:
    found = troubles({"fine": scores([0.5]), "a": scores([0, 0, 1], first=4)})
    assert found == [
        "1 of 3 examples of 'a' do not fit into the model's context and score 0",
        "2 of 3 examples of 'a' have a reply that cannot be graded and counts 0, the first, "
        "number 5: reason 0",
    ]


def test_void_is_where_nothing_was_asked_or_graded() -> None:
    assert scores([0, 1, 0]).void  # failed, overlong, failed
    assert not scores([0, 0.5, 1]).void
