"""Races: who meets on which examples, who goes on, what is told."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.search.race import draw, order, told

DRIVING = {"a": np.arange(0, 100, 2, dtype=np.uint32), "b": np.arange(30, dtype=np.uint32)}


def test_stages_add_examples_of_every_task_and_repeat_none() -> None:
    first, second, third = draw(DRIVING, (5, 10, 20), seed=1, generation=3)
    for task, driving in DRIVING.items():
        parts = [first[task], second[task], third[task]]
        assert [len(part) for part in parts] == [5, 5, 10]
        joined = np.concatenate(parts)
        assert len(set(joined.tolist())) == 20
        assert set(joined.tolist()) <= set(driving.tolist())


def test_each_generation_meets_on_other_examples_and_a_seed_fixes_them() -> None:
    def drawn(seed: int, generation: int) -> list[int]:
        return draw(DRIVING, (20,), seed, generation)[0]["a"].tolist()

    assert drawn(1, 3) == drawn(1, 3)
    assert drawn(1, 3) != drawn(1, 4)
    assert drawn(1, 3) != drawn(2, 3)


def test_tasks_are_drawn_apart() -> None:
    twice = {"a": DRIVING["a"], "b": DRIVING["a"]}
    (stage,) = draw(twice, (20,), seed=1, generation=1)
    assert stage["a"].tolist() != stage["b"].tolist()


def test_the_best_come_first_and_equal_ones_keep_their_places() -> None:
    assert order(np.array([0.1, 0.5, 0.3, 0.5])) == [1, 3, 2, 0]


def test_of_several_objectives_the_undominated_come_first() -> None:
    values = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.4, 0.4], [0.0, 1.0]])
    assert order(values) == [1, 2, 4, 3, 0]


def test_a_lucky_start_is_not_told_above_those_who_went_on() -> None:
    reached = np.array([0, 2, 1, 2, 0])
    found = told(reached, np.array([0.9, 0.5, 0.7, 0.4, 0.1]))
    assert found[[1, 3]].tolist() == [0.5, 0.4]
    assert found[2] == pytest.approx(0.4)
    assert found[2] < 0.4
    assert found[0] < found[2]
    assert found[4] == 0.1


@settings(derandomize=True, deadline=None)
@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, 3), min_size=n, max_size=n),
            st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=n, max_size=n),
        )
    ),
    st.booleans(),
)
def test_told_values_are_in_the_order_of_the_race(
    drawn: tuple[list[int], list[tuple[float, float]]], several: bool
) -> None:
    reached, values = np.array(drawn[0]), np.array(drawn[1])
    if not several:
        values = values[:, 0]
    found = told(reached, values)
    assert found.shape == values.shape
    assert (found <= values).all()
    for i in range(len(reached)):
        for j in range(len(reached)):
            if reached[i] > reached[j]:
                assert (found[i] > found[j]).all()
            elif reached[i] == reached[j]:
                assert ((found[i] > found[j]) | (values[i] <= values[j])).all()
    last = reached == reached.max()
    assert (found[last] == values[last]).all()
