"""Residual scales folded into recipes: the product rule, the bounds, the tensors of a kind.

That the folded models compute the same is shown in tests/merge/test_layer_space.py.
"""

import math
from itertools import accumulate, pairwise
from operator import mul

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import ModelError
from evomerge.layout import Layout, infer
from evomerge.recipe import Recipe, Source, resolve
from evomerge.space import Infeasible
from evomerge.space.residual import BOUND, Ends, Fold, Slot, fold_of, stack

PARTS = (
    *("self_attn.q_proj", "self_attn.o_proj", "self_attn.q_norm"),
    *("mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
)
NORMS = ("input_layernorm", "post_attention_layernorm")
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")


def layout(*parts: str, layers: int = 2, final: str = "model.norm") -> Layout:
    inside = (f"model.layers.{i}.{part}.weight" for i in range(layers) for part in parts)
    return infer(["model.embed_tokens.weight", *inside, f"{final}.weight", "lm_head.weight"])


LLAMA = fold_of({"model_type": "llama"}, layout(*PARTS))
GEMMA = fold_of({"model_type": "gemma"}, layout(*PARTS))
ENDS = Ends("a", {"a": layout(*PARTS), "b": layout(*PARTS, layers=5)})


def sources(recipe: Recipe | Infeasible) -> list[Source]:
    assert isinstance(recipe, Recipe), recipe
    return [source for part in recipe.slices or () for source in part.sources]


def scale(source: Source, tensor: str) -> float:
    return float(resolve("scale", (source.parameters,), tensor, 0.0) or 1.0)


def unfolded(recipe: Recipe | Infeasible) -> list[dict[str, float]]:
    """What each output layer's tensors are multiplied by, and the final norm, in order."""
    return [
        {part: scale(source, f"model.layers.{layer}.{part}.weight") for part in PARTS}
        | {"final": scale(source, "model.norm.weight")}
        for source in sources(recipe)
        for layer in range(*source.layer_range)
    ]


names = st.tuples(st.sampled_from("ab"), st.integers(0, 4))
scales = st.floats(0.5, 2.0) | st.floats(-2.0, -0.5)
orders = st.lists(names, min_size=1, max_size=8)


@settings(derandomize=True, deadline=None)
@given(order=orders)
def test_scales_of_one_are_the_plain_stack(order: list[tuple[str, int]]) -> None:
    found = sources(stack([Slot(*name) for name in order], LLAMA))
    assert all(not source.parameters for source in found)
    assert [(s.model, n) for s in found for n in range(*s.layer_range)] == order
    joins = [a for a, b in pairwise(order) if b != (a[0], a[1] + 1)]
    assert len(found) == len(joins) + 1, "slices are as long as they can be"


@settings(derandomize=True, deadline=None)
@given(slots=st.lists(st.builds(Slot, st.just("a"), st.integers(0, 4), scales), min_size=1))
def test_a_slot_is_divided_by_the_product_of_the_scales_up_to_it(slots: list[Slot]) -> None:
    products = list(accumulate((slot.scale for slot in slots), mul))
    recipe = stack(slots, LLAMA)
    if any(not 1 / BOUND <= abs(product) <= BOUND for product in products):
        assert isinstance(recipe, Infeasible)
        return
    for found, product in zip(unfolded(recipe), products, strict=True):
        sign = math.copysign(1.0, product)
        assert found == {
            **dict.fromkeys(PARTS, 1.0),
            **dict.fromkeys(OUTPUTS, pytest.approx(1 / product, rel=1e-8)),
            **dict.fromkeys(NORMS, sign),
            "final": found["final"],
        }
    assert unfolded(recipe)[-1]["final"] == math.copysign(1.0, products[-1])


@settings(derandomize=True, deadline=None)
@given(factor=scales, before=orders, after=orders)
def test_a_scale_that_is_taken_back_leaves_nothing_behind(
    factor: float, before: list[tuple[str, int]], after: list[tuple[str, int]]
) -> None:
    first, *rest = [Slot(*name) for name in after]
    back = Slot(first.model, first.layer, 1 / factor)
    slots = [*(Slot(*name) for name in before), Slot("c", 0, factor), back, *rest]
    found = sources(stack(slots, LLAMA))
    assert {source.model for source in found if source.parameters} <= {"c"}


@pytest.mark.slow
@settings(derandomize=True, deadline=None)
@given(
    slots=st.lists(st.builds(Slot, st.sampled_from("ab"), st.integers(0, 4), scales), min_size=1)
)
def test_a_recipe_reads_back_as_it_was(slots: list[Slot]) -> None:
    recipe = stack(slots, LLAMA, "float32")
    if isinstance(recipe, Recipe):
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_the_recipe_is_ordinary_mergekit() -> None:
    slots = [Slot("a", 0), Slot("a", 1), Slot("a", 2, -0.5), Slot("a", 3), Slot("b", 4)]
    recipe = stack(slots, LLAMA, "bfloat16")
    assert isinstance(recipe, Recipe)
    inside = [
        {"filter": ".o_proj.", "value": -2.0},
        {"filter": ".down_proj", "value": -2.0},
        {"filter": ".input_layernorm.weight", "value": -1.0},
        {"filter": ".post_attention_layernorm.weight", "value": -1.0},
    ]
    last = [*inside, {"filter": "model.norm.weight", "value": -1.0}]

    def part(model: str, start: int, end: int, filters: list[dict[str, object]]) -> object:
        source = {"model": model, "layer_range": [start, end]}
        scaled = {"parameters": {"scale": filters}} if filters else {}
        return {"sources": [{**source, **scaled}]}

    assert recipe.to_dict() == {
        "merge_method": "passthrough",
        "slices": [part("a", 0, 2, []), part("a", 2, 4, inside), part("b", 4, 5, last)],
        "dtype": "bfloat16",
    }


def test_given_ends_stand_beside_the_first_and_the_last_layer() -> None:
    slots = [Slot("b", 3), Slot("b", 4), Slot("a", 1), Slot("b", 0, -0.5)]
    recipe = stack(slots, LLAMA, ends=ENDS)
    assert isinstance(recipe, Recipe)
    assert (recipe.merge_method, recipe.base_model) == ("linear", "a")
    ranges = [[(s.model, s.layer_range) for s in one.sources] for one in recipe.slices or ()]
    assert ranges == [
        [("b", (3, 4)), ("a", (1, 2))],  # a has two layers
        [("b", (4, 5))],
        [("a", (1, 2))],
        [("b", (0, 1)), ("a", (0, 1))],
    ]
    scopes = [[(s.parameters, recipe.parameters) for s in one.sources] for one in recipe.slices]

    def weight(tensor: str, at: int) -> list[float]:
        found = [resolve("weight", both, tensor, 0.0) for both in scopes[at]]
        return [float(value) for value in found if value is not None]

    assert weight("model.embed_tokens.weight", 0) == [0.0, 1.0]
    assert weight("model.layers.3.self_attn.o_proj.weight", 0) == [1.0, 0.0]
    assert weight("model.layers.4.self_attn.o_proj.weight", 1) == [1.0]
    assert weight("model.layers.2.self_attn.o_proj.weight", 3) == [-2.0, 0.0]
    assert weight("model.layers.2.self_attn.q_proj.weight", 3) == [1.0, 0.0]
    assert weight("lm_head.weight", 3) == [0.0, 1.0]
    assert weight("model.norm.weight", 3) == [0.0, -1.0]


@pytest.mark.slow
@settings(derandomize=True, deadline=None)
@given(order=orders)
def test_the_last_slice_has_no_more_sources_than_the_first(order: list[tuple[str, int]]) -> None:
    """Of more, mergekit 0.1.5 merges into the final norm and the head only as many."""
    recipe = stack([Slot(*name) for name in order], ends=ENDS)
    assert isinstance(recipe, Recipe)
    first, *_, last = [*recipe.slices, *recipe.slices]
    assert len(last.sources) <= len(first.sources)
    beside = [s for s in first.sources[1:] if order[0][0] == "a"]
    embedding = "model.embed_tokens.weight"
    assert all(resolve("weight", (s.parameters,), embedding, 0.0) == 0 for s in beside)


def test_own_ends_need_no_other_model() -> None:
    slots = [Slot("a", 0), Slot("b", 1), Slot("a", 2)]
    given = stack(slots, ends=ENDS)
    assert given == stack(slots)


def test_a_scale_without_a_fold_is_infeasible() -> None:
    found = stack([Slot("a", 0), Slot("a", 1, 0.5)])
    assert isinstance(found, Infeasible)
    assert found.reason.endswith("how they are folded was not said")


@pytest.mark.parametrize("edge", [BOUND, 1 / BOUND, -BOUND])
def test_the_bounds_belong_to_what_is_allowed(edge: float) -> None:
    assert isinstance(stack([Slot("a", 0, edge)], LLAMA), Recipe)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (0.0, "multiply to 0, outside [1/8, 8] in magnitude"),
        (4.01, "multiply to 8.02, outside [1/8, 8] in magnitude"),
        (-0.06, "multiply to -0.12, outside [1/8, 8] in magnitude"),
        (math.nan, "multiply to nan, which is not a finite number"),
        (math.inf, "multiply to inf, which is not a finite number"),
    ],
)
def test_a_product_out_of_bounds_is_infeasible(wrong: float, reason: str) -> None:
    found = stack([Slot("a", 0, 2.0), Slot("b", 3, wrong), Slot("b", 4)], LLAMA)
    assert isinstance(found, Infeasible)
    assert found.reason == (f"slot 1 ('b' layer 3, scale {wrong:g}): the scales up to it {reason}")


def test_no_slot_is_infeasible() -> None:
    assert stack([], LLAMA) == Infeasible("no layer is chosen")


def test_a_sign_is_infeasible_where_norms_cannot_carry_it() -> None:
    slots = [Slot("a", 0, 0.5), Slot("a", 1, -1.5), Slot("a", 2, -1.0)]
    assert stack(slots, GEMMA) == Infeasible(
        "slot 1 ('a' layer 1, scale -1.5): the scales up to it multiply to -0.75, and the sign "
        "cannot be folded into this architecture: its norms multiply by 1 + w"
    )
    assert isinstance(stack([Slot("a", 0, -1.0)], LLAMA), Recipe)
    found = unfolded(stack([Slot("a", 0, 0.5)], GEMMA))
    assert found == [dict.fromkeys([*PARTS, "final"], 1.0) | dict.fromkeys(OUTPUTS, 2.0)]


def test_weights_on_the_bare_stream_are_multiplied() -> None:
    """OLMo 2 has its norms after the sub-layers."""
    after = ("post_attention_layernorm", "post_feedforward_layernorm")
    read = tuple(f"x.{name}_proj" for name in ("q", "k", "v", "gate", "up"))
    fold = fold_of({"model_type": "olmo2"}, layout(*after, *read))
    (source,) = sources(stack([Slot("a", 0, -0.5)], fold))
    found = {part: scale(source, f"model.layers.0.{part}.weight") for part in (*after, *read)}
    assert found == {**dict.fromkeys(after, -2.0), **dict.fromkeys(read, -0.5)}
    assert scale(source, "model.norm.weight") == -1.0
    assert scale(source, "model.layers.0.x.q_proj.bias") == 1.0


@pytest.mark.parametrize(
    ("experts", "written"),
    [
        ("block_sparse_moe.experts.3.w2", ".w2."),
        ("mlp.experts.3.down_proj", ".down_proj"),
    ],
)
def test_experts_are_found_under_either_name(experts: str, written: str) -> None:
    own = ("self_attn.o_proj", *NORMS, experts)
    fold = fold_of({"model_type": "mixtral"}, layout(*own))
    assert fold.written == (".o_proj.", written)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gemma2", "multiply by 1 \\+ w, which no scale of w divides"),
        ("bert", "it normalises the residual stream itself"),
        ("qwen", "was never checked; it is for .*llama, ministral, mistral"),
        ("None", "was never checked"),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_reason(kind: str, reason: str) -> None:
    with pytest.raises(ModelError, match=f"a model of type '{kind}': .*{reason}"):
        fold_of({"model_type": kind}, layout(*PARTS))


@pytest.mark.parametrize("missing", [*OUTPUTS, *NORMS])
def test_a_model_that_lacks_a_tensor_of_its_kind_is_refused(missing: str) -> None:
    parts = [part for part in PARTS if part != missing]
    with pytest.raises(ModelError, match=f"no tensor of layer 0 has '.{missing.split('.')[-1]}"):
        fold_of({"model_type": "llama"}, layout(*parts))


def test_a_model_without_its_final_norm_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no tensor is called 'model\.norm\.weight'"):
        fold_of({"model_type": "llama"}, layout(*PARTS, final="model.ln"))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="the model's layers cannot be told: it has none"):
        fold_of({"model_type": "llama"}, infer(["model.norm.weight"]))
    with pytest.raises(ModelError, match=r"layers \[0\] of 'layers\.\*' are missing"):
        fold_of({"model_type": "llama"}, infer([f"layers.1.{part}.weight" for part in PARTS]))


def test_a_fold_is_a_value() -> None:
    assert (
        fold_of({"model_type": "mistral"}, layout(*PARTS))
        == LLAMA
        == Fold(LLAMA.written, LLAMA.signed, LLAMA.final)
    )
