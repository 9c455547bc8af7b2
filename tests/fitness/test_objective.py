"""Objectives: what each gives of known scores, what jobs are refused, how constraints rank."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import JobError
from evomerge.fitness.objective import Objective, Size, merit
from evomerge.fitness.results import Scored, Scores
from evomerge.guard.pareto import front
from evomerge.job import Job

WEIGHTS = {"a": 3.0, "b": 1.0, "c": 0.0}
SIZE = Size(layers=24, parameters=1_000)


def job(**keys: Any) -> Job:
    return Job.from_dict(
        {
            "name": "test",
            "parents": {"x": {"model": "x"}, "y": {"model": "y"}},
            "base": {"model": "z"},
            "space": {"kind": "weight", "method": "linear", "per": "model", "weight": [0, 1]},
            "tasks": [{"task": name} for name in WEIGHTS],
            "budget": {"candidates": 1},
            "shaping": 0.1,
            **keys,
        },
        "job",
    )


def objective(
    weights: dict[str, float] = WEIGHTS, generating: tuple[str, ...] = ("a", "b"), **keys: Any
) -> Objective:
    return Objective.from_job(job(**keys), weights, generating)


def part(
    values: list[float], shaping: float = 0.0, tokens: int = 0, examples: list[int] | None = None
) -> Scores:
    n = len(values)
    return Scores(
        np.arange(n, dtype=np.uint32) if examples is None else np.array(examples, np.uint32),
        np.array(values, np.float32),
        np.full(n, shaping, np.float32),
        np.zeros(n, np.bool_),
        np.full(n, tokens, np.uint32),
        np.zeros(n, np.bool_),
    )


def scored(**tasks: Scores) -> Scored:
    return Scored(tasks, 0.0, 0.0)


CANDIDATE = scored(
    a=part([1, 1, 0, 0], -1.0, tokens=10),
    b=part([1, 0], -2.0, tokens=30),
    c=part([1], -3.0, tokens=500),
)
WORSE_ON_B = scored(a=part([1, 1]), b=part([0, 1, 0, 0]), c=part([0]))


def test_the_mean_is_weighed() -> None:
    found = objective()
    assert found.score(CANDIDATE) == pytest.approx(0.5)
    assert found.fitness(CANDIDATE) == pytest.approx(0.5 - 0.1 * (3 * 1 + 1 * 2) / 4)
    assert found.values(CANDIDATE) == (found.fitness(CANDIDATE),)
    assert found.values(CANDIDATE, shaped=False) == (found.score(CANDIDATE),)


def test_the_worst_task_counts_alone_and_none_without_a_weight_does() -> None:
    found = objective(objective="worst")
    assert found.score(WORSE_ON_B) == 0.25  # c is 0, but has no weight
    assert found.shares(WORSE_ON_B) == {"a": 0.0, "b": 1.0, "c": 0.0}
    assert found.score(CANDIDATE) == 0.5
    assert found.fitness(CANDIDATE) == pytest.approx(0.5 - 0.1 * 2)


SOURCES = {
    "x": scored(a=part([1, 0, 0, 0]), b=part([0, 0, 0, 0, 0, 0, 0, 0, 0, 0.5]), c=part([1])),
    "y": scored(a=part([1, 1, 1, 0]), b=part([0]), c=part([1])),
    "base": scored(a=part([0]), b=part([0]), c=part([0])),
    "uniform average": scored(a=part([1]), b=part([1]), c=part([1])),  # no source model
}


def test_a_share_of_the_best_source_is_taken_task_by_task() -> None:
    found = objective(objective="relative").against(SOURCES)
    # a: 0.75 of y; b: at most 0.05 of x, which counts as 0.1
    assert found.score(CANDIDATE) == pytest.approx((3 * 0.5 / 0.75 + 1 * 0.5 / 0.1) / 4)
    shaped = (3 * (0.5 - 0.1) / 0.75 + 1 * (0.5 - 0.2) / 0.1) / 4
    assert found.fitness(CANDIDATE) == pytest.approx(shaped)


@pytest.mark.parametrize("kind", ["mean", "worst", "relative"])
def test_the_shares_give_the_score_up_to_a_factor(kind: str) -> None:
    found = objective(objective=kind).against(SOURCES)
    other = scored(a=part([1, 0, 0]), b=part([1, 1]), c=part([0]))
    ratios = [found.score(s) / s.score(found.shares(s)) for s in (CANDIDATE, other)]
    assert ratios[0] == pytest.approx(ratios[1])


def test_what_compares_with_sources_says_that_they_are_missing() -> None:
    with pytest.raises(ValueError, match="not known yet"):
        objective(objective="relative").fitness(CANDIDATE)
    with pytest.raises(ValueError, match="'base' are not known yet"):
        objective(constraints=[{"task": "a"}]).violation(CANDIDATE)


def test_several_objectives_come_in_the_jobs_order_with_costs_negated() -> None:
    names = ["length", "task:c", "score", "layers", "latency", "parameters"]
    found = objective(objective="pareto", objectives=names)
    assert found.needs_size
    # c does not generate: its tokens are no reply's
    plain = (-20.0, 1.0, 0.5, -24.0, -20_000.0, -1_000.0)
    assert found.values(CANDIDATE, SIZE, shaped=False) == pytest.approx(plain)
    shaped = (-20.0, 1.0 - 0.3, 0.5 - 0.125, -24.0, -20_000.0, -1_000.0)
    assert found.values(CANDIDATE, SIZE) == pytest.approx(shaped)
    assert found.fitness(CANDIDATE) == objective().fitness(CANDIDATE)


def test_a_size_is_asked_for_only_where_it_counts() -> None:
    found = objective(objective="pareto", objectives=["score", "length"])
    assert not found.needs_size
    assert len(found.values(CANDIDATE)) == 2
    with pytest.raises(ValueError, match="'layers' needs the size"):
        objective(objective="pareto", objectives=["score", "layers"]).values(CANDIDATE)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"objective": "pareto", "objectives": ["score", "task:d"]},
            "'task:d' is unknown: did you mean 'task:",
        ),
        (
            {"constraints": [{"task": "a"}, {"task": "d"}]},
            r"constraints\[1\].task: 'd' is unknown: known: a, b, c",
        ),
        (
            {"objective": "pareto", "objectives": ["score", "length"], "generating": ()},
            "'length': every task is teacher-forced.*set teacher_forced: false",
        ),
        (
            {"objective": "pareto", "objectives": ["score", "latency"], "generating": ()},
            "'latency': every task is teacher-forced",
        ),
    ],
)
def test_what_these_tasks_cannot_give_is_refused_in_one_line(
    keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(JobError, match=words) as raised:
        objective(**keys)
    assert "\n" not in str(raised.value)


REFERENCE = {
    name: scored(a=part([1, 1, 1, 0, 0, 0]), b=part([1] * 6), c=part([0] * 6))
    for name in ("x", "y", "base")
}


def test_a_constraint_is_held_on_the_examples_of_the_candidate() -> None:
    found = objective(constraints=[{"task": "a", "drop": 0.25}]).against(REFERENCE)
    rest = {"b": part([0]), "c": part([0])}
    # On 3, 4 and 5 the base scores 0, on 0 and 1 it scores 1, on all of them 0.5.
    assert found.violation(scored(a=part([0, 0, 0], examples=[3, 4, 5]), **rest)) == 0.0
    assert found.violation(scored(a=part([1, 0], examples=[1, 0]), **rest)) == 0.25
    assert found.violation(scored(a=part([0, 1, 0, 0, 0, 0]), **rest)) == pytest.approx(1 / 12)
    assert found.violation(scored(a=part([1] * 6), **rest)) == 0.0


def test_violations_add_up_and_one_kept_well_makes_up_for_none() -> None:
    constraints = [{"task": "a", "of": "x"}, {"task": "b", "of": "y"}, {"task": "c"}]
    found = objective(constraints=constraints).against(REFERENCE)
    broken = scored(a=part([0] * 6), b=part([1, 1, 1, 0, 0, 0]), c=part([1] * 6))
    assert found.violation(broken) == pytest.approx(0.5 + 0.5)


def test_a_drop_to_the_last_digit_is_kept() -> None:
    reference = {name: scored(a=part([0.8] * 3)) for name in ("x", "y", "base")}
    found = objective({"a": 1.0}, constraints=[{"task": "a", "drop": 0.1}]).against(reference)
    assert found.violation(scored(a=part([0.7] * 3))) == 0.0
    assert found.violation(scored(a=part([0.6999] * 3))) == pytest.approx(0.0001, rel=1e-2)


def test_without_constraints_nothing_is_violated() -> None:
    assert objective().violation(CANDIDATE) == 0.0


def test_the_merit_of_one_objective_is_a_plain_list() -> None:
    found = merit([(0.5,), None, (0.9,), (-0.1,), (0.7,)], [0, 0, 0.3, 0, 0.1], 1)
    assert found.shape == (5,)
    assert found[[0, 3]].tolist() == [0.5, -0.1]
    assert np.argsort(-found).tolist() == [0, 3, 4, 2, 1]


def test_nothing_scored_is_nothing_but_worst() -> None:
    found = merit([None, None], [0.0, 0.0], 1)
    assert found.shape == (2,)
    assert found[0] == found[1] < merit([(-1e6,)], [9.0], 1)[0]
    assert merit([None, None], [0.0, 0.0], 3).shape == (2, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_ranks_as_if_it_had_failed(bad: float) -> None:
    found = merit([(0.5, bad), (0.1, -3.0), None, (0.5, 0.5)], [0, 0, 0, bad], 2)
    assert np.isfinite(found).all()
    assert found[0].tolist() == found[2].tolist() == found[3].tolist()
    assert found[1].tolist() == [0.1, -3.0]


NUMBERS = st.floats(-1e15, 1e15)
CANDIDATES = st.lists(
    st.tuples(
        st.none() | st.tuples(NUMBERS, NUMBERS),
        st.just(0.0) | st.integers(1, 999).map(lambda n: n / 100),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(CANDIDATES)
def test_who_breaks_less_dominates_and_all_dominate_who_failed(
    candidates: list[tuple[tuple[float, float] | None, float]],
) -> None:
    found = merit([values for values, _ in candidates], [broken for _, broken in candidates], 2)
    assert found.shape == (len(candidates), 2)
    assert np.isfinite(found).all()
    for (values, broken), row in zip(candidates, found, strict=True):
        if values is not None and broken == 0:
            assert row.tolist() == list(values)
        for (others, breaks), other in zip(candidates, found, strict=True):
            level = np.inf if values is None else broken
            beyond = np.inf if others is None else breaks
            if level < beyond:
                assert (row > other).all()
            elif level == beyond > 0:
                assert (row == other).all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(CANDIDATES)
def test_a_front_holds_no_violator_where_somebody_holds_the_constraints(
    candidates: list[tuple[tuple[float, float] | None, float]],
) -> None:
    found = merit([values for values, _ in candidates], [broken for _, broken in candidates], 2)
    feasible = {i for i, (values, broken) in enumerate(candidates) if values and broken == 0}
    if feasible:
        assert set(front(found).tolist()) <= feasible
