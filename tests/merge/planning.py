"""Plans of recipes, and what to ask of them."""

from collections.abc import Mapping
from typing import Any

from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.plan import Plan, TensorPlan
from evomerge.merge.planner import make_plan
from evomerge.recipe import Recipe

EMBEDDINGS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def planned(recipe: str, opened: Mapping[str, Checkpoint], **options: bool) -> Plan:
    """The plan of a recipe in YAML; its models are named as the fixtures name them."""
    parsed = Recipe.from_yaml(recipe)
    return make_plan(parsed, {name: opened[name] for name in parsed.model_names()}, **options)


def tensors(plan: Plan) -> dict[str, TensorPlan]:
    return {tensor.name: tensor for tensor in plan.tensors}


def sources(tensor: TensorPlan) -> tuple[tuple[str, str], ...]:
    """Model and name of each input."""
    return tuple((source.model, source.name) for source in tensor.inputs)


def layer(index: int, rest: str = "mlp.up_proj.weight") -> str:
    return f"model.layers.{index}.{rest}"


def linear(weight: Any, **more: Any) -> str:
    return Recipe.from_dict(
        {
            "merge_method": "linear",
            "models": [
                {"model": "a", "parameters": {"weight": weight}},
                {"model": "b", "parameters": {"weight": 1.0}},
            ],
            **more,
        }
    ).to_yaml()


WHOLE = "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: a}, {model: %s}]"
STACK = "merge_method: passthrough\nslices: [%s]"
RANGE = "{sources: [{model: %s, layer_range: [%d, %d]}]}"


def stack(prefix: str, layers: int, *names: str) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{i}.{name}.weight": (4, 4) for i in range(layers) for name in names}
