"""What a config says of its layers follows them, or is refused where it cannot."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from evomerge.errors import ModelError
from evomerge.merge.depth import layer_config


def config(depth: int = 4, **more: Any) -> dict[str, Any]:
    return {"model_type": "llama", "num_hidden_layers": depth, **more}


def changed(order: list[int], **more: Any) -> dict[str, Any]:
    """What changes in a config when its layers stand in this order."""
    return layer_config({"m": config(**more)}, [("m", layer) for layer in order], "m")


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers", "n_layers"])
def test_the_depth_is_counted(key: str) -> None:
    configs = {"m": {"model_type": "any", key: 4}}
    assert layer_config(configs, [("m", 0), ("m", 0), ("m", 3)], "m") == {key: 3}


def test_a_number_that_is_not_the_depth_stays() -> None:
    assert changed([0, 1], num_layers=7) == {"num_hidden_layers": 2}


@pytest.mark.parametrize(
    "more",
    [
        {"layer_types": ["a", "b", "a", "b"]},
        {"model_type": "minimax"},
        {"model_type": "gemma3_text"},
        {"attn_layer_period": 2, "attn_layer_offset": 1},
        {"num_kv_shared_layers": 2},
        {"first_k_dense_replace": 1, "scale_depth": 1.4, "block_types": ["r", "a"]},
    ],
)
def test_all_layers_in_order_change_nothing(more: dict[str, Any]) -> None:
    assert changed([0, 1, 2, 3], **more) == {}


# Each way of saying what layers are: the order, the config before, what changes.
SAID: dict[str, tuple[list[int], dict[str, Any], dict[str, Any]]] = {
    "list": ([3, 0], {"layer_types": list("abcd")}, {"layer_types": ["d", "a"]}),
    "list-of-a-new-name": ([1, 0], {"layer_temper": list("abcd")}, {"layer_temper": ["b", "a"]}),
    "other-list": ([1, 0], {"eos_token_id": [1, 2, 3, 4]}, {}),
    "list-or-number": ([1], {"intermediate_size": [5, 6, 7, 8]}, {"intermediate_size": [6]}),
    "numbers": ([3, 0, 3], {"moe_layers": [1, 3]}, {"moe_layers": [0, 2]}),
    "no-numbers": ([0, 2], {"attn_layer_indices": [1]}, {"attn_layer_indices": []}),
    "dense-listed": (
        [1, 0, 1],
        {"mlp_only_layers": [1], "decoder_sparse_step": 1},
        {"mlp_only_layers": [0, 2]},
    ),
    "every-second-sparse": (
        [1, 3, 0],
        {"decoder_sparse_step": 2, "mlp_only_layers": []},
        {"decoder_sparse_step": 1, "mlp_only_layers": [2]},
    ),
    "none-of-them-dense": ([2, 3, 2], {"decoder_sparse_step": 1}, {}),
    "leading": ([0, 0, 1, 2], {"first_k_dense_replace": 1}, {"first_k_dense_replace": 2}),
    "leading-gone": ([2, 3], {"num_dense_layers": 2}, {"num_dense_layers": 0}),
    "leading-with-a-list": (
        [2, 0],
        {"first_k_dense_replace": 1, "mlp_layer_types": list("dsss")},
        {"mlp_layer_types": ["s", "d"]},
    ),
    "from-to": (
        [0, 0, 1, 2, 3],
        {"moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 3},
        {"moe_layer_start_index": 2, "moe_layer_end_index": 4},
    ),
    "cycle": ([0, 2, 3], {"block_types": ["r", "r", "a"]}, {"block_types": ["r", "a", "r"]}),
    "cycle-goes-on": ([0, 1, 2, 3, 1, 2], {"block_types": ["r", "r", "a"]}, {}),
    "counted-lists": (
        [1, 1, 0],
        {"attention_types": [[["g", "l"], 2]], "attention_layers": ["g", "l", "g", "l"]},
        {"attention_types": [[["l", "l", "g"], 1]], "attention_layers": ["l", "l", "g"]},
    ),
    "branch-scale": ([0], {"scale_depth": 1.4}, {"scale_depth": 0.7}),
    "overrides": (
        [3, 1],
        {"per_layer_config": {"1": {"head_dim": 8}, "2": {"head_dim": 4}}},
        {"per_layer_config": {"1": {"head_dim": 8}}},
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_what_layers_are_follows_them(name: str) -> None:
    order, before, after = SAID[name]
    depth = {} if len(order) == 4 else {"num_hidden_layers": len(order)}
    assert changed(order, **before) == {**depth, **after}


UNSAYABLE: dict[str, tuple[list[int], dict[str, Any]]] = {
    "first_k_dense_replace": ([1, 0], {"first_k_dense_replace": 1}),
    "num_dense_layers": ([0, 2, 1], {"num_dense_layers": 2}),
    "moe_layer_interval": ([1, 0, 1], {"moe_layer_interval": 1, "moe_layer_start_index": 1}),
    "attn_layer_period": ([1, 0], {"attn_layer_period": 2}),
    "expert_layer_period": ([1, 2], {"expert_layer_period": 2, "expert_layer_offset": 1}),
    "scale_attn_by_inverse_layer_idx": ([1], {"scale_attn_by_inverse_layer_idx": True}),
    "model_type": ([0, 1], {"model_type": "minimax"}),
    "num_kv_shared_layers": ([0, 1], {"num_kv_shared_layers": 1}),
    "hidden_size_per_layer_input": ([0, 1], {"hidden_size_per_layer_input": 256}),
    "sliding_window_pattern": ([1, 0], {"sliding_window_pattern": "LLLG"}),
    "moe_layer_freq": ([1, 0], {"moe_layer_freq": 2, "layer_types": list("abcd")}),
}


@pytest.mark.parametrize("key", UNSAYABLE)
def test_what_cannot_be_said_is_refused(key: str) -> None:
    order, more = UNSAYABLE[key]
    with pytest.raises(ModelError, match=f"model 'm': '{key}' of its config ties what a layer"):
        changed(order, **more)


@pytest.mark.parametrize("kind", ["diffllama", "modernbert"])
def test_a_layer_that_moves_where_its_place_matters_is_refused(kind: str) -> None:
    with pytest.raises(ModelError, match="'model_type' of its config ties"):
        changed([1, 0], model_type=kind)


# Configs that leave a list out, and what it takes for the list to have two kinds of layers.
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8}
LEFT_OUT: list[tuple[str, str, dict[str, Any]]] = [
    *(
        ("layer_types", kind, {})
        for kind in (
            *("gemma2", "gemma3_text", "gemma3n_text", "gpt_oss", "vaultgemma", "olmo3", "cohere2"),
            *("afmoe", "cwm", "granite_swa", "qwen3_next", "qwen3_5_text", "llama4_text"),
        )
    ),
    ("layer_types", "gemma3_text", {"sliding_window_pattern": 2}),
    ("layer_types", "qwen3_next", {"full_attention_interval": 3}),
    ("layer_types", "smollm3", WINDOW),
    ("layer_types", "smollm3", WINDOW | {"no_rope_layer_interval": 2}),
    ("no_rope_layers", "smollm3", {}),
    ("no_rope_layers", "llama4_text", {"no_rope_layer_interval": 3}),
    *(
        ("layer_types", kind, WINDOW | {"max_window_layers": 4})
        for kind in ("qwen2", "qwen2_moe", "qwen3", "dots1", "qwen2_vl_text", "qwen2_5_vl_text")
    ),
]


@pytest.mark.parametrize(("key", "kind", "more"), LEFT_OUT)
@pytest.mark.parametrize("order", [[8, 7, 3, 3, 0, 1], [0, *range(9)], [2, 1, 5]])
def test_a_list_that_is_left_out_is_what_transformers_takes(
    key: str, kind: str, more: dict[str, Any], order: list[int]
) -> None:
    def taken(**keys: Any) -> list[Any]:
        listed: list[Any] = getattr(AutoConfig.for_model(kind, **keys), key)
        return listed

    before = more | {"num_hidden_layers": 9}
    whole = taken(**before)
    assert len(set(whole)) == 2
    after = before | changed(order, depth=9, model_type=kind, **more)
    assert taken(**after) == [whole[layer] for layer in order]


@pytest.mark.parametrize("kind", ["modernbert", "modernbert-decoder"])
def test_all_but_the_first_layer_of_a_modern_bert_can_move(kind: str) -> None:
    whole = AutoConfig.for_model(kind, num_hidden_layers=9).layer_types
    found = changed([0, 8, 3, 3], depth=9, model_type=kind)
    assert found["layer_types"] == [whole[0], whole[8], whole[3], whole[3]]


def test_a_window_that_is_not_used_needs_no_list() -> None:
    keys = {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2}
    assert changed([3, 1], model_type="qwen2", **keys) == {"num_hidden_layers": 2}


def test_parents_say_the_same_in_their_own_ways() -> None:
    configs = {
        "old": config(6, model_type="gemma3_text"),
        "new": config(6, model_type="gemma3_text", layer_types=list("abcdef")),
    }
    found = layer_config(configs, [("new", 4), ("old", 5), ("old", 0)], "old")
    assert found["layer_types"] == ["e", "full_attention", "sliding_attention"]


def test_a_parent_that_does_not_say_it_is_named() -> None:
    configs = {"a": config(layer_types=list("abcd")), "b": config()}
    with pytest.raises(ModelError, match="model 'b': 'layer_types' of its config lacks layer 2"):
        layer_config(configs, [("a", 0), ("b", 2)], "a")


def test_another_model_gives_the_config() -> None:
    configs = {"base": config(2, dtype="float32"), "a": config(8), "unused": {}}
    assert layer_config(configs, [("a", 0), ("a", 7)], "base") == {}
    assert layer_config(configs, [("a", 7)] * 3, "base") == {"num_hidden_layers": 3}


def test_the_language_part_of_a_larger_model_changes() -> None:
    text = config(4, layer_types=list("abcd"), vocab_size=9)
    configs = {"m": {"model_type": "many", "text_config": text, "vision_config": config(4)}}
    found = layer_config(configs, [("m", 1)], "m")
    assert found == {"text_config": {**text, "num_hidden_layers": 1, "layer_types": ["b"]}}


def test_a_layer_beyond_the_stack_is_refused() -> None:
    with pytest.raises(ModelError, match="counts 4 layers, so layer 4 is no layer of the stack"):
        changed([3, 4])


def test_a_config_without_a_depth_is_refused() -> None:
    with pytest.raises(ModelError, match="model 'm': its config counts no layers"):
        layer_config({"m": {"model_type": "unet"}}, [("m", 0)], "m")


@settings(derandomize=True, deadline=None)
@given(order=st.lists(st.integers(0, 5), min_size=1), data=st.data())
def test_choosing_twice_is_choosing_once(order: list[int], data: st.DataObject) -> None:
    before = config(6, layer_types=list("abcdef"), moe_layers=[1, 4], mlp_only_layers=[2, 3])
    again = data.draw(st.lists(st.integers(0, len(order) - 1), min_size=1))
    first = before | layer_config({"m": before}, [("m", i) for i in order], "m")
    second = first | layer_config({"m": first}, [("m", i) for i in again], "m")
    once = [("m", order[i]) for i in again]
    assert second == before | layer_config({"m": before}, once, "m")
