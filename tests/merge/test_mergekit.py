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

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.merge import reference

pytestmark = pytest.mark.mergekit

Tensors = dict[str, torch.Tensor]

ROOT = Path(__file__).resolve().parents[2]
MERGEKIT = Path(os.environ.get("EVOMERGE_MERGEKIT", ROOT / ".venv-mergekit/bin/mergekit-yaml"))

# Runs one program over many (recipe, folder) pairs; what goes wrong is left beside the folder.
# Many merges in one process. evomerge's command would end it.
DRIVER = """
import contextlib, functools, io, json, pathlib, runpy, sys, traceback
target, *arguments, jobs = sys.argv[1:]
if target == "evomerge":
    from evomerge.cli import main as run
else:
    run = functools.partial(runpy.run_path, target, run_name="__main__")
for recipe, folder in json.loads(jobs):
    sys.argv = [target, *arguments, recipe, folder]
    said, error = io.StringIO(), ""
    try:
        with contextlib.redirect_stderr(said):
            run()
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

RECIPES = Path(__file__).with_name("mergekit_recipes.yaml").read_text()
METHODS = {f"{x}-{name}": x for x, names in yaml.safe_load(RECIPES).items() for name in names}
SAMPLED = [
    name
    for name, method in METHODS.items()
    if method.startswith(("dare", "della")) and not name.endswith("dense")
]
# The long tensors only where inputs, arithmetic and output have one dtype.
CASES = [
    (name, mode)
    for name in METHODS
    for mode in MODES
    if not name.endswith("spans") or mode in ("float32", "bfloat16")
]

# Methods that keep the largest of something. Which of equal values is up to mergekit's sort, and
# with 8 bits of precision there are many. What sce keeps decides its weights as well: all values
# of a tensor move with them, by less than half the precision at its largest value.
THRESHOLDS = {"ties": 0.0, "breadcrumbs": 0.0, "breadcrumbs_ties": 0.0, "sce": 0.5}
# Methods that find coefficients by adding up whole tensors. In float32 mergekit's sums of long ones
# are inexact by up to a hundred times the precision, and depend on its number of threads.
COEFFICIENTS = ("nuslerp", "multislerp", "karcher", "model_stock", "sce")
LONG = "model.embed_tokens.weight"


def parent_tensors(
    seed: int, vocabulary: int = 64, biases: bool = False, change: float = 0.02
) -> Tensors:
    """The base for seed 0, else the base plus a random difference."""
    layer = {f"self_attn.{x}_proj": (32 if x == "q" else 16, 32) for x in "qkv"}
    layer |= {"self_attn.o_proj": (32, 32), "mlp.down_proj": (32, 64)}
    layer |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (64, 32))
    norms = ("input_layernorm", "post_attention_layernorm")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, 32)}
    shapes["lm_head.weight"] = (vocabulary, 32)
    for index in range(4):
        at = f"model.layers.{index}"
        shapes |= {f"{at}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"{at}.{name}.weight": (32,) for name in norms}
        if biases:
            shapes |= {f"{at}.{x}.bias": layer[x][:1] for x in layer if "self_attn" in x}
    shapes["model.norm.weight"] = (32,)
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if seed:
        base = parent_tensors(0, vocabulary, biases)
        return {name: x + change * drawn[name] for name, x in base.items()}
    # The cosine of two norms is near 1, where slerp turns linear.
    return {name: 0.05 * x + (x.ndim == 1) for name, x in drawn.items()}


def without_head(tensors: Tensors) -> Tensors:
    return {name: x for name, x in tensors.items() if name != "lm_head.weight"}


def all_parents() -> dict[str, Tensors]:
    """Those that the recipes name."""
    parents = {name: parent_tensors(seed) for seed, name in enumerate(("base", "a", "b", "c"))}
    parents |= {"twin": parents["base"], "a_in_shards": parents["a"]}
    parents |= {"tied": without_head(parents["c"]), "tied_b": without_head(parents["b"])}
    parents |= {f"near_{x}": parent_tensors(i, change=1e-4) for i, x in enumerate("ab", 1)}
    parents |= {f"biased_{x}": parent_tensors(i, biases=True) for i, x in enumerate("ab", 1)}
    wide = enumerate(("base", "a", "b", "c"))
    # Over half a million values, with an odd tail: spans of one tensor, and one embedding.
    return parents | {f"wide_{x}": without_head(parent_tensors(i, 20011)) for i, x in wide}


def write_parent(folder: Path, tensors: Tensors, dtype: str) -> None:
    folder.mkdir(parents=True)
    stored = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    write_weights(folder, stored, shards=2 if folder.name.endswith("shards") else 1)
    size = len(tensors["model.embed_tokens.weight"])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": size}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype}
    tied = {"tie_word_embeddings": "lm_head.weight" not in tensors}
    biased = {"attention_bias": any(name.endswith("bias") for name in tensors)}
    (folder / "config.json").write_text(json.dumps(kind | sizes | heads | tied | biased))
    vocabulary = {"<unk>": 0} | {f"w{index}": index for index in range(1, size)}
    Tokenizer(WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def write_weights(folder: Path, tensors: Tensors, shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[index::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    content = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


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
    parents = all_parents()
    recipes = []
    for mode, (dtype, dtypes) in MODES.items():
        paths = {name: folder / "parents" / dtype / name for name in parents}
        for name, path in paths.items():
            if not path.exists():
                write_parent(path, parents[name], dtype)
        for method, named in yaml.safe_load(Template(RECIPES).substitute(paths)).items():
            for name, recipe in named.items():
                if (f"{method}-{name}", mode) in CASES:
                    recipes.append(folder / f"{method}-{name}-{mode}.yaml")
                    content = {"merge_method": method} | recipe | dtypes
                    recipes[-1].write_text(yaml.safe_dump(content))
    exact = []
    for method in COEFFICIENTS:
        content = yaml.safe_load((folder / f"{method}-spans-float32.yaml").read_text())
        exact.append(folder / f"{method}-spans-float64.yaml")
        exact[-1].write_text(yaml.safe_dump(content | {"dtype": "float64"}))
    for program, command in {
        "mergekit": (python, "-c", DRIVER, MERGEKIT.resolve()),
        "evomerge": (sys.executable, "-c", DRIVER, "evomerge", "merge"),
    }.items():
        (folder / program).mkdir()
        wanted = recipes + exact if program == "mergekit" else recipes
        jobs = json.dumps([(str(x), str(folder / program / x.stem)) for x in wanted])
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
    dropped = {name for name in shapes[1] if name.endswith(".bias")}  # see test_attention_biases
    assert {name: shape for name, shape in shapes[1].items() if name not in dropped} == shapes[0]
    assert layers[1] == layers[0]
    return tensors


def ulps(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The number of representable values between each two elements of one dtype."""
    bits = torch.int32 if left.element_size() == 4 else torch.int16
    whole = torch.stack((left, right)).view(bits).to(torch.int64)
    ordinal = torch.where(whole < 0, torch.iinfo(bits).min - whole, whole)
    return ordinal.diff(dim=0).abs()[0]


def changes(tensors: Tensors, base: Path) -> Tensors:
    before = load_file(base / "model.safetensors")
    return {name: (x.double() - before[name].double()).abs() for name, x in tensors.items()}


def differing(theirs: torch.Tensor, ours: torch.Tensor, noise: float) -> int:
    """How many elements are apart: at all if there is no noise, else by over 2 ulps and by more
    than the noise in units of the dtype's precision at the largest value."""
    distance = ulps(theirs, ours)
    if not noise:
        return int((distance > 0).sum())
    near = (theirs - ours).abs() <= noise * precision(theirs)  # not so if one is no number
    return int(((distance > 2) & ~near).sum())


def precision(tensor: torch.Tensor) -> torch.Tensor:
    """Of the tensor's dtype at its largest value."""
    return torch.finfo(tensor.dtype).eps * tensor.abs().max()


def test_the_reference_is_mergekit_0_1_5_on_the_same_torch() -> None:
    code = "from importlib.metadata import version as v; print(v('mergekit'), v('torch'))"
    mergekit, kernels = subprocess.check_output([reference_python(), "-c", code], text=True).split()
    assert (mergekit, kernels.split("+")[0]) == ("0.1.5", torch.__version__.split("+")[0])


@pytest.mark.parametrize(("name", "mode"), [x for x in CASES if x[0] not in SAMPLED])
def test_same_tensors(merged: Path, name: str, mode: str) -> None:
    theirs, ours = both(merged, f"{name}-{mode}")
    if METHODS[name] in THRESHOLDS and mode != "float32":
        noise = THRESHOLDS[METHODS[name]]
        apart = sum(differing(x, ours[key], noise) for key, x in theirs.items())
        assert apart <= 0.01 * sum(x.numel() for x in theirs.values())
        return
    if name in [f"{x}-spans" for x in COEFFICIENTS] and mode == "float32":
        del theirs[LONG]  # see the next test
    found = {key: differing(x, ours[key], 0) for key, x in theirs.items()}
    assert {key: count for key, count in found.items() if count} == {}


@pytest.mark.parametrize("method", COEFFICIENTS)
def test_long_tensors_are_as_exact(merged: Path, method: str) -> None:
    """No further from what mergekit computes in float64 than what it computes in float32."""
    file = merged / f"mergekit/{method}-spans-float64/model.safetensors"
    exact = load_file(file)[LONG]
    theirs, ours = (tensors[LONG] for tensors in both(merged, f"{method}-spans-float32"))
    apart, allowed = ((x.double() - exact).abs().max() for x in (ours, theirs))
    assert exact.dtype == torch.float64
    assert apart <= allowed + precision(theirs)


def test_attention_biases_are_merged_where_mergekit_drops_them(merged: Path) -> None:
    theirs, ours = both(merged, "linear-biases-float32")
    folders = [merged / "parents/float32" / name for name in ("biased_a", "biased_b")]
    a, b = (load_file(folder / "model.safetensors") for folder in folders)
    biases = {name for name in a if name.endswith(".bias")}
    assert biases
    assert ours.keys() - theirs.keys() == biases
    for name in biases:
        torch.testing.assert_close(ours[name], (a[name] + b[name]) / 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["ties-one", "breadcrumbs-one"])
def test_what_is_trimmed_differs_only_among_equal_magnitudes(
    merged: Path, name: str, mode: str
) -> None:
    parents = merged / "parents" / MODES[mode][0]
    wide = torch.float32 if mode.startswith("float32") else torch.bfloat16
    base, tuned = (load_file(parents / x / "model.safetensors") for x in ("base", "a"))
    theirs, ours = both(merged, f"{name}-{mode}")
    for key, before in base.items():
        magnitudes = (tuned[key].to(wide) - before.to(wide)).abs()
        kept = [magnitudes[x[key] != before].sort().values for x in (theirs, ours)]
        assert torch.equal(*kept), key


@pytest.mark.parametrize("mode", MODES)
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


@pytest.mark.parametrize("name", ["dare_linear-one", "della_linear-one"])
def test_rescaling_restores_the_sum_of_magnitudes(merged: Path, name: str) -> None:
    """Not by one over the density: each tensor keeps its own sum, here times the weight."""
    parents = merged / "parents/float32"
    tuned = changes(load_file(parents / "a/model.safetensors"), parents / "base")
    expected = {name: 0.5 * change.mean().item() for name, change in tuned.items()}
    for tensors in both(merged, f"{name}-float32"):
        found = {name: x.mean().item() for name, x in changes(tensors, parents / "base").items()}
        assert found == pytest.approx(expected, rel=1e-4)


def test_della_keeps_values_by_their_rank_in_the_row(merged: Path) -> None:
    parents = merged / "parents/float32"
    base, tuned = (load_file(parents / x / "model.safetensors") for x in ("base", "a"))
    expected = np.concatenate(
        [
            reference.keep_probabilities((tuned[key] - x).double().numpy(), 0.4, 0.3).ravel()
            for key, x in base.items()
        ]
    )
    groups = np.array_split(np.argsort(expected), 8)  # from the smallest magnitudes to the largest
    for tensors in both(merged, "della_linear-ranks-float32"):
        kept = torch.cat([(tensors[key] != x).flatten() for key, x in base.items()]).numpy()
        for group in groups:
            probability = expected[group]
            deviation = np.sqrt((probability * (1 - probability)).sum()) / len(group)
            assert abs(kept[group].mean() - probability.mean()) < 5 * deviation
