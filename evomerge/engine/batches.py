"""Which rows run together: as many as memory allows, of like length.

Knows nothing of what is run.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from evomerge.errors import OutOfMemory

T = TypeVar("T")

_GPU_SHARE = 0.2  # of the device's memory, for one batch: the rest holds the model and its parents
_HOST_SHARE = 1 / 16  # of the machine's, which other workers use too


@dataclass(frozen=True)
class Row:
    """What one row takes. tokens: that pass through the model, those that it writes included.
    outputs: positions that logits are kept of. written: how many tokens it writes; all rows of a
    batch write equally many."""

    tokens: int
    outputs: int
    written: int = 0


Footprint = Callable[[int, int], float]  # bytes of a row, by its tokens and outputs


class Batches:
    """Runs rows in batches.

    The plan follows from the rows, the model and the size of the device alone, not from the memory
    that happens to be free: sums are rounded in the order that the shape of a batch decides, and a
    resumed search has to see the same bits. Only where memory does run out are batches halved,
    from then on.
    """

    def __init__(
        self,
        device: torch.device,
        most: int | None,
        footprint: Callable[[], Footprint],
        forget: Callable[[], bool],
    ) -> None:
        """most: rows in a batch, None for as many as fit. footprint: as it is by now. forget:
        frees memory that can be done without, and says whether there was any."""
        self._device = device
        self._most = most
        self._footprint = footprint
        self._forget = forget
        self._room = _room(device) if most is None else float("inf")

    def run(self, rows: Sequence[Row], call: Callable[[list[int]], list[T]]) -> list[T]:
        """The results of `call`, which is given the positions of a batch, in the order of `rows`.
        Raises OutOfMemory where a single row does not fit."""
        waiting = sorted(range(len(rows)), key=lambda i: (-rows[i].written, -rows[i].tokens))
        results: dict[int, T] = {}
        footprint = self._footprint()
        while waiting:
            batch = self._next(rows, waiting, footprint)
            try:
                found = call(batch)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                found = None
            if found is None:  # here nothing holds the failed batch's tensors any more
                self._make_room([rows[i] for i in batch], footprint)
                continue
            results |= dict(zip(batch, found, strict=True))
            waiting = waiting[len(batch) :]
        return [results[i] for i in range(len(rows))]

    def _next(self, rows: Sequence[Row], waiting: Sequence[int], footprint: Footprint) -> list[int]:
        """The first of the rows that wait, as many as go together."""
        outputs = 0
        first = rows[waiting[0]]
        for count, row in enumerate(rows[i] for i in waiting):
            outputs = max(outputs, row.outputs)
            size = (count + 1) * footprint(first.tokens, outputs)
            full = size > self._room or count == self._most
            if count and (full or row.written != first.written):
                return list(waiting[:count])
        return list(waiting)

    def _make_room(self, batch: Sequence[Row], footprint: Footprint) -> None:
        forgotten = self._forget()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if forgotten:
            return
        tokens = max(row.tokens for row in batch)
        if len(batch) == 1:
            raise OutOfMemory(
                f"{tokens} tokens do not fit into the memory of {self._device} beside the model: "
                "lower engine.context or the task's max_new_tokens, or compute in bfloat16"
            )
        outputs = max(row.outputs for row in batch)
        self._room = len(batch) // 2 * footprint(tokens, outputs)


def footprint_of(config: Any, size: int) -> Footprint:
    """By a model's configuration, and the bytes of a value: its KV cache, what passes through a
    layer at once, the attention mask, and logits."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    cache = 2 * config.num_hidden_layers * kv_heads * head_size
    passing = 6 * config.hidden_size + 3 * inner
    token = (cache + passing) * size
    # Logits stay beside their float32 copy, its softmax and what that is made from.
    output = config.vocab_size * (size + 12)
    return lambda tokens, outputs: float(tokens * token + 4 * tokens**2 + outputs * output)


def _room(device: torch.device) -> float:
    if device.type == "cuda":
        return _GPU_SHARE * torch.cuda.get_device_properties(device).total_memory
    return _HOST_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def out_of_memory(error: RuntimeError) -> bool:
    """Whether there is too little memory: on the CPU torch raises no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
