"""The sink in memory: a plan is written into the parameters of a live model, without any disk.

Models and their task vectors stay on the device as far as there is room, and what is known of them
as a whole (norms, angles, counts of magnitudes) as long as they do; the rest streams from its
files. Knows nothing of what the model computes.
"""

import threading
from collections.abc import Callable, Hashable, Mapping

import torch

from evomerge.errors import ModelError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.files import FromFiles
from evomerge.merge.memory import spare_memory
from evomerge.merge.methods import drawn
from evomerge.merge.operand import Facts, Operand, Read
from evomerge.merge.parallel import each
from evomerge.merge.plan import COPY, Input, Plan, TensorPlan, compute

_WORTH_THREADS = 1 << 24  # bytes: starting threads costs as much as merging a small model


class Resident:
    """Models held on one device. Casts and task vectors are made on first use, then kept.

    room: bytes that may be held on the device. host_room: bytes of what does not fit there that
    may be held in the host's memory, pinned for a GPU; the rest is read from its files at every
    use. held, host_held: how many bytes are. streamed: bytes that every candidate reads from files.
    """

    def __init__(
        self,
        models: Mapping[str, Checkpoint],
        device: torch.device,
        room: int | None = None,
        host_room: int | None = None,
    ) -> None:
        self.room = spare_memory(device) if room is None else room
        if host_room is None:
            host_room = spare_memory(torch.device("cpu")) if device.type == "cuda" else 0
        self.host_room = host_room
        self.held = self.host_held = 0
        self._all = sum(h.bytes for model in models.values() for h in model.headers.values())
        self._device = device
        self._files = FromFiles(models, device)
        self._kept: dict[Hashable, tuple[torch.Tensor, Facts]] = {}
        self._streamed: dict[Hashable, int] = {}
        self._facts: dict[Hashable, Facts] = {}
        self._making: set[Hashable] = set()
        self._lock = threading.Lock()

    @property
    def streamed(self) -> int:
        """See above."""
        return sum(self._streamed.values())

    @property
    def to_come(self) -> int:
        """Bytes that are likely to be held on the device some day, beyond those that are: of every
        model, where there is room."""
        return max(0, min(self.room, self._all) - self.held)

    def operand(self, source: Input, plan: TensorPlan) -> Operand:
        """See plan.Inputs."""
        key = (source, plan.compute_dtype, plan.shape)
        return self._found(key, lambda: self._files.operand(source, plan))

    def task_vector(self, source: Input, base: Operand, plan: TensorPlan) -> Operand:
        """See plan.Inputs."""
        key = (source, plan.base, plan.compute_dtype, plan.shape)
        return self._found(key, lambda: self._files.task_vector(source, base, plan))

    def draws(self, seed: int, plan: TensorPlan) -> Read:
        """See plan.Inputs."""

        def make() -> Operand:
            return Operand(drawn(seed), plan.shape, torch.int16, self._device)

        return self._found(("draws", seed, plan.shape), make).span

    def _found(self, key: Hashable, make: Callable[[], Operand]) -> Operand:
        """In memory if there is room, else to be read again; with what is known of it."""
        kept = self._kept.get(key)
        if kept is not None:
            return self._operand(*kept)
        operand = make()
        operand.facts = self._facts.setdefault(key, operand.facts)
        with self._lock:  # one thread makes it, others that want it read for themselves
            if key in self._streamed or key in self._making:
                return operand
            on_device = self.held + operand.nbytes <= self.room
            on_host = self._host_bytes(operand)
            if not on_device and self.host_held + on_host > self.host_room:
                self._streamed[key] = operand.nbytes
                return operand
            self._making.add(key)
            self.held += operand.nbytes if on_device else 0
            self.host_held += 0 if on_device else on_host
        values = operand.whole() if on_device else self._on_host(operand)
        self._kept[key] = values, operand.facts
        return self._operand(values, operand.facts)

    def _operand(self, values: torch.Tensor, facts: Facts) -> Operand:
        """A new one for every use: each keeps its last span, which of values on the host is a copy
        on the device."""
        flat = values.view(-1)

        def read(start: int, stop: int) -> torch.Tensor:
            return flat[start:stop]

        return Operand(read, values.shape, values.dtype, self._device, facts=facts)

    def _on_host(self, operand: Operand) -> torch.Tensor:
        """Its values, where a GPU copies them from at the full speed of the bus; the device, which
        is full, holds no more than a span."""
        pinned = self._device.type == "cuda"
        return operand.into(torch.empty(operand.numel, dtype=operand.dtype, pin_memory=pinned))

    def _host_bytes(self, operand: Operand) -> int:
        """What it takes there: torch allocates pinned memory in powers of two."""
        if self._device.type != "cuda":
            return operand.nbytes
        return 1 << max(0, operand.nbytes - 1).bit_length()

    def write(
        self,
        plan: Plan,
        parameters: Mapping[str, torch.Tensor],
        given_up: threading.Event | None = None,
    ) -> None:
        """Merge into live parameters, by tensor name. Raises ModelError if names or shapes do not
        match.

        Values are rounded to the plan's dtype first, whatever the live dtype: they are those that
        the sink on disk would write. Live parameters that the plan lacks stay as they are.
        given_up: of a merge in the background, which takes no thread but its own: once it is set no
        further tensor is merged.
        """
        # Buffers that are copied follow from the config: a live model may make its own.
        tensors = [t for t in plan.tensors if t.name in parameters or t.method != COPY]
        missing = [tensor.name for tensor in tensors if tensor.name not in parameters]
        if missing:
            raise ModelError(f"the live model has no tensor '{missing[0]}'")
        for tensor in tensors:
            shape = tuple(parameters[tensor.name].shape)
            if shape != tensor.shape:
                raise ModelError(
                    f"tensor '{tensor.name}' is {list(tensor.shape)} in the merge and "
                    f"{list(shape)} in the live model: correct config.json of the models"
                )

        def fill(tensor: TensorPlan, stopped: threading.Event) -> None:
            if given_up is not None and given_up.is_set():
                return
            with torch.no_grad():  # which every thread has its own of
                _fill(parameters[tensor.name].data, compute(tensor, self, plan.seed))

        many = self._device.type == "cpu" and plan.bytes > _WORTH_THREADS and given_up is None
        each(fill, tensors, torch.get_num_threads() if many else 1)


def _fill(target: torch.Tensor, merged: Operand) -> None:
    if not target.is_contiguous():
        target.copy_(merged.whole().view(target.shape))
        return
    merged.into(target.view(-1))
