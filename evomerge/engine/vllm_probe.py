"""Whether vLLM computes with the tensors that it was given: read back, exactly, after each swap.

vLLM fuses tensors, keeps only its own share of them, and on a CPU packs them out of reach, so they
are not just compared where they lie in memory: a matrix is multiplied with unit vectors, which
gives its columns to the last bit, whatever form it is kept in. Knows nothing of merging.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from evomerge.errors import ModelError
from evomerge.layout import infer

_COLUMNS = 2  # of each matrix
_STRIDE = 7919  # a prime: other columns with every swap

# A tensor's place: its layer, None outside them, and what it is called there; see layout.Layout.
At = tuple[int | None, str]


class Probe:
    """Notes columns of what is sent, and compares them with what is live.

    Linear layers, embeddings, heads and vectors such as those of norms are understood; of other
    modules (experts, state spaces) nothing is compared.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        owners = {
            f"{name}.{leaf}": (module, leaf)
            for name, module in model.named_modules()
            for leaf, parameter in module.named_parameters(recurse=False)
            if isinstance(module, LinearBase | VocabParallelEmbedding) or parameter.ndim == 1
        }
        packed = getattr(model, "packed_modules_mapping", {})
        self._names = dict(infer(owners).index)
        self._live = {at: owners[name] for at, name in self._names.items()}
        self._parts = {at: _parts(at, packed) for at in self._live}
        self._owner = {part: at for at, parts in self._parts.items() for part in parts}
        self._sent: dict[At, list[Tensor]] = {}
        self._swap = 0

    def forget(self) -> None:
        """Another swap begins."""
        self._sent.clear()
        self._swap += 1

    def note(self, at: At, values: Tensor) -> None:
        """What is sent for a place in the model's files."""
        owner = self._owner.get(at)
        if owner is None or values.ndim > 2:
            return
        module, _ = self._live[owner]
        parts = self._parts[owner]
        forms = [values]  # that vLLM may keep it in: some architectures store matrices transposed
        if values.ndim == 2 and len(parts) == 1 and isinstance(module, LinearBase):
            shape = (module.output_size, module.input_size)
            forms = [form for form in (values, values.T) if tuple(form.shape) == shape]
        if len(parts) == 1 and len(getattr(module, "output_sizes", [])) > 1 < module.tp_size:
            forms = []  # fused in the files already: which rows are whose is not known here
        rows = [_own_rows(module, form, parts.index(at)) for form in forms]
        self._sent[at] = [self._excerpt(module, form).clone() for form in rows]

    def wrong(self, depth: int) -> str | None:
        """The name of a tensor of the first `depth` layers, or outside the layers, that is not what
        was sent. Raises ModelError for one that nothing was sent for."""
        for at, (module, leaf) in self._live.items():
            if at[0] is not None and at[0] >= depth:
                continue
            parts = self._sources(at, getattr(module, leaf))
            missing = [part for part in parts if part not in self._sent]
            if missing:
                raise ModelError(
                    f"the models have no tensor '{self._names[at]}', which their config asks for"
                )
            forms = [torch.cat(form) for form in zip(*(self._sent[p] for p in parts), strict=True)]
            for live in self._read(module, leaf) if forms else ():
                if not any(_same(live, form) for form in forms):
                    return self._names[at]
        return None

    def _sources(self, at: At, parameter: Tensor) -> tuple[At, ...]:
        """The places in the files that a live tensor comes from; of a tied head the embeddings'."""
        if any(part in self._sent for part in self._parts[at]):
            return self._parts[at]
        twins = (
            self._parts[other]
            for other, (module, leaf) in self._live.items()
            if getattr(module, leaf) is parameter and self._parts[other][0] in self._sent
        )
        return next(twins, self._parts[at])

    def _read(self, module: Any, leaf: str) -> Iterator[Tensor]:
        """A live tensor, an excerpt of a matrix: as it lies in memory, and as it is computed with
        where that is another form."""
        parameter = getattr(module, leaf)
        if parameter.ndim == 2:
            yield self._excerpt(module, parameter, 0)
        elif parameter.numel():
            yield parameter
        if leaf == "weight" and hasattr(module, "cpu_linear"):
            size = _width(module)
            units = torch.zeros(_COLUMNS, size, dtype=parameter.dtype, device=parameter.device)
            units[range(_COLUMNS), self._columns(size)] = 1
            yield module.quant_method.apply(module, units, None).T

    def _excerpt(self, module: Any, values: Tensor, start: int | None = None) -> Tensor:
        """Columns of a matrix that are this worker's, of which the first is number `start` of those
        that the matrix has; a vector whole."""
        if values.ndim < 2:
            return values
        if start is None:
            start = module.tp_rank * _width(module) if isinstance(module, RowParallelLinear) else 0
        return values[:, [start + column for column in self._columns(_width(module))]]

    def _columns(self, width: int) -> list[int]:
        return [(self._swap * _STRIDE + i * (width // _COLUMNS)) % width for i in range(_COLUMNS)]


def _parts(at: At, packed: Mapping[str, Sequence[str]]) -> tuple[At, ...]:
    """What of the files is fused into a live tensor: gate_proj and up_proj into gate_up_proj."""
    layer, key = at
    *path, module, leaf = ["", *key.split(".")]
    names = packed.get(module, [module])
    return tuple((layer, ".".join([*path, name, leaf]).lstrip(".")) for name in names)


def _width(module: Any) -> int:
    """How many columns this worker has of a module's matrix."""
    if isinstance(module, VocabParallelEmbedding):
        return int(module.embedding_dim)
    return int(getattr(module, "input_size_per_partition", module.input_size))


def _own_rows(module: Any, values: Tensor, part: int) -> Tensor:
    """Those that this worker has of a tensor, which is this part of a fused one."""
    if isinstance(module, VocabParallelEmbedding):
        own = module.shard_indices
        return values[int(own.org_vocab_start_index) : int(own.org_vocab_end_index)]
    if not isinstance(module, ColumnParallelLinear):
        return values
    copies = 1
    if isinstance(module, QKVParallelLinear) and part > 0:  # of few heads of keys and values
        copies = int(module.num_kv_head_replicas)
    return values.chunk(int(module.tp_size) // copies)[int(module.tp_rank) // copies]


def _same(live: Tensor, sent: Tensor) -> bool:
    """To the last bit, after rounding to the live dtype. Vocabularies may be padded."""
    return torch.equal(live[: len(sent)].float(), sent.to(live.device, live.dtype).float())
