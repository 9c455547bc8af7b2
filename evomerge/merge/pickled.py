"""Pickled weights: a `.bin` file as a mapping of names to tensors, nothing else.

Read only by torch's weights-only loader, which builds tensors and plain containers and runs no
code of the file. Knows nothing of models.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import ModelError


def load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled file, memory-mapped. Raises ModelError.

    Files that torch wrote before version 1.6 cannot be mapped and are refused.
    """
    try:
        data: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise ModelError(f"model file '{path}': {_reason(path, error)}") from None
    if not isinstance(data, dict) or not data:
        raise ModelError(f"model file '{path}' holds no tensors by name: convert it to safetensors")
    for name, value in data.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ModelError(
                f"model file '{path}': '{name}' is no tensor: convert the file to safetensors"
            )
        if value.layout != torch.strided or value.is_quantized:
            raise ModelError(
                f"model file '{path}': '{name}' is sparse or quantised: convert the file to "
                "safetensors"
            )
    return {name: value.detach() for name, value in data.items()}


def _reason(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    if not is_archive:
        return "no archive of torch 1.6 or later, or truncated: load it, save it as safetensors"
    if isinstance(error, pickle.UnpicklingError):
        return "holds more than tensors, which is not loaded: convert it to safetensors"
    return f"truncated or damaged ({str(error).splitlines()[0]}): copy it again"
