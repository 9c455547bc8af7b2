"""Layouts: a tensor's place, from its name alone."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import ModelError
from evomerge.layout import Place, infer

LLAMA = "model.layers.{}.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 3, "attention"),
        ("model.layers.3.self_attn.q_proj.bias", 3, "attention"),
        ("model.layers.3.self_attn.q_norm.weight", 3, "norms"),
        ("model.layers.3.self_attn.k_norm.weight", 3, "norms"),
        ("model.layers.3.mlp.down_proj.weight", 3, "mlp"),
        ("model.layers.3.mlp.experts.1.w1.weight", 3, "mlp"),
        ("model.layers.3.input_layernorm.weight", 3, "norms"),
        ("model.layers.3.post_attention_layernorm.weight", 3, "norms"),
        ("model.layers.3.self_attn_layer_norm.bias", 3, "norms"),
        ("model.embed_tokens.weight", None, "embeddings"),
        ("model.norm.weight", None, "norms"),
        ("lm_head.weight", None, "head"),
        ("lm_head.bias", None, "head"),
    ],
)
def test_a_llama_like_tensor_has_its_place(name: str, layer: int | None, module: str) -> None:
    places = infer([name, *(LLAMA.format(i) for i in range(12))]).places
    template = name if layer is None else name.replace(f".{layer}.", ".{}.", 1)
    assert places[name] == Place(layer, module, template)


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("transformer.h.1.attn.c_attn.weight", 1, "attention"),
        ("transformer.h.1.ln_1.weight", 1, "norms"),
        ("transformer.h.1.mlp.c_fc.weight", 1, "mlp"),
        ("transformer.wte.weight", None, "embeddings"),
        ("transformer.wpe.weight", None, "embeddings"),
        ("transformer.ln_f.weight", None, "norms"),
    ],
)
def test_a_gpt2_like_tensor_has_its_place(name: str, layer: int | None, module: str) -> None:
    layout = infer([name, "transformer.h.0.attn.bias", "transformer.h.1.attn.bias"])
    assert (layout.places[name].layer, layout.places[name].module) == (layer, module)
    assert layout.prefix == "transformer.h"


@settings(max_examples=30, deadline=None)
@given(layers=st.integers(1, 120), seed=st.integers(0, 1000))
def test_layers_are_counted_whatever_the_order_of_the_names(layers: int, seed: int) -> None:
    names = ["model.embed_tokens.weight", *(LLAMA.format(i) for i in range(layers))]
    random.Random(seed).shuffle(names)
    layout = infer(names)
    assert layout.layers == layers
    assert layout.prefix == "model.layers"
    assert list(layout.places) == names
    assert {layout.places[LLAMA.format(i)].layer for i in range(layers)} == set(range(layers))
    assert len({layout.places[LLAMA.format(i)].template for i in range(layers)}) == 1


def test_a_model_without_numbered_parts_has_no_layers() -> None:
    layout = infer(["embed.weight", "head.weight"])
    assert (layout.layers, layout.prefix) == (0, "")


def test_no_names_make_an_empty_layout() -> None:
    assert infer([]).places == {}


def test_experts_inside_a_layer_are_not_layers() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.w1.weight" for i in range(2) for j in range(8)]
    assert infer(names).layers == 2


def test_the_part_with_most_tensors_holds_the_layers() -> None:
    tower = [f"vision.blocks.{i}.attn.weight" for i in range(3)]
    text = [f"text.layers.{i}.{key}.weight" for i in range(2) for key in ("attn", "mlp")]
    layout = infer([*tower, *text])
    assert (layout.prefix, layout.layers) == ("text.layers", 2)
    assert layout.places["vision.blocks.2.attn.weight"].layer is None


def test_two_parts_numbered_alike_are_ambiguous() -> None:
    names = [f"{part}.layers.{i}.w" for part in ("encoder", "decoder") for i in range(2)]
    with pytest.raises(ModelError, match=r"'encoder\.layers\.\*' and 'decoder\.layers\.\*'"):
        infer(names)


@pytest.mark.parametrize(("there", "missing"), [([0, 2], [1]), ([1, 2], [0]), ([0, 3], [1, 2])])
def test_missing_layers_are_named(there: list[int], missing: list[int]) -> None:
    with pytest.raises(ModelError) as caught:
        infer(LLAMA.format(i) for i in there)
    assert f"layers {missing} of 'model.layers.*' are missing" in str(caught.value)
