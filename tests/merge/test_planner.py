"""Plans: what each output tensor is made of, and recipes that do not fit their models."""

import pytest
import torch

from evomerge.errors import ModelError, RecipeError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.plan import Input
from evomerge.recipe import Recipe
from evomerge.signatures import METHODS
from tests.merge.conftest import altered
from tests.merge.planning import (
    EMBEDDINGS,
    HEAD,
    NORM,
    RANGE,
    STACK,
    WHOLE,
    layer,
    linear,
    planned,
    sources,
    tensors,
)


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
