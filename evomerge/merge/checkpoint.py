"""A model on disk: config, tensor headers, tensors on demand, and what its files hash to.

Opens only `config.json` and safetensors files; never unpickles. Knows nothing of merging.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from evomerge.errors import ModelError
from evomerge.layout import Layout, infer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Header:
    """What is known of a tensor without reading it."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the tensor's values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """An opened model folder. Values are read by `tensor`, memory-mapped, never all at once."""

    path: Path
    config: Mapping[str, Any]
    headers: Mapping[str, Header]
    _handles: Mapping[str, Any] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Open a model folder. Raises ModelError for what is missing, truncated or malformed."""
        path = Path(path)
        if not path.is_dir():
            raise ModelError(f"model '{path}': no such folder: give the folder of a saved model")
        config = _read_json(path / "config.json")
        handles = {name: _open(path / name) for name in _weight_files(path)}
        headers: dict[str, Header] = {}
        for file, handle in handles.items():
            for name in handle.keys():  # noqa: SIM118  # a handle is no mapping
                view = handle.get_slice(name)
                code = view.get_dtype()
                if code not in _DTYPES:
                    raise ModelError(f"model '{path}': tensor '{name}' is {code}: not supported")
                headers[name] = Header(file, tuple(view.get_shape()), _DTYPES[code])
        missing = _indexed(path).keys() - headers.keys()
        if missing:
            raise ModelError(f"model '{path}': tensor '{min(missing)}' of its index is missing")
        if not headers:
            raise ModelError(f"model '{path}': its safetensors files hold no tensor")
        return cls(path, config, headers, handles)

    def tensor(self, name: str) -> torch.Tensor:
        """The values of a tensor, on the CPU, backed by the file. Raises ModelError."""
        header = self.headers.get(name)
        if header is None:
            raise ModelError(f"model '{self.path}' has no tensor '{name}'")
        tensor: torch.Tensor = self._handles[header.file].get_tensor(name)
        return tensor

    @cached_property
    def layout(self) -> Layout:
        """Where each tensor stands."""
        try:
            return infer(self.headers)
        except ModelError as error:
            raise ModelError(f"model '{self.path}': {error}") from None

    @cached_property
    def dtype(self) -> torch.dtype:
        """What most of its values are stored as."""
        sizes: dict[torch.dtype, int] = {}
        for header in self.headers.values():
            sizes[header.dtype] = sizes.get(header.dtype, 0) + header.bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @cached_property
    def files(self) -> dict[str, str]:
        """SHA-256 of each file that makes the model what it is, by name."""
        names = {"config.json", *TOKENIZER_FILES, *self._handles}
        present = sorted(name for name in names if (self.path / name).is_file())
        return {name: _sha256(self.path / name) for name in present}

    @cached_property
    def sha(self) -> str:
        """One SHA-256 for the whole content: the same files anywhere give the same."""
        text = json.dumps(self.files, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """Such as 'bfloat16', as recipes spell it."""
    return str(dtype).removeprefix("torch.")


def _indexed(path: Path) -> dict[str, str]:
    """The file of each tensor, by the model's index; empty without one."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        raise ModelError(f"model file '{index}' maps no tensors to files: copy it again")
    return shards


def _weight_files(path: Path) -> list[str]:
    names = sorted(set(_indexed(path).values()))
    if names:
        for name in names:
            if not (path / name).is_file():
                raise ModelError(f"model '{path}': shard '{name}' of its index is missing")
        return names
    names = sorted(p.name for p in path.glob("*.safetensors"))
    if not names:
        raise ModelError(f"model '{path}': no safetensors file in the folder: save it as such")
    if len(names) > 1 and "model.safetensors" in names:
        return ["model.safetensors"]
    return names


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"model file '{path}' is truncated or no safetensors file ({error}): copy it again"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model '{path.parent}': {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"model file '{path}' is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"model file '{path}' is not a JSON object")
    return data


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
