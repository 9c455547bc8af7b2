"""The same small Llamas with heads that vLLM runs on a CPU, which have 32 values at least."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from evomerge.merge.checkpoint import Checkpoint

SMALLEST = 32  # of the heads that vLLM runs on a CPU
FACTOR = 4  # its root is a power of two: scaling by it rounds nothing


def with_wide_heads(model: Checkpoint, folder: Path) -> Checkpoint:
    """A model that computes the same, with heads of four times as many values, three of four zero.

    Rotary positions turn value i of a head by an angle of base^(-2i / size), so that with the base
    to the fourth power they turn the values that are there as before. Attention divides by the root
    of the size, which the queries make up for. A model of another architecture, or with heads that
    are large enough, stays as it is.
    """
    config = dict(model.config)
    if config.get("model_type") != "llama" or config["head_dim"] >= SMALLEST:
        return model
    size, count = config["head_dim"], config["num_attention_heads"]
    half = size // 2
    places = torch.tensor(
        [
            head * FACTOR * size + (i if i < half else FACTOR * half + i - half)
            for head in range(count)
            for i in range(size)
        ]
    )
    shutil.copytree(model.path, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        if "self_attn" not in name:
            continue
        if name.endswith("o_proj.weight"):
            tensors[name] = values.new_zeros(values.shape[0], FACTOR * count * size)
            tensors[name][:, places] = values
        else:
            tensors[name] = values.new_zeros(FACTOR * count * size, *values.shape[1:])
            tensors[name][places] = values * (FACTOR**0.5 if "q_proj" in name else 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config["head_dim"] = FACTOR * size
    config["rope_parameters"] = dict(config["rope_parameters"])
    config["rope_parameters"]["rope_theta"] **= FACTOR
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)
