"""The sink on disk: a plan becomes a folder that transformers, or diffusers, loads.

The folder is built under a temporary name beside its place and renamed when whole: it is there or
it is not.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from evomerge.errors import ModelError
from evomerge.merge.chat_template import chosen_template, with_template
from evomerge.merge.checkpoint import Checkpoint, dtype_name
from evomerge.merge.depth import layer_config
from evomerge.merge.files import FromFiles
from evomerge.merge.parallel import default_threads
from evomerge.merge.place import check_free, whole
from evomerge.merge.plan import Plan, TensorPlan, compute
from evomerge.merge.shards import read_bytes
from evomerge.merge.tokenizer import tokenizer_files
from evomerge.merge.writer import TensorFile, write_files

RECIPE = "mergekit_config.yml"  # of what a folder was merged
DEFAULT_SHARD_BYTES = 5_000_000_000
_INDEX = "model.safetensors.index.json"
_LANGUAGE_PARTS = ("default", "text_decoder")  # whose layers a config counts


def write_checkpoint(
    plan: Plan,
    models: Mapping[str, Checkpoint],
    out: Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    tokenizer: bool = True,
    device: torch.device = torch.device("cpu"),  # noqa: B008  # immutable
    threads: int | None = None,
    progress: Callable[[int], None] = lambda written: None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the merged model to `out`: shards, index, config, tokenizer, mergekit_config.yml.

    tokenizer: whether its files are written. device: what computes. threads: how many, see
    default_threads. progress is told the bytes of values written so far; finish may add
    files to the folder before it takes its name. Raises what check_free raises, ModelError where a
    file cannot be read or written, and RecipeError for values that the method cannot merge.
    """
    check_free(out)
    others = texts(plan, models, tokenizer)
    try:
        with whole(out) as folder:
            files = tensor_files(plan, models, folder, shard_bytes)
            for parent in {file.path.parent for file in files}:
                parent.mkdir(parents=True, exist_ok=True)
            inputs = FromFiles(models, device)
            threads = threads or default_threads(device)
            write_files(files, lambda t: compute(t, inputs, plan.seed), progress, threads)
            for name, text in {**others, **_indexes(files, folder)}.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(text)
            finish(folder)
    except OSError as error:
        raise ModelError(f"output '{out}' cannot be written: {error.strerror or error}") from error


def texts(plan: Plan, models: Mapping[str, Checkpoint], tokenizer: bool) -> dict[str, bytes]:
    """Every file but those of tensors, by its name in the folder. Raises ModelError where a config
    cannot say what the plan makes, RecipeError for a chat template that is none."""
    donor = models[plan.donor]
    found = {RECIPE: plan.recipe.to_yaml().encode()}
    if donor.plain:
        return found | {name: read_bytes(donor.path / name) for name in donor.companions}
    config = json.dumps(_config(plan, models), indent=2, ensure_ascii=False)
    found["config.json"] = f"{config}\n".encode()
    generation = donor.path / "generation_config.json"
    if generation.is_file():
        found[generation.name] = read_bytes(generation)
    return found | (_tokenizer(plan, models) if tokenizer else {})


def _tokenizer(plan: Plan, models: Mapping[str, Checkpoint]) -> dict[str, bytes]:
    files = plan.vocabulary.files if plan.vocabulary else tokenizer_files(models[plan.donor])
    setting = plan.recipe.chat_template
    template = None if setting is None else chosen_template(setting, models)
    return dict(files) if template is None else with_template(files, template)


def tensor_files(
    plan: Plan, models: Mapping[str, Checkpoint], folder: Path, limit: int
) -> list[TensorFile]:
    """Tensors in order, cut where a file would pass the limit; a plain state dict keeps the files
    of its donor."""
    if models[plan.donor].plain:
        return _donors_files(plan, models[plan.donor], folder)
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in plan.tensors:
        if shards[-1] and size + tensor.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    count = len(shards)
    names = ["model.safetensors"]
    if count > 1:
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return [
        TensorFile(folder / name, tuple((tensor.name, tensor) for tensor in shard))
        for name, shard in zip(names, shards, strict=True)
    ]


def _donors_files(plan: Plan, donor: Checkpoint, folder: Path) -> list[TensorFile]:
    tensors: dict[Path, list[tuple[str, TensorPlan]]] = {}
    for tensor in plan.tensors:
        file = PurePosixPath(donor.headers[tensor.name].file)
        if file.suffix != ".safetensors":  # under the names that loaders look for
            name = file.name.removesuffix(file.suffix)
            if name.startswith("pytorch_model"):
                name = name.removeprefix("pytorch_")
            file = file.with_name(f"{name}.safetensors")
        component = "" if str(file.parent) == "." else f"{file.parent}/"
        entry = (tensor.name.removeprefix(component), tensor)
        tensors.setdefault(folder / file, []).append(entry)
    return [TensorFile(path, tuple(own)) for path, own in tensors.items()]


def _indexes(files: Sequence[TensorFile], folder: Path) -> dict[str, bytes]:
    """Which file of its folder holds each tensor, by the index's name; for a language model always,
    for a component where it has several files."""
    found = {}
    for parent in dict.fromkeys(file.path.parent for file in files):
        own = [file for file in files if file.path.parent == parent]
        stem = own[0].path.name.split("-0")[0].removesuffix(".safetensors")
        if stem != "model" and len(own) == 1:
            continue
        data = {
            "metadata": {"total_size": sum(plan.bytes for file in own for _, plan in file.tensors)},
            "weight_map": {name: file.path.name for file in own for name, _ in file.tensors},
        }
        index = parent.relative_to(folder) / f"{stem}.safetensors.index.json"
        found[index.as_posix()] = f"{json.dumps(data, indent=2)}\n".encode()
    return found


def _config(plan: Plan, models: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """The donor's config with the output's depth, per-layer lists, vocabulary and dtype."""
    donor = models[plan.donor]
    config = dict(donor.config)
    for part, layers in plan.layers.items():
        whole = [layer for _, layer in layers] == list(range(donor.parts[part].layers))
        if whole and len({name for name, _ in layers}) <= 1:
            continue
        if part not in _LANGUAGE_PARTS:
            raise ModelError(f"slices of '{part}': no config says which layers it has: merge whole")
        configs = {name: models[name].config for name, _ in layers} | {plan.donor: donor.config}
        config |= layer_config(configs, layers, plan.donor)
    if plan.vocabulary is not None:
        config = plan.vocabulary.configured(config)
    dtypes = {tensor.dtype for tensor in plan.tensors if tensor.dtype.is_floating_point}
    return _with(config, plan.head, dtype_name(dtypes.pop()) if len(dtypes) == 1 else None)


def _with(config: dict[str, Any], head: bool, dtype: str | None) -> dict[str, Any]:
    """Whether the head is tied, and the dtype, in the config and those of its parts."""
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config") and "model_type" in value:
            config[key] = _with(dict(value), head, dtype)
    if head and config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = False
    if dtype is not None and (
        "torch_dtype" in config or "dtype" in config or "model_type" in config
    ):
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    return config
