"""What tensors are made of, in models made up of names and shapes."""

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
from evomerge.merge.plan import Input
from tests.merge.conftest import Tensors
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
    stack,
    tensors,
)

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
