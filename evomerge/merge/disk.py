"""The sink on disk: a plan becomes a folder that transformers loads.

Tensors stream into shards one at a time, so memory holds one tensor and its inputs. The folder is
built under a temporary name beside its place and renamed when whole: it is there or it is not.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from evomerge.errors import InputError, ModelError, OutputExists
from evomerge.merge.checkpoint import _DTYPES, TOKENIZER_FILES, Checkpoint, dtype_name
from evomerge.merge.methods import Spare
from evomerge.merge.plan import Plan, TensorPlan, compute

DEFAULT_SHARD_BYTES = 5_000_000_000
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


class FromFiles:
    """Inputs read from memory-mapped files; nothing is kept."""

    def __init__(self, models: Mapping[str, Checkpoint]) -> None:
        self.spare = Spare()
        self._models = models

    def tensor(self, model: str, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See plan.Inputs."""
        return self._models[model].tensor(name).to(dtype)

    def task_vector(
        self, model: tuple[str, str], base: tuple[str, str], dtype: torch.dtype
    ) -> torch.Tensor:
        """See plan.Inputs."""
        return self.tensor(*model, dtype) - self.tensor(*base, dtype)


def check_free(out: Path, renamed: bool = True) -> Path:
    """Where an output folder will stand, links followed; nothing is written.

    renamed: a finished folder is to take this place, which a mount point and the current directory
    do not allow. Raises OutputExists unless `out` is absent or an empty folder, and InputError
    where no folder can be made.
    """
    try:
        place = out.resolve()
        if place.is_dir():
            if any(place.iterdir()):
                raise OutputExists(f"output folder '{out}' is not empty: name another, or empty it")
        elif place.exists():
            raise OutputExists(f"output '{out}' is a file: name a folder")
        obstacle = _obstacle(place, renamed)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"output '{out}' cannot be written: {reason}") from None
    if obstacle:
        raise InputError(f"output '{out}' cannot be written: {obstacle}: name another folder")
    return place


def _obstacle(place: Path, renamed: bool) -> str | None:
    """Why no folder can be made at `place`, or take its name when `renamed`; None if one can."""
    if renamed and os.path.ismount(place):
        return "it is a mount point, which cannot be replaced"
    if renamed and place == Path.cwd():
        return "it is the current directory, which would be replaced"
    if place.is_symlink():
        return "it is a link in a circle"
    inside = place.is_dir() and not renamed  # files go into the folder that is there
    ground = place if inside else next(p for p in place.parents if p.exists())
    if not ground.is_dir():
        return f"'{ground}' is a file"
    if not os.access(ground, os.W_OK | os.X_OK):
        return f"'{ground}' does not let you write"
    return None


def write_checkpoint(
    plan: Plan,
    models: Mapping[str, Checkpoint],
    out: Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int], None] = lambda written: None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the merged model to `out`: shards, index, config, tokenizer, mergekit_config.yml.

    progress is told the bytes of values written so far; finish may add files to the folder before
    it takes its name. Raises what check_free raises, and ModelError when a file cannot be written.
    """
    place = check_free(out)
    partial = place.parent / f".{place.name}.partial"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # what a killed merge left
        partial.mkdir()
        _write_tensors(plan, models, partial, shard_bytes, progress)
        config = json.dumps(_config(plan, models), indent=2, ensure_ascii=False)
        (partial / "config.json").write_text(config + "\n", encoding="utf-8")
        source = models[plan.tokenizer_from].path
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        (partial / "mergekit_config.yml").write_text(plan.recipe.to_yaml(), encoding="utf-8")
        finish(partial)
        if place.is_dir():
            place.rmdir()
        os.replace(partial, place)
    except OSError as error:
        raise ModelError(f"output '{out}' cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(partial, ignore_errors=True)


def _write_tensors(
    plan: Plan,
    models: Mapping[str, Checkpoint],
    folder: Path,
    shard_bytes: int,
    progress: Callable[[int], None],
) -> None:
    shards = _shards(plan.tensors, shard_bytes)
    inputs, written = FromFiles(models), 0
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(_header(tensors))
            for tensor in tensors:
                _write(file, compute(tensor, plan.recipe.merge_method, inputs, plan.seed))
                weight_map[tensor.name] = name
                written += tensor.bytes
                progress(written)
            file.flush()
            os.fsync(file.fileno())
    index = {"metadata": {"total_size": plan.bytes}, "weight_map": weight_map}
    text = json.dumps(index, indent=2)
    (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def _shards(tensors: Sequence[TensorPlan], limit: int) -> list[list[TensorPlan]]:
    """Tensors in order, cut where a shard would pass the limit; at least one tensor in each."""
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def _header(tensors: Sequence[TensorPlan]) -> bytes:
    """The header of a safetensors file: its length, then JSON, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.bytes
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write(file: BinaryIO, tensor: torch.Tensor) -> None:
    flat = tensor.contiguous().view(-1)
    if flat.numel():
        file.write(flat.view(torch.uint8).numpy().data)


def _config(plan: Plan, models: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """The source's config with the output's depth, dtype and per-layer lists."""
    config = dict(models[plan.config_from].config)
    old_depth = next((config[key] for key in _DEPTH_KEYS if key in config), None)
    for key in _DEPTH_KEYS:
        if key in config:
            config[key] = len(plan.layers)
    for key, value in config.items():
        if isinstance(value, list) and len(value) == old_depth and key.startswith("layer"):
            config[key] = [_of_layer(models[model], key, layer) for model, layer in plan.layers]
    if plan.head and config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = False
    dtypes = {tensor.dtype for tensor in plan.tensors}
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if len(dtypes) == 1:
        config[key] = dtype_name(dtypes.pop())
    return config


def _of_layer(model: Checkpoint, key: str, layer: int) -> Any:
    values = model.config.get(key)
    if not isinstance(values, list) or len(values) <= layer:
        raise ModelError(f"model '{model.path}': '{key}' of its config lacks layer {layer}")
    return values[layer]
