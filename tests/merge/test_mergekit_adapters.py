"""BASE+ADAPTER is the model that mergekit 0.1.5 makes of it, through PEFT.

Adapters are written by PEFT itself, in mergekit's environment; see `test_mergekit.py`.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evomerge.merge.sources import open_model
from tests import tiny

pytestmark = pytest.mark.mergekit

ROOT = Path(__file__).resolve().parents[2]
MERGEKIT = Path(os.environ.get("EVOMERGE_MERGEKIT", ROOT / ".venv-mergekit/bin/mergekit-yaml"))

# Writes adapters by PEFT and lets mergekit apply them. In: the arguments of PEFT's LoraConfig by
# BASE/NAME. A base that does not exist becomes a GPT-2, whose matrices are stored [in, out].
REFERENCE = """
import json, pathlib, sys, torch
from mergekit.common import ModelReference
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

def disturb(parameters):
    for value in parameters:
        if value.requires_grad:
            value.data += 0.1 * torch.randn_like(value)

torch.manual_seed(0)
for case, arguments in json.load(sys.stdin).items():
    base, adapter = pathlib.Path("bases", case).parent, pathlib.Path("adapters", case)
    if not base.exists():
        sizes = dict(n_embd=48, n_layer=2, n_head=2, vocab_size=101, n_positions=16)
        gpt2 = GPT2LMHeadModel(GPT2Config(**sizes)).to(torch.bfloat16)
        disturb(gpt2.parameters())
        gpt2.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **arguments))
    disturb(adapted.parameters())
    adapted.save_pretrained(adapter)
    made = ModelReference.parse(f"{base}+{adapter}").merged(cache_dir="cache")
    pathlib.Path("out", case).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(made.model.path).rename(pathlib.Path("out", case))
"""

LLAMA = {
    "some": {"r": 8, "lora_alpha": 20, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 3,
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 6, "layers.0.mlp.up_proj": 40},
        "alpha_pattern": {r".*layers\.1\..*q_proj": 11, "down_proj": 0.7},
    },
    "embeddings": {"r": 5, "target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "wholes": {"r": 4, "target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
}
GPT2 = {
    "turned": {"r": 4, "target_modules": ["c_attn", "c_proj"]},
    "square": {"r": 4, "target_modules": [r"c_proj"], "layers_to_transform": [1]},
    "biases": {"r": 4, "target_modules": ["c_fc"], "bias": "all"},
}
CASES = {
    **{f"float32/{name}": arguments for name, arguments in LLAMA.items()},
    **{f"bfloat16/{name}": arguments for name, arguments in LLAMA.items()},
    **{f"gpt2/{name}": arguments for name, arguments in GPT2.items()},
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bases/BASE`, `adapters/BASE/NAME` and mergekit's models: `out/BASE/NAME`."""
    script = Path(__file__).with_name("mergekit_reference.sh").relative_to(ROOT)
    if not MERGEKIT.is_file():
        pytest.fail(f"no mergekit-yaml at {MERGEKIT}: run {script} or set EVOMERGE_MERGEKIT to one")
    folder = tmp_path_factory.mktemp("adapters")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        tiny.write_model(folder / "bases" / name, seed=0, dtype=dtype, hidden=96)
    ended = subprocess.run(
        [MERGEKIT.resolve().parent / "python", "-c", REFERENCE],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        input=json.dumps(CASES),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_same_tensors(merged: Path, case: str) -> None:
    theirs = load_file(merged / "out" / case / "model.safetensors")
    plain = open_model(str(merged / "bases" / case.split("/")[0]))
    ours = open_model(f"{plain.path}+{merged}/adapters/{case}")
    assert {name: header.dtype for name, header in ours.headers.items()} == {
        name: tensor.dtype for name, tensor in theirs.items()
    }
    assert [name for name in theirs if not torch.equal(ours.tensor(name), theirs[name])] == []
    assert any(not torch.equal(plain.tensor(name), ours.tensor(name)) for name in theirs)
