"""LoRA adapters as PEFT saves them, applied to a checkpoint while its values are read.

The result is a checkpoint whose headers and values are those of the adapted model; nothing is
written, and only a few rows of an update exist at a time. Roundings are those of PEFT's
`merge_and_unload`, so that a merge of BASE+ADAPTER is the merge of the model that PEFT would save.
Knows nothing of recipes or of where folders come from.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import ModelError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.shards import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Header,
    Read,
    Shards,
    open_files,
    read_json,
)

# What a LoRA may be that is not computed here, by the key of its config.
_VARIANTS = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron LoRA",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable tokens",
    "use_bdlora": "BD-LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}
# Initialisations that leave the base as it is. The others change the base before they train, and
# the files do not hold that base.
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")

_PREFIX = "base_model.model."
_FACTORS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "embedding a",
    ".lora_embedding_B": "embedding b",
}
# What may stand before a tensor's own name in the adapter and not in the base's files, or there
# and not here: the classes of one architecture wrap the same layers differently.
_WRAPPERS = re.compile(r"^((model|language_model|transformer)\.)+")

# Rows of an update that are multiplied at once: always as many, so that a value does not depend
# on the span it is read in, and enough that BLAS sums as it does for the whole product.
_ROWS = 32


@dataclass(frozen=True)
class _Update:
    """scaling * B A, or its transpose. a: [r, in]; b: [out, r].

    rounded: it is rounded to the weight's dtype before it is added, as PEFT does for embeddings.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    transposed: bool
    rounded: bool

    @property
    def shape(self) -> tuple[int, int]:
        """That of the weight it is added to."""
        out, width = len(self.b), self.a.shape[1]
        return (width, out) if self.transposed else (out, width)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), flat."""
        if self.transposed:
            product = (self.b @ self.a[:, start:stop]).T
        else:
            product = self.b[start:stop] @ self.a
        return (product * self.scaling).reshape(-1)


@dataclass(frozen=True)
class _Adapter:
    """An adapter's files, its tensors sorted by what they do.

    factors: of each module with an update, the tensor that is each factor. wholes: the tensors
    that replace one of the base, with the name they have there.
    """

    folder: Path
    config: Mapping[str, Any]
    stored: Shards
    factors: Mapping[str, Mapping[str, str]]
    wholes: Mapping[str, str]

    @classmethod
    def open(cls, folder: Path, allow_pickle: bool) -> "_Adapter":
        config = read_json(folder / ADAPTER_CONFIG)
        _check_supported(folder, config)
        file = next((name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
        if file is None:
            raise ModelError(f"adapter '{folder}': {ADAPTER_WEIGHTS[0]} is missing")
        stored = open_files(folder, [file], allow_pickle=allow_pickle)
        factors: dict[str, dict[str, str]] = {}
        wholes: dict[str, str] = {}
        for key in stored.headers:
            name = key.removeprefix(_PREFIX)
            suffix = next((suffix for suffix in _FACTORS if name.endswith(suffix)), None)
            if suffix is not None:
                factors.setdefault(name.removesuffix(suffix), {})[_FACTORS[suffix]] = key
            elif "lora_" in name or ".token_adapter." in name:
                raise ModelError(f"adapter '{folder}': tensor '{key}' is of an unknown kind")
            else:
                wholes[key] = name.replace(".base_layer.", ".")
        return cls(folder, config, stored, factors, wholes)

    def error(self, what: str) -> ModelError:
        return ModelError(f"adapter '{self.folder}': {what}")

    def factor(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        """A factor in the dtype that a weight of `dtype` is updated in."""
        header = self.stored.headers[key]
        values = self.stored.values(key)(0, header.numel).view(header.shape)
        return values.to(torch.promote_types(dtype, torch.float32))

    def scaling(self, module: str, rank: int) -> float:
        """What the product of a module's factors is multiplied by."""
        stated = self._number("r", "rank_pattern", module)
        if stated != rank:
            raise self.error(f"'{module}' has rank {rank}, by {ADAPTER_CONFIG} {stated:g}")
        alpha = self._number("lora_alpha", "alpha_pattern", module)
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _number(self, key: str, patterns: str, module: str) -> float:
        """A number of the config; the first pattern that fits the end of the name decides."""
        value, listed = self.config.get(key), self.config.get(patterns) or {}
        if not isinstance(listed, Mapping):
            raise self.error(
                f"'{patterns}' of {ADAPTER_CONFIG} is {listed}: give numbers by module"
            )
        for pattern, special in listed.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    value = special
                    break
            except re.error as error:
                raise self.error(f"'{pattern}' of {patterns} is no pattern: {error}") from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"'{key}' of {ADAPTER_CONFIG} is {value}: give a number")
        return value


def apply(base: Checkpoint, folder: Path, uri: str, *, allow_pickle: bool = False) -> Checkpoint:
    """The model that a PEFT adapter makes of `base`. `uri` names the adapter durably.

    A weight becomes W + scaling * B A, scaling = alpha / r, or alpha / sqrt(r) for rank-stabilised
    LoRA (Hu et al. 2021, section 4.1; Kalajdzievski 2023, section 3), computed in float32 (float64
    for such a W) and rounded once to the dtype of W; an update of embeddings is rounded to it
    first. Modules that were trained whole replace the base's. Raises ModelError for adapters of
    another kind and for a tensor of the adapter that has no place in the base.
    """
    adapter = _Adapter.open(folder, allow_pickle)
    wholes = _wholes(adapter, base)
    headers = {**base.headers, **{name: header for name, (header, _) in wholes.items()}}
    updates, biases = _updates(adapter, headers, _Names(headers))

    def replaced(name: str) -> Read:
        return wholes[name][1] if name in wholes else base.values(name)

    config = dict(base.config)
    if headers.keys() - base.headers.keys():  # a head of its own where the base's is tied
        config["tie_word_embeddings"] = False
    own = (ADAPTER_CONFIG, *adapter.stored.files)
    return replace(
        base,
        config=config,
        headers=headers,
        uri=f"{base.uri}+{uri}",
        sources={**base.sources, **{f"+{name}": folder / name for name in own}},
        read=_Adapted(replaced, headers, updates, biases),
    )


def _check_supported(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"adapter '{folder}' is of the kind {kind}: only LORA can be applied")
    for key, variant in _VARIANTS.items():
        if config.get(key):
            raise ModelError(
                f"adapter '{folder}' uses {variant} ('{key}'), which cannot be applied here: merge "
                "it into its base with PEFT and name the result"
            )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_INITIALISATIONS:
        raise ModelError(
            f"adapter '{folder}' was initialised by '{start}', which changes its base as well: "
            "merge it into its base with PEFT and name the result"
        )


class _Names:
    """Finds the tensor that an adapter calls by a name that is wrapped otherwise."""

    def __init__(self, headers: Mapping[str, Header]) -> None:
        self._headers = headers
        self._unwrapped: dict[str, list[str]] = {}
        for name in headers:
            self._unwrapped.setdefault(_WRAPPERS.sub("", name), []).append(name)

    def find(self, name: str) -> str | None:
        """The name as the model has it; None where it has none, or several."""
        if name in self._headers:
            return name
        found = self._unwrapped.get(_WRAPPERS.sub("", name), [])
        return found[0] if len(found) == 1 else None


def _wholes(adapter: _Adapter, base: Checkpoint) -> dict[str, tuple[Header, Read]]:
    """Header and values of each tensor that replaces one of the base, in the base's dtype."""
    names = _Names(base.headers)
    wholes: dict[str, tuple[Header, Read]] = {}
    for key, name in adapter.wholes.items():
        header = adapter.stored.headers[key]
        target = names.find(name)
        if target is not None:
            old = base.headers[target]
        elif name.endswith("lm_head.weight"):  # the base's is tied to its embeddings
            target, old = name, replace(header, dtype=base.dtype)
        else:
            raise adapter.error(f"tensor '{key}' has no place in model '{base.path}'")
        if old.shape != header.shape or old.packed:
            raise adapter.error(
                f"tensor '{key}' {list(header.shape)} cannot replace '{target}' {list(old.shape)} "
                f"({old.dtype}): name the base that it was made for"
            )
        if target in wholes:
            raise adapter.error(f"it replaces '{target}' twice")
        own = replace(header, file=f"+{header.file}", dtype=old.dtype)
        wholes[target] = (own, partial(_cast, adapter.stored.values(key), old.dtype))
    return wholes


def _cast(values: Read, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
    return values(start, stop).to(dtype)


def _updates(
    adapter: _Adapter, headers: Mapping[str, Header], names: _Names
) -> tuple[dict[str, _Update], dict[str, torch.Tensor]]:
    """What is added to each weight, and to each bias."""
    weights: dict[str, _Update] = {}
    biases: dict[str, torch.Tensor] = {}

    def target(module: str, kind: str) -> str:
        name = names.find(f"{module}.{kind}")
        if name is None:
            raise adapter.error(
                f"it updates '{module}.{kind}', which the base does not have (a head may be tied "
                "to the embeddings): name the base that it was made for"
            )
        if headers[name].packed or not headers[name].dtype.is_floating_point:
            raise adapter.error(f"'{name}' of the base is quantised: name the model it was made of")
        if name in weights or name in biases:
            raise adapter.error(f"it updates '{name}' twice")
        return name

    for module, keys in adapter.factors.items():
        name = target(module, "weight")
        weights[name] = update = _update(adapter, module, keys, headers[name].dtype)
        if "bias" in keys:
            name = target(module, "bias")
            bias = adapter.factor(keys["bias"], headers[name].dtype)
            if bias.shape != headers[name].shape:
                raise adapter.error(f"'{keys['bias']}' is {list(bias.shape)}: not as '{name}'")
            biases[name] = bias * update.scaling
    weights = _turned(weights, headers, bool(adapter.config.get("fan_in_fan_out")))
    for name, update in weights.items():
        if update.shape != headers[name].shape:
            raise adapter.error(
                f"its update of '{name}' is {list(update.shape)}, the weight is "
                f"{list(headers[name].shape)}: name the base that it was made for"
            )
    return weights, biases


def _update(adapter: _Adapter, module: str, keys: Mapping[str, str], dtype: torch.dtype) -> _Update:
    """The update of a weight of this dtype; [out, in], the other way round of embeddings."""
    embedding = any(factor.startswith("embedding") for factor in keys)
    kind = "embedding " if embedding else ""
    if keys.keys() - {"bias"} != {f"{kind}a", f"{kind}b"}:
        found = ", ".join(sorted(keys.values()))
        raise adapter.error(f"an update has two factors, '{module}' has {found}")
    a, b = (adapter.factor(keys[kind + factor], dtype) for factor in "ab")
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise adapter.error(
            f"'{module}' has factors {list(a.shape)} and {list(b.shape)}: only updates of matrices "
            "can be applied"
        )
    return _Update(a, b, adapter.scaling(module, len(a)), embedding, rounded=embedding)


def _turned(
    updates: Mapping[str, _Update], headers: Mapping[str, Header], fan_in_fan_out: bool
) -> dict[str, _Update]:
    """The updates of linear layers transposed where weights are stored [in, out], as in GPT-2.

    Shapes tell; a square weight is stored as the others are, or as the adapter's config says.
    """
    turned = {
        name: not update.rounded and update.shape[::-1] == headers[name].shape
        for name, update in updates.items()
    }
    square = {name for name, update in updates.items() if len(set(update.shape)) == 1}
    squares_too = fan_in_fan_out or any(turned[name] for name in turned.keys() - square)
    return {
        name: replace(update, transposed=True)
        if turned[name] and (name not in square or squares_too)
        else update
        for name, update in updates.items()
    }


class _Adapted:
    """What reads the adapted model's tensors: the base's, plus what is added to some.

    Spans may end anywhere, rows are computed in fixed blocks: the last one is kept.
    """

    def __init__(
        self,
        base: Callable[[str], Read],
        headers: Mapping[str, Header],
        updates: Mapping[str, _Update],
        biases: Mapping[str, torch.Tensor],
    ) -> None:
        self._base = base
        self._headers = headers
        self._updates = updates
        self._biases = biases
        self._last: tuple[str, int, torch.Tensor] | None = None

    def __call__(self, name: str) -> Read:
        values = self._base(name)
        if name in self._biases:
            bias, dtype = self._biases[name], self._headers[name].dtype
            return lambda start, stop: (values(start, stop) + bias[start:stop]).to(dtype)
        return partial(self._read, name, values) if name in self._updates else values

    def _read(self, name: str, values: Read, start: int, stop: int) -> torch.Tensor:
        if start == stop:
            return values(start, stop)
        size = _ROWS * self._headers[name].shape[1]
        pieces = [
            self._block(name, block, values)[max(start - block * size, 0) : stop - block * size]
            for block in range(start // size, -(-stop // size))
        ]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _block(self, name: str, block: int, values: Read) -> torch.Tensor:
        """Updated rows [block * _ROWS, (block + 1) * _ROWS), or up to the last row; flat."""
        last = self._last  # read once: another thread may replace it
        if last is not None and last[:2] == (name, block):
            return last[2]
        header, update = self._headers[name], self._updates[name]
        count, width = header.shape
        start, stop = block * _ROWS, min((block + 1) * _ROWS, count)
        whole = max(stop - _ROWS, 0)  # as many rows in the last block as in the others
        added = update.rows(whole, stop)[(start - whole) * width :]
        if update.rounded:
            added = added.to(header.dtype)
        rows = (values(start * width, stop * width) + added).to(header.dtype)
        self._last = (name, block, rows)
        return rows
