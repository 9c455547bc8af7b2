"""What is drawn where replies are sampled, and when they are complete: hooks into `generate`.

Knows nothing of prompts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, StoppingCriteria

from evomerge.engine import BrokenModel, Generation
from evomerge.engine.texts import Texts
from evomerge.seeds import generator

_EVERY = 16  # tokens after which replies are searched for stop texts


def uniforms(how: Generation, rows: Sequence[tuple[str, int]], steps: int) -> torch.Tensor:
    """What decides the draws of each row, (text of the prompt, number of the sample): a number in
    [0, 1) for each step. It depends on nothing else but the seed, not even on `steps`."""
    drawn = [generator(how.seed, f"draw/{text}", sample).random(steps) for text, sample in rows]
    return torch.from_numpy(np.stack(drawn))


class Choice(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Leaves of the logits of each step only the token that is chosen.

    width: of the prompts. draws: see `uniforms`; None: the most likely token is chosen.
    """

    def __init__(self, how: Generation, width: int, draws: torch.Tensor | None) -> None:
        self._how = how
        self._width = width
        self._draws = draws

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Raises BrokenModel where the logits are no numbers."""
        if not logits.amax(dim=-1).isfinite().all():
            raise BrokenModel("the merged model's outputs are not finite numbers")
        if self._draws is None:
            return logits
        draws = self._draws[:, ids.shape[1] - self._width, None].to(logits.device)
        chosen = drawn(logits, draws, self._how.temperature, self._how.top_p)
        return torch.full_like(logits, -torch.inf).scatter_(1, chosen, 0.0)


def drawn(
    logits: torch.Tensor, draws: torch.Tensor, temperature: float, top_p: float
) -> torch.Tensor:
    """A token for each row, (rows, 1): where its number in [0, 1) falls among the cumulated
    probabilities. These are summed in the order of the vocabulary: in that of the probabilities,
    a rounding error that swaps two like ones would change what is drawn.

    logits: (rows, vocabulary). draws: (rows, 1). top_p: only the fewest tokens, likeliest first,
    that together reach this share of the probability can be drawn (nucleus sampling, arXiv
    1904.09751 section 3.1).
    """
    shares = (logits.double() / temperature).softmax(dim=-1)
    if top_p < 1:
        likeliest, order = shares.sort(dim=-1, descending=True, stable=True)
        before = likeliest.cumsum(dim=-1) - likeliest
        shares = shares.scatter(1, order, likeliest.where(before < top_p, 0.0))
    reached = shares.cumsum(dim=-1)
    places = torch.searchsorted(reached, draws * reached[:, -1:], right=True)
    return places.clamp(max=logits.shape[1] - 1)


class Stopped(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Ends rows that have written a stop text; now and then, for the batch runs on anyway."""

    def __init__(self, texts: Texts, stop: Sequence[str], width: int) -> None:
        self._texts = texts
        self._stop = stop
        self._width = width
        self._done: set[int] = set()

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which rows are complete."""
        if (ids.shape[1] - self._width) % _EVERY == 0:  # decoding takes time
            for number, row in enumerate(ids[:, self._width :].tolist()):
                if number not in self._done and self._texts.stopped(row, self._stop):
                    self._done.add(number)
        done = [number in self._done for number in range(len(ids))]
        return torch.tensor(done, device=ids.device)
