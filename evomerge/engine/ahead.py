"""Merging ahead: the next candidate, in the background, while the live model is scored.

It is merged into spare tensors. When its turn comes they change places with the live ones, which
are the spare ones of the candidate after it. Knows nothing of what is scored.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from evomerge.engine.batches import out_of_memory
from evomerge.engine.kept import Shape
from evomerge.errors import EvomergeError
from evomerge.merge.live import Resident
from evomerge.merge.memory import spare_memory
from evomerge.merge.plan import Plan
from evomerge.recipe import Recipe

_Kind = tuple[tuple[int, ...], torch.dtype]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """What a recipe comes to: a plan of nothing but the live model's tensors, and its shape."""

    plan: Plan
    shape: Shape


@dataclass(frozen=True)
class Prepared:
    """A finished merge. values: by the plan's names. seconds: that it took."""

    planned: Planned
    values: Mapping[str, torch.Tensor]
    seconds: float


@dataclass(frozen=True)
class _Begun:
    recipe: Recipe
    given_up: threading.Event
    found: Future[Prepared | None]


class Ahead:
    """One merge at a time, on a thread of its own, and on a GPU in a stream of its own.

    While there is one nothing else may merge from these parents: whoever does calls `take` first.
    """

    def __init__(self, resident: Resident, device: torch.device) -> None:
        self._resident = resident
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it
        self._thread = ThreadPoolExecutor(1, "merge-ahead")
        self._begun: _Begun | None = None
        # In turn the background's and, while nothing is begun, the caller's.
        self._spare: dict[_Kind, list[torch.Tensor]] = {}
        self._told = self._off = False

    def begin(
        self,
        recipe: Recipe,
        live: Mapping[tuple[int | None, str], torch.Tensor],
        plan: Callable[[], Planned],
    ) -> bool:
        """Begin to merge; False where there is no room for a second model like the live one.

        live: its tensors as they stand, by layer and what they are called there. plan: of the
        recipe, made in the background.
        """
        self.drop()
        if self._off:
            return False
        if not (self._spare or self._has_room(map(_kind, live.values()))):
            self._tell()
            return False
        dtypes = {key: tensor.dtype for (_, key), tensor in live.items()}
        given_up = threading.Event()
        found = self._thread.submit(self._prepared, plan, dtypes, given_up)
        self._begun = _Begun(recipe, given_up, found)
        return True

    def take(self, recipe: Recipe) -> Prepared | None:
        """What was begun of this recipe, waiting until it is finished; None where nothing was, or
        where it failed, and whoever merges will be told why. What was begun of another is dropped.
        """
        begun = self._begun
        if begun is None or begun.recipe != recipe:
            self.drop()
            return None
        self._begun = None
        return begun.found.result()

    def drop(self) -> None:
        """End what was begun, at the next tensor."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        begun.given_up.set()
        # What nobody foresaw is met again by whoever loads that recipe.
        prepared = None if begun.found.exception() else begun.found.result()
        for value in prepared.values.values() if prepared else ():
            self._keep(value)

    def exchange(
        self,
        prepared: Prepared,
        live: Mapping[str, torch.Tensor],
        model: Iterable[torch.Tensor],
    ) -> bool:
        """Give live tensors, by the plan's names, the values that were taken. False, and nothing is
        done, where these are not the tensors that they were made for.

        model: all tensors of the live model, those aside that no recipe has included.
        """
        values = prepared.values
        if values.keys() != live.keys():
            return False
        if any(_kind(live[name]) != _kind(value) for name, value in values.items()):
            return False
        seen = Counter(t.data_ptr() for t in {id(t): t for t in model}.values())
        for name, value in values.items():
            tensor = live[name]
            alone = isinstance(tensor, torch.nn.Parameter) and seen[tensor.data_ptr()] == 1
            if alone and tensor.stride() == value.stride():
                tensor.data, displaced = value, tensor.data
            else:  # something else sees the same memory, or it is laid out otherwise
                tensor.data.copy_(value)
                displaced = value
            self._keep(displaced)
        return True

    def free(self) -> bool:
        """Give the memory back, and never take it again: there is too little. Whether there was
        any."""
        held = self._begun is not None or bool(self._spare)
        self.drop()
        self._spare.clear()
        if held:
            self._give_up()
        return held

    def close(self) -> None:
        """End what was begun, and the thread."""
        self.drop()
        self._spare.clear()
        self._thread.shutdown()

    def _keep(self, tensor: torch.Tensor) -> None:
        self._spare.setdefault(_kind(tensor), []).append(tensor)

    def _has_room(self, wanted: Iterable[_Kind]) -> bool:
        """Whether what the spare tensors lack of these fits beside the parents, of which some may
        not be held yet."""
        there = Counter({kind: len(tensors) for kind, tensors in self._spare.items()})
        lacking = (Counter(wanted) - there).items()
        size = sum(torch.Size(s).numel() * dtype.itemsize * n for (s, dtype), n in lacking)
        return not size or size <= spare_memory(self._device) - self._resident.to_come

    def _give_up(self) -> None:
        self._off = True
        self._tell()

    def _tell(self) -> None:
        if not self._told:
            _log.warning(
                "engine: memory of %s is too short for a second model: candidates are not merged "
                "ahead",
                self._device,
            )
        self._told = True

    # -- in the background -------------------------------------------------------------------------

    def _prepared(
        self,
        plan: Callable[[], Planned],
        dtypes: Mapping[str, torch.dtype],
        given_up: threading.Event,
    ) -> Prepared | None:
        try:
            return self._merged(plan, dtypes, given_up)
        except EvomergeError:  # which whoever loads it will be told
            return None
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        self._spare.clear()  # here nothing holds the failed merge's tensors any more
        self._give_up()
        return None

    def _merged(
        self,
        plan: Callable[[], Planned],
        dtypes: Mapping[str, torch.dtype],
        given_up: threading.Event,
    ) -> Prepared | None:
        started = time.perf_counter()
        planned = plan()
        tensors = {tensor.name: tensor for tensor in planned.plan.tensors}
        wanted: dict[str, _Kind] = {
            name: (tensors[name].shape, dtypes[key])
            for (_, key), name in planned.shape.stored.index.items()
            if key in dtypes
        }
        if not self._has_room(wanted.values()):  # of this one alone: the next may be smaller
            return None
        values = {name: self._spared(kind) for name, kind in wanted.items()}
        with self._in_stream():
            self._resident.write(planned.plan, values, given_up)
        return Prepared(planned, values, time.perf_counter() - started)

    def _spared(self, kind: _Kind) -> torch.Tensor:
        spare = self._spare.get(kind)
        if spare:
            return spare.pop()
        shape, dtype = kind
        return torch.empty(shape, dtype=dtype, device=self._device)

    @contextmanager
    def _in_stream(self) -> Iterator[None]:
        """On a GPU: behind all that was asked of it before, and finished at the end.

        Spare tensors are allocated outside, as the live ones are, whose places they take; and
        nothing is freed or read by another stream before this one has come to its end.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._stream.synchronize()


def _kind(tensor: torch.Tensor) -> _Kind:
    return tuple(tensor.shape), tensor.dtype
