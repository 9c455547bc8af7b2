"""Plans: what each output tensor is made of, and recipes that do not fit their models."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from evomerge.errors import ModelError, RecipeError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.plan import Input, Plan, TensorPlan
from evomerge.merge.planner import make_plan
from evomerge.recipe import METHODS, Recipe
from tests.merge.conftest import Tensors, altered

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


def test_every_tensor_is_merged_from_all_parents(opened: dict[str, Checkpoint]) -> None:
    plan = planned(linear(0.5), opened)
    assert [tensor.name for tensor in plan.tensors] == list(opened["a"].headers)
    for tensor in plan.tensors:
        assert tensor.inputs == (Input("a", tensor.name), Input("b", tensor.name))
        assert tensor.base is None
        assert tensor.shape == opened["a"].headers[tensor.name].shape
    assert plan.layers == {"default": (("a", 0), ("a", 1), ("a", 2))}
    assert plan.notes == ()
    assert plan.bytes == sum(header.bytes for header in opened["a"].headers.values())


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        (EMBEDDINGS, 0.25),
        (layer(0), 0.25),
        (layer(1), 0.5),
        (layer(2), 0.75),
        (NORM, 0.25),
        (HEAD, 0.25),
    ],
)
def test_gradients_run_over_the_layers_and_start_outside_them(
    opened: dict[str, Checkpoint], name: str, weight: float
) -> None:
    plan = planned(linear([0.25, 0.75]), opened)
    assert tensors(plan)[name].per_model[0]["weight"] == weight


SLICES = """
merge_method: linear
slices:
- sources:
  - {model: a, layer_range: [0, 2], parameters: {weight: [0.0, 1.0]}}
  - {model: b, layer_range: [1, 3], parameters: {weight: 0.5}}
- sources:
  - {model: deep, layer_range: [4, 5], parameters: {weight: [0.0, 0.3]}}
  - {model: b, layer_range: [0, 1], parameters: {weight: 0.7}}
"""


@pytest.mark.parametrize(
    ("name", "inputs", "weights"),
    [
        (EMBEDDINGS, (("a", EMBEDDINGS), ("b", EMBEDDINGS)), [0.0, 0.5]),
        (layer(0), (("a", layer(0)), ("b", layer(1))), [0.0, 0.5]),
        (layer(1), (("a", layer(1)), ("b", layer(2))), [1.0, 0.5]),
        # The only layer of its slice takes a gradient's end; what follows the layers its start.
        (layer(2), (("deep", layer(4)), ("b", layer(0))), [0.3, 0.7]),
        (NORM, (("deep", NORM), ("b", NORM)), [0.0, 0.7]),
        (HEAD, (("deep", HEAD), ("b", HEAD)), [0.0, 0.7]),
    ],
)
def test_slices_renumber_layers(
    opened: dict[str, Checkpoint],
    name: str,
    inputs: tuple[tuple[str, str], ...],
    weights: list[float],
) -> None:
    tensor = tensors(planned(SLICES, opened))[name]
    assert sources(tensor) == inputs
    assert [parameters["weight"] for parameters in tensor.per_model] == weights


def test_slices_give_each_tensor_once(opened: dict[str, Checkpoint]) -> None:
    plan = planned(SLICES, opened)
    names = [tensor.name for tensor in plan.tensors]
    assert sorted(names) == sorted(opened["a"].headers)
    assert plan.layers == {"default": (("a", 0), ("a", 1), ("deep", 4))}
    assert plan.donor == "a"


def test_a_layer_may_be_used_again(opened: dict[str, Checkpoint]) -> None:
    part = "{sources: [{model: a, layer_range: [1, 2]}]}"
    plan = planned(f"merge_method: passthrough\nslices: [{part}, {part}, {part}]", opened)
    found = tensors(plan)
    assert [sources(found[layer(i)]) for i in range(3)] == [(("a", layer(1)),)] * 3
    assert EMBEDDINGS in found
    assert HEAD in found


def test_filters_of_a_parents_parameter_match_its_own_name(opened: dict[str, Checkpoint]) -> None:
    recipe = """
merge_method: linear
parameters: {weight: 0.1}
slices:
- sources:
  - {model: a, layer_range: [0, 2]}
  - model: b
    layer_range: [1, 3]
    parameters: {weight: [{filter: layers.2., value: 0.9}]}
"""
    found = tensors(planned(recipe, opened))
    weights = [found[layer(i)].per_model[1]["weight"] for i in (0, 1)]
    assert weights == [0.1, 0.9]  # output layer 1 is the parent's layer 2


def test_filters_of_a_shared_parameter_match_the_name_in_the_output(
    opened: dict[str, Checkpoint],
) -> None:
    recipe = """
merge_method: slerp
base_model: a
parameters: {t: [{filter: layers.1., value: 0.9}, {value: 0.1}]}
slices: [{sources: [{model: a, layer_range: [1, 3]}, {model: b, layer_range: [1, 3]}]}]
"""
    found = tensors(planned(recipe, opened))
    assert [found[layer(i)].shared["t"] for i in (0, 1)] == [0.1, 0.9]


@pytest.mark.parametrize(
    ("scope", "expected"),
    [("source", 0.1), ("slice", 0.2), ("recipe", 0.3)],
)
def test_the_narrowest_scope_decides(
    opened: dict[str, Checkpoint], scope: str, expected: float
) -> None:
    values = {"source": 0.1, "slice": 0.2, "recipe": 0.3}
    order = list(values)
    given = {
        name: {"weight": value}
        for name, value in values.items()
        if order.index(name) >= order.index(scope)
    }
    recipe = {
        "merge_method": "linear",
        "parameters": given["recipe"],
        "slices": [
            {
                "parameters": given.get("slice", {}),
                "sources": [
                    {"model": "a", "layer_range": [0, 3], "parameters": given.get("source", {})}
                ],
            }
        ],
    }
    plan = planned(Recipe.from_dict(recipe).to_yaml(), opened)
    assert {tensor.per_model[0]["weight"] for tensor in plan.tensors} == {expected}


def test_task_vectors_leave_the_listed_base_out(opened: dict[str, Checkpoint]) -> None:
    recipe = """
merge_method: task_arithmetic
base_model: base
models: [{model: a}, {model: base}, {model: b}]
parameters: {weight: 0.5}
"""
    for tensor in planned(recipe, opened).tensors:
        assert sources(tensor) == (("a", tensor.name), ("b", tensor.name))
        assert tensor.base == Input("base", tensor.name)
        assert len(tensor.per_model) == 2


def test_slerp_starts_at_its_base_whatever_the_order(opened: dict[str, Checkpoint]) -> None:
    recipe = "{merge_method: slerp, base_model: b, models: [{model: a}, {model: b}], "
    plan = planned(recipe + "parameters: {t: 0.5}}", opened)
    assert {tuple(s.model for s in tensor.inputs) for tensor in plan.tensors} == {("b", "a")}


def test_linear_counts_an_unlisted_base_in(opened: dict[str, Checkpoint]) -> None:
    recipe = "{merge_method: linear, base_model: base, models: [{model: a}], "
    plan = planned(recipe + "parameters: {weight: 0.5}}", opened)
    assert [source.model for source in plan.tensors[0].inputs] == ["a", "base"]
    assert plan.donor == "base"


@pytest.mark.parametrize("method", [m for m, s in METHODS.items() if s.base == "optional"])
@pytest.mark.parametrize("listed", ["a, b", "a, base, b"])
def test_an_optional_base_is_subtracted_if_there_is_one(
    opened: dict[str, Checkpoint], method: str, listed: str
) -> None:
    models = ", ".join(f"{{model: {name}}}" for name in listed.split(", "))
    recipe = f"{{merge_method: {method}, models: [{models}], parameters: {{weight: 0.5}}"
    based = planned(f"{recipe}, base_model: base}}", opened).tensors[0]
    assert [source.model for source in based.inputs] == ["a", "b"]
    assert based.base == Input("base", based.name)
    if "base" not in listed:
        bare = planned(f"{recipe}}}", opened).tensors[0]
        assert ([source.model for source in bare.inputs], bare.base) == (["a", "b"], None)


@pytest.mark.parametrize("method", ["model_stock", "nearswap", "arcee_fusion"])
def test_methods_on_models_take_their_base_first(
    opened: dict[str, Checkpoint], method: str
) -> None:
    models = "{model: a}, {model: b}" if method == "model_stock" else "{model: a}"
    more = "parameters: {t: 0.1}, " if method == "nearswap" else ""
    recipe = f"{{merge_method: {method}, {more}base_model: base, models: [{models}]}}"
    for tensor in planned(recipe, opened).tensors:
        assert next(source.model for source in tensor.inputs) == "base"
        assert tensor.base is None


def test_a_base_alone_is_merged_with_nothing(opened: dict[str, Checkpoint]) -> None:
    recipe = "{merge_method: ties, base_model: base, parameters: {weight: 1}, slices: [%s]}"
    part = "{sources: [{model: base, layer_range: [0, 1]}]}"
    with pytest.raises(RecipeError, match="'ties' merges at least 1 models, the base aside"):
        planned(recipe % part, opened)


WHOLE = "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: a}, {model: %s}]"
STACK = "merge_method: passthrough\nslices: [%s]"
RANGE = "{sources: [{model: %s, layer_range: [%d, %d]}]}"

UNFIT: dict[str, tuple[str, type[Exception], str]] = {
    "range-past-the-end": (
        STACK % (RANGE % ("a", 2, 4)),
        RecipeError,
        r"layer_range \[2, 4\] is outside 'a', which has 3 layers",
    ),
    "other-depth": (WHOLE % "deep", ModelError, "'a' has 3 layers and 'deep' 5"),
    "other-shape": (WHOLE % "wide", ModelError, r"is \[\d+, 16\] in 'a' and \[\d+, 32\] in 'wide'"),
    "tensor-that-only-the-second-has": (
        WHOLE % "biased",
        ModelError,
        r"'biased' has the tensor 'model\.layers\.0\.self_attn\.q_proj\.bias', which 'a' lacks",
    ),
    "tensor-that-only-the-first-has": (
        "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: biased}, {model: a}]",
        ModelError,
        r"'a' has no tensor 'model\.layers\.0\.self_attn\.q_proj\.bias'",
    ),
    "stack-of-other-shape": (
        STACK % (RANGE % ("a", 0, 3) + ", " + RANGE % ("wide", 0, 3)),
        ModelError,
        "'a' and in 'wide': their layers do not fit together",
    ),
    "stack-with-other-tensors": (
        STACK % (RANGE % ("a", 0, 3) + ", " + RANGE % ("biased", 0, 3)),
        ModelError,
        r"q_proj\.bias.*'a' and in 'biased': their layers do not fit together",
    ),
    "config-of-other-shape": (
        "base_model: wide\n" + STACK % (RANGE % ("a", 0, 3)),
        ModelError,
        "'wide' and in 'a': their layers do not fit together",
    ),
    "stack-with-other-vocabulary": (
        STACK % (RANGE % ("a", 0, 3) + ", " + RANGE % ("wordy", 0, 3)),
        ModelError,
        r"'lm_head\.weight' is \[\d+, 16\] in 'a' and \[\d+, 16\] in the merge",
    ),
    "weight-missing": (
        "{merge_method: linear, models: [{model: a, parameters: {weight: 1}}, {model: b}]}",
        RecipeError,
        "'weight' of model 'b' has no value for tensor",
    ),
    "weight-missing-where-no-filter-matches": (
        linear([{"filter": "mlp", "value": 0.5}]),
        RecipeError,
        r"'weight' of model 'a' has no value for tensor 'lm_head\.weight'",
    ),
    "t-missing": (
        "{merge_method: slerp, base_model: a, models: [{model: a}, {model: b}]}",
        RecipeError,
        "'t' has no value for tensor",
    ),
    "weights-cancel": (linear(-1.0), RecipeError, "sum to 0 and cannot be normalized"),
    "weights-cancel-in-one-layer": (
        linear([1.0, -1.0, 1.0]),
        RecipeError,
        r"weights of tensor 'model\.layers\.1\..*sum to 0",
    ),
    "base-not-among-the-sources": (
        "merge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 1}\n"
        "slices: [" + RANGE % ("a", 0, 3) + "]",
        RecipeError,
        "base_model 'base' is not among a slice's sources",
    ),
    "slerp-of-three": (
        "merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\n"
        "models: [{model: a}, {model: b}, {model: base}]",
        RecipeError,
        "'slerp' merges 2 models.*names 3",
    ),
    "passthrough-of-two": (
        "{merge_method: passthrough, models: [{model: a}, {model: b}]}",
        RecipeError,
        "'passthrough' merges 1 models.*names 2",
    ),
}


@pytest.fixture(scope="session")
def with_wordy(
    opened: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Checkpoint]:
    """All models, and wordy: a with two more words."""
    more = (EMBEDDINGS, HEAD)
    folder = altered(
        opened["a"].path,
        tmp_path_factory.mktemp("wordy") / "wordy",
        lambda t: t | {n: torch.cat((t[n], torch.zeros(2, 16))) for n in more},
        vocab_size=opened["a"].config["vocab_size"] + 2,
    )
    return opened | {"wordy": Checkpoint.open(folder)}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused_in_one_line(
    with_wordy: dict[str, Checkpoint], case: str
) -> None:
    recipe, kind, words = UNFIT[case]
    with pytest.raises(kind, match=words) as raised:
        planned(recipe, with_wordy)
    assert "\n" not in str(raised.value)


def test_layers_of_a_model_with_other_words_may_stand_inside(
    with_wordy: dict[str, Checkpoint],
) -> None:
    parts = (RANGE % ("a", 0, 2), RANGE % ("wordy", 1, 3), RANGE % ("a", 2, 3))
    plan = planned(STACK % ", ".join(parts), with_wordy)
    assert len(plan.layers["default"]) == 5


def test_weights_that_cancel_may_be_added_up(opened: dict[str, Checkpoint]) -> None:
    plan = planned(linear(-1.0, parameters={"normalize": False}), opened)
    assert {tensor.shared["normalize"] for tensor in plan.tensors} == {False}


@pytest.mark.parametrize("order", [("a", "tied"), ("tied", "a")])
def test_embeddings_stand_in_for_a_tied_head(
    opened: dict[str, Checkpoint], order: tuple[str, str]
) -> None:
    models = ", ".join(f"{{model: {name}}}" for name in order)
    recipe = f"{{merge_method: linear, parameters: {{weight: 0.5}}, models: [{models}]}}"
    plan = planned(recipe, opened)
    assert dict(sources(tensors(plan)[HEAD])) == {"a": HEAD, "tied": EMBEDDINGS}
    assert plan.head


def test_tied_models_alone_have_no_head(opened: dict[str, Checkpoint]) -> None:
    plan = planned("{merge_method: passthrough, models: [{model: tied}]}", opened)
    assert HEAD not in tensors(plan)
    assert not plan.head


def test_a_head_that_the_config_asks_for_is_made_of_a_tied_last_slice(
    opened: dict[str, Checkpoint],
) -> None:
    parts = RANGE % ("a", 0, 2) + ", " + RANGE % ("tied", 2, 3)
    plan = planned(STACK % parts, opened)
    assert sources(tensors(plan)[HEAD]) == (("tied", EMBEDDINGS),)


@pytest.mark.parametrize(
    ("parents", "dtypes", "computed", "stored"),
    [
        (("a", "b"), {}, "float32", "float32"),
        (("half", "half-a"), {}, "bfloat16", "bfloat16"),
        (("half", "a"), {}, "float32", "float32"),
        (("a", "b"), {"dtype": "bfloat16"}, "bfloat16", "bfloat16"),
        (("half", "a"), {"dtype": "float16"}, "float16", "float16"),
        (("half", "half-a"), {"out_dtype": "float32"}, "bfloat16", "float32"),
        (("half", "a"), {"dtype": "float32", "out_dtype": "bfloat16"}, "float32", "bfloat16"),
    ],
)
def test_dtypes_are_promoted_unless_the_recipe_says_so(
    opened: dict[str, Checkpoint],
    parents: tuple[str, str],
    dtypes: dict[str, str],
    computed: str,
    stored: str,
) -> None:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": name} for name in parents],
        "parameters": {"weight": 0.5},
        **dtypes,
    }
    plan = planned(Recipe.from_dict(recipe).to_yaml(), opened)
    assert {(tensor.compute_dtype, tensor.dtype) for tensor in plan.tensors} == {
        (getattr(torch, computed), getattr(torch, stored))
    }


def test_dtypes_are_promoted_for_each_tensor_and_with_the_base(
    opened: dict[str, Checkpoint],
) -> None:
    recipe = """
merge_method: task_arithmetic
base_model: base
models: [{model: half}]
parameters: {weight: 1}
"""
    assert {tensor.dtype for tensor in planned(recipe, opened).tensors} == {torch.float32}


@pytest.mark.parametrize("method", ["arcee_fusion", "ramplus_tl"])
@pytest.mark.parametrize(("out", "stored"), [(None, torch.float32), ("float16", torch.float16)])
def test_methods_that_widen_store_what_they_give(
    opened: dict[str, Checkpoint], method: str, out: str | None, stored: torch.dtype
) -> None:
    recipe = {"merge_method": method, "base_model": "half", "models": [{"model": "half-a"}]}
    more = {} if out is None else {"out_dtype": out}
    plan = planned(Recipe.from_dict(recipe | more).to_yaml(), opened)
    assert {(t.compute_dtype, t.dtype) for t in plan.tensors} == {(torch.bfloat16, stored)}


def test_without_settings_the_vocabulary_is_the_parents(opened: dict[str, Checkpoint]) -> None:
    plan = planned(linear(0.5), opened)
    assert plan.vocabulary is None
    assert all(source.rows is None for tensor in plan.tensors for source in tensor.inputs)


def test_a_tokenizer_of_a_model_outside_the_recipe_is_refused(
    opened: dict[str, Checkpoint],
) -> None:
    with pytest.raises(RecipeError, match="'deep' is no model of the recipe"):
        planned(linear(0.5, tokenizer_source="deep"), opened)


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize(
    ("density", "epsilon", "fits"),
    [
        (0.5, 0.15, True),
        (0.5, -0.15, True),
        (1.0, 0.15, True),
        (0.1, 0.15, False),
        (0.9, 0.15, False),
        (0.3, -0.5, False),
    ],
)
def test_keep_probabilities_of_della_have_to_be_probabilities(
    opened: dict[str, Checkpoint], method: str, density: float, epsilon: float, fits: bool
) -> None:
    parameters = f"{{weight: 1, density: {density}, epsilon: {epsilon}}}"
    recipe = f"{{merge_method: {method}, base_model: base, models: [{{model: a}}], "
    recipe += f"parameters: {parameters}}}"
    if fits:
        assert planned(recipe, opened).tensors
    else:
        with pytest.raises(RecipeError, match=f"density {density} and epsilon {epsilon} of tensor"):
            planned(recipe, opened)


# Vocabularies of different heights


def test_heights_differ_unless_they_are_truncated(with_wordy: dict[str, Checkpoint]) -> None:
    recipe = WHOLE % "wordy"
    words = r"'lm_head\.weight' is .* for models with different tokens give a tokenizer_source"
    with pytest.raises(ModelError, match=words):
        planned(recipe, with_wordy)
    found = tensors(planned(recipe, with_wordy, truncate=True))
    height = with_wordy["a"].config["vocab_size"]
    assert found[EMBEDDINGS].shape == found[HEAD].shape == (height, 16)
    assert found[layer(0)].shape == with_wordy["a"].headers[layer(0)].shape


def test_truncation_is_of_tokens_only(opened: dict[str, Checkpoint]) -> None:
    with pytest.raises(ModelError, match="'wide': they do not fit together"):
        planned(WHOLE % "wide", opened, truncate=True)


# Models made up of names and shapes


Shapes = Mapping[str, tuple[int, ...]]
Make = Callable[..., Checkpoint]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write and open a model of these tensors, with this config; without one, a bare folder."""

    def made(
        name: str, shapes: Shapes, config: Any = None, extra: Tensors | None = None
    ) -> Checkpoint:
        folder = tmp_path / name
        folder.mkdir()
        values = {key: torch.zeros(shape) for key, shape in shapes.items()}
        save_file(values | (extra or {}), folder / "model.safetensors")
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return Checkpoint.open(folder)

    return made


LLAMA = {"model_type": "llama", "vocab_size": 10}
LLAVA = {"model_type": "llava", "text_config": LLAMA}
ENCODER = {"model_type": "bert", "vocab_size": 10}


def stack(prefix: str, layers: int, *names: str) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{i}.{name}.weight": (4, 4) for i in range(layers) for name in names}


def decoder(prefix: str = "", layers: int = 3) -> dict[str, tuple[int, ...]]:
    """The tensors of a small Llama, behind a prefix."""
    inside = stack(f"{prefix}model.layers", layers, "self_attn.q_proj", "mlp.up_proj")
    ends = {"model.embed_tokens.weight": (10, 4), "model.norm.weight": (4,)}
    return {
        **inside,
        **{prefix + name: shape for name, shape in ends.items()},
        f"{prefix}lm_head.weight": (10, 4),
    }


def vision_model(layers: int = 3) -> dict[str, tuple[int, ...]]:
    """A text decoder, a vision tower and a projector, as LLaVA names them."""
    return {
        **stack("vision_tower.vision_model.encoder.layers", 2, "self_attn.q_proj", "mlp.fc1"),
        "vision_tower.vision_model.embeddings.patch_embedding.weight": (4, 4),
        "multi_modal_projector.linear_1.weight": (4, 4),
        **decoder("language_model.", layers),
    }


TEXT_ONLY = """
merge_method: linear
parameters: {weight: %s}
%smodules:
  text_decoder: {models: [{model: seeing}, {model: %s}]}
"""


def test_parts_that_the_recipe_does_not_name_are_copied_with_a_note(make: Make) -> None:
    models = {name: make(name, vision_model(), LLAVA) for name in ("seeing", "other")}
    plan = planned(TEXT_ONLY % (0.5, "", "other"), models)
    found = tensors(plan)
    assert found.keys() == models["seeing"].headers.keys()
    for name, tensor in found.items():
        if name.startswith("language_model."):
            assert tensor.method == "linear"
            assert sources(tensor) == (("seeing", name), ("other", name))
        else:
            assert tensor.method == "copy"
            assert sources(tensor) == (("seeing", name),)
    assert sorted(plan.notes) == [
        f"part '{part}' ({n} tensors) is copied from 'seeing': the recipe does not name it"
        for part, n in (("multi_modal_projector", 1), ("vision_tower", 5))
    ]
    assert {part: len(layers) for part, layers in plan.layers.items()} == {
        "vision_tower": 2,
        "multi_modal_projector": 0,
        "text_decoder": 3,
    }


def test_models_are_merged_in_all_their_parts(make: Make) -> None:
    models = {name: make(name, vision_model(), LLAVA) for name in ("a", "b")}
    plan = planned(WHOLE % "b", models)
    assert {tensor.method for tensor in plan.tensors} == {"linear"}
    assert tensors(plan).keys() == models["a"].headers.keys()


def test_gradients_run_over_the_layers_of_each_part(make: Make) -> None:
    models = {name: make(name, vision_model(), LLAVA) for name in ("a", "b")}
    found = tensors(planned(linear([0.2, 0.8]), models))
    tower = "vision_tower.vision_model.encoder.layers.%d.mlp.fc1.weight"
    expected = {
        "multi_modal_projector.linear_1.weight": 0.2,
        tower % 0: 0.2,
        tower % 1: 0.8,
        **{f"language_model.{layer(i)}": w for i, w in enumerate((0.2, 0.5, 0.8))},
    }
    weights = {name: found[name].per_model[0]["weight"] for name in expected}
    assert weights == pytest.approx(expected)


def test_the_model_with_the_named_parts_is_what_others_are_merged_into(make: Make) -> None:
    """Also where the base is the language model that its text decoder was trained from."""
    models = {"seeing": make("seeing", vision_model(), LLAVA)}
    models |= {name: make(name, decoder(), LLAMA) for name in ("words", "base")}
    recipe = TEXT_ONLY.replace("linear", "task_arithmetic") % (0.5, "base_model: base\n", "words")
    plan = planned(recipe, models)
    found = tensors(plan)
    assert plan.donor == "seeing"
    assert found.keys() == vision_model().keys()
    merged = found[f"language_model.{layer(1)}"]
    assert sources(merged) == (("seeing", merged.name), ("words", layer(1)))
    assert merged.base == Input("base", layer(1))


@pytest.mark.parametrize("dtype", ["", "dtype: bfloat16\n"])
def test_quantised_parts_that_are_copied_stay_as_they_are(make: Make, dtype: str) -> None:
    name = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    shapes = {k: shape for k, shape in vision_model().items() if k != name}
    packed = {name: torch.ones(4, 4).to(torch.float8_e4m3fn)}
    models = {model: make(model, shapes, LLAVA, packed) for model in ("seeing", "other")}
    tensor = tensors(planned(dtype + TEXT_ONLY % (0.5, "", "other"), models))[name]
    assert (tensor.method, tensor.dtype) == ("copy", torch.float8_e4m3fn)
    assert tensor.compute_dtype == torch.float8_e4m3fn


def test_a_language_model_is_merged_into_the_text_decoder(make: Make) -> None:
    models = {
        "seeing": make("seeing", vision_model(), LLAVA),
        "words": make("words", decoder(), LLAMA),
    }
    found = tensors(planned(TEXT_ONLY % ([0.2, 0.8], "", "words"), models))
    for name in decoder():
        tensor = found[f"language_model.{name}"]
        assert sources(tensor) == (("seeing", f"language_model.{name}"), ("words", name))
    weights = [found[f"language_model.{layer(i)}"].per_model[0]["weight"] for i in range(3)]
    assert weights == pytest.approx([0.2, 0.5, 0.8])


def test_slices_of_a_part_renumber_it_alone(make: Make) -> None:
    models = {
        "seeing": make("seeing", vision_model(), LLAVA),
        "words": make("words", decoder(), LLAMA),
    }
    recipe = """
merge_method: passthrough
modules:
  text_decoder:
    slices:
    - sources: [{model: seeing, layer_range: [0, 2]}]
    - sources: [{model: words, layer_range: [0, 3]}]
"""
    plan = planned(recipe, models)
    found = tensors(plan)
    at = "language_model." + layer(2)
    assert sources(found[at]) == (("words", layer(0)),)
    assert sources(found["language_model.model.norm.weight"]) == (("words", NORM),)
    expected = [*(("seeing", i) for i in range(2)), *(("words", i) for i in range(3))]
    assert list(plan.layers["text_decoder"]) == expected
    assert sum("vision_tower" in name for name in found) == 5


UNFIT_PARTS = {
    "slices-of-several-parts": (
        "merge_method: passthrough\nslices: [" + RANGE % ("seeing", 0, 3) + "]",
        RecipeError,
        "say which of them is sliced: use 'modules'",
    ),
    "unknown-part": (
        "{merge_method: passthrough, modules: {text: {models: [{model: seeing}]}}}",
        RecipeError,
        "no part 'text'.*text_decoder",
    ),
    "part-that-another-lacks": (
        "{merge_method: linear, parameters: {weight: 1}, "
        "modules: {vision_tower: {models: [{model: seeing}, {model: hearing}]}}}",
        ModelError,
        "'hearing' has no part 'vision_tower', only .*audio_tower",
    ),
    "other-depth": (
        TEXT_ONLY % (0.5, "", "deep"),
        ModelError,
        "'seeing' has 3 layers and 'deep' 4",
    ),
}


@pytest.mark.parametrize("case", UNFIT_PARTS)
def test_parts_that_do_not_fit_are_refused_in_one_line(make: Make, case: str) -> None:
    hearing = {
        name.replace("vision_tower.vision_model", "audio_tower"): shape
        for name, shape in vision_model().items()
    }
    models = {
        "seeing": make("seeing", vision_model(), LLAVA),
        "hearing": make("hearing", hearing, LLAVA),
        "deep": make("deep", decoder(layers=4), LLAMA),
    }
    recipe, kind, words = UNFIT_PARTS[case]
    with pytest.raises(kind, match=words) as raised:
        planned(recipe, models)
    assert "\n" not in str(raised.value)


def test_biases_are_merged_like_weights(make: Make) -> None:
    biased = decoder() | {f"model.layers.{i}.self_attn.q_proj.bias": (4,) for i in range(3)}
    models = {name: make(name, biased, LLAMA) for name in "ab"}
    found = tensors(planned(WHOLE % "b", models))
    bias = found["model.layers.1.self_attn.q_proj.bias"]
    assert (bias.method, bias.shape, len(bias.inputs)) == ("linear", (4,), 2)


def buffers() -> Tensors:
    return {
        **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(3)},
        "model.position_ids": torch.arange(6).view(1, 6),
        "model.steps": torch.tensor([3]),
        "model.mask": torch.ones(2, 2, dtype=torch.bool),
    }


def test_buffers_are_copied_with_a_note(make: Make) -> None:
    models = {name: make(name, decoder(), LLAMA, buffers()) for name in "ab"}
    plan = planned("dtype: bfloat16\n" + WHOLE % "b", models)
    found = tensors(plan)
    for name, value in buffers().items():
        tensor = found[name]
        assert (tensor.method, sources(tensor)) == ("copy", (("a", name),))
        expected = torch.bfloat16 if value.is_floating_point() else value.dtype
        assert tensor.dtype == tensor.compute_dtype == expected
        assert f"tensor '{of_any_layer(name)}' is no weight: copied from 'a'" in plan.notes
    assert found[layer(0)].method == "linear"


def of_any_layer(name: str) -> str:
    return re.sub(r"layers\.\d+", "layers.{}", name)


def derived_only() -> Tensors:
    return {
        name: value
        for name, value in buffers().items()
        if name.endswith(("inv_freq", "position_ids"))
    }


def test_derived_tensors_that_only_the_first_has_are_copied(make: Make) -> None:
    models = {"a": make("a", decoder(), LLAMA, derived_only()), "b": make("b", decoder(), LLAMA)}
    plan = planned(WHOLE % "b", models)
    assert {n for n, t in tensors(plan).items() if t.method == "copy"} == derived_only().keys()


def test_derived_tensors_that_only_another_has_are_left_out_with_a_note(make: Make) -> None:
    models = {"a": make("a", decoder(), LLAMA), "b": make("b", decoder(), LLAMA, derived_only())}
    plan = planned(WHOLE % "b", models)
    assert tensors(plan).keys() == decoder().keys()
    for name in derived_only():
        note = f"tensor '{of_any_layer(name)}' of 'b' is left out: it is derived"
        assert plan.notes.count(note) == 1  # whatever the number of layers


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_other_tensors_that_one_model_lacks_are_never_left_out(make: Make, order: str) -> None:
    more = decoder() | {"model.layers.1.mlp.gate.weight": (4, 4)}
    models = {"a": make("a", decoder(), LLAMA), "b": make("b", more, LLAMA)}
    recipe = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: %s}, {model: %s}]"
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.gate\.weight"):
        planned(recipe % tuple(order), models)


def test_names_may_stand_behind_other_prefixes(make: Make) -> None:
    """As a model with a head and its trunk alone are saved."""
    trunk = {
        name.removeprefix("model."): shape for name, shape in decoder().items() if name != HEAD
    }
    models = {"a": make("a", decoder(), LLAMA), "b": make("b", trunk, LLAMA)}
    found = tensors(planned(WHOLE % "b", models))
    assert sources(found[layer(2)]) == (("a", layer(2)), ("b", layer(2).removeprefix("model.")))
    assert sources(found[HEAD]) == (("a", HEAD), ("b", "embed_tokens.weight"))  # it is tied


# Models without layers, and layers that cannot be told


UNET = stack("down_blocks", 2, "attn.to_q", "resnet.conv") | stack(
    "up_blocks", 2, "attn.to_q", "resnet.conv"
)


def test_plain_state_dicts_are_merged_whole(make: Make) -> None:
    models = {name: make(name, UNET) for name in "ab"}
    plan = planned(WHOLE % "b", models)
    assert tensors(plan).keys() == UNET.keys()
    assert all(len(tensor.inputs) == 2 for tensor in plan.tensors)
    assert plan.layers == {"default": ()}


GRADIENT = "merge_method: linear\nparameters: {weight: [0, 1]}\nmodels: [{model: a}, {model: b}]"
FILTERED = """
merge_method: linear
parameters: {weight: [{filter: q, value: %s}, {value: 0.5}]}
models: [{model: a}, {model: b}]
"""


@pytest.mark.parametrize("config", [None, ENCODER], ids=["plain", "unclear"])
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(GRADIENT, id="gradient"),
        pytest.param(FILTERED % [0.0, 1.0], id="gradient-behind-a-filter"),
        pytest.param(STACK % (RANGE % ("a", 0, 1)), id="slices"),
    ],
)
def test_where_layers_cannot_be_told_nothing_may_depend_on_them(
    make: Make, config: Any, recipe: str
) -> None:
    models = {name: make(name, UNET, config) for name in "ab"}
    with pytest.raises(ModelError, match=r"'a': its layers cannot be told .*: use 'models'"):
        planned(recipe, models)


@pytest.mark.parametrize("config", [None, ENCODER], ids=["plain", "unclear"])
def test_where_layers_cannot_be_told_filters_still_hold(make: Make, config: Any) -> None:
    models = {name: make(name, UNET, config) for name in "ab"}
    plan = planned(FILTERED % 0.25, models)
    weights = {t.name.split(".")[3]: t.per_model[0]["weight"] for t in plan.tensors}
    assert weights == {"to_q": 0.25, "conv": 0.5}


def test_a_plain_state_dict_is_no_language_model(make: Make) -> None:
    models = {"a": make("a", decoder()), "b": make("b", decoder(), LLAMA)}
    with pytest.raises(ModelError, match="'a' is a plain state dict and 'b' a language model"):
        planned(WHOLE % "b", models)


def test_a_plain_state_dict_has_no_tokenizer(make: Make) -> None:
    models = {name: make(name, UNET) for name in "ab"}
    with pytest.raises(RecipeError, match=r"'a' is a plain state dict.*no tokenizer"):
        planned("tokenizer_source: union\n" + WHOLE % "b", models)


def test_other_architectures_are_merged_only_where_that_is_asked_for(make: Make) -> None:
    models = {
        "a": make("a", decoder(), LLAMA),
        "b": make("b", decoder(), LLAMA | {"model_type": "qwen2"}),
    }
    with pytest.raises(ModelError, match=r"'b' is qwen2 and 'a' llama.*--allow-crimes"):
        planned(WHOLE % "b", models)
    plan = planned(WHOLE % "b", models, allow_crimes=True)
    assert tensors(plan).keys() == decoder().keys()


def test_crimes_have_to_fit_as_well(make: Make) -> None:
    more = decoder() | {"model.layers.0.self_attn.q_norm.weight": (4,)}
    models = {
        "a": make("a", decoder(), LLAMA),
        "b": make("b", more, LLAMA | {"model_type": "qwen3"}),
    }
    with pytest.raises(ModelError, match=r"'b' has the tensor .*q_norm\.weight', which 'a' lacks"):
        planned(WHOLE % "b", models, allow_crimes=True)


def test_packed_weights_are_not_merged(make: Make) -> None:
    packed = {layer(i): torch.ones(4, 4).to(torch.float8_e4m3fn) for i in range(3)}
    shapes = {name: shape for name, shape in decoder().items() if name not in packed}
    models = {name: make(name, shapes, LLAMA, packed) for name in "ab"}
    with pytest.raises(
        ModelError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' of 'a' is quant"
    ):
        planned(WHOLE % "b", models)


def test_packed_integers_are_no_buffers(make: Make) -> None:
    """Of a model that is quantised to integers, whose scales are floating values."""
    config = LLAMA | {"quantization_config": {"quant_method": "gptq"}}
    packed = {
        layer(i, "mlp.up_proj.qweight"): torch.ones(4, 4, dtype=torch.int32) for i in range(3)
    }
    models = {name: make(name, decoder(), config, packed) for name in "ab"}
    with pytest.raises(ModelError, match=r"'model\.layers\.0\.mlp\.up_proj\.qweight' of 'a' is q"):
        planned(WHOLE % "b", models)


# Names that stand inside the layers and outside


def opt() -> dict[str, tuple[int, ...]]:
    """The tensors of a small OPT: a norm of one name in each layer and behind them."""
    return {
        "model.decoder.embed_tokens.weight": (10, 4),
        **stack("model.decoder.layers", 3, "self_attn.q_proj", "fc1", "final_layer_norm"),
        "model.decoder.final_layer_norm.weight": (4,),
    }


@pytest.mark.parametrize("order", [1, -1])
def test_a_norm_behind_the_layers_may_be_called_like_one_in_them(make: Make, order: int) -> None:
    shapes = dict([*opt().items()][::order])
    config = {"model_type": "opt", "vocab_size": 10}
    models = {name: make(name, shapes, config) for name in "ab"}
    for recipe in (WHOLE % "b", STACK % ", ".join(RANGE % (name, 0, 3) for name in "ab")):
        found = tensors(planned(recipe, models))
        assert found["model.decoder.final_layer_norm.weight"].shape == (4,)
        depth = 3 if "linear" in recipe else 6
        assert found.keys() == {n for n in shapes if ".layers." not in n} | {
            f"model.decoder.layers.{i}.{name}.weight"
            for i in range(depth)
            for name in ("self_attn.q_proj", "fc1", "final_layer_norm")
        }


def test_one_of_them_may_not_be_missing(make: Make) -> None:
    config = {"model_type": "opt", "vocab_size": 10}
    short = {n: s for n, s in opt().items() if n != "model.decoder.final_layer_norm.weight"}
    models = {"a": make("a", short, config), "b": make("b", opt(), config)}
    with pytest.raises(ModelError, match=r"'b' has the tensor '.*r\.final_layer_norm\.weight'"):
        planned(WHOLE % "b", models)


def test_what_only_the_config_of_the_base_asks_for_is_not_left_out(make: Make) -> None:
    """Also where the base is no source of any slice."""
    models = {"base": make("base", decoder() | {"model.gate.weight": (4, 4)}, LLAMA)}
    models |= {"a": make("a", decoder(), LLAMA)}
    with pytest.raises(ModelError, match=r"'base' has the tensor 'model\.gate\.weight', which 'a'"):
        planned("base_model: base\n" + STACK % (RANGE % ("a", 0, 3)), models)


def test_a_bias_of_the_head_that_no_source_has_is_refused(make: Make) -> None:
    models = {"base": make("base", decoder() | {"lm_head.bias": (10,)}, LLAMA)}
    models |= {"a": make("a", decoder(), LLAMA)}
    with pytest.raises(ModelError, match=r"'a' has no tensor 'lm_head\.bias'"):
        planned("base_model: base\n" + STACK % (RANGE % ("a", 0, 3)), models)


# Gradients


@pytest.mark.parametrize(
    ("depth", "values", "expected"),
    [
        (1, [0.0, 1.0], [1.0]),
        (2, [0.0, 1.0], [0.0, 1.0]),
        (5, [0.0, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0]),
        (5, [0.0, 1.0, 0.0], [0.0, 0.5, 1.0, 0.5, 0.0]),
        (4, [0.0, 0.3, 0.6, 0.9], [0.0, 0.3, 0.6, 0.9]),
        (3, [0.7], [0.7] * 3),
    ],
)
def test_gradients_are_interpolated_between_the_first_layer_and_the_last(
    make: Make, depth: int, values: Sequence[float], expected: Sequence[float]
) -> None:
    models = {name: make(name, decoder(layers=depth), LLAMA) for name in "ab"}
    recipe = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n"
    found = tensors(planned(f"{recipe}parameters: {{t: {list(values)}}}", models))
    assert [found[layer(i)].shared["t"] for i in range(depth)] == pytest.approx(expected)
    assert found[EMBEDDINGS].shared["t"] == found[NORM].shared["t"] == values[0]


def test_notes_tell_of_layers_that_fall_out_between_slices(make: Make) -> None:
    models = {"a": make("a", decoder(layers=6), LLAMA)}
    plan = planned(STACK % (RANGE % ("a", 0, 2) + ", " + RANGE % ("a", 3, 6)), models)
    assert any("'a' loses layers 2 between its slices" in note for note in plan.notes)
