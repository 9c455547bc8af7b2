"""Candidates that a search comes back to: their merged tensors, in memory that is to spare.

Knows nothing of how they were merged.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from evomerge.layout import Layout
from evomerge.merge.memory import spare_memory
from evomerge.recipe import Recipe

_SHARE = 0.5  # of the memory to spare: parents that are read later, and batches, want some too
_MOST = 32  # candidates: no more of a generation go on to its next stage
_WORTH = 3.0  # a merge takes so many times a copy: each candidate is copied here, few come back


@dataclass(frozen=True)
class Shape:
    """What a live model has to look like before its tensors are filled: the (model, layer) that
    each layer follows, the stored tensors, and the model that gives the config."""

    layers: tuple[tuple[str, int], ...]
    stored: Layout
    donor: str


@dataclass(frozen=True)
class Merged:
    """A merge that can be written again. values: by the live model's names."""

    shape: Shape
    values: Mapping[str, torch.Tensor]

    def write(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Fill a live model of this shape, to the last bit as the merge did."""
        for name, value in self.values.items():
            parameters[name].data.copy_(value)


class Kept:
    """The merged tensors of recent candidates, on the device of the live model.

    Nothing is kept before a candidate comes back for the first time (a search without stages
    never does that), nor of merges that take hardly longer than copying their tensors. When memory
    runs out the oldest go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._merged: dict[str, Merged] = {}
        self._seen: set[str] = set()
        self._returning = False
        self._copying = 0.0  # seconds per byte

    def found(self, recipe: Recipe) -> Merged | None:
        """The merge of a recipe, if it is kept."""
        key = _key(recipe)
        self._returning |= key in self._seen
        self._seen.add(key)
        return self._merged.get(key)

    def holds(self, recipe: Recipe) -> bool:
        """Whether `found` would give one; nobody has come back by asking this."""
        return _key(recipe) in self._merged

    def offer(
        self, recipe: Recipe, shape: Shape, values: Mapping[str, torch.Tensor], seconds: float
    ) -> None:
        """Keep a copy of what a merge has written, which took so many seconds, if it is worth it
        and there is room."""
        size = sum(value.nbytes for value in values.values())
        if not self._returning or seconds < _WORTH * size * self._copying:
            return
        room = _SHARE * (spare_memory(self._device) + self._bytes)
        while self._merged and (len(self._merged) == _MOST or self._bytes + size > room):
            self._merged.pop(next(iter(self._merged)))
        if size > room:
            return
        started = time.perf_counter()
        copies = {name: value.detach().clone() for name, value in values.items()}
        finish(self._device)
        self._copying = (time.perf_counter() - started) / size
        self._merged[_key(recipe)] = Merged(shape, copies)

    def clear(self) -> bool:
        """Give the memory back; whether there was any."""
        held = bool(self._merged)
        self._merged.clear()
        return held

    @property
    def _bytes(self) -> int:
        return sum(v.nbytes for merged in self._merged.values() for v in merged.values.values())


def _key(recipe: Recipe) -> str:
    return hashlib.sha256(json.dumps(recipe.to_dict(), sort_keys=True).encode()).hexdigest()


def finish(device: torch.device) -> None:
    """Wait for a GPU, so that a clock tells what its work took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
