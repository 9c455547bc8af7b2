"""Engines: text in, text out, on a live model whose tensors change with every recipe.

Values and the protocol stand here, `build` makes an engine. Knows nothing of tasks, scores or
searches, and loads nothing heavy.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from evomerge.errors import EvomergeError
from evomerge.recipe import Recipe

# Read when transformers is imported, which modules of this package do.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str


# A text to go on with, or a conversation, which the model's chat template writes out up to where
# the assistant is to speak.
Prompt = str | tuple[Turn, ...]


@dataclass(frozen=True)
class Generation:
    """How replies are written.

    max_new_tokens: of each reply. stop: texts before the first of which a reply is cut. samples:
    replies to each prompt. temperature: 0: always the most likely token. top_p: share of the
    probability that is drawn from. seed: what is drawn depends on it, the prompt and the number of
    the sample, never on what else is generated beside it.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """What a model wrote.

    truncated: it was cut off by the token limit, or by the end of the context. tokens: how many it
    generated, the end of sequence aside; of a reply that is cut at a stop text, up to where that
    text was complete. overlong: the prompt leaves no room in the model's context, so that nothing
    was written.
    """

    text: str
    truncated: bool
    tokens: int
    overlong: bool = False


@dataclass(frozen=True)
class Likelihood:
    """How a model sees a reference answer.

    token_log_likelihoods: of each of its tokens given those before it, in nats. greedy: each of
    them is the most likely one, so that greedy generation would write exactly this answer, and
    stop if its end was asked for: by whichever of the model's ends. overlong: prompt and answer do
    not fit into the model's context, so that there are no values.
    """

    token_log_likelihoods: tuple[float, ...]
    greedy: bool
    overlong: bool = False

    @property
    def log_likelihood(self) -> float:
        """Of the whole answer, in nats; -inf where it does not fit."""
        return float("-inf") if self.overlong else sum(self.token_log_likelihoods)


class BrokenModel(EvomergeError):
    """A merged model whose outputs are not numbers."""


class Engine(Protocol):
    """A live model. `load` decides which tensors it has; the rest runs them."""

    @property
    def merges_ahead(self) -> bool:
        """Whether `prepare` is worth calling; False where it never does anything."""
        ...

    def load(self, recipe: Recipe) -> None:
        """Merge into the live model. Raises RecipeError or ModelError for a recipe that cannot be
        merged; the live model is then undefined until the next successful load."""
        ...

    def prepare(self, recipe: Recipe) -> bool:
        """Begin to merge a recipe in the background, beside the live model, which goes on as it is.

        The next `load` of this recipe gives what it would give without, to the last bit and the
        last error; that of another one drops what was begun. False where nothing is: memory does
        not allow it, or it would not be worth it. Raises nothing for a recipe that cannot be
        merged, or memory that runs out: `load` does.
        """
        ...

    def generate(self, prompts: Sequence[Prompt], how: Generation) -> list[tuple[Reply, ...]]:
        """As many replies to each prompt as asked for. Raises BrokenModel, OutOfMemory where not
        even one fits beside the model, and ModelError for a conversation where the model has no
        chat template."""
        ...

    def likelihoods(
        self, pairs: Sequence[tuple[Prompt, str]], ended: bool = True
    ) -> list[Likelihood]:
        """Of each (prompt, answer), by one teacher-forced forward. ended: the end of sequence
        counts as the last token of the answer. Raises as `generate` does."""
        ...

    def close(self) -> None:
        """Free what the engine holds; nothing may be called afterwards."""
        ...
