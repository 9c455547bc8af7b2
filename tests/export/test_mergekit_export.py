"""An exported recipe through the real mergekit."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.merge.test_mergekit import MERGEKIT
from tests.tiny import ROOT


@pytest.mark.mergekit
def test_mergekit_makes_the_same_tensors_from_an_exported_recipe(
    exported: Path, tmp_path: Path
) -> None:
    assert MERGEKIT.is_file(), f"no mergekit at {MERGEKIT}: run `make test-mergekit`"
    ended = subprocess.run(
        [MERGEKIT, exported / "mergekit_config.yml", tmp_path / "theirs"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = load_file(exported / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
