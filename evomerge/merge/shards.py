"""Files of tensors: which of a folder hold its weights, their headers, their values on demand.

Safetensors files are memory-mapped; pickled ones are opened only where the caller allows it. Knows
nothing of models: what the tensors are called and whether they fit together is for others.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from evomerge.errors import ModelError

Read = Callable[[int, int], torch.Tensor]
"""read(start, stop): the values [start, stop) of a tensor in its flat C order, as a 1-D tensor on
the CPU that must not be written to."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that can be opened, by their safetensors code."""
_KNOWN = frozenset(DTYPES.values())

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# What libraries call the weights of a model; the first that a folder has is taken.
_STEMS = ("model", "diffusion_pytorch_model")
_PICKLED_STEMS = ("pytorch_model", "diffusion_pytorch_model")
_PART = r"-\d+-of-\d+"
_PICKLED = re.compile(r"(pytorch_model|diffusion_pytorch_model).*\.bin")  # not training_args.bin

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Header:
    """What is known of a tensor without reading it.

    file: where its values are, relative to the checkpoint's folder; after a plus, to its adapter's.
    packed: the values are codes of a quantised format (float8, 4-bit, ...), which no arithmetic
    may touch.
    """

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    packed: bool = False

    @property
    def numel(self) -> int:
        """How many values it has."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Size of the tensor's values."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Shards:
    """The tensors of one folder. `files`: those that hold them, relative to the folder."""

    files: tuple[str, ...]
    headers: Mapping[str, Header]
    values: Callable[[str], Read]


def open_shards(folder: Path, *, allow_pickle: bool = False) -> Shards:
    """Open the weights of a folder: by its index, its one file, or all that it has.

    Raises ModelError for what is missing, truncated, malformed, or pickled without permission.
    """
    index = _index(folder)
    files = _files(folder, index)
    return open_files(folder, files, index, allow_pickle=allow_pickle)


def open_files(
    folder: Path,
    files: list[str],
    index: Mapping[str, str] | None = None,
    *,
    allow_pickle: bool = False,
) -> Shards:
    """Open these files. `index` tells which file a tensor is in, where two have it."""
    index = index or {}
    headers: dict[str, Header] = {}
    reads: dict[str, Callable[[str], Read]] = {}
    for file in files:
        found, reads[file] = _open_file(folder, file, allow_pickle)
        for name, header in found.items():
            if name not in headers or index.get(name) == file:
                headers[name] = header
            elif name not in index:
                raise ModelError(
                    f"model '{folder}': tensor '{name}' is in '{headers[name].file}' and in "
                    f"'{file}': remove the file that is not part of the model"
                )
    missing = index.keys() - headers.keys()
    if missing:
        raise ModelError(f"model '{folder}': tensor '{min(missing)}' of its index is missing")
    if not headers:
        raise ModelError(f"model '{folder}': its weight files hold no tensor")
    return Shards(tuple(files), headers, lambda name: reads[headers[name].file](name))


def weight_files(folder: Path) -> list[str]:
    """The files in a folder that may hold a model's weights: safetensors, or else pickled ones."""
    names = sorted(p.name for p in folder.iterdir() if p.name not in ADAPTER_WEIGHTS)
    found = [name for name in names if name.endswith(".safetensors")]
    return found or [name for name in names if _PICKLED.fullmatch(name)]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not weight_files(folder)


def read_bytes(path: Path) -> bytes:
    """What a model's file holds. Raises ModelError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"model file '{path}' cannot be read: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model '{path.parent}': {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"model file '{path}' is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"model file '{path}' is not a JSON object")
    return data


def check_inside(file: Path, names: Iterable[str]) -> None:
    """Raise ModelError for what a model's file names outside of its own folder: it came with the
    model, and what it names is read, and its name written to."""
    for name in names:
        path = PurePosixPath(name)
        if not path.name or path.is_absolute() or ".." in path.parts:
            raise ModelError(
                f"model file '{file}' names '{name}', which is not in its folder: correct it"
            )


def _index(folder: Path) -> dict[str, str]:
    """The file of each tensor, by the folder's index; empty without one."""
    safetensors = [f"{stem}.safetensors.index.json" for stem in _STEMS]
    pickled = [f"{stem}.bin.index.json" for stem in _PICKLED_STEMS]
    if any(name.endswith(".safetensors") for name in weight_files(folder)):
        pickled = []  # they are copies
    for name in safetensors + pickled:
        index = folder / name
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(v, str) for v in files.values()):
                raise ModelError(f"model file '{index}' maps no tensors to files: copy it again")
            check_inside(index, files.values())
            return files
    return {}


def _files(folder: Path, index: Mapping[str, str]) -> list[str]:
    names = sorted(set(index.values()))
    if names:
        for name in names:
            if not (folder / name).is_file():
                raise ModelError(f"model '{folder}': shard '{name}' of its index is missing")
        return names
    found = weight_files(folder)
    if not found:
        raise ModelError(f"model '{folder}': no safetensors file in the folder: save it as such")
    chosen = _without_variants(found)
    whole = [f"{stem}.safetensors" for stem in _STEMS]
    whole += [f"{stem}.bin" for stem in _PICKLED_STEMS]
    chosen = next(([name] for name in whole if name in chosen), chosen)
    left_out = sorted({*found} - {*chosen})
    if left_out:
        _log.info("model '%s': %s left out", folder, ", ".join(left_out))
    return chosen


def _without_variants(names: list[str]) -> list[str]:
    """Without copies in another precision, such as model.fp16.safetensors beside the model."""
    marked = re.compile(rf"(?P<stem>[^.]+?)({_PART})?\.[^.]+?({_PART})?\.(safetensors|bin)")
    plain = {re.sub(rf"({_PART})?\.(safetensors|bin)$", "", name) for name in names}

    def is_copy(name: str) -> bool:
        match = marked.fullmatch(name)
        return match is not None and match["stem"] in plain

    return [name for name in names if not is_copy(name)]


def _open_file(
    folder: Path, file: str, allow_pickle: bool
) -> tuple[dict[str, Header], Callable[[str], Read]]:
    """The headers of a file, and what gives the values of its tensors by name."""
    if (folder / file).suffix != ".safetensors":
        if not allow_pickle:
            raise ModelError(
                f"model '{folder}': '{file}' is pickled: convert it to safetensors; "
                "`evomerge merge --allow-pickle` reads it, by torch's weights-only loader"
            )
        from evomerge.merge.pickled import load

        tensors = load(folder / file)
        headers = {
            name: _header(folder, file, name, str(tensor.dtype), tensor.dtype, tensor.shape)
            for name, tensor in tensors.items()
        }
        return headers, lambda name: _spans(tensors[name])
    try:
        handle: Any = safe_open(folder / file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"model file '{folder / file}' is truncated or no safetensors file ({error}): "
            "copy it again"
        ) from None
    headers = {}
    for name in handle.keys():  # noqa: SIM118  # a handle is no mapping
        view = handle.get_slice(name)
        code = view.get_dtype()
        headers[name] = _header(folder, file, name, code, DTYPES.get(code), view.get_shape())
    return headers, lambda name: _spans(handle.get_tensor(name))


def _header(
    folder: Path, file: str, name: str, code: str, dtype: torch.dtype | None, shape: Sequence[int]
) -> Header:
    """A tensor's header. code: what its file calls the dtype."""
    if dtype is None or dtype not in _KNOWN:
        raise ModelError(
            f"model '{folder}': tensor '{name}' is {code}: not supported: known: "
            f"{', '.join(DTYPES)}"
        )
    packed = dtype.is_floating_point and dtype.itemsize == 1
    return Header(file, tuple(shape), dtype, packed)


def _spans(tensor: torch.Tensor) -> Read:
    flat = tensor.reshape(-1)
    return lambda start, stop: flat[start:stop]
