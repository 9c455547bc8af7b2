"""Small real things for tests: random Llamas over the zoo's tokenizer, tasks, jobs."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
ZOO = ROOT / "examples" / "zoo"
HIDDEN, HEADS, MLP = 16, 2, 24


def write_model(
    folder: Path,
    seed: int,
    layers: int = 3,
    dtype: torch.dtype = torch.float32,
    near: Path | None = None,
    hidden: int = HIDDEN,
) -> Path:
    """A random Llama with the zoo's tokenizer; `near` another model, a fine-tune of that one."""
    vocabulary = json.loads((ZOO / "base" / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    tensors = {"model.embed_tokens.weight": values(vocabulary, hidden)}
    for i in range(layers):
        name = f"model.layers.{i}."
        for key in ("q", "k", "v", "o"):
            tensors[f"{name}self_attn.{key}_proj.weight"] = values(hidden, hidden)
        tensors[f"{name}mlp.gate_proj.weight"] = values(MLP, hidden)
        tensors[f"{name}mlp.up_proj.weight"] = values(MLP, hidden)
        tensors[f"{name}mlp.down_proj.weight"] = values(hidden, MLP)
        tensors[f"{name}input_layernorm.weight"] = 1 + values(hidden)
        tensors[f"{name}post_attention_layernorm.weight"] = 1 + values(hidden)
    tensors["model.norm.weight"] = 1 + values(hidden)
    tensors["lm_head.weight"] = values(vocabulary, hidden)
    if near is not None:
        from safetensors.torch import load_file

        other = load_file(near / "model.safetensors")
        tensors = {k: other[k].float() + 0.1 * v for k, v in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    stored = {k: v.to(dtype).contiguous() for k, v in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((ZOO / "base" / "config.json").read_text())
    config |= {
        "hidden_size": hidden,
        "intermediate_size": MLP,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": hidden // HEADS,
        "num_hidden_layers": layers,
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ZOO / "base" / file, folder / file)
    return folder


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_task(
    folder: Path,
    train: int = 24,
    validation: int = 12,
    test: int = 16,
    source: str = "ja_list_ops",
) -> Path:
    """A small task cut from one of the zoo's, by default the target task; gives its task.yaml."""
    origin = ROOT / "fitness" / source
    sizes = {"train": train, "validation": validation, "test": test}
    for split, n in sizes.items():
        lines = (origin / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        write_jsonl(folder / "data" / f"{split}.jsonl", [json.loads(line) for line in lines[:n]])
    shutil.copyfile(origin / "task.yaml", folder / "task.yaml")
    return folder / "task.yaml"


def write_job(folder: Path, **changes: Any) -> Path:
    """A job over the zoo that searches in seconds; keys of `changes` replace whole sections."""
    if not (folder / "task" / "task.yaml").exists():
        write_task(folder / "task")
    job: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "parents": {"ops": {"model": str(ZOO / "ops")}, "ja": {"model": str(ZOO / "ja")}},
        "base": {"model": str(ZOO / "base")},
        "space": {"preset": "per_layer_task_arithmetic"},
        "tasks": [{"task": "task"}],
        "optimizer": {"name": "cma-es", "population": 4},
        "budget": {"candidates": 12},
        "guard": {"validation_looks": 3},
        "engine": {"device": "cpu", "threads": 1},
    }
    job |= changes
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job, allow_unicode=True), encoding="utf-8")
    return path
