"""The same recipe gives the same tensors through mergekit 0.1.5 and through evomerge.

Tiny random Llama parents are merged by both programs and the folders compared. The reference
lives in an environment of its own (see `mergekit_reference.sh`); EVOMERGE_MERGEKIT names its
`mergekit-yaml`. Starting up takes each program seconds, so one process merges every recipe.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from string import Template

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

pytestmark = pytest.mark.mergekit

Tensors = dict[str, torch.Tensor]

ROOT = Path(__file__).resolve().parents[2]
MERGEKIT = Path(os.environ.get("EVOMERGE_MERGEKIT", ROOT / ".venv-mergekit/bin/mergekit-yaml"))

# Runs one program over many (recipe, folder) pairs; what goes wrong is left beside the folder.
DRIVER = """
import contextlib, io, json, pathlib, runpy, sys, traceback
run, target, *arguments, jobs = sys.argv[1:]
for recipe, folder in json.loads(jobs):
    sys.argv = [target, *arguments, recipe, folder]
    said, error = io.StringIO(), ""
    try:
        with contextlib.redirect_stderr(said):
            getattr(runpy, run)(target, run_name="__main__")
    except SystemExit as end:
        error = f"exit code {end.code}, {said.getvalue()}" if end.code else ""
    except BaseException:
        error = traceback.format_exc()
    pathlib.Path(folder + ".error").write_text(error)
"""

# How the parents are stored, and what the recipe says about dtypes.
MODES = {
    "float32": ("float32", {"dtype": "float32"}),
    "bfloat16": ("bfloat16", {"dtype": "bfloat16"}),
    "as-stored": ("bfloat16", {}),
    "float32-to-bfloat16": ("bfloat16", {"dtype": "float32", "out_dtype": "bfloat16"}),
}

RECIPES = """
linear:
  plain:
    models: [{model: $a}, {model: $b, parameters: {weight: 0.9}}, {model: $c}]
    parameters: {weight: [0.3, -0.2]}
  sum-with-base:
    base_model: $base
    models: [{model: $a}, {model: $b, parameters: {weight: 0.7}}]
    parameters: {normalize: false, weight: 0.2}
  filters:
    models:
    - model: $a
      parameters: {weight: [{filter: self_attn, value: [0, 0.3, 1]}, {filter: mlp, value: 0.2}]}
    - {model: $b, parameters: {weight: [{filter: layers.2., value: 0.0}]}}
    parameters: {weight: 0.6}
  slices:
    slices:
    - sources:
      - {model: $a, layer_range: [0, 3], parameters: {weight: [0.2, 0.9]}}
      - {model: $b, layer_range: [1, 4]}
      parameters: {weight: 0.4}
    - sources: [{model: $b, layer_range: [2, 3]}, {model: $c, layer_range: [3, 4]}]
      parameters: {normalize: false}
    parameters: {weight: [0.5, 0.3]}
  one-tied: {models: [{model: $tied}, {model: $b}], parameters: {weight: 0.5}}
task_arithmetic:
  plain:
    base_model: $base
    models: [{model: $a}, {model: $base}, {model: $b}, {model: $c, parameters: {weight: -0.4}}]
    parameters: {weight: 0.55}
  normalize:
    base_model: $base
    models: [{model: $a, parameters: {weight: [0.2, 0.9]}}, {model: $b}]
    parameters: {weight: 0.3, normalize: true, lambda: 0.7}
  base-in-slices:
    base_model: $base
    slices:
    - sources: [{model: $a, layer_range: [0, 2]}, {model: $base, layer_range: [0, 2]}]
    - base_model: $b
      sources: [{model: $b, layer_range: [1, 4]}, {model: $c, layer_range: [1, 4]}]
      parameters: {lambda: 1.3, weight: [0.1, 0.5]}
    parameters: {weight: 0.6}
passthrough:
  slices:
    slices:
    - sources: [{model: $a, layer_range: [0, 3]}]
    - sources: [{model: $b, layer_range: [1, 3], parameters: {scale: 0.7}}]
  scale:
    models: [{model: $a}]
    parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: [0.3, 1.1]}]}
  tied: {slices: [{sources: [{model: $tied, layer_range: [1, 4]}]}]}
slerp:
  plain: {base_model: $a, models: [{model: $b}, {model: $a}], parameters: {t: 0.3}}
  filters:
    base_model: $base
    slices: [{sources: [{model: $base, layer_range: [0, 4]}, {model: $c, layer_range: [0, 4]}]}]
    parameters:
      t: [{filter: self_attn, value: [0, 0.5, 1]}, {filter: mlp, value: [1, 0.2]}, {value: 0.5}]
  base-in-slices:
    base_model: $a
    slices:
    - sources: [{model: $a, layer_range: [0, 3]}, {model: $b, layer_range: [1, 4]}]
    - base_model: $c
      sources: [{model: $base, layer_range: [0, 2]}, {model: $c, layer_range: [0, 2]}]
      parameters: {t: 0.8}
    parameters: {t: [0.1, 0.6]}
ties:
  plain:
    base_model: $base
    models: [{model: $a}, {model: $b, parameters: {weight: 0.3}}, {model: $c}]
    parameters: {weight: 0.5, density: 0.4}
  sum:
    base_model: $base
    models: [{model: $a}, {model: $b}, {model: $c, parameters: {weight: -0.4}}]
    parameters: {weight: 0.6, density: 0.33, normalize: false, int8_mask: true, lambda: 0.8}
  gradients:
    base_model: $base
    models:
    - {model: $a, parameters: {density: [1, 0.7, 0.1]}}
    - {model: $b, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
    - {model: $c, parameters: {weight: [{filter: mlp, value: 0.5}, {value: 0}]}}
    parameters: {rescale: true, weight: 1.0}
dare_linear:
  dense: {base_model: $base, models: [{model: $a}, {model: $b}], parameters: {weight: 0.3}}
  one: {base_model: $base, models: [{model: $a}], parameters: {weight: 0.5, density: 0.3}}
  normalize:
    base_model: $base
    models: [{model: $a, parameters: {weight: 0.5}}, {model: $b, parameters: {weight: 0.9}}]
    parameters: {density: 0.6, normalize: true}
dare_ties:
  plain:
    base_model: $base
    models: [{model: $a}, {model: $b}, {model: $c, parameters: {weight: 0.4, density: 0.5}}]
    parameters: {weight: 0.6, density: 0.3, lambda: 0.8}
  normalize:
    base_model: $base
    models: [{model: $a}, {model: $b}, {model: $c, parameters: {weight: 0.4}}]
    parameters: {weight: 0.6, density: 0.5, normalize: true, rescale: false}
"""
METHODS = {f"{x}-{name}": x for x, names in yaml.safe_load(RECIPES).items() for name in names}
SAMPLED = [name for name in METHODS if name.startswith("dare") and name != "dare_linear-dense"]

in_every_mode = pytest.mark.parametrize("mode", MODES)


def parent_tensors(seed: int) -> Tensors:
    """The base for seed 0, else the base plus a random difference."""
    layer = {f"self_attn.{x}_proj": (32 if x == "q" else 16, 32) for x in "qkv"}
    layer |= {"self_attn.o_proj": (32, 32), "mlp.down_proj": (32, 64)}
    layer |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (64, 32))
    norms = ("input_layernorm", "post_attention_layernorm")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (64, 32), "lm_head": (64, 32)}
    for index in range(4):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        shapes |= dict.fromkeys((f"model.layers.{index}.{name}" for name in norms), (32,))
    shapes["model.norm"] = (32,)
    generator = torch.Generator().manual_seed(seed)
    drawn = {f"{k}.weight": torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    if seed:
        return {name: x + 0.02 * drawn[name] for name, x in parent_tensors(0).items()}
    # The cosine of two norms is near 1, where slerp turns linear.
    return {name: 0.05 * x + (x.ndim == 1) for name, x in drawn.items()}


def write_parent(folder: Path, tensors: Tensors, dtype: str) -> None:
    folder.mkdir(parents=True)
    stored = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype}
    tied = {"tie_word_embeddings": "lm_head.weight" not in tensors}
    (folder / "config.json").write_text(json.dumps(kind | sizes | heads | tied))
    vocabulary = {"<unk>": 0} | {f"w{index}": index for index in range(1, 64)}
    Tokenizer(WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def reference_python() -> Path:
    if not MERGEKIT.is_file():
        script = Path(__file__).with_name("mergekit_reference.sh").relative_to(ROOT)
        pytest.fail(f"no mergekit-yaml at {MERGEKIT}: run {script} or set EVOMERGE_MERGEKIT to one")
    return MERGEKIT.resolve().parent / "python"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `parents/DTYPE/NAME` and what each program made in `PROGRAM/RECIPE-MODE`."""
    python = reference_python()
    folder = tmp_path_factory.mktemp("mergekit")
    parents = {name: parent_tensors(seed) for seed, name in enumerate(("base", "a", "b", "c"))}
    parents["tied"] = {name: x for name, x in parents["c"].items() if name != "lm_head.weight"}
    recipes = []
    for mode, (dtype, dtypes) in MODES.items():
        paths = {name: folder / "parents" / dtype / name for name in parents}
        for name, path in paths.items():
            if not path.exists():
                write_parent(path, parents[name], dtype)
        for method, named in yaml.safe_load(Template(RECIPES).substitute(paths)).items():
            for name, recipe in named.items():
                recipes.append(folder / f"{method}-{name}-{mode}.yaml")
                recipes[-1].write_text(yaml.safe_dump({"merge_method": method} | recipe | dtypes))
    for program, command in {
        "mergekit": (python, "-c", DRIVER, "run_path", MERGEKIT.resolve()),
        "evomerge": (sys.executable, "-c", DRIVER, "run_module", "evomerge", "merge"),
    }.items():
        (folder / program).mkdir()
        jobs = json.dumps([(str(x), str(folder / program / x.stem)) for x in recipes])
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
        ended = subprocess.run(
            [*command, jobs], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
        )
        assert ended.returncode == 0, f"{program} stopped: {ended.stderr[-2000:]}"
    return folder


def both(merged: Path, result: str) -> list[Tensors]:
    """mergekit's and evomerge's tensors, once all but their values is seen to be the same."""
    tensors, shapes, layers = [], [], []
    for folder in (merged / "mergekit" / result, merged / "evomerge" / result):
        error = folder.with_name(f"{result}.error").read_text()
        assert not error, f"{folder.parent.name}: {error}"
        files = sorted(folder.glob("*.safetensors"))
        tensors.append({name: x for file in files for name, x in load_file(file).items()})
        shapes.append({name: (x.dtype, x.shape) for name, x in tensors[-1].items()})
        layers.append(json.loads((folder / "config.json").read_text())["num_hidden_layers"])
    assert shapes[1] == shapes[0]
    assert layers[1] == layers[0]
    return tensors


def ulps(left: torch.Tensor, right: torch.Tensor) -> int:
    """The largest number of representable values between two tensors of one dtype."""
    bits = torch.int32 if left.element_size() == 4 else torch.int16
    whole = torch.stack((left, right)).view(bits).to(torch.int64)
    ordinal = torch.where(whole < 0, torch.iinfo(bits).min - whole, whole)
    return int(ordinal.diff(dim=0).abs().max())


def changes(tensors: Tensors, base: Path) -> Tensors:
    before = load_file(base / "model.safetensors")
    return {name: (x.double() - before[name].double()).abs() for name, x in tensors.items()}


def test_the_reference_is_mergekit_0_1_5_on_the_same_torch() -> None:
    code = "from importlib.metadata import version as v; print(v('mergekit'), v('torch'))"
    mergekit, kernels = subprocess.check_output([reference_python(), "-c", code], text=True).split()
    assert (mergekit, kernels.split("+")[0]) == ("0.1.5", torch.__version__.split("+")[0])


@in_every_mode
@pytest.mark.parametrize("name", [name for name in METHODS if name not in SAMPLED])
def test_same_tensors(merged: Path, name: str, mode: str) -> None:
    theirs, ours = both(merged, f"{name}-{mode}")
    apart = {key: ulps(ours[key], tensor) for key, tensor in theirs.items()}
    assert {key: ulp for key, ulp in apart.items() if ulp > 0} == {}


@in_every_mode
@pytest.mark.parametrize("name", SAMPLED)
def test_same_distribution(merged: Path, name: str, mode: str) -> None:
    base = merged / "parents" / MODES[mode][0] / "base"
    theirs, ours = (
        torch.cat([x.flatten() for x in changes(tensors, base).values()])
        for tensors in both(merged, f"{name}-{mode}")
    )
    for left, right in ((theirs, ours), ((theirs > 0).double(), (ours > 0).double())):
        deviation = ((left.var() + right.var()) / left.numel()).sqrt()
        assert (left.mean() - right.mean()).abs() < 5 * deviation  # magnitude, then keep rate


def test_dare_rescales_to_the_sum_of_magnitudes(merged: Path) -> None:
    """Not by one over the density: each tensor keeps its own sum, here times the weight."""
    parents = merged / "parents/float32"
    tuned = changes(load_file(parents / "a/model.safetensors"), parents / "base")
    expected = {name: 0.5 * change.mean().item() for name, change in tuned.items()}
    for tensors in both(merged, "dare_linear-one-float32"):
        found = {name: x.mean().item() for name, x in changes(tensors, parents / "base").items()}
        assert found == pytest.approx(expected, rel=1e-4)
