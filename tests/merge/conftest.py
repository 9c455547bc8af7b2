"""Models for the tests of merging: folders that differ from the shared ones in one thing each."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.merge import operand
from evomerge.merge.checkpoint import Checkpoint
from tests import tiny

Tensors = dict[str, torch.Tensor]


@contextmanager
def spans_of(length: int) -> Iterator[None]:
    """Tensors are read in spans of about so many elements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operand, "_ON_CPU", length)
        patch.setattr(operand, "_NORM_SPAN", length)
        yield


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def altered(
    source: Path,
    folder: Path,
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    **config: Any,
) -> Path:
    """A copy of a model with other tensors or other keys in its config."""
    shutil.copytree(source, folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | config))
    return folder


def without(*names: str) -> Callable[[Tensors], Tensors]:
    """Drop tensors."""
    return lambda tensors: {k: v for k, v in tensors.items() if k not in names}


@pytest.fixture(scope="session")
def folders(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shared models, and
    half, half-a, half-b: base, a and b in bfloat16; wide: another hidden size; tied: b without a
    head; biased: b with one more tensor in each layer."""
    folder = tmp_path_factory.mktemp("altered")

    def biased(tensors: Tensors) -> Tensors:
        more = {f"model.layers.{i}.self_attn.q_proj.bias": torch.zeros(16) for i in range(3)}
        return tensors | more

    tied = altered(models["b"], folder / "tied", without("lm_head.weight"))
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return {
        **models,
        "half": tiny.write_model(folder / "half", seed=0, dtype=torch.bfloat16),
        **{
            f"half-{name}": tiny.write_model(
                folder / f"half-{name}", seed=seed, near=models["base"], dtype=torch.bfloat16
            )
            for name, seed in (("a", 1), ("b", 2))
        },
        "wide": tiny.write_model(folder / "wide", seed=4, hidden=32),
        "tied": tied,
        "biased": altered(models["b"], folder / "biased", biased),
    }


@pytest.fixture(scope="session")
def opened(folders: dict[str, Path]) -> dict[str, Checkpoint]:
    """All of them opened, by name."""
    return {name: Checkpoint.open(path) for name, path in folders.items()}
