"""Graders made of others: of several aspects of a reply, and of several replies to an item."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BeforeValidator, Discriminator, Field, model_validator

from evomerge.fitness.example import Example
from evomerge.fitness.graders.code import UnitTests
from evomerge.fitness.graders.equivalence import MathEquivalence
from evomerge.fitness.graders.grader import Grade, Grader, by_name, named
from evomerge.fitness.graders.installed import Installed
from evomerge.fitness.graders.instructions import IfEval
from evomerge.fitness.graders.language import Language
from evomerge.fitness.graders.numbers import LastNumber
from evomerge.fitness.graders.text import Contains, ExactMatch, Regex, RougeL, TokenF1

Aspect = (
    ExactMatch
    | Contains
    | Regex
    | LastNumber
    | RougeL
    | TokenF1
    | MathEquivalence
    | UnitTests
    | IfEval
    | Language
    | Installed
)

_Aspect = Annotated[Aspect, Discriminator("kind")]


class AllOf(Grader):
    """The product of what several graders find: right, and in Japanese."""

    kind: Literal["all_of"] = "all_of"
    graders: tuple[
        Annotated[_Aspect, BeforeValidator(by_name, json_schema_input_type=str | _Aspect)], ...
    ] = Field(min_length=2)

    def check(self) -> None:
        """See Grader."""
        for grader in self.graders:
            grader.check()

    @property
    def votes(self) -> bool:
        """See Grader."""
        return any(grader.votes for grader in self.graders)

    @property
    def target_is_reply(self) -> bool:
        """See Grader."""
        return all(grader.target_is_reply for grader in self.graders)

    def worth(self, reply: str, item: Example) -> float:
        """See Grader."""
        return math.prod(grader.worth(reply, item) for grader in self.graders)

    def grades(self, answers: Sequence[tuple[str, Example]]) -> list[Grade]:
        """See Grader. A reply that one of them fails on has failed."""
        found = [grader.grades(answers) for grader in self.graders]
        return [
            Grade(
                math.prod(grade.worth for grade in of),
                next((grade.failure for grade in of if grade.failure), None),
            )
            for of in zip(*found, strict=True)
        ]

    def vote(self, reply: str, item: Example) -> str | None:
        """See Grader: that of the first of them that votes."""
        return next(g for g in self.graders if g.votes).vote(reply, item)


OneReply = Aspect | AllOf
_OneReply = Annotated[OneReply, Discriminator("kind")]


class _OverSamples(Grader):
    """What is said of the several replies to an item, by what a grader says of each."""

    k: int = Field(ge=1)
    of: Annotated[_OneReply, BeforeValidator(by_name, json_schema_input_type=str | _OneReply)]

    def check(self) -> None:
        """See Grader."""
        self.of.check()

    @property
    def least_samples(self) -> int:
        """See Grader."""
        return self.k

    @property
    def target_is_reply(self) -> bool:
        """See Grader."""
        return self.of.target_is_reply

    def worth(self, reply: str, item: Example) -> float:
        """See Grader."""
        return self.of.worth(reply, item)

    def grades(self, answers: Sequence[tuple[str, Example]]) -> list[Grade]:
        """See Grader."""
        return self.of.grades(answers)


class PassAtK(_OverSamples):
    """The chance that of k replies one is right, a reply being right if it is worth 1: unbiased,
    from all n of them (arXiv 2107.03374, section 2.1)."""

    kind: Literal["pass_at_k"] = "pass_at_k"

    def combined(self, item: Example, replies: Sequence[str], grades: Sequence[Grade]) -> float:
        """See Grader."""
        n, right = len(grades), sum(grade.worth == 1 for grade in grades)
        # 1 - C(n - right, k) / C(n, k), factor by factor: neither overflows nor cancels.
        wrong = np.arange(n - right + 1, n + 1)
        return 1.0 if n - right < self.k else float(1 - np.prod(1 - self.k / wrong))


class MajorityAtK(_OverSamples):
    """What the most frequent answer of the first k replies is worth; of equally frequent ones, the
    earliest. Replies without an answer do not vote."""

    kind: Literal["majority_at_k"] = "majority_at_k"

    @model_validator(mode="after")
    def _votes(self) -> Self:
        if not self.of.votes:
            raise ValueError(
                f"of: '{named(self.of)}' finds no answer to vote on: choose one that does, such as "
                "last_number"
            )
        return self

    def combined(self, item: Example, replies: Sequence[str], grades: Sequence[Grade]) -> float:
        """See Grader."""
        first = list(zip(replies, grades, strict=True))[: self.k]
        answers = [
            (vote, grade.worth)
            for reply, grade in first
            if not grade.failure and (vote := self.of.vote(reply, item)) is not None
        ]
        if not answers:
            return 0.0
        winner = Counter(vote for vote, _ in answers).most_common(1)[0][0]
        return next(worth for vote, worth in answers if vote == winner)
