"""Values that tasks, scorers and graders share: an item of a task, and what was made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evomerge.engine import Prompt


@dataclass(frozen=True)
class Example:
    """One item of a task.

    prompt: what the model is given, worked examples included. target: the answer that replies are
    graded by. question: the item's own part of the prompt; items are compared by it. reference: a
    whole reply that is right, such as a worked solution that ends in the target. choices, right:
    of a multiple choice, and which of them is right, from 0. record: the item's fields as its file
    has them.
    """

    prompt: Prompt
    target: str
    question: str = ""
    reference: str = ""
    choices: tuple[str, ...] = ()
    right: int = 0
    record: Mapping[str, Any] = field(default_factory=dict)


def asked(item: Example) -> str:
    """All that an item asks: its question, and its choices where they do not stand there."""
    return with_choices(item.question, item.choices)


def with_choices(question: str, choices: Sequence[str]) -> str:
    """A question, and those of the choices that do not stand in it."""
    return "\n".join((question, *(choice for choice in choices if choice not in question)))


@dataclass(frozen=True)
class Verdict:
    """What came of one item.

    score: in [0, 1]. shaping: mean log-likelihood per token of the reference answer, in [-3, 0]; 0
    where nobody asked. truncated: the token limit cut a reply off. tokens: of a reply, on average;
    0 where nothing is generated. overlong: the prompt does not fit into the model's context, so
    the item scores 0. failure: why a reply has no worth of its own and counts 0. replies: what the
    model wrote, if it did.
    """

    score: float
    shaping: float = 0.0
    truncated: bool = False
    tokens: int = 0
    overlong: bool = False
    failure: str | None = None
    replies: tuple[str, ...] = ()
