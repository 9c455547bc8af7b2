"""What of a config.json changes when layers are chosen, repeated or reordered.

A config says what each layer is (sliding or full attention, dense or experts, with or without
rotary positions) in lists, in lists of layer numbers, or by a rule on the layer's number such as
"every fourth". Each way is a trait, read as one value per layer: the output's values follow its
layers, and are written in the config's own way, or refused where it cannot say them. Knows nothing
of tensors.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import ModelError

Config = Mapping[str, Any]
Values = list[Any]

_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_LANGUAGE_PARTS = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class _Trait:
    """One way of saying what each layer is.

    name: the config's key. read: the values of n layers as a config says them, None where it does
    not. write: the keys that say these values (and whatever else the config has to say with them),
    None where it cannot.
    """

    name: str
    read: Callable[[Config, int], Values | None]
    write: Callable[[Values, Config], dict[str, Any] | None]


def layer_config(
    configs: Mapping[str, Config], layers: Sequence[tuple[str, int]], config_from: str
) -> dict[str, Any]:
    """The keys of `config_from`'s config that change when these are the output's layers.

    configs: by model. layers: (model, layer) that each output layer follows. In a multi-part
    config the language part changes, as a whole. Raises ModelError for a layer that its config does
    not count, and where the order of layers cannot be said in a config.
    """
    key, donor = _language_part(config_from, configs[config_from])
    names = dict.fromkeys(model for model, _ in layers)
    used = {name: _language_part(name, configs[name])[1] for name in names}
    depths = {name: _depth(config) for name, config in used.items()}
    for model, layer in layers:
        if layer >= depths[model]:
            raise ModelError(
                f"model '{model}': its config counts {depths[model]} layers, so layer {layer} is "
                "no layer of the stack: end the range before it"
            )
    found: dict[str, Any] = {k: len(layers) for k in _DEPTH_KEYS if donor.get(k) == _depth(donor)}
    for trait in _traits([donor, *used.values()]):
        values = {name: trait.read(config, depths[name]) for name, config in used.items()}
        if any(of_model is not None for of_model in values.values()):
            wanted = [_of_layer(trait, model, values[model], layer) for model, layer in layers]
            found |= _said(trait, wanted, donor, config_from)
    changed = {k: value for k, value in found.items() if donor.get(k) != value}
    return {key: {**donor, **changed}} if key and changed else changed


def _language_part(model: str, config: Config) -> tuple[str, Config]:
    """The part of a config that counts the layers, and its key, '' where it is the whole."""
    parts = {key: config[key] for key in _LANGUAGE_PARTS if isinstance(config.get(key), Mapping)}
    for key, part in {"": config, **parts}.items():
        if any(isinstance(part.get(name), int) for name in _DEPTH_KEYS):
            return key, part
    raise ModelError(
        f"model '{model}': its config counts no layers ({', '.join(_DEPTH_KEYS)}), so none can "
        "be chosen"
    )


def _depth(config: Config) -> int:
    return next(int(config[key]) for key in _DEPTH_KEYS if isinstance(config.get(key), int))


def _of_layer(trait: _Trait, model: str, values: Values | None, layer: int) -> Any:
    if values is None or len(values) <= layer:
        raise ModelError(f"model '{model}': '{trait.name}' of its config lacks layer {layer}")
    return values[layer]


def _said(trait: _Trait, wanted: Values, donor: Config, config_from: str) -> dict[str, Any]:
    """The keys that make the donor's config say what is wanted; none where it says so already."""
    if trait.read(donor, len(wanted)) == wanted:
        return {}
    keys = trait.write(wanted, donor)
    if keys is None:
        raise ModelError(
            f"model '{config_from}': '{trait.name}' of its config ties what a layer does to its "
            "number, and cannot say this order of layers: keep their order, or choose other ranges"
        )
    return keys


def _refuse(values: Values, config: Config) -> None:
    return None


# -- Lists with an entry for each layer ------------------------------------------------------------

_LISTS = (
    *("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers", "layers_block_type"),
    *("block_configs", "activation_sparsity_pattern", "intermediate_size", "ffn_multipliers"),
    *("num_attention_heads", "num_key_value_heads", "num_query_heads", "num_kv_heads"),
)


def _list_trait(key: str) -> _Trait:
    def read(config: Config, depth: int) -> Values | None:
        implied = _IMPLIED.get((key, str(config.get("model_type"))))
        if isinstance(config.get(key), list) and (config[key] or implied is None):
            return list(config[key])
        return implied(config, depth) if implied else None

    return _Trait(key, read, lambda values, config: {key: values})


def _every(
    default: int, key: str = "", others: str = "sliding_attention", first: int = 1
) -> Callable[[Config, int], Values]:
    """Full attention in every so-manieth layer, by the config's key or by default."""

    def rule(config: Config, depth: int) -> Values:
        period = config.get(key) or default
        return [others if (i + first) % period else "full_attention" for i in range(depth)]

    return rule


def _window(config: Config, depth: int) -> Values:
    """Qwen's: sliding attention from a layer on; in its experts' first generation, in every second
    layer up to it."""
    kind = config.get("model_type")
    used = config.get("use_sliding_window", kind == "dots1")
    if not used or config.get("sliding_window", "the default") is None:
        return ["full_attention"] * depth
    edge = config.get("max_window_layers", 62 if kind == "dots1" else 28)
    slides = [i % 2 == 0 and i < edge if kind == "qwen2_moe" else i >= edge for i in range(depth)]
    return ["sliding_attention" if value else "full_attention" for value in slides]


def _rotary(config: Config, depth: int) -> Values:
    """1 for a layer with rotary positions."""
    period = config.get("no_rope_layer_interval") or 4
    return [int((i + 1) % period != 0) for i in range(depth)]


def _by_rotary(with_rotary: str, without: str) -> Callable[[Config, int], Values]:
    def rule(config: Config, depth: int) -> Values:
        rotary = config.get("no_rope_layers") or _rotary(config, depth)
        return [with_rotary if has else without for has in rotary]

    return rule


def _smollm3(config: Config, depth: int) -> Values:
    sliding = config.get("use_sliding_window") and config.get("sliding_window") is not None
    kinds = ("full_attention", "sliding_attention" if sliding else "full_attention")
    return _by_rotary(*kinds)(config, depth)


# What a list is that a config leaves out, by key and model_type.
_IMPLIED: dict[tuple[str, str], Callable[[Config, int], Values]] = {
    **{("layer_types", kind): _every(2) for kind in ("gemma2", "gpt_oss", "vaultgemma")},
    ("layer_types", "olmo3"): _every(4),
    ("layer_types", "gemma3_text"): _every(6, "sliding_window_pattern"),
    ("layer_types", "gemma3n_text"): _every(5),
    ("layer_types", "cohere2"): _every(4, "sliding_window_pattern"),
    ("layer_types", "afmoe"): _every(4, "global_attn_every_n_layers"),
    **{("layer_types", kind): _every(4, first=0) for kind in ("cwm", "granite_swa")},
    **{
        ("layer_types", kind): _every(3, "global_attn_every_n_layers", first=0)
        for kind in ("modernbert", "modernbert-decoder")
    },
    **{
        ("layer_types", kind): _every(4, "full_attention_interval", "linear_attention")
        for kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
    },
    **{
        ("layer_types", kind): _window
        for kind in (
            *("qwen2", "qwen2_moe", "qwen3", "dots1"),
            *("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"),
        )
    },
    ("layer_types", "smollm3"): _smollm3,
    ("layer_types", "llama4_text"): _by_rotary("chunked_attention", "full_attention"),
    **{("no_rope_layers", kind): _rotary for kind in ("smollm3", "llama4_text")},
}


# -- Lists of layer numbers ------------------------------------------------------------------------

_NUMBERS = ("full_attn_idxs", "attn_layer_indices", "moe_layers", "hybrid_layer_ids")


def _numbers_trait(key: str) -> _Trait:
    def read(config: Config, depth: int) -> Values | None:
        listed = config.get(key)
        if not isinstance(listed, list):
            return None
        return [i in listed for i in range(_reach(depth, listed))]

    return _Trait(key, read, lambda values, config: {key: _where(values)})


def _reach(depth: int, numbers: Iterable[int]) -> int:
    """How many layers numbers speak of, which may be more than there are in the output."""
    return max(depth, *(number + 1 for number in numbers), 0)


def _where(values: Values) -> list[int]:
    return [i for i, value in enumerate(values) if value]


# -- Rules on the layer's number -------------------------------------------------------------------


def _sparse(config: Config, depth: int) -> Values | None:
    """Qwen's: experts in every so-manieth layer but those listed."""
    if "decoder_sparse_step" not in config and "mlp_only_layers" not in config:
        return None
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    return [i not in dense and (i + 1) % step == 0 for i in range(_reach(depth, dense))]


def _write_sparse(values: Values, config: Config) -> dict[str, Any]:
    return {"decoder_sparse_step": 1, "mlp_only_layers": _where([not v for v in values])}


def _ernie(config: Config, depth: int) -> Values | None:
    """Experts in every so-manieth layer from one to another; -1 is the last."""
    if "moe_layer_interval" not in config:
        return None
    end = config.get("moe_layer_end_index", -1)
    low, high = config.get("moe_layer_start_index", 1), depth - 1 if end == -1 else end
    return [(i + 1) % config["moe_layer_interval"] == 0 and low <= i <= high for i in range(depth)]


def _write_ernie(values: Values, config: Config) -> dict[str, Any] | None:
    sparse = _where(values)
    if not sparse or sparse != list(range(sparse[0], sparse[-1] + 1)):
        return None
    ends = {"moe_layer_start_index": sparse[0], "moe_layer_end_index": sparse[-1]}
    return {"moe_layer_interval": 1, **ends}


def _leading(key: str) -> _Trait:
    """The first layers are dense, as many as a number says, the others have experts."""

    def read(config: Config, depth: int) -> Values | None:
        if not isinstance(config.get(key), int) or "mlp_layer_types" in config:
            return None
        return [i < config[key] for i in range(depth)]

    def write(values: Values, config: Config) -> dict[str, Any] | None:
        dense = _where(values)
        return {key: len(dense)} if dense == list(range(len(dense))) else None

    return _Trait(key, read, write)


def _cycle(config: Config, depth: int) -> Values | None:
    """Recurrent Gemma's: a list that starts again at its end."""
    cycle = config.get("block_types")
    return [cycle[i % len(cycle)] for i in range(depth)] if cycle else None


def _attention_types(config: Config, depth: int) -> Values | None:
    """GPT-Neo's: lists with how often each is repeated."""
    if "attention_types" not in config:
        return None
    return [kind for kinds, times in config["attention_types"] for kind in kinds * times]


def _branch_scale(config: Config, depth: int) -> Values | None:
    """MiniCPM's: what each sub-layer's output is multiplied by, from the number of layers."""
    if not isinstance(config.get("scale_depth"), int | float):
        return None
    return [round(config["scale_depth"] / math.sqrt(depth), 12)] * depth


def _write_branch_scale(values: Values, config: Config) -> dict[str, Any] | None:
    if len(set(values)) > 1:
        return None
    return {"scale_depth": values[0] * math.sqrt(len(values))}


def _overrides(config: Config, depth: int) -> Values | None:
    """Other values of any key, by layer number."""
    by_number = config.get("per_layer_config")
    if not isinstance(by_number, Mapping):
        return None
    return [by_number.get(str(i)) for i in range(_reach(depth, map(int, by_number)))]


def _write_overrides(values: Values, config: Config) -> dict[str, Any]:
    return {"per_layer_config": {str(i): value for i, value in enumerate(values) if value}}


_RULES = (
    _Trait("decoder_sparse_step", _sparse, _write_sparse),
    _Trait("moe_layer_interval", _ernie, _write_ernie),
    _leading("first_k_dense_replace"),
    _leading("num_dense_layers"),
    _Trait("block_types", _cycle, lambda values, config: {"block_types": values}),
    _Trait(
        "attention_types",
        _attention_types,
        lambda values, config: {"attention_types": [[values, 1]]},
    ),
    _Trait("scale_depth", _branch_scale, _write_branch_scale),
    _Trait("per_layer_config", _overrides, _write_overrides),
)


# -- What only the layer's own place can say -------------------------------------------------------


def _period(key: str, offset: str) -> _Trait:
    """Jamba's: every so-manieth layer, counted from an offset."""

    def read(config: Config, depth: int) -> Values | None:
        period = config.get(key)
        return [i % period == config.get(offset, 0) for i in range(depth)] if period else None

    return _Trait(key, read, _refuse)


def _placed(key: str, holds: Callable[[Config], bool], from_end: bool = False) -> _Trait:
    """A layer computes with its own number, or with the number of layers after it as well."""

    def read(config: Config, depth: int) -> Values | None:
        if not holds(config):
            return None
        return [(i, depth if from_end else None) for i in range(depth)]

    return _Trait(key, read, _refuse)


def _is(*kinds: str) -> Callable[[Config], bool]:
    return lambda config: config.get("model_type") in kinds


def _is_set(key: str) -> Callable[[Config], bool]:
    return lambda config: bool(config.get(key))


def _unlisted(key: str, listed: str) -> Callable[[Config], bool]:
    """A rule that nothing here reads, in a config without the list that replaces it."""

    def holds(config: Config) -> bool:
        replaced = config.get(listed) or (listed, config.get("model_type")) in _IMPLIED
        rules = not isinstance(config.get(key), list | None) and config[key] not in (0, 1)
        return rules and not replaced

    return holds


_BOUND = (
    _period("attn_layer_period", "attn_layer_offset"),
    _period("expert_layer_period", "expert_layer_offset"),
    _placed("scale_attn_by_inverse_layer_idx", _is_set("scale_attn_by_inverse_layer_idx")),
    _placed("model_type", _is("diffllama")),  # a constant of its attention falls with the number
    _placed("model_type", _is("minimax"), from_end=True),  # so does the decay of its attention
    _placed("num_kv_shared_layers", _is_set("num_kv_shared_layers"), from_end=True),
    # One tensor outside the layers holds a part for each of them.
    _placed("hidden_size_per_layer_input", _is_set("hidden_size_per_layer_input"), from_end=True),
    _Trait(  # the first layer has no norm before its attention
        "model_type",
        lambda config, depth: (
            [i == 0 for i in range(depth)]
            if _is("modernbert", "modernbert-decoder")(config)
            else None
        ),
        _refuse,
    ),
    *(
        _placed(key, _unlisted(key, listed))
        for key, listed in (
            ("sliding_window_pattern", "layer_types"),
            ("global_attn_every_n_layers", "layer_types"),
            ("full_attention_interval", "layer_types"),
            ("dense_attention_every_n_layers", "layer_types"),
            ("hybrid_override_pattern", "layer_types"),
            ("moe_layer_freq", "mlp_layer_types"),
            ("interleave_moe_layer_step", "moe_layers"),
        )
    ),
)


def _traits(configs: Sequence[Config]) -> list[_Trait]:
    """Every trait that one of the configs may have. A list that nothing here knows is taken for one
    with an entry for each layer where it has as many and 'layer' or 'block' in its name."""
    lists = dict.fromkeys(_LISTS)
    for config in configs:
        depth = _depth(config)
        for key, value in config.items():
            if isinstance(value, list) and len(value) == depth and key not in _NUMBERS:
                named = ("layer" in key or "block" in key) and key != "mlp_only_layers"
                lists |= dict.fromkeys([key] if named and key != "block_types" else [])
    return [*map(_list_trait, lists), *map(_numbers_trait, _NUMBERS), *_RULES, *_BOUND]
