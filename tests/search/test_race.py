"""Races: who meets on which examples, who goes on, what is told."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.search.race import Race, Values, draw, order, told

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


@pytest.mark.slow
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


class Run:
    """A race on drawn scores, (candidates, stages); NaN is a failure. after: by (candidate, stage),
    how much was under way when it was sent there, by stage."""

    def __init__(self, scores: Values, keep: Sequence[int]) -> None:
        self.scores = scores
        self.race = Race([*range(len(scores))], keep, self.values)
        self.under_way = self.race.begin()
        self.landed: list[tuple[int, int]] = []

    def values(self, entrants: Sequence[int], stages: int) -> Values:
        return self.scores[list(entrants), stages - 1]

    def land(self, at: int) -> list[tuple[int, int]]:
        entrant, stage = self.under_way.pop(at)
        self.landed.append((entrant, stage))
        scored = bool(np.isfinite(self.scores[entrant, stage]).all())
        sent = self.race.landed(entrant, stage, scored)
        self.under_way += sent
        return sent


def barrier(scores: Values, keep: Sequence[int]) -> set[tuple[int, int]]:
    """Who is scored in which stage where each stage waits for all of the one before."""
    racing, met = [*range(len(scores))], set()
    for stage in range(len(keep) + 1):
        met |= {(entrant, stage) for entrant in racing}
        racing = [e for e in racing if np.isfinite(scores[e, stage]).all()]
        if stage < len(keep):
            kept = order(scores[racing, stage])[: keep[stage]]
            racing = [racing[i] for i in sorted(kept)]
    return met


@st.composite
def races(draw: st.DrawFn) -> tuple[Values, list[int]]:
    keep = sorted(draw(st.lists(st.integers(1, 6), max_size=3)), reverse=True)
    size, several = draw(st.integers(1, 8)), draw(st.booleans())
    score = st.sampled_from([0.0, 0.25, 0.5, 0.75, np.nan])
    columns = 2 if several else 1
    row = st.lists(
        st.lists(score, min_size=columns, max_size=columns),
        min_size=len(keep) + 1,
        max_size=len(keep) + 1,
    )
    found = np.array(draw(st.lists(row, min_size=size, max_size=size)))
    return (found if several else found[:, :, 0]), keep


@settings(derandomize=True, deadline=None)
@given(races(), st.data())
def test_whoever_lands_first_the_same_go_on_to_the_same_stages(
    drawn: tuple[Values, list[int]], data: st.DataObject
) -> None:
    scores, keep = drawn
    run = Run(scores, keep)
    while run.under_way:
        assert not run.race.is_over
        landed, of = run.race.progress
        assert landed < of
        run.land(data.draw(st.integers(0, len(run.under_way) - 1)))
    assert run.race.is_over
    assert len(run.landed) == len(set(run.landed))
    assert set(run.landed) == barrier(scores, keep)
    assert run.race.reached == dict(sorted(run.landed))
    ends = [np.isfinite(scores[e, -1]).all() for e, stage in run.landed if stage == len(keep)]
    assert run.race.is_lost == (not any(ends))


def test_whoever_is_sure_to_go_on_does_not_wait_for_the_others() -> None:
    scores = np.array([[0.1, 0.0], [0.9, 0.0], [0.5, 0.0], [0.2, 0.0]])
    run = Run(scores, [2])
    assert run.land(1) == []  # three others may be better
    assert run.land(1) == []
    assert run.land(1) == [(1, 1)]  # the best of three, where two of four go on
    assert run.land(0) == [(2, 1)]


def test_a_failure_makes_room_for_nobody_it_only_shortens_the_wait() -> None:
    scores = np.array([[0.1, 0.1, 0.0], [np.nan, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.2, 0.0]])
    run = Run(scores, [4, 1])
    assert run.land(0) == [(0, 1)]  # as many go on as there are
    run.land(1)
    run.land(1)
    assert run.under_way == [(1, 0), (0, 1), (2, 1), (3, 1)]
    assert [run.land(1), run.land(1), run.land(1)] == [[], [], []]  # the fourth may beat them
    assert run.land(0) == [(2, 2)]  # it failed: it meets nobody there


def test_of_several_objectives_all_wait_for_all() -> None:
    scores = np.array([[[0.9, 0.9], [0.0, 0.0]], [[0.1, 0.1], [0.0, 0.0]], [[0.2, 0.1], [0, 0]]])
    run = Run(scores, [2])
    assert [run.land(0), run.land(0)] == [[], []]
    assert run.land(0) == [(0, 1), (2, 1)]
