"""Groups of tensors: each tensor in one, found again by the filters of a recipe."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import JobError
from evomerge.layout import Layout, infer, split
from evomerge.recipe import ModelEntry, resolve
from evomerge.space.groups import Groups, Per
from tests.space.names import llama
from tests.test_layout import ARCHITECTURES, _tensors

PER: tuple[Per, ...] = ("model", "layer", "module", "slice")


def found_by(groups: Groups, name: str) -> str:
    """The group of a tensor, as a merge finds a parameter of it."""
    labels = list(groups.members)
    value = [
        {"value": labels.index(label)} | ({} if text is None else {"filter": text})
        for text, label in groups.filters
    ]
    entry = ModelEntry.model_validate({"model": "m", "parameters": {"weight": value}})
    number = resolve("weight", [entry.parameters], name, 0.5)
    assert number is not None
    return labels[int(number)]


def layered(architecture: str) -> list[Layout]:
    """The parts of an architecture that have layers."""
    names = [n for part in ARCHITECTURES[architecture].values() for n, _ in _tensors(part)]
    return [layout for layout in split(names).values() if layout.layers]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("filters", [(), ("mlp", "q_proj", "bias")])
def test_every_tensor_of_an_architecture_is_found_in_its_group(
    architecture: str, filters: tuple[str, ...]
) -> None:
    for layout in layered(architecture):
        for per in PER:
            groups = Groups.of(layout, per, 1, filters)
            members = [name for names in groups.members.values() for name in names]
            assert sorted(members) == sorted(layout.places)
            for label, names in groups.members.items():
                assert {found_by(groups, name) for name in names} == {label}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_module_of_a_layer_holds_nothing_of_other_layers_or_modules(architecture: str) -> None:
    for layout in layered(architecture):
        for label, names in Groups.of(layout, "module").members.items():
            places = [layout.places[name] for name in names]
            modules = {place.module for place in places} - {"norms"}
            assert len({place.layer for place in places}) == 1
            if places[0].layer is not None:
                assert modules == {label.rpartition(" ")[2]}  # no norms on their own


@pytest.mark.parametrize(
    ("architecture", "norm", "module"),
    [
        ("llama mistral qwen2 stablelm", "model.layers.1.input_layernorm.weight", "attention"),
        ("llama mistral qwen2 stablelm", "model.layers.1.post_attention_layernorm.weight", "mlp"),
        ("gemma2", "model.layers.1.post_attention_layernorm.weight", "attention"),
        ("gemma2", "model.layers.1.pre_feedforward_layernorm.weight", "mlp"),
        ("olmo2", "model.layers.1.post_feedforward_layernorm.weight", "mlp"),
        ("qwen3", "model.layers.1.self_attn.q_norm.weight", "attention"),
        ("gpt2 gpt_bigcode", "transformer.h.1.ln_1.weight", "attention"),
        ("gpt2 gpt_bigcode", "transformer.h.1.ln_2.weight", "mlp"),
        ("opt", "model.decoder.layers.1.final_layer_norm.weight", "mlp"),
        ("bert", "bert.encoder.layer.1.attention.output.LayerNorm.weight", "attention"),
        ("bert", "bert.encoder.layer.1.output.LayerNorm.weight", "mlp"),
        ("internlm2", "model.layers.1.ffn_norm.weight", "mlp"),
        ("vit", "vit.encoder.layer.1.layernorm_after.weight", "mlp"),
        ("cohere", "model.layers.1.input_layernorm.weight", "attention"),
    ],
)
def test_norms_go_with_what_they_stand_at(architecture: str, norm: str, module: str) -> None:
    (layout,) = layered(architecture)
    assert found_by(Groups.of(layout, "module"), norm) == f"layer 1 {module}"


def test_a_norm_before_what_is_called_ff_goes_with_the_mlp() -> None:
    parts = ("mamba.in_proj", "feed_forward.up_proj", "input_layernorm", "pre_ff_layernorm")
    layout = infer([f"model.layers.{i}.{part}.weight" for i in range(2) for part in parts])
    groups = Groups.of(layout, "module")
    assert found_by(groups, "model.layers.1.pre_ff_layernorm.weight") == "layer 1 mlp"
    assert found_by(groups, "model.layers.1.input_layernorm.weight") == "layer 1 attention"


@pytest.mark.slow
@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    runs=st.integers(1, 7),
    granularity=st.integers(1, 3),
    per=st.sampled_from(PER),
    prefix=st.sampled_from(["model.", "", "model.language_model."]),
    seed=st.integers(0, 999),
)
def test_groups_do_not_depend_on_the_order_of_files(
    runs: int, granularity: int, per: Per, prefix: str, seed: int
) -> None:
    names = llama(runs * granularity, prefix=prefix)
    ordered = Groups.of(infer(names), per, granularity)
    random.Random(seed).shuffle(names)
    shuffled = Groups.of(infer(names), per, granularity)
    assert list(shuffled.members) == list(ordered.members)
    for name in names:
        assert found_by(shuffled, name) == found_by(ordered, name)


@pytest.mark.parametrize(
    ("per", "granularity", "filters", "labels"),
    [
        ("model", 1, (), ["all"]),
        ("model", 1, ("mlp",), ["all mlp", "all"]),
        ("layer", 1, (), ["embeddings", "layer 0", "layer 1", "final norm and head"]),
        ("layer", 2, (), ["embeddings", "layers 0-1", "final norm and head"]),
        ("slice", 1, (), ["layer 0", "layer 1"]),
        (
            "slice",
            2,
            ("self_attn", "mlp"),
            ["layers 0-1 self_attn", "layers 0-1 mlp", "layers 0-1"],
        ),
        (
            "module",
            2,
            (),
            ["embeddings", "layers 0-1 attention", "layers 0-1 mlp", "final norm and head"],
        ),
    ],
)
def test_groups_are_named_by_their_layers(
    per: Per, granularity: int, filters: tuple[str, ...], labels: list[str]
) -> None:
    groups = Groups.of(infer(llama(2)), per, granularity, filters)
    assert list(groups.members) == labels


def test_a_slice_has_what_stands_before_and_after_the_layers() -> None:
    groups = Groups.of(infer(llama(4)), "slice", 2)
    assert found_by(groups, "model.embed_tokens.weight") == "layers 0-1"
    assert found_by(groups, "model.norm.weight") == "layers 2-3"
    assert found_by(groups, "lm_head.weight") == "layers 2-3"


def test_a_name_inside_another_is_told_apart() -> None:
    names = [f"{tower}layers.{i}.mlp.up.weight" for tower in ("", "seeing.") for i in range(3)]
    names += [f"layers.{i}.attn.{key}.weight" for i in range(3) for key in "qk"]
    groups = Groups.of(infer(names), "layer")
    assert found_by(groups, "layers.1.mlp.up.weight") == "layer 1"
    assert found_by(groups, "seeing.layers.1.mlp.up.weight") == "final norm and head"


def test_an_unknown_name_falls_to_the_last_group() -> None:
    groups = Groups.of(infer(llama(2)), "layer")
    assert found_by(groups, "value_head.weight") == "final norm and head"


@pytest.mark.parametrize(
    ("names", "granularity", "words"),
    [
        (llama(6), 4, "space.granularity: 4 does not divide the model's 6 layers"),
        (["a.weight", "b.weight"], 1, "space.per: 'layer' needs layers"),
        (
            [f"{t}.layers.{i}.mlp.up.weight" for t in "ab" for i in range(2)],
            1,
            "two parts of the model are numbered alike",
        ),
    ],
)
def test_layers_that_cannot_be_divided_are_refused(
    names: list[str], granularity: int, words: str
) -> None:
    with pytest.raises(JobError) as caught:
        Groups.of(infer(names), "layer", granularity)
    assert words in str(caught.value)
