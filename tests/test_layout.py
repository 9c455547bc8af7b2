"""Layouts: a tensor's place, from its name alone."""

import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.layout import Place, infer, split

LLAMA = "model.layers.{}.self_attn.q_proj.weight"

Part = tuple[int, str, dict[str, list[str]]]  # layers, prefix, templates by module


def _read_architectures() -> dict[str, dict[str, Part]]:
    found: dict[str, dict[str, Part]] = {}
    parts: dict[str, Part] = {}
    templates: dict[str, list[str]] = {}
    for line in (Path(__file__).parent / "layouts.txt").read_text().splitlines():
        if line.startswith("["):
            parts = found.setdefault(line[1:-1], {})
        elif line.startswith("  "):
            module, names = line.strip().split(": ")
            templates[module] = [t for name in names.split() for t in _templates(name)]
        elif line and not line.startswith("#"):
            part, layers, *prefix = line.split()
            templates = {}
            parts[part] = (int(layers), "".join(prefix), templates)
    return found


def _templates(names: str) -> Iterator[str]:
    """The names that one with braces stands for."""
    before, _, rest = names.partition("{")
    inner, _, after = rest.partition("}")
    for word in inner.split(","):
        name = before + word + after
        yield name[:-1] if name.endswith("!") else f"{name}.weight"


ARCHITECTURES = _read_architectures()


def _tensors(part: Part) -> Iterator[tuple[str, Place]]:
    """Every tensor of a part with its true place."""
    layers, prefix, templates = part
    for module, names in templates.items():
        for name in names:
            if name.startswith("#."):
                template = f"{prefix}.{{}}{name[1:]}"
                for layer in range(layers):
                    yield template.format(layer), Place(layer, module, template)
            else:
                yield name, Place(None, module, name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_is_laid_out_as_it_is_made(architecture: str) -> None:
    parts = {part: dict(_tensors(given)) for part, given in ARCHITECTURES[architecture].items()}
    names = [name for places in parts.values() for name in places]
    random.Random(architecture).shuffle(names)
    layouts = split(names)
    assert {part: layout.places for part, layout in layouts.items()} == parts
    for part, (layers, prefix, _) in ARCHITECTURES[architecture].items():
        found = layouts[part]
        assert (found.layers, found.prefix, found.unclear) == (layers, prefix, "")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_biases_stand_beside_their_weights(architecture: str) -> None:
    names = [n for part in ARCHITECTURES[architecture].values() for n, _ in _tensors(part)]
    weights = [name for name in names if name.endswith(".weight")]
    biases = {name: re.sub(r"weight$", "bias", name) for name in weights}
    for layout in split([*names, *biases.values()]).values():
        for name in layout.places:
            if name in biases:
                beside = layout.places[biases[name]]
                assert beside.layer == layout.places[name].layer
                assert beside.module == layout.places[name].module


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)), depth=st.integers(1, 40), data=st.data()
)
def test_every_tensor_is_in_one_part_whatever_the_depth(
    architecture: str, depth: int, data: st.DataObject
) -> None:
    names = []
    for layers, prefix, templates in ARCHITECTURES[architecture].values():
        other = depth if layers else 0
        names += [name for name, _ in _tensors((other, prefix, templates))]
    names = data.draw(st.permutations(names)) if len(names) < 60 else names
    layouts = split(names)
    assert sorted(itertools.chain(*(layout.places for layout in layouts.values()))) == sorted(names)
    for layout in layouts.values():
        order = {name: i for i, name in enumerate(names)}
        assert [order[n] for n in layout.places] == sorted(order[n] for n in layout.places)
        for name, place in layout.places.items():
            assert place.template.format(place.layer) == name


@pytest.mark.parametrize("architecture", ["llava", "gemma3", "qwen2_vl"])
@pytest.mark.parametrize("part", ["text_decoder", "vision_tower"])
def test_the_index_is_the_same_under_either_naming(architecture: str, part: str) -> None:
    published, saved = (
        infer(name for name, _ in _tensors(ARCHITECTURES[key][part])).index
        for key in (architecture, f"{architecture}:new")
    )
    assert published.keys() == saved.keys()
    assert len(published) == len(set(published.values()))


@settings(max_examples=30, derandomize=True, deadline=None)
@given(layers=st.integers(1, 120), seed=st.integers(0, 1000))
def test_layers_are_counted_whatever_the_order_of_the_names(layers: int, seed: int) -> None:
    names = ["model.embed_tokens.weight", *(LLAMA.format(i) for i in range(layers))]
    random.Random(seed).shuffle(names)
    layout = infer(names)
    assert (layout.layers, layout.prefix) == (layers, "model.layers")
    assert list(layout.places) == names
    assert {layout.places[LLAMA.format(i)].layer for i in range(layers)} == set(range(layers))
    assert len({layout.places[LLAMA.format(i)].template for i in range(layers)}) == 1


def test_a_model_without_numbered_parts_has_no_layers() -> None:
    layout = infer(["embed.weight", "head.weight"])
    assert (layout.layers, layout.prefix, layout.unclear) == (0, "", "")
    assert split(["embed.weight", "head.weight"]) == {"default": layout}


def test_no_names_make_an_empty_layout() -> None:
    assert infer([]).places == {}
    assert split([])["default"].places == {}


def test_an_architecture_that_nobody_listed_is_laid_out() -> None:
    stack = [f"trunk.cells.{i}.{n}.weight" for i in range(3) for n in ("mix.attn.a", "ff.b", "ln1")]
    names = ["front.tok_embedding.weight", *stack, "trunk.out_norm.weight", "lm_head.weight"]
    (layout,) = split(names).values()
    modules = [layout.places[name].module for name in [names[0], *names[1:4], *names[-2:]]]
    assert (layout.prefix, layout.layers) == ("trunk.cells", 3)
    assert modules == ["embeddings", "attention", "mlp", "norms", "norms", "head"]


def test_a_few_numbered_steps_beside_the_layers_are_no_second_stack() -> None:
    layers = [f"model.layers.{i}.{n}.weight" for i in range(4) for n in ("attn.q", "mlp.up")]
    steps = [f"model.adapter.net.{i}.weight" for i in (0, 2, 4)]  # activations lie between
    heads = [f"model.extra.{i}.proj.weight" for i in range(3)]
    layout = infer([*steps, *heads, *layers])
    assert (layout.prefix, layout.layers, layout.unclear) == ("model.layers", 4, "")
    assert all(layout.places[name].layer is None for name in [*steps, *heads])


def test_steps_of_one_operation_are_no_layers() -> None:
    layout = infer(["visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight"])
    assert (layout.layers, layout.unclear) == (0, "")


# As diffusers saves a UNet.
UNET = [
    *(f"down_blocks.{i}.resnets.{j}.conv1.weight" for i in range(4) for j in range(2)),
    *(f"up_blocks.{i}.resnets.{j}.conv1.weight" for i in range(4) for j in range(3)),
    "mid_block.attentions.0.proj_in.weight",
    "time_embedding.linear_1.weight",
]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (UNET, "'up_blocks.*' and 'down_blocks.*'"),
        ([LLAMA.format(i) for i in (0, 2)], "layers [1] of 'model.layers.*' are missing"),
        ([LLAMA.format(i) for i in (1, 2)], "layers [0] of 'model.layers.*' are missing"),
        ([LLAMA.format(i) for i in (0, 3)], "layers [1, 2] of 'model.layers.*' are missing"),
        (
            ["net.0.wte.weight", "net.1.mlp.up.weight", "net.2.mlp.up.weight"],
            "'net.0' is made like no other of 'net.*'",
        ),
    ],
    ids=["two stacks", "gap", "no first", "wide gap", "unlike"],
)
def test_an_unclear_layout_says_why_and_places_no_tensor_in_a_layer(
    names: list[str], reason: str
) -> None:
    layouts = split(names)
    assert list(layouts) == ["default"]
    layout = layouts["default"]
    assert reason in layout.unclear
    assert "\n" not in layout.unclear
    assert (layout.layers, layout.prefix) == (0, "")
    assert {(p.layer, p.template) for p in layout.places.values()} == {(None, n) for n in names}


def test_one_unclear_part_leaves_the_others_clear() -> None:
    text = [f"language_model.layers.{i}.mlp.up.weight" for i in range(4)]
    tower = [f"vision_tower.stages.{i}.conv.weight" for i in (0, 2)]
    layouts = split([*text, *tower])
    assert layouts["text_decoder"].layers == 4
    assert layouts["vision_tower"].unclear


@pytest.mark.parametrize(
    "names",
    [
        # a text encoder with its projection, a decoder alone, an encoder alone
        ["text_model.encoder.layers.0.mlp.fc1.weight", "text_projection.weight"],
        ["model.decoder.layers.0.mlp.fc1.weight", "model.decoder.embed_tokens.weight"],
        ["bert.encoder.layer.0.output.dense.weight", "classifier.weight"],
        ["language_model.model.layers.0.mlp.up.weight", "vision_embed_tokens.weight"],
    ],
)
def test_a_model_with_one_stack_is_one_part(names: list[str]) -> None:
    layouts = split(names)
    assert list(layouts) == ["default"]
    assert layouts["default"].layers == 1
