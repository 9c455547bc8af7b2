"""What every grader is: a part of a task file that says what a reply is worth."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from evomerge.errors import TaskError
from evomerge.fitness.example import Example
from evomerge.messages import one_line


@dataclass(frozen=True)
class Grade:
    """worth: in [0, 1]. failure: why there is none, which is worth 0."""

    worth: float
    failure: str | None = None


class Kind(BaseModel):
    """What a task file chooses by its `kind`, the other fields being its options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_serializer(mode="wrap")
    def _with_kind(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Always: two kinds without options differ in nothing else, and `kind` is a default.
        return {"kind": named(self), **fields(self)}


def named(choice: BaseModel) -> str:
    """What a task file calls it."""
    return str(type(choice).model_fields["kind"].default)


def by_name(score: Any) -> Any:
    """A name alone chooses a kind without options."""
    return {"kind": score} if isinstance(score, str) else score


class Grader(Kind):
    """Its fields are its options in a task file; `kind` names it there."""

    def check(self) -> None:
        """Whether it can work here. Raises TaskError, with the remedy, where it cannot."""

    @property
    def least_samples(self) -> int:
        """How many replies to each item it needs."""
        return 1

    @property
    def votes(self) -> bool:
        """Whether it finds answers to vote on."""
        return type(self).vote is not Grader.vote

    @property
    def target_is_reply(self) -> bool:
        """Whether an item's target may be taken for a reply that is right."""
        return True

    @abstractmethod
    def worth(self, reply: str, item: Example) -> float:
        """Of one reply, in [0, 1]. Whatever it raises fails that item alone."""

    def grades(self, answers: Sequence[tuple[str, Example]]) -> list[Grade]:
        """Of many replies, each to its item."""
        return [self._grade(reply, item) for reply, item in answers]

    def _grade(self, reply: str, item: Example) -> Grade:
        try:
            worth = float(self.worth(reply, item))
        except Exception as error:  # a grader may be anybody's code, an item anybody's data
            return Grade(0.0, f"{named(self)}: {one_line(error) or type(error).__name__}")
        if not 0 <= worth <= 1:
            return Grade(0.0, f"{named(self)}: a worth of {worth:g}: give one from 0 to 1")
        return Grade(worth)

    def vote(self, reply: str, item: Example) -> str | None:
        """The answer that a reply gives, equal for replies that agree; None for no answer."""
        raise TaskError(f"score: '{named(self)}' finds no answer to vote on")

    def combined(self, item: Example, replies: Sequence[str], grades: Sequence[Grade]) -> float:
        """What several replies to the same item are worth together: their mean."""
        return float(np.mean([grade.worth for grade in grades]))


def require(module: str, grader: Grader) -> None:
    """Raises TaskError, with the remedy, where a library of the extra `tasks` is missing."""
    if find_spec(module) is None:
        raise TaskError(
            f"score: '{named(grader)}' needs the library '{module}': pip install 'evomerge[tasks]'"
        )
