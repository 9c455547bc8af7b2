"""Layer orders and residual scales on real models: what is merged computes what was meant.

The reference runs the parents' own layers in the wanted order, read by transformers, and scales the
residual stream before each of them.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from evomerge.errors import ModelError
from evomerge.job import LayerSpace
from evomerge.layout import Layout, infer
from evomerge.merge.checkpoint import Checkpoint
from evomerge.recipe import Recipe
from evomerge.space import Infeasible, Models, build
from evomerge.space.residual import FOLDABLE, Fold, Slot, fold_of, stack
from tests.running import Ended, evomerge_

TOLERANCE = 1e-4
TOKENS = torch.arange(1, 29).reshape(2, 14)
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-6,
    "norm_epsilon": 1e-6,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
DEEPSEEK: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    **EXPERTS,
}
GPT2: dict[str, Any] = {"n_embd": 16, "n_head": 2, "n_layer": 3, "n_inner": 24, "n_positions": 64}

# model_type and what a tiny model of it needs beyond SIZES, by the name of the test.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "ministral": ("ministral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", {"shared_expert_intermediate_size": 8, **EXPERTS}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "phi3": ("phi3", {}),
    "smollm3": ("smollm3", {}),
    "granite": ("granite", {"residual_multiplier": 0.7, "attention_bias": True}),
    "olmoe": ("olmoe", EXPERTS),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "seed_oss": ("seed_oss", {"attention_out_bias": True}),
    "ernie4_5": ("ernie4_5", {}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {}),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "olmo3": ("olmo3", {}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {}),
    "phi": ("phi", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt2": ("gpt2", GPT2),
    "gemma": ("gemma", {}),
    "nemotron": ("nemotron", {}),
    "olmo": ("olmo", {}),
}
UNSIGNED = {"gemma", "nemotron", "olmo"}
REFUSED = {
    "gemma2": "multiply by 1 \\+ w",
    "gemma3_text": "multiply by 1 \\+ w",
    "bert": "normalises the residual stream itself",
    "gpt_bigcode": "was never checked",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


def made(folder: Path, kind: str, more: dict[str, Any], seed: int) -> Path:
    """A random float32 model whose every value matters: no bias is 0 and no norm is 1."""
    out = folder / f"{kind}-{seed}-{zlib.crc32(json.dumps(more).encode())}"
    if out.exists():
        return out
    config = AutoConfig.for_model(kind, **SIZES | more, eos_token_id=1, bos_token_id=1)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # A residual stream of size 1 or so, as in trained models: norms add an epsilon to it.
            size = 1.0 if any(part in key for part in ("embed", "wte", "wpe")) else 0.2
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    model.save_pretrained(out)
    return out


def parents(cache: Path, name: str) -> tuple[Path, Path]:
    kind, more = KINDS[name]
    return made(cache, kind, more, 0), made(cache, kind, more, 1)


def merged(recipe: Recipe, out: Path) -> Path:
    end = merge(recipe, out)
    assert end.code == 0, end.err
    return out


def merge(recipe: Recipe, out: Path) -> Ended:
    file = out.with_suffix(".yaml")
    file.write_text(recipe.to_yaml())
    return evomerge_("merge", file, out)


def loaded(folder: Path) -> PreTrainedModel:
    """As transformers reads it: nothing missing, nothing left over."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, attn_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def layers_of(model: PreTrainedModel) -> Sequence[torch.nn.Module]:
    layout = infer(model.state_dict())
    found = model.get_submodule(layout.prefix)
    assert isinstance(found, torch.nn.ModuleList)
    return list(found)


@contextmanager
def scaled(model: PreTrainedModel, scales: Sequence[float]) -> Iterator[None]:
    """The residual stream multiplied by a scale before each layer."""

    def hook(scale: float) -> Any:
        def before(module: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (args[0] * scale, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * scale}

        return before

    layers = layers_of(model)
    handles = [
        layer.register_forward_pre_hook(hook(scale), with_kwargs=True)
        for layer, scale in zip(layers, scales, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def known(folder: Path) -> tuple[dict[str, Any], Layout]:
    model = Checkpoint.open(folder)
    return dict(model.config), model.layout


def stacked(slots: Sequence[Slot], fold: Fold) -> Recipe:
    recipe = stack(slots, fold)
    assert isinstance(recipe, Recipe), recipe
    return recipe


# -- Scales ----------------------------------------------------------------------------------------

SCALES = (1.0, 0.7, 1.6, -0.8, 1.2, 0.5)


def test_every_architecture_that_can_be_folded_is_tried() -> None:
    assert {kind for kind, _ in KINDS.values()} == set(FOLDABLE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if at % 4 == 0 else pytest.param(name, marks=pytest.mark.slow)
        for at, name in enumerate(KINDS)
    ],
)
def test_folded_scales_compute_what_scaling_the_stream_computes(
    cache: Path, tmp_path: Path, name: str
) -> None:
    a, b = parents(cache, name)
    fold = fold_of(*known(a))
    order = [(a, 0), (a, 1), (b, 1), (a, 2), (b, 2), (b, 2)]
    scales = [abs(s) for s in SCALES] if name in UNSIGNED else SCALES
    slots = [Slot(str(m), n, s) for (m, n), s in zip(order, scales, strict=True)]
    plain = loaded(merged(stacked([Slot(s.model, s.layer) for s in slots], fold), tmp_path / "p"))
    with scaled(plain, scales):
        wanted = logits(plain)
    found = logits(loaded(merged(stacked(slots, fold), tmp_path / "folded")))
    assert (found - wanted).abs().max() <= TOLERANCE
    assert (logits(plain) - wanted).abs().max() > 100 * TOLERANCE, "scaling changes nothing here"
    if name not in UNSIGNED:
        wrong = [Slot(s.model, s.layer, abs(s.scale)) for s in slots]
        found = logits(loaded(merged(stacked(wrong, fold), tmp_path / "wrong")))
        assert (found - wanted).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", sorted(UNSIGNED))
def test_a_sign_that_no_norm_can_carry_is_infeasible(cache: Path, name: str) -> None:
    a, _ = parents(cache, name)
    found = stack([Slot("a", 0), Slot("a", 1, -0.8)], fold_of(*known(a)))
    assert isinstance(found, Infeasible)
    assert "slot 1 ('a' layer 1, scale -0.8)" in found.reason


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_exact_is_refused_with_the_reason(cache: Path, kind: str) -> None:
    _, layout = known(parents(cache, "llama")[0])
    with pytest.raises(ModelError, match=REFUSED[kind]):
        fold_of({"model_type": kind}, layout)


def test_a_decoded_stack_is_its_scaled_layers_between_the_first_parents_ends(
    deep: tuple[Path, Path], tmp_path: Path
) -> None:
    section = LayerSpace.model_validate(
        {
            "kind": "layers",
            "repeats": 2,
            "scales": "matrix",
            "scale": {"low": -1.5, "high": 1.5, "start": 1.0},
        }
    )
    paths = {"a": str(deep[0]), "b": str(deep[1])}
    opened = {path: known(Path(path)) for path in paths.values()}
    configs = {path: config for path, (config, _) in opened.items()}
    layouts = {path: layout for path, (_, layout) in opened.items()}
    space = build(section, Models(paths, None, layouts, "float32", configs, {}))
    names = [coordinate.name for coordinate in space.coordinates]
    genotype = np.zeros(len(names))
    genotype[[8 + 3, 8 + 4, 16 + 1, 16 + 2, 24 + 6]] = 1.0
    order = [("b", 3), ("b", 4), ("a", 1), ("a", 2), ("b", 6)]
    scales = {("b", 4, "a", 1): -0.75, ("a", 2, "b", 6): 1.2}
    for (i, n, j, m), scale in scales.items():
        genotype[names.index(f"scale from {i} layer {n} to {j} layer {m}")] = (scale + 1.5) / 3
    recipe = space.decode(genotype)
    assert isinstance(recipe, Recipe)
    reference = loaded(deep[0])
    own = {name: layers_of(loaded(Path(path))) for name, path in paths.items()}
    reference.model.layers = torch.nn.ModuleList([own[name][layer] for name, layer in order])
    reference.config.num_hidden_layers = len(order)
    with scaled(reference, [scales.get((*a, *b), 1.0) for a, b in pairwise([("", 0), *order])]):
        wanted = logits(reference)
    found = logits(loaded(merged(recipe, tmp_path / "out")))
    assert (found - wanted).abs().max() <= TOLERANCE
    assert (logits(reference) - wanted).abs().max() > 100 * TOLERANCE


# -- Depth -----------------------------------------------------------------------------------------


def ranges(*slices: tuple[Path, int, int]) -> Recipe:
    parts = [{"sources": [{"model": str(m), "layer_range": [i, j]}]} for m, i, j in slices]
    return Recipe.from_dict({"merge_method": "passthrough", "slices": parts})


def assert_computes(folder: Path, order: Sequence[tuple[Path, int]]) -> None:
    """A merged model computes what these layers compute, each a module of its own parent: with the
    embeddings of the first, and the final norm and (unless tied) the head of the last."""
    own = {path: loaded(path) for path, _ in order}
    first, last = own[order[0][0]], own[order[-1][0]]
    types = {path: getattr(model.config, "layer_types", None) for path, model in own.items()}
    if any(types.values()):
        first.config.layer_types = [types[path][layer] for path, layer in order]
    first.config.num_hidden_layers = len(order)
    first.model.layers = torch.nn.ModuleList([layers_of(own[p])[layer] for p, layer in order])
    first.model.norm = last.model.norm
    if not first.config.tie_word_embeddings:
        first.lm_head = last.lm_head
    model = loaded(folder)
    assert model.config.num_hidden_layers == len(layers_of(model)) == len(order)
    assert torch.equal(logits(model), logits(first))


@pytest.fixture(scope="module")
def deep(cache: Path) -> tuple[Path, Path]:
    """Two Llamas of eight layers."""
    more = {"num_hidden_layers": 8, "tie_word_embeddings": False}
    return made(cache, "llama", more, 0), made(cache, "llama", more, 1)


@pytest.mark.parametrize(
    "slices",
    [
        pytest.param([(0, 0, 6), (0, 2, 8)], id="depth up-scaling"),
        pytest.param([(0, 0, 4), (1, 2, 6), (0, 4, 8)], id="frankenmerge"),
        pytest.param([(0, 0, 3), (0, 2, 3), (0, 2, 3), (0, 3, 8)], id="repeated layer"),
        pytest.param([(0, 0, 2), (0, 5, 8)], id="pruned"),
        pytest.param([(1, 7, 8), (0, 1, 2)], id="reordered"),
    ],
)
def test_a_stack_computes_its_layers_in_order(
    deep: tuple[Path, Path], tmp_path: Path, slices: list[tuple[int, int, int]]
) -> None:
    named = [(deep[m], i, j) for m, i, j in slices]
    out = merged(ranges(*named), tmp_path / "out")
    assert_computes(out, [(m, layer) for m, i, j in named for layer in range(i, j)])


def test_an_expanded_block_changes_nothing(deep: tuple[Path, Path], tmp_path: Path) -> None:
    """LLaMA Pro (arXiv 2401.02415): copies that add nothing to the residual stream yet."""
    zero = {"scale": [{"filter": part, "value": 0.0} for part in ("o_proj", "down_proj")]}
    slices: list[dict[str, Any]] = []
    for start in range(0, 8, 4):
        block = {"model": str(deep[0]), "layer_range": [start, start + 4]}
        copy = {"model": str(deep[0]), "layer_range": [start + 3, start + 4], "parameters": zero}
        slices += [{"sources": [block]}, {"sources": [copy]}]
    recipe = Recipe.from_dict({"merge_method": "passthrough", "slices": slices})
    model = loaded(merged(recipe, tmp_path / "out"))
    assert len(layers_of(model)) == 10
    assert torch.equal(logits(model), logits(loaded(deep[0])))


# -- What each layer is ----------------------------------------------------------------------------

GEMMA3: dict[str, Any] = {"num_hidden_layers": 6, "sliding_window": 4}
QWEN2: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
SMOLLM3: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4}
MIXED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        {**GEMMA3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 4},
        {**GEMMA3, "layer_types": ["full_attention", "sliding_attention"] * 3},
    ),
    "qwen2": ("qwen2", QWEN2, {**QWEN2, "max_window_layers": 2}),
    "smollm3": (
        "smollm3",
        {**SMOLLM3, "no_rope_layer_interval": 2},
        {**SMOLLM3, "no_rope_layers": [1, 1, 0]},
    ),
}


@pytest.mark.parametrize("slices", [[(0, 0, 3), (0, 1, 3)], [(1, 1, 3), (0, 0, 2), (1, 0, 1)]])
@pytest.mark.parametrize("name", MIXED)
def test_a_layer_stays_what_it_was(
    cache: Path, tmp_path: Path, name: str, slices: list[tuple[int, int, int]]
) -> None:
    kind, *configs = MIXED[name]
    named = [(made(cache, kind, configs[m], m), i, j) for m, i, j in slices]
    out = merged(ranges(*named), tmp_path / "out")
    assert_computes(out, [(m, layer) for m, i, j in named for layer in range(i, j)])


@pytest.mark.parametrize("name", MIXED)
def test_a_layer_that_keeps_its_number_stays_what_it_was(
    cache: Path, tmp_path: Path, name: str
) -> None:
    kind, *configs = MIXED[name]
    first, second = (made(cache, kind, configs[m], m) for m in range(2))
    depth = Checkpoint.open(second).config["num_hidden_layers"]
    out = merged(ranges((first, 0, 1), (second, 1, depth)), tmp_path / "out")
    assert_computes(out, [(first, 0), *((second, layer) for layer in range(1, depth))])


@pytest.mark.parametrize("more", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_dense_layers_among_experts_stay_dense(
    cache: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    parent = made(cache, "qwen3_moe", EXPERTS | more, 0)
    out = merged(ranges((parent, 1, 3), (parent, 0, 2)), tmp_path / "out")
    assert_computes(out, [(parent, 1), (parent, 2), (parent, 0), (parent, 1)])


def test_leading_dense_layers_stay_the_leading_ones_or_are_refused(
    cache: Path, tmp_path: Path
) -> None:
    parent = made(cache, "deepseek_v3", DEEPSEEK | {"first_k_dense_replace": 1}, 0)
    out = merged(ranges((parent, 0, 1), (parent, 0, 3)), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["first_k_dense_replace"] == 2
    assert_computes(out, [(parent, 0), (parent, 0), (parent, 1), (parent, 2)])
    end = merge(ranges((parent, 1, 3), (parent, 0, 1)), tmp_path / "refused")
    assert end.code == 2
    assert "'first_k_dense_replace' of its config" in end.err
    assert not (tmp_path / "refused").exists()


def test_layers_that_compute_with_their_own_number_cannot_move(cache: Path, tmp_path: Path) -> None:
    parent = made(cache, "gpt2", GPT2 | {"scale_attn_by_inverse_layer_idx": True}, 0)
    assert merge(ranges((parent, 0, 2)), tmp_path / "kept").code == 0
    end = merge(ranges((parent, 0, 1), (parent, 2, 3)), tmp_path / "moved")
    assert end.code == 2
    assert "'scale_attn_by_inverse_layer_idx' of its config" in end.err
