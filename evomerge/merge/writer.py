"""Safetensors files written in parallel: every tensor's place is known before its values are.

Files are laid out and their space is reserved first, so that a full disk is found out at once.
Then threads compute tensors span by span and write each span where it belongs: memory holds a few
spans, whatever the size of the model.

Knows nothing of recipes, configs or tokenizers.
"""

import json
import os
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.merge.operand import Operand
from evomerge.merge.parallel import each
from evomerge.merge.plan import TensorPlan
from evomerge.merge.shards import DTYPES

_STEP = 1 << 26  # bytes between two words of progress: telling takes as long as a span
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorFile:
    """A file to write: its path, and its tensors in order, each by its name in the file."""

    path: Path
    tensors: tuple[tuple[str, TensorPlan], ...]


@dataclass(frozen=True)
class _Place:
    """Where a tensor goes: a file, and the position of its first byte there."""

    file: int
    offset: int
    plan: TensorPlan


def write_files(
    files: Sequence[TensorFile],
    compute: Callable[[TensorPlan], Operand],
    progress: Callable[[int], None],
    threads: int,
) -> None:
    """Write the files, on so many threads; the result does not depend on how many. progress is
    told the bytes of values written so far, by any thread, one at a time.

    Raises OSError where the disk does not take the files, and what `compute` raises.
    """
    with ExitStack() as stack:
        places: list[_Place] = []
        numbers: list[int] = []
        for file in files:
            number = os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            stack.callback(os.close, number)
            numbers.append(number)
            places += _lay_out(number, file)
        places.sort(key=lambda place: -place.plan.bytes)  # the longest first: none is waited for
        total = sum(place.plan.bytes for place in places)
        each(_Writer(compute, progress, total).put, places, threads)
        for number in numbers:
            os.fsync(number)


def _lay_out(number: int, file: TensorFile) -> list[_Place]:
    """Write the header and reserve the room."""
    header = _header(file)
    places, offset = [], len(header)
    for _, plan in file.tensors:
        places.append(_Place(number, offset, plan))
        offset += plan.bytes
    os.posix_fallocate(number, 0, offset)
    _write(number, memoryview(header), 0)
    return places


def _header(file: TensorFile) -> bytes:
    """The beginning of a safetensors file: the header's length, then JSON, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, plan in file.tensors:
        end = offset + plan.bytes
        entries[name] = {
            "dtype": _CODES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class _Writer:
    """Computes and writes tensors, and counts what is written. total: bytes of all of them."""

    def __init__(
        self,
        compute: Callable[[TensorPlan], Operand],
        progress: Callable[[int], None],
        total: int,
    ) -> None:
        self._compute = compute
        self._progress = progress
        self._total = total
        self._lock = threading.Lock()
        self._written = 0

    def put(self, place: _Place, stopped: threading.Event) -> None:
        """Compute one tensor and write it to its place."""
        tensor = self._compute(place.plan)
        size = tensor.dtype.itemsize
        for i, j in tensor.spans():
            if stopped.is_set():
                return
            values = tensor.span(i, j).cpu().contiguous()
            _write(place.file, values.view(torch.uint8).numpy().data, place.offset + i * size)
            self._count(values.nbytes)
        # Begin to store it now, so that the end does not wait for all of it.
        os.posix_fadvise(place.file, place.offset, place.plan.bytes, os.POSIX_FADV_DONTNEED)

    def _count(self, size: int) -> None:
        with self._lock:
            before, self._written = self._written, self._written + size
            if self._written // _STEP > before // _STEP or self._written == self._total:
                self._progress(self._written)


def _write(number: int, data: memoryview, offset: int) -> None:
    while data.nbytes:
        written = os.pwrite(number, data, offset)
        data, offset = data[written:], offset + written
