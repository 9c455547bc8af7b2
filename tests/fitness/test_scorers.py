"""Scorers on a real live model: what is asked of it, and what each item's verdict is."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from evomerge.engine import Engine, Generation
from evomerge.engine.build import build
from evomerge.errors import TaskError
from evomerge.fitness.example import Example
from evomerge.fitness.graders import Grade
from evomerge.fitness.graders.numbers import LastNumber
from evomerge.fitness.graders.text import ExactMatch, Regex
from evomerge.fitness.scorers import (
    Generated,
    MultipleChoice,
    Perplexity,
    Score,
    Scorer,
    TeacherForced,
    scorer_of,
    shape,
)
from evomerge.fitness.task import Task
from evomerge.job import Engine as EngineSection
from evomerge.merge.checkpoint import Checkpoint
from evomerge.messages import explain
from evomerge.recipe import Recipe
from tests import tiny

OPS = str(tiny.ZOO / "ops-early")
HOW = Generation(8, ("\n",))
SAMPLED = Generation(8, ("\n",), samples=4, temperature=1.5, seed=1)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """A parent that knows half of its operations, live."""
    live = build(
        EngineSection(device="cpu", threads=1), {OPS: Checkpoint.open(tiny.ZOO / "ops-early")}, OPS
    )
    live.load(Recipe.from_dict({"merge_method": "passthrough", "models": [{"model": OPS}]}))
    yield live
    live.close()


@pytest.fixture(scope="module")
def items() -> tuple[Example, ...]:
    """Questions on operations, in the order of their file."""
    return Task.open(tiny.ROOT / "fitness" / "en_list_ops" / "task.yaml").examples("train")[:16]


@pytest.fixture(scope="module")
def overlong(items: tuple[Example, ...]) -> Example:
    """One whose prompt is longer than the model's context."""
    return replace(items[0], prompt=str(items[0].prompt) * 100)


def opened(score: Any, how: Generation = HOW, forced: bool = False) -> Scorer:
    """The scorer of what a task file says."""
    return scorer_of(TypeAdapter(Score).validate_python(score), how, forced)


def test_a_written_reply_is_graded_and_kept(engine: Engine, items: tuple[Example, ...]) -> None:
    verdicts = opened("exact_match").judge(engine, items, shaped=False)
    replies = [of[0] for of in engine.generate([item.prompt for item in items], HOW)]
    assert [verdict.replies for verdict in verdicts] == [(reply.text,) for reply in replies]
    right = [float(r.text == item.target) for r, item in zip(replies, items, strict=True)]
    assert [verdict.score for verdict in verdicts] == right
    assert 0 < sum(right) < len(right), "the parent can do all or nothing: this test shows little"
    assert [verdict.tokens for verdict in verdicts] == [reply.tokens for reply in replies]
    assert not any(verdict.shaping or verdict.failure for verdict in verdicts)


def test_an_item_that_does_not_fit_is_not_graded(
    engine: Engine, items: tuple[Example, ...], overlong: Example
) -> None:
    without_number = replace(overlong, target="none")  # which a grader would fail on
    chosen = [items[0], without_number, items[1]]
    for scorer in (Generated(HOW, LastNumber()), Generated(SAMPLED, LastNumber())):
        alone = scorer.judge(engine, [items[0], items[1]], shaped=True)
        first, second, third = scorer.judge(engine, chosen, shaped=True)
        assert (second.score, second.overlong, second.failure) == (0, True, None)
        assert (second.replies, second.tokens, second.shaping) == ((), 0, -3.0)
        assert [first.replies, third.replies] == [verdict.replies for verdict in alone]
        assert [first.score, third.score] == [verdict.score for verdict in alone]


def test_an_item_that_its_grader_fails_on_scores_0_and_the_others_go_on(
    engine: Engine, items: tuple[Example, ...]
) -> None:
    chosen = [items[0], replace(items[1], target="none"), items[2]]
    verdicts = Generated(HOW, LastNumber()).judge(engine, chosen, shaped=False)
    assert [verdict.failure for verdict in verdicts] == [
        None,
        "last_number: the target 'none' has no number",
        None,
    ]
    assert verdicts[1].score == 0
    assert verdicts[1].replies, "what the model wrote is kept"


class Torn(ExactMatch):
    """A grader whose replies cannot be taken together."""

    def combined(self, item: Example, replies: Sequence[str], grades: Sequence[Grade]) -> float:
        if item.target == "none":
            raise ValueError("no two\nagree")
        return super().combined(item, replies, grades)


def test_replies_that_cannot_be_taken_together_fail_their_item_alone(
    engine: Engine, items: tuple[Example, ...]
) -> None:
    chosen = [items[0], replace(items[1], target="none")]
    fine, torn = Generated(HOW, Torn()).judge(engine, chosen, shaped=False)
    assert (fine.score, fine.failure) == (1, None)
    assert (torn.score, torn.failure) == (0, "no two agree")


def test_several_replies_count_by_their_mean_or_as_their_grader_says(
    engine: Engine, items: tuple[Example, ...]
) -> None:
    every = opened("exact_match", SAMPLED).judge(engine, items, shaped=False)
    some = opened({"kind": "pass_at_k", "k": 4, "of": "exact_match"}, SAMPLED)
    most = opened({"kind": "majority_at_k", "k": 4, "of": "exact_match"}, SAMPLED)
    passes, majorities = (scorer.judge(engine, items, shaped=False) for scorer in (some, most))
    for item, one, any_, vote in zip(items, every, passes, majorities, strict=True):
        right = [reply == item.target for reply in one.replies]
        assert len(right) == 4
        assert one.replies == any_.replies == vote.replies
        assert one.score == np.mean(right)
        assert any_.score == any(right)
        if right.count(True) != 2:  # else the earliest decides among equals
            votes = max(one.replies.count(reply) for reply in one.replies)
            assert vote.score == float(one.replies.count(item.target) == votes) or votes == 1
    assert any(0 < verdict.score < 1 for verdict in every), "all samples alike: this shows little"


def test_replies_are_shaped_by_the_reference_and_else_by_the_target(
    engine: Engine, items: tuple[Example, ...]
) -> None:
    solved = replace(items[0], reference=f"{items[0].target} {items[0].target}")
    plain = replace(items[0], reference="")
    verdicts = Generated(HOW, ExactMatch()).judge(engine, [solved, plain], shaped=True)
    wanted = engine.likelihoods([(solved.prompt, solved.reference), (plain.prompt, plain.target)])
    expected = [shape(of.token_log_likelihoods) for of in wanted]
    assert [verdict.shaping for verdict in verdicts] == pytest.approx(expected, abs=1e-4)
    assert expected[0] != pytest.approx(expected[1], abs=0.01)


def test_an_item_is_not_shaped_without_a_reply_that_is_right(
    engine: Engine, items: tuple[Example, ...]
) -> None:
    refusals = Generated(HOW, Regex(pattern="sorry"))
    unknown = replace(items[0], target="false", reference="false")
    known = replace(items[0], target="false", reference="1 2")
    first, second = refusals.judge(engine, [unknown, known], shaped=True)
    assert (first.score, first.shaping) == (1, 0)
    assert second.shaping < 0
    (empty,) = Generated(HOW, ExactMatch()).judge(
        engine, [replace(items[0], target="", reference="")], shaped=True
    )
    assert empty.shaping == 0


def choosing(items: tuple[Example, ...]) -> list[Example]:
    """The right answer among others, longer and shorter, at any place."""
    made = []
    for at, item in enumerate(items):
        choices = [items[(at + i) % len(items)].target for i in range(1, 4)]
        choices = [choices[0], choices[1] + " 1 2 3", choices[2][:1]]
        choices.insert(at % 4, item.target)
        made.append(replace(item, choices=tuple(choices), right=at % 4))
    return made


@pytest.mark.parametrize("normalized", [False, True])
def test_the_most_likely_choice_counts(
    engine: Engine, items: tuple[Example, ...], normalized: bool
) -> None:
    scorer = opened({"kind": "multiple_choice", "choices": ["a"], "normalized": normalized})
    chosen = choosing(items)
    verdicts = scorer.judge(engine, chosen, shaped=True)
    assert not scorer.generates
    for item, verdict in zip(chosen, verdicts, strict=True):
        found = engine.likelihoods([(item.prompt, " " + c) for c in item.choices], ended=False)
        # As lm-eval's process_results of a multiple choice.
        values = np.array([of.log_likelihood for of in found])
        if normalized:
            values = values / np.array([float(len(choice)) for choice in item.choices])
        assert verdict.score == (1.0 if np.argmax(values) == item.right else 0.0)
        right = found[item.right].token_log_likelihoods
        assert verdict.shaping == pytest.approx(shape(right), abs=1e-4)
        assert (verdict.replies, verdict.tokens, verdict.truncated) == ((), 0, False)
    assert 0 < sum(verdict.score for verdict in verdicts) < len(verdicts)


def test_of_equally_likely_choices_the_first_counts(
    engine: Engine, items: tuple[Example, ...]
) -> None:
    scorer = opened({"kind": "multiple_choice", "choices": ["a"]})
    same = replace(items[0], choices=("1", "1"), right=0)
    verdicts = scorer.judge(engine, [same, replace(same, right=1)], shaped=False)
    assert [verdict.score for verdict in verdicts] == [1, 0]


def test_a_choice_follows_its_delimiter(engine: Engine, items: tuple[Example, ...]) -> None:
    chosen = [replace(items[0], choices=(items[0].target, "3"), right=0)]
    spaced, bare = (
        opened({"kind": "multiple_choice", "choices": ["a"], "delimiter": delimiter}).judge(
            engine, chosen, shaped=True
        )
        for delimiter in (" 9 ", "")
    )
    assert spaced[0].shaping != bare[0].shaping


def test_choices_that_do_not_fit_or_are_empty_are_told(
    engine: Engine, items: tuple[Example, ...], overlong: Example
) -> None:
    scorer = opened({"kind": "multiple_choice", "choices": ["a"], "normalized": True})
    long = replace(items[0], choices=("1", "1 2 " * 300), right=0)
    empty = replace(items[0], choices=("1", " "), right=0)
    fine = replace(items[0], choices=("1", "2"), right=0)
    verdicts = scorer.judge(
        engine, [replace(overlong, choices=("1", "2"), right=0), long, empty, fine], shaped=True
    )
    assert [verdict.overlong for verdict in verdicts] == [True, True, False, False]
    assert [verdict.failure is not None for verdict in verdicts] == [False, False, True, False]
    assert [verdict.score for verdict in verdicts[:3]] == [0, 0, 0]


def test_perplexity_is_of_the_target_without_its_end(
    engine: Engine, items: tuple[Example, ...], overlong: Example
) -> None:
    scorer = opened("perplexity")
    chosen = [*items, overlong, replace(items[0], target="")]
    *verdicts, long, empty = scorer.judge(engine, chosen, shaped=True)
    found = engine.likelihoods([(item.prompt, item.target) for item in items], ended=False)
    expected = [np.exp(np.mean(of.token_log_likelihoods)) for of in found]
    assert [verdict.score for verdict in verdicts] == pytest.approx(expected, rel=1e-4)
    assert all(0 < verdict.score <= 1 for verdict in verdicts)
    assert (long.score, long.overlong) == (0, True)
    assert (empty.score, empty.failure) == (0, "perplexity: the target has no tokens")


def test_one_forward_over_the_target_says_what_would_be_written(
    engine: Engine, items: tuple[Example, ...], overlong: Example
) -> None:
    scorer = opened("exact_match", forced=True)
    assert isinstance(scorer, TeacherForced)
    *verdicts, long = scorer.judge(engine, [*items, overlong], shaped=True)
    written = Generated(HOW, ExactMatch()).judge(engine, items, shaped=True)
    assert [verdict.score for verdict in verdicts] == [verdict.score for verdict in written]
    assert [v.shaping for v in verdicts] == pytest.approx([v.shaping for v in written], abs=1e-4)
    assert (long.score, long.overlong, long.shaping) == (0, True, -3.0)


def test_a_name_or_a_mapping_chooses_a_scorer() -> None:
    assert opened("last_number") == Generated(HOW, LastNumber())
    assert opened({"kind": "exact_match"}) == Generated(HOW, ExactMatch())
    assert isinstance(opened("perplexity"), Perplexity)
    choice = {"kind": "multiple_choice", "choices": "{{ choices }}"}
    assert isinstance(opened(choice), MultipleChoice)


class Scored(BaseModel):
    """A file with a score."""

    score: Score


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("exact_mach", "score.kind: 'exact_mach' is unknown: did you mean 'exact_match'?"),
        ("multiple", "score.kind: 'multiple' is unknown: did you mean 'multiple_choice'?"),
        (5, "score: 5: give keys and their values"),
        ({"ignore_case": True}, "score.kind: required, and missing"),
        ({"kind": "last_number", "ignore_case": True}, "score.ignore_case: unknown key"),
        ("regex", "score.pattern: required, and missing"),
        ({"kind": "regex", "pattern": "("}, "score.pattern: '(' is no regular expression"),
        ("language", "score.is: required, and missing"),
        ("multiple_choice", "score.choices: required, and missing"),
        ({"kind": "rouge_l", "by": "word"}, "score.by: 'word': input should be 'words' or"),
        (
            {"kind": "all_of", "graders": ["last_numbr", "contains"]},
            "score.graders[0].kind: 'last_numbr' is unknown: did you mean 'last_number'?",
        ),
        ({"kind": "all_of", "graders": ["contains"]}, "score.graders: 1 given: give at least 2"),
        (
            {"kind": "majority_at_k", "k": 3, "of": "rouge_l"},
            "score.of: 'rouge_l' finds no answer to vote on",
        ),
        ({"kind": "pass_at_k", "k": 0, "of": "contains"}, "score.k: 0: input should be greater"),
    ],
)
def test_a_score_that_is_written_wrong_is_told_with_its_key(score: Any, message: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        Scored(score=score)
    assert message in explain(refusal.value, Scored)


@pytest.mark.parametrize(
    ("score", "how", "forced", "message"),
    [
        (
            {"kind": "pass_at_k", "k": 8, "of": "last_number"},
            SAMPLED,
            False,
            "pass_at_k: k is 8, and generate.samples is 4",
        ),
        (
            {"kind": "majority_at_k", "k": 2, "of": "last_number"},
            HOW,
            False,
            "majority_at_k: k is 2, and generate.samples is 1",
        ),
        ("last_number", HOW, True, "teacher_forced: it scores exact matches alone"),
        ({"kind": "exact_match", "ignore_case": True}, HOW, True, "exact matches alone"),
        ("perplexity", HOW, True, "not 'perplexity'"),
        ({"kind": "installed", "name": "nobodys"}, HOW, False, "'nobodys' is unknown"),
        (
            {"kind": "all_of", "graders": ["last_number", {"kind": "language", "is": "jap"}]},
            HOW,
            False,
            "'jap' is unknown",
        ),
        (
            {"kind": "pass_at_k", "k": 1, "of": {"kind": "installed", "name": "nobodys"}},
            HOW,
            False,
            "'nobodys' is unknown",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_asked(
    score: Any, how: Generation, forced: bool, message: str
) -> None:
    with pytest.raises(TaskError) as refusal:
        opened(score, how, forced)
    assert message in str(refusal.value)


def test_a_library_that_is_missing_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("evomerge.fitness.graders.grader.find_spec", lambda module: None)
    for score in ("rouge_l", {"kind": "language", "is": "ja"}):
        with pytest.raises(TaskError, match=r"pip install 'evomerge\[tasks\]'"):
            opened(score)
