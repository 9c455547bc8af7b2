"""Graders made of others: every aspect, any of k samples, the majority."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from evomerge.errors import TaskError
from evomerge.fitness.example import Example
from evomerge.fitness.graders import AnyGrader, Grade
from evomerge.fitness.graders.composed import AllOf, MajorityAtK, PassAtK
from evomerge.fitness.graders.numbers import LastNumber
from evomerge.fitness.graders.text import Contains, ExactMatch, TokenF1

ITEM = Example("", "18")


def pass_at(k: int, right: int, n: int) -> float:
    grades = [Grade(float(i < right)) for i in range(n)]
    return PassAtK(k=k, of=LastNumber()).combined(ITEM, [""] * n, grades)


def test_all_of_is_the_product_of_what_they_find() -> None:
    grader = AllOf(graders=(TokenF1(), Contains()))
    item = Example("", "eighteen dollars")
    grades = grader.grades(
        [("eighteen dollars", item), ("eighteen", item), ("eighteen dollars a day", item)]
    )
    assert [grade.worth for grade in grades] == pytest.approx([1, 0, 4 / 5])


def test_a_reply_that_one_aspect_fails_on_has_failed() -> None:
    grader = AllOf(graders=(ExactMatch(), LastNumber()))
    fine, broken = grader.grades([("18", ITEM), ("none", Example("", "none"))])
    assert fine == Grade(1.0)
    assert broken == Grade(0.0, "last_number: the target 'none' has no number")


def test_all_of_votes_by_its_first_aspect_that_can() -> None:
    grader = AllOf(graders=(TokenF1(), LastNumber()))
    assert grader.votes
    assert grader.vote("It is 18.0", ITEM) == "18"
    assert not AllOf(graders=(TokenF1(), Contains())).votes


@settings(max_examples=80, deadline=None, derandomize=True)
@given(n=st.integers(1, 9), right=st.integers(0, 9), k=st.integers(1, 9))
def test_pass_at_k_is_the_share_of_draws_of_k_that_hold_a_right_one(
    n: int, right: int, k: int
) -> None:
    right, k = min(right, n), min(k, n)
    draws = list(itertools.combinations([i < right for i in range(n)], k))
    assert pass_at(k, right, n) == pytest.approx(np.mean([any(draw) for draw in draws]))


def test_pass_at_k_neither_overflows_nor_cancels() -> None:
    exact = 1 - math.comb(9_990, 100) / math.comb(10_000, 100)
    assert pass_at(100, 10, 10_000) == pytest.approx(exact, rel=1e-12)
    assert 0 < pass_at(1, 1, 10_000) == pytest.approx(1e-4)


def test_a_reply_that_is_half_right_does_not_pass() -> None:
    grader = PassAtK(k=1, of=TokenF1())
    assert grader.combined(ITEM, ["", ""], [Grade(0.5), Grade(1.0)]) == 0.5


def majority(k: int, *replies: str) -> float:
    grader = MajorityAtK(k=k, of=LastNumber())
    grades = grader.grades([(reply, ITEM) for reply in replies])
    return grader.combined(ITEM, replies, grades)


def test_the_most_frequent_answer_counts() -> None:
    assert majority(3, "3", "It is 18", "18.0") == 1
    assert majority(3, "3", "18", "3.0") == 0
    assert majority(5, "3", "4", "5", "18", "十八") == 1


def test_of_equally_frequent_answers_the_earliest_counts() -> None:
    assert majority(2, "18", "3") == 1
    assert majority(2, "3", "18") == 0
    assert majority(5, "4", "18", "3", "3", "18") == 1


def test_only_the_first_k_replies_vote() -> None:
    assert majority(1, "18", "3", "3") == 1
    assert majority(3, "18", "3", "3") == 0


def test_replies_without_an_answer_do_not_vote() -> None:
    assert majority(4, "no idea", "no idea", "none", "18") == 1
    assert majority(2, "no idea", "none") == 0


def test_replies_that_could_not_be_graded_do_not_vote() -> None:
    grader = MajorityAtK(k=3, of=LastNumber())
    grades = [Grade(0, "broken"), Grade(0, "broken"), Grade(1.0)]
    assert grader.combined(ITEM, ["3", "3", "18"], grades) == 1


def test_a_majority_is_only_of_what_votes() -> None:
    with pytest.raises(ValidationError, match="'token_f1' finds no answer to vote on"):
        MajorityAtK(k=3, of=TokenF1())
    with pytest.raises(TaskError, match="'token_f1' finds no answer to vote on"):
        TokenF1().vote("", ITEM)


def test_the_replies_that_are_needed_are_known() -> None:
    assert PassAtK(k=8, of=LastNumber()).least_samples == 8
    assert MajorityAtK(k=4, of=LastNumber()).least_samples == 4
    assert LastNumber().least_samples == 1


def test_graders_over_samples_are_not_nested() -> None:
    inner = {"kind": "pass_at_k", "k": 1, "of": "last_number"}
    for outer in (
        {"kind": "all_of", "graders": ["last_number", inner]},
        {"kind": "pass_at_k", "k": 1, "of": inner},
    ):
        with pytest.raises(ValidationError):
            TypeAdapter(AnyGrader).validate_python(outer)


def test_what_is_written_out_tells_kinds_apart() -> None:
    written = [
        grader.model_dump(mode="json", exclude_defaults=True)
        for grader in (LastNumber(), Contains(), PassAtK(k=1, of=LastNumber()))
    ]
    assert written == [
        {"kind": "last_number"},
        {"kind": "contains"},
        {"kind": "pass_at_k", "k": 1, "of": {"kind": "last_number"}},
    ]
