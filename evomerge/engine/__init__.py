"""Engines: text in, text out, on a live model whose tensors change with every recipe.

Knows nothing of tasks, scores or searches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from evomerge.errors import EvomergeError
from evomerge.job import Engine as EngineSection
from evomerge.recipe import Recipe

if TYPE_CHECKING:
    from evomerge.merge.checkpoint import Checkpoint  # loads torch


@dataclass(frozen=True)
class Reply:
    """What a model wrote.

    truncated: it was cut off by the token limit. tokens: how many it generated, the end of
    sequence aside; of a reply that is cut at a stop text, up to where that text was complete.
    """

    text: str
    truncated: bool
    tokens: int


@dataclass(frozen=True)
class Likelihood:
    """How a model sees a reference answer, end of sequence included.

    token_log_likelihoods: of each of its tokens given those before it, in nats. greedy: each of
    them is the most likely one, so that greedy generation would write exactly this answer and stop.
    """

    token_log_likelihoods: tuple[float, ...]
    greedy: bool

    @property
    def log_likelihood(self) -> float:
        """Of the whole answer, in nats."""
        return sum(self.token_log_likelihoods)


class BrokenModel(EvomergeError):
    """A merged model whose outputs are not numbers."""


class Engine(Protocol):
    """A live model. `load` decides which tensors it has; the rest runs them."""

    def load(self, recipe: Recipe) -> None:
        """Merge into the live model. Raises RecipeError or ModelError for a recipe that cannot be
        merged; the live model is then undefined until the next successful load."""
        ...

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str]
    ) -> list[Reply]:
        """Greedy replies, each cut before the first of the `stop` texts."""
        ...

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of each (prompt, answer), by one teacher-forced forward. Raises BrokenModel."""
        ...

    def close(self) -> None:
        """Free what the engine holds; nothing may be called afterwards."""
        ...


def build(section: EngineSection, models: Mapping[str, "Checkpoint"], first: str) -> Engine:
    """The engine of a job's section, with `models` (by their names in recipes) resident.

    first: the model that gives config and tokenizer.
    """
    from evomerge.engine.transformers import TransformersEngine

    return TransformersEngine(section, models, first)
