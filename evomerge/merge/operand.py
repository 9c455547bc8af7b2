"""One input tensor of a merge: read span by span, and what has been found out about all of it.

A tensor is never held whole for a merge's sake. Formulas read equal spans of all their inputs, and
statistics (norms, selections by magnitude) are passes over the same spans. What they find is kept
in the tensor's facts, which a search keeps from one candidate to the next.

Everything runs on one thread of torch's, so that the bits of a sum do not depend on how many there
are: whoever merges sees to that (see `parallel`). Knows nothing of models, files, recipes or
formulas.
"""

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from evomerge.errors import InputError
from evomerge.merge import bits

T = TypeVar("T")

# Values [start, stop) of a tensor in its flat C order, as a 1-D tensor that nobody writes to.
Read = Callable[[int, int], Tensor]

_ON_CPU = 1 << 17  # elements of a span: a few buffers of this size stay in a core's own cache
_ON_DEVICE = 1 << 24  # a GPU wants long spans
_IN_MEMORY = 1 << 24  # bytes
_NORM_SPAN = 1 << 20  # mergekit's, for norms and angles


def span_bounds(numel: int, unit: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Spans, at multiples of the unit, that cover a tensor of so many values; one that is empty of
    an empty tensor.

    A short tail joins its neighbour: torch adds up the last few values of a span in another order.
    """
    length = _ON_CPU if device.type == "cpu" else _ON_DEVICE
    length = max(1, length // unit) * unit
    count = max(1, numel // length)
    for i in range(count):
        yield i * length, numel if i == count - 1 else (i + 1) * length


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known of a whole tensor, by question; may itself be a part of a question."""

    answers: dict[Hashable, Any] = field(default_factory=dict)


class Operand:
    """A tensor of `shape`, of which `span` gives values in `dtype` on `device`.

    unit: spans start and end at multiples of it, so that vectors inside them are whole.
    facts: those of the same tensor from before.
    """

    def __init__(
        self,
        read: Read,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device = torch.device("cpu"),  # noqa: B008  # immutable
        unit: int = 1,
        facts: Facts | None = None,
    ) -> None:
        self.shape = tuple(shape)
        self.numel = math.prod(self.shape)
        self.nbytes = self.numel * dtype.itemsize
        self.dtype = dtype
        self.device = device
        self.unit = max(1, unit)
        self.facts = Facts() if facts is None else facts
        self._read = read
        self._last: tuple[int, int, Tensor] | None = None

    @classmethod
    def of(cls, tensor: Tensor, facts: Facts | None = None) -> "Operand":
        """A tensor in memory."""
        flat = tensor.contiguous().view(-1)
        read: Read = lambda i, j: flat[i:j]  # noqa: E731
        return cls(read, tensor.shape, tensor.dtype, tensor.device, facts=facts)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums: float32 at least."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def row(self) -> int:
        """Length of the last dimension; 1 without dimensions."""
        return self.shape[-1] if self.shape else 1

    def span(self, start: int, stop: int) -> Tensor:
        """Values [start, stop), 1-D; not to be written to. The last span is kept: a base is read
        once for all its task vectors."""
        last = self._last  # threads may share an operand: what is here is one thread's
        if last is None or last[:2] != (start, stop):
            last = (start, stop, self._read(start, stop).to(self.device, self.dtype))
            self._last = last
        return last[2]

    def derived(
        self, read: Read, dtype: torch.dtype | None = None, unit: int | None = None
    ) -> "Operand":
        """Another tensor of the same shape and device, computed span by span."""
        return Operand(
            read, self.shape, dtype or self.dtype, self.device, math.lcm(self.unit, unit or 1)
        )

    def minus(self, other: "Operand") -> "Operand":
        """The difference, rounded to the dtype."""
        return self.derived(lambda i, j: self.span(i, j) - other.span(i, j))

    def spans(self) -> Iterator[tuple[int, int]]:
        """Bounds that cover the tensor; one empty span of an empty tensor."""
        return span_bounds(self.numel, self.unit, self.device)

    def held(self) -> "Operand":
        """The same tensor, computed once and for all: in memory, or in a temporary file where it
        is long. Raises InputError where there is no room for that file."""
        if self.device.type != "cpu" or self.nbytes <= _IN_MEMORY:
            return Operand.of(self.whole())
        return Operand.of(self.into(torch.frombuffer(_temporary(self.nbytes), dtype=self.dtype)))

    def whole(self) -> Tensor:
        """All values at once."""
        return self.into(torch.empty(self.numel, dtype=self.dtype, device=self.device))

    def into(self, flat: Tensor) -> Tensor:
        """All values, written into a 1-D tensor of any dtype and device; in their shape."""
        for i, j in self.spans():
            flat[i:j] = self.span(i, j)
        return flat.view(self.shape)

    def known(self, question: Hashable, find: Callable[[], T]) -> T:
        """A fact about the whole tensor: found once, then remembered."""
        answers = self.facts.answers
        if question not in answers:
            answers[question] = find()
        found: T = answers[question]
        return found

    def total(self, of_span: Callable[[int, int], Tensor]) -> Tensor:
        """The sum over spans, in float64, of what a function makes of each, such as a partial sum.

        Added up in place: small results that live on between long buffers break the memory into
        pieces that no buffer fits any more.
        """
        (first, *others) = self.spans()
        total = of_span(*first).double()
        for span in others:
            total += of_span(*span)
        return total

    @property
    def norm(self) -> Tensor:
        """The L2 norm; in float32 at least and without dimensions, as all that follow."""
        return self.known("norm", self._norm)

    def _norm(self) -> Tensor:
        parts = torch.stack([torch.linalg.vector_norm(x) for x in self._wide_spans()])
        norm: Tensor = torch.linalg.vector_norm(parts)
        return norm

    def dot(self, other: "Operand") -> Tensor:
        """sum(x y), each product rounded to the dtype."""
        question = ("dot", other.facts)
        return self.known(
            question,
            lambda: self.total(
                lambda i, j: (self.span(i, j) * other.span(i, j)).sum(dtype=self.wide)
            ).to(self.wide),
        )

    def inner(self, other: "Operand") -> Tensor:
        """sum(x y), no product rounded."""
        return self.known(("inner", other.facts), lambda: self._inner(other))

    def _inner(self, other: "Operand") -> Tensor:
        pairs = zip(self._wide_spans(), other._wide_spans(), strict=True)
        return torch.stack([torch.dot(x, y) for x, y in pairs]).sum(dim=0)

    def cosine(self, other: "Operand") -> Tensor:
        """Of the angle to another tensor, both as one vector; 0 if one of them is zero."""
        return self.known(("cosine", other.facts), lambda: self._cosine(other))

    def _cosine(self, other: "Operand") -> Tensor:
        a, b = (x.norm if x.norm > 1e-8 else torch.ones_like(x.norm) for x in (self, other))
        pairs = zip(self._wide_spans(), other._wide_spans(), strict=True)
        parts = [x.div_(a).mul_(y.div_(b)).sum() for x, y in pairs]
        return torch.stack(parts).sum(dim=0).clamp(-1, 1)

    def _wide_spans(self) -> Iterator[Tensor]:
        """Copies in float32 at least, to do anything with until the next one."""
        length = max(1, _NORM_SPAN // self.unit) * self.unit
        buffer = torch.empty(min(self.numel, length), dtype=self.wide, device=self.device)
        for start in range(0, max(1, self.numel), length):
            stop = min(start + length, self.numel)
            yield buffer[: stop - start].copy_(self.span(start, stop))

    @property
    def count_nonzero(self) -> int:
        """How many values are not zero."""
        return self.known(
            "nonzero",
            lambda: sum(int(self.span(i, j).count_nonzero()) for i, j in self.spans()),
        )

    def quantile(self, share: float) -> Tensor:
        """The value at position int(share (numel - 1)) of all values in ascending order."""
        place = int(torch.tensor(share) * (self.numel - 1))
        positive = self.derived(lambda i, j: self.span(i, j).clamp(min=0))
        negative = self.derived(lambda i, j: self.span(i, j).clamp(max=0))
        if self.numel - place <= positive.count_nonzero:
            return self._value(positive.selection(self.numel - place).code)
        if place < negative.count_nonzero:
            return -self._value(negative.selection(place + 1).code)
        return self._value(0)

    def _value(self, code: int) -> Tensor:
        kind = bits.KINDS[self.dtype.itemsize]
        return torch.tensor(code, dtype=kind, device=self.device).view(self.dtype)

    def selection(self, count: int) -> "Selection":
        """The `count` largest magnitudes, 0 <= count <= numel. The last one asked for is
        remembered: a search may change a weight and not the density, and has any number of
        densities."""
        last: tuple[int, Selection] | None = self.facts.answers.get("selection")
        if last is None or last[0] != count:
            last = (count, _select(self, count))
            self.facts.answers["selection"] = last
        return last[1]

    @property
    def magnitudes(self) -> Tensor:
        """How many values have each of the coarse magnitudes; see _select."""
        return self.known("magnitudes", lambda: _counts(self, 0, 0))


def _temporary(size: int) -> mmap.mmap:
    """A file without a name, mapped. All of its room is reserved: a disk that is found full while a
    mapping is written to ends the process."""
    try:
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise InputError(
            f"a temporary file of {size} bytes cannot be made in '{tempfile.gettempdir()}': "
            f"{error.strerror}: set TMPDIR to a folder with more room"
        ) from None


@dataclass(frozen=True)
class Selection:
    """The largest magnitudes of a tensor: all those above `code`, and of those equal to it the
    ones before flat position `end`. A code is the bit pattern of a magnitude: it sorts like it."""

    code: int
    end: int

    def mask(self, values: Tensor, start: int) -> Tensor:
        """Which of the values at [start, start + n) are selected: a mask of bits, 1-D."""
        found = bits.codes(values)
        if start + values.numel() <= self.end:
            return bits.below(self.code - 1, found)
        if start >= self.end:
            return bits.below(self.code, found)
        head, tail = found[: self.end - start], found[self.end - start :]
        return torch.cat([bits.below(self.code - 1, head), bits.below(self.code, tail)])


# A magnitude's bit pattern is found digit by digit, from the top: 15 bits, then 16 at a time.
_DIGIT = 16


def _select(operand: Operand, count: int) -> Selection:
    """Radix selection: exact, in memory that does not grow with the tensor, without sorting."""
    if count == 0:
        return Selection(torch.iinfo(bits.KINDS[operand.dtype.itemsize]).max, 0)
    code, wanted = 0, count
    for level in range(operand.dtype.itemsize * 8 // _DIGIT):
        counts = operand.magnitudes if level == 0 else _counts(operand, level, code)
        from_top = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, wanted))
        digit = len(counts) - 1 - place
        equal = int(counts[digit])
        wanted -= int(from_top[place]) - equal
        code = code << _DIGIT | digit
    return Selection(code, operand.numel if wanted == equal else _end(operand, code, wanted))


def _counts(operand: Operand, level: int, prefix: int) -> Tensor:
    """How many magnitudes with the leading digits `prefix` have each digit at `level`."""
    shift = operand.dtype.itemsize * 8 - _DIGIT * (level + 1)
    size = 1 << (_DIGIT - (level == 0))
    counts = torch.zeros(size, dtype=torch.int64, device=operand.device)
    for i, j in operand.spans():
        codes = bits.codes(operand.span(i, j))
        if level:
            codes = codes[codes >> (shift + _DIGIT) == prefix] >> shift & (size - 1)
        elif shift:
            codes = codes >> shift
        counts += torch.bincount(codes, minlength=size)
    return counts


def _end(operand: Operand, code: int, wanted: int) -> int:
    """The position behind the wanted-th value of magnitude `code`."""
    for i, j in operand.spans():
        others = bits.codes(operand.span(i, j)) ^ code
        found = others.numel() - int(others.count_nonzero())
        if found >= wanted:
            return i + int((others == 0).nonzero()[wanted - 1]) + 1
        wanted -= found
    raise ValueError(f"fewer than {wanted} more values of magnitude code {code}")
