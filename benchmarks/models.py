"""Random Llama models on disk, cheap to make at any size: what the benchmarks of merging merge.

A base and fine-tunes near it, written in pieces, so that memory does not grow with the model.
"""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from evomerge.errors import InputError
from evomerge.merge.checkpoint import Checkpoint, Header, Read

WEIGHTS = "model.safetensors"
_SEEDS = {"base": 0, "a": 1, "b": 2, "c": 3}
_SPREAD = 0.02  # standard deviation of the base's values
_CHANGE = 0.002  # and of a fine-tune's difference from it
_PIECE = 1 << 22  # values drawn at a time
_SAVED_AS = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by its name."""
        hidden, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        layer = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (self.mlp, hidden),
            "mlp.up_proj": (self.mlp, hidden),
            "mlp.down_proj": (hidden, self.mlp),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, hidden)}
        for i in range(self.layers):
            found |= {f"model.layers.{i}.{name}.weight": size for name, size in layer.items()}
        return found | {"model.norm.weight": (hidden,), "lm_head.weight": (self.vocabulary, hidden)}

    @property
    def parameters(self) -> int:
        """How many values a model has."""
        return sum(math.prod(size) for size in self.tensors.values())


SHAPES = {
    "toy": Shape(32, 64, 2, 4, 2, 256),
    "95M": Shape(768, 2048, 10, 12, 12, 16000),
    "1.1B": Shape(2048, 5632, 22, 32, 4, 32000),  # as TinyLlama
    "7B": Shape(4096, 11008, 2, 32, 32, 32000),  # as Llama 2, but 2 of its 32 equal layers
}


def family(
    folder: Path, shape: str, dtype: torch.dtype, names: Sequence[str], spare: int = 0
) -> dict[str, Path]:
    """The folders of a base and its fine-tunes, by name; those that are not there yet are made.

    folder: where families are kept. names: of the fine-tunes 'a', 'b' and 'c'. spare: bytes that
    have to stay free beside them. Raises InputError where the disk has no room.
    """
    kind = str(dtype).removeprefix("torch.")
    models = {name: folder / f"{shape}-{kind}" / name for name in ("base", *names)}
    missing = {name: path for name, path in models.items() if not path.is_dir()}
    folder.mkdir(parents=True, exist_ok=True)
    needed = len(missing) * SHAPES[shape].parameters * dtype.itemsize + spare
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"'{folder}' needs {needed / 1e9:.1f} GB and has {free / 1e9:.1f} GB free: "
            "name another folder"
        )
    for name, path in missing.items():
        print(f"making the {shape} {kind} model '{name}'", file=sys.stderr, flush=True)
        partial = path.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        near = None if name == "base" else models["base"] / WEIGHTS
        _write_weights(partial / WEIGHTS, SHAPES[shape], dtype, _SEEDS[name], near)
        partial.rename(path)
    for path in models.values():
        _write_texts(path, SHAPES[shape], kind)
    return models


def _write_weights(
    path: Path, shape: Shape, dtype: torch.dtype, seed: int, near: Path | None
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in shape.tensors.items():
        start, end = end, end + math.prod(size) * dtype.itemsize
        entry = {"dtype": _SAVED_AS[dtype], "shape": size, "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size in shape.tensors.items():
            origin = None if near is None else _flat(near, name)
            for start in range(0, math.prod(size), _PIECE):
                count = min(_PIECE, math.prod(size) - start)
                values = torch.randn(count, generator=generator)
                if origin is not None:
                    values = values.mul_(_CHANGE).add_(origin[start : start + count])
                else:
                    values = values.mul_(_SPREAD).add_(len(size) == 1)  # norms are about 1
                file.write(values.to(dtype).view(torch.uint8).numpy().data)


def _flat(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as opened:
        values: torch.Tensor = opened.get_tensor(name)
        return values.view(-1)


def outline(name: str, shape: Shape, dtype: torch.dtype) -> Checkpoint:
    """A model of names and shapes alone, for plans; whoever reads a value of it fails."""

    def read(tensor: str) -> Read:
        raise InputError(f"model '{name}': '{tensor}': it has no values: make a family of models")

    headers = {tensor: Header(WEIGHTS, size, dtype) for tensor, size in shape.tensors.items()}
    kind = str(dtype).removeprefix("torch.")
    return Checkpoint(
        Path(name), _config(shape, kind), headers, False, name, None, sources={}, read=read
    )


def _config(shape: Shape, kind: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": kind,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
    }


def _write_texts(folder: Path, shape: Shape, kind: str) -> None:
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, 64)} | {"</s>": 64}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    texts = {
        "config.json": _config(shape, kind),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "</s>",
        },
    }
    for name, data in texts.items():
        (folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
