"""Tensor names of models, and what a space is told of them."""

from collections.abc import Mapping, Sequence

from evomerge.layout import infer
from evomerge.space import Models

PARENTS = {"ops": "/zoo/ops", "ja": "/zoo/ja"}
BASE = "/zoo/base"


def llama(layers: int, extras: bool = True, prefix: str = "model.") -> list[str]:
    """Tensor names of a Llama-like model; `extras`: biases, and q_norm and k_norm as in Qwen 3."""
    names = [f"{prefix}embed_tokens.weight"]
    for i in range(layers):
        layer = f"{prefix}layers.{i}."
        projections = [f"self_attn.{key}_proj" for key in "qkvo"]
        projections += [f"mlp.{key}_proj" for key in ("gate", "up", "down")]
        names += [f"{layer}{projection}.weight" for projection in projections]
        names += [f"{layer}{key}_layernorm.weight" for key in ("input", "post_attention")]
        if extras:
            names += [f"{layer}self_attn.{key}_norm.weight" for key in "qk"]
            names += [f"{layer}{projection}.bias" for projection in projections]
    return [*names, f"{prefix}norm.weight", "lm_head.weight"]


def vision_llama(layers: int) -> list[str]:
    """Tensor names of a LLaVA-like model over a Llama."""
    tower = [f"vision_tower.encoder.layers.{i}.mlp.fc1.weight" for i in range(layers)]
    text = [f"language_model.{name}" for name in llama(layers)]
    return [*tower, "multi_modal_projector.linear_1.weight", *text]


def models_with(
    names: Sequence[str] | Mapping[str, Sequence[str]],
    parents: Mapping[str, str] = PARENTS,
    base: str | None = BASE,
) -> Models:
    """Models of these tensors, by path where they differ, ten values in each."""
    paths = [*parents.values(), *([base] if base else [])]
    own = names if isinstance(names, Mapping) else dict.fromkeys(paths, names)
    sizes = {path: dict.fromkeys(own[path], 10) for path in paths}
    layouts = {path: infer(own[path]) for path in paths}
    return Models(parents, base, layouts, "bfloat16", {path: {} for path in paths}, sizes)
