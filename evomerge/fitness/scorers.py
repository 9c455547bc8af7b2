"""Scorers: how the items of a task are asked of a live model, and what comes of it.

A search climbs the mean score. The log-likelihood of the reference answer only shapes what an
optimizer climbs, where every score is still 0.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import numpy as np
from pydantic import BeforeValidator, Discriminator, Field

from evomerge.engine import Engine, Generation, Likelihood, Reply
from evomerge.errors import TaskError
from evomerge.fitness.example import Example, Verdict
from evomerge.fitness.graders import AnyGrader, Grade, Grader
from evomerge.fitness.graders.grader import Kind, by_name, named
from evomerge.fitness.graders.text import ExactMatch
from evomerge.messages import one_line

# Nats: a token that the model gives less than 5% is as wrong as can be. Without a floor a model
# that guesses evenly looks better than one that is half right and sure of the other half, and a
# search settles there.
_FLOOR = -3.0

# Of an item that does not fit into the model's context.
_OVERLONG = Verdict(0.0, _FLOOR, overlong=True)


class Scorer(Protocol):
    """Asks a live model and judges what it says."""

    @property
    def generates(self) -> bool:
        """Whether replies are written, which alone have lengths."""
        ...

    def judge(self, engine: Engine, items: Sequence[Example], shaped: bool) -> list[Verdict]:
        """Of each item. shaped: also take the log-likelihood of the reference answers. Raises
        BrokenModel, and ModelError where the model lacks what the task needs."""
        ...


@dataclass(frozen=True)
class Generated:
    """Replies that are written and graded."""

    how: Generation
    grader: Grader
    generates: bool = True

    def judge(self, engine: Engine, items: Sequence[Example], shaped: bool) -> list[Verdict]:
        """See Scorer. An item without an answer that could be right by itself has no shaping."""
        replies = engine.generate([item.prompt for item in items], self.how)
        fitting = [
            (reply.text, item)
            for item, of in zip(items, replies, strict=True)
            if not _overlong(of)
            for reply in of
        ]
        grades = iter(self.grader.grades(fitting))
        shaping = self._shaping(engine, items) if shaped else [0.0] * len(items)
        return [
            self._verdict(item, of, value, grades)
            for item, of, value in zip(items, replies, shaping, strict=True)
        ]

    def _verdict(
        self, item: Example, replies: tuple[Reply, ...], shaping: float, grades: Iterator[Grade]
    ) -> Verdict:
        """grades: of the replies from here on, those of overlong items left out."""
        if _overlong(replies):
            return Verdict(0.0, shaping, overlong=True)
        own = [next(grades) for _ in replies]
        texts = tuple(reply.text for reply in replies)
        failure = next((grade.failure for grade in own if grade.failure), None)
        try:
            score = self.grader.combined(item, texts, own)
        except Exception as error:  # see Grader: it is the item's alone
            score, failure = 0.0, failure or one_line(error)
        return Verdict(
            score,
            shaping,
            any(reply.truncated for reply in replies),
            round(sum(reply.tokens for reply in replies) / len(replies)),
            failure=failure,
            replies=texts,
        )

    def _shaping(self, engine: Engine, items: Sequence[Example]) -> list[float]:
        answers = [self._reference(item) for item in items]
        asked = [(item.prompt, a) for item, a in zip(items, answers, strict=True) if a]
        found = iter(engine.likelihoods(asked) if asked else [])
        return [_shape(next(found)) if answer else 0.0 for answer in answers]

    def _reference(self, item: Example) -> str:
        """A reply that is right; '' where none is known."""
        known = item.reference or item.target
        return known if known != item.target or self.grader.target_is_reply else ""


def _overlong(replies: Sequence[Reply]) -> bool:
    return any(reply.overlong for reply in replies)


@dataclass(frozen=True)
class TeacherForced:
    """One forward over prompt, target and end of sequence: 1 where greedy generation would write
    exactly that."""

    generates: bool = False

    def judge(self, engine: Engine, items: Sequence[Example], shaped: bool) -> list[Verdict]:
        """See Scorer."""
        found = engine.likelihoods([(item.prompt, item.target) for item in items])
        return [_OVERLONG if of.overlong else Verdict(float(of.greedy), _shape(of)) for of in found]


class MultipleChoice(Kind):
    """1 if of an item's choices the right one is the most likely to follow the prompt, of equally
    likely ones the first, as lm-eval's acc and acc_norm."""

    kind: Literal["multiple_choice"] = "multiple_choice"
    choices: str | tuple[str, ...] = Field(
        description="Jinja over a record's fields that gives a list, or a list of Jinja texts."
    )
    answer: str = Field(
        "{{ answer }}",
        description="Jinja: which choice is right: its index from 0, its letter, or its text.",
    )
    delimiter: str = Field(
        " ", description="Between the prompt and a choice; nothing, in a conversation."
    )
    normalized: bool = Field(
        False, description="Divide a choice's log-likelihood by its number of characters."
    )

    @property
    def generates(self) -> bool:
        """See Scorer."""
        return False

    def judge(self, engine: Engine, items: Sequence[Example], shaped: bool) -> list[Verdict]:
        """See Scorer. The reference answer is the right choice."""
        found = iter(
            engine.likelihoods(
                [(item.prompt, answer) for item in items for answer in self._answers(item)],
                ended=False,
            )
        )
        return [self._verdict(item, [next(found) for _ in item.choices]) for item in items]

    def _answers(self, item: Example) -> list[str]:
        delimiter = self.delimiter if isinstance(item.prompt, str) else ""
        return [delimiter + choice for choice in item.choices]

    def _verdict(self, item: Example, found: list[Likelihood]) -> Verdict:
        if any(of.overlong for of in found):
            return _OVERLONG
        if not all(of.token_log_likelihoods for of in found):
            return Verdict(0.0, _FLOOR, failure="multiple_choice: one of the choices has no tokens")
        lengths = [len(choice) if self.normalized else 1 for choice in item.choices]
        values = [of.log_likelihood / n for of, n in zip(found, lengths, strict=True)]
        return Verdict(float(np.argmax(values) == item.right), _shape(found[item.right]))


class Perplexity(Kind):
    """1 / perplexity of the target after the prompt: the exponential of the mean log-likelihood of
    its tokens, in (0, 1]."""

    kind: Literal["perplexity"] = "perplexity"

    @property
    def generates(self) -> bool:
        """See Scorer."""
        return False

    def judge(self, engine: Engine, items: Sequence[Example], shaped: bool) -> list[Verdict]:
        """See Scorer."""
        found = engine.likelihoods([(item.prompt, item.target) for item in items], ended=False)
        return [self._verdict(of) for of in found]

    def _verdict(self, found: Likelihood) -> Verdict:
        if found.overlong:
            return _OVERLONG
        if not found.token_log_likelihoods:
            return Verdict(0.0, _FLOOR, failure="perplexity: the target has no tokens")
        mean = found.log_likelihood / len(found.token_log_likelihoods)
        return Verdict(math.exp(mean), _shape(found))


# What `score` may be in a task file: a mapping, or the name alone of a kind without options.
_Named = Annotated[AnyGrader | MultipleChoice | Perplexity, Discriminator("kind")]
Score = Annotated[_Named, BeforeValidator(by_name, json_schema_input_type=str | _Named)]


def scorer_of(
    score: AnyGrader | MultipleChoice | Perplexity, how: Generation, forced: bool
) -> Scorer:
    """What a task file asks for. how: replies are written; forced: by one forward, over the target.

    Raises TaskError for what does not go together, or cannot work here.
    """
    if forced:
        if score != ExactMatch():
            raise TaskError(
                f"teacher_forced: it scores exact matches alone, not '{named(score)}': leave one "
                "of them out"
            )
        return TeacherForced()
    if isinstance(score, MultipleChoice | Perplexity):
        return score
    if score.least_samples > how.samples:
        raise TaskError(
            f"score: {named(score)}: k is {score.least_samples}, and generate.samples is "
            f"{how.samples}: ask for at least as many"
        )
    score.check()
    return Generated(how, score)


def _shape(found: Likelihood) -> float:
    return _FLOOR if found.overlong else shape(found.token_log_likelihoods)


def shape(token_log_likelihoods: Sequence[float]) -> float:
    """The mean over an answer's tokens, each not below -3 nats: in [-3, 0]."""
    return sum(max(_FLOOR, value) for value in token_log_likelihoods) / len(token_log_likelihoods)
