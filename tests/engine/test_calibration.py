"""Activation means of real models, against the same computed on the side, slowly, in float64."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
)

from evomerge.engine.build import build
from evomerge.engine.calibration import content_sha, measure, statistics_for
from evomerge.errors import InputError, ModelError, RecipeError
from evomerge.job import Engine as Section
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import write_checkpoint
from evomerge.merge.planner import make_plan
from evomerge.merge.statistics import ACTIVATION_MEAN, Statistics
from evomerge.recipe import Recipe
from tests import tiny
from tests.merge.conftest import altered, without

CPU = torch.device("cpu")
LINES = [
    "数列 三 と 一 、 昇順 =",
    "now ascend of 7 and one and 4",
    "descend of eight =",
    "六 五 四",
]
TOKENS = 8


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.txt"
    path.write_text("\n".join(LINES * 30) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def base(models: dict[str, Path]) -> Checkpoint:
    return Checkpoint.open(models["base"])


def token_ids(folder: Path, texts: list[str], blocks: int) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [number for text in texts for number in tokenizer(text)["input_ids"]]
    return torch.tensor(ids[: blocks * TOKENS]).view(blocks, TOKENS)


def by_hand(folder: Path, ids: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """Everything that enters each linear layer, block by block, all of it kept."""
    live = AutoModelForCausalLM.from_pretrained(folder).eval()
    heard: dict[str, list[np.ndarray[Any, Any]]] = {}

    def listen(name: str) -> Callable[..., None]:
        def hear(module: torch.nn.Module, entering: Any, leaving: Any) -> None:
            rows = entering[0].reshape(-1, entering[0].shape[-1])
            heard.setdefault(name, []).append(rows.double().numpy())

        return hear

    for name, module in live.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_hook(listen(f"{name}.weight"))
    with torch.no_grad():
        for block in ids:
            live(input_ids=block[None])
    return {name: np.abs(np.concatenate(rows)).mean(axis=0) for name, rows in heard.items()}


def assert_means(found: Statistics, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    assert {name for _, name in found.values} == set(expected)
    assert {kind for kind, _ in found.values} == {ACTIVATION_MEAN}
    for (_, name), mean in found.values.items():
        assert mean.dtype == torch.float32
        np.testing.assert_allclose(mean.flatten().numpy(), expected[name], rtol=1e-4, err_msg=name)


def saved(folder: Path, config: PreTrainedConfig) -> Path:
    """A random model of any architecture over the zoo's tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tiny.ZOO / "base" / file).read_bytes())
    return folder


SMALL = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 157, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}


# What is measured


@pytest.mark.parametrize("blocks", [1, 7])
def test_means_are_those_of_all_tokens(base: Checkpoint, text: Path, blocks: int) -> None:
    found = measure(base, text, blocks, TOKENS, CPU)
    ids = token_ids(base.path, [text.read_text(encoding="utf-8")], blocks)
    assert_means(found, by_hand(base.path, ids))
    assert len(found.values) == 3 * 7 + 1


def test_a_model_is_run_in_several_batches(
    base: Checkpoint, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.engine.calibration._BATCH", 3 * TOKENS)
    told: list[tuple[int, int]] = []
    found = measure(base, text, 7, TOKENS, CPU, lambda done, blocks: told.append((done, blocks)))
    ids = token_ids(base.path, [text.read_text(encoding="utf-8")], 7)
    assert_means(found, by_hand(base.path, ids))
    assert told == [(3, 7), (6, 7), (7, 7)]


def test_measuring_twice_gives_the_same_bits(base: Checkpoint, text: Path) -> None:
    state = torch.get_rng_state()
    one, two = (measure(base, text, 5, TOKENS, CPU).values for _ in range(2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_bfloat16_model_runs_as_it_is(tmp_path: Path, text: Path) -> None:
    folder = tiny.write_model(tmp_path / "half", seed=0, dtype=torch.bfloat16)
    found = measure(Checkpoint.open(folder), text, 3, TOKENS, CPU)
    expected = by_hand(folder, token_ids(folder, [text.read_text(encoding="utf-8")], 3))
    for (_, name), mean in found.values.items():  # batches of another size round otherwise
        np.testing.assert_allclose(mean.numpy(), expected[name], rtol=0.05)


@pytest.mark.parametrize("prefixed", [True, False])
def test_where_inputs_are_rows_means_stand_upright(
    tmp_path: Path, text: Path, prefixed: bool
) -> None:
    """GPT-2's layers, also as published: without the prefix that transformers gives names."""
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=157, n_positions=32)
    folder = saved(tmp_path / "gpt2", config)
    cut = "" if prefixed else "transformer."
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix(cut): value for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = Checkpoint.open(folder)
    found = measure(model, text, 3, TOKENS, CPU)
    expected = by_hand(folder, token_ids(folder, [text.read_text(encoding="utf-8")], 3))
    del expected["lm_head.weight"]  # tied
    assert_means(found, {name.removeprefix(cut): mean for name, mean in expected.items()})
    for (_, name), mean in found.values.items():
        assert mean.shape == (model.headers[name].shape[0], 1)


def test_experts_have_no_statistics(tmp_path: Path, text: Path) -> None:
    config = MixtralConfig(**SMALL, **HEADS, num_local_experts=4, max_position_embeddings=64)
    folder = saved(tmp_path / "mixtral", config)
    found = measure(Checkpoint.open(folder), text, 3, TOKENS, CPU)
    assert_means(found, by_hand(folder, token_ids(folder, [text.read_text("utf-8")], 3)))
    assert not any("experts" in name for _, name in found.values)


def test_fused_projections_are_one_layer(tmp_path: Path, text: Path) -> None:
    folder = saved(tmp_path / "phi3", Phi3Config(**SMALL, **HEADS, eos_token_id=2, bos_token_id=1))
    found = measure(Checkpoint.open(folder), text, 3, TOKENS, CPU)
    assert_means(found, by_hand(folder, token_ids(folder, [text.read_text("utf-8")], 3)))
    assert found.get(ACTIVATION_MEAN, "model.layers.1.self_attn.qkv_proj.weight") is not None


def test_a_tied_head_has_none(models: dict[str, Path], tmp_path: Path, text: Path) -> None:
    folder = altered(
        models["base"], tmp_path / "tied", without("lm_head.weight"), tie_word_embeddings=True
    )
    found = measure(Checkpoint.open(folder), text, 3, TOKENS, CPU)
    assert len(found.values) == 3 * 7


# Text


def test_records_follow_each_other(base: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "calibration.jsonl"
    records = [{"text": LINES[0]}, {"prompt": LINES[1], "answer": " 1 4 7"}, {"text": LINES[2]}]
    tiny.write_jsonl(path, records * 4)
    texts = [LINES[0], f"{LINES[1]} 1 4 7", LINES[2]] * 4
    found = measure(base, path, 6, TOKENS, CPU)
    assert_means(found, by_hand(base.path, token_ids(base.path, texts, 6)))


def test_only_as_much_text_is_read_as_is_needed(base: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "calibration.jsonl"
    path.write_text(json.dumps({"text": " ".join(LINES * 9)}) + "\nno JSON\n", encoding="utf-8")
    measure(base, path, 2, TOKENS, CPU)
    with pytest.raises(InputError, match=r"calibration.jsonl' line 2 is not JSON"):
        measure(base, path, 2000, TOKENS, CPU)


def test_less_text_gives_fewer_blocks_and_a_warning(
    base: Checkpoint, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text.write_text(" ".join(LINES), encoding="utf-8")
    count = len(AutoTokenizer.from_pretrained(base.path)(" ".join(LINES))["input_ids"]) // TOKENS
    with caplog.at_level(logging.WARNING):
        found = measure(base, text, 99, TOKENS, CPU)
    assert f"is enough for {count} blocks of 8 tokens, not for 99" in caplog.text
    assert_means(found, by_hand(base.path, token_ids(base.path, [" ".join(LINES)], count)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", b"", r"'.*c\.txt' has \d tokens, less than a block of 8: give more text"),
        ("c.txt", b"\xff\xfe\xfa", r"'.*c\.txt' cannot be read"),
        ("c.jsonl", b'{"question": "?"}', r"line 1 has no text: give it a 'text', or a 'prompt'"),
        ("c.jsonl", b'{"text": 3}', r"line 1 has no text"),
        ("c.jsonl", b"[1]", r"line 1 has no text"),
    ],
)
def test_bad_text_is_told(
    base: Checkpoint, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        measure(base, tmp_path / name, 2, TOKENS, CPU)


# Models that cannot be measured


def test_blocks_are_no_longer_than_the_models_positions(base: Checkpoint, text: Path) -> None:
    with pytest.raises(RecipeError, match=r"aim.tokens: 65 is more than the 64 positions"):
        measure(base, text, 1, 65, CPU)


def test_a_model_that_lacks_a_tensor_is_refused(
    models: dict[str, Path], tmp_path: Path, text: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = altered(models["base"], tmp_path / "lacking", without(name))
    with pytest.raises(ModelError, match=f"the tensor '{name}' is missing"):
        measure(Checkpoint.open(folder), text, 1, TOKENS, CPU)


def test_activations_that_are_no_numbers_are_told(
    models: dict[str, Path], tmp_path: Path, text: Path
) -> None:
    def broken(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {"model.norm.weight": tensors["model.norm.weight"] * torch.inf}

    folder = altered(models["base"], tmp_path / "broken", broken)
    with pytest.raises(ModelError, match=r"what enters 'lm_head.weight' is not finite numbers"):
        measure(Checkpoint.open(folder), text, 1, TOKENS, CPU)


# From a recipe


def recipe(text: Path, **aim: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [{"model": "a", "parameters": {"weight": 0.8}}],
            "aim": {"calibration": str(text), "blocks": 4, "tokens": TOKENS, **aim},
        }
    )


@pytest.fixture
def opened(models: dict[str, Path], tmp_path: Path) -> dict[str, Checkpoint]:
    """base in a folder of its own, and a."""
    base = altered(models["base"], tmp_path / "base")
    return {"base": Checkpoint.open(base), "a": Checkpoint.open(models["a"])}


def test_a_recipe_without_aim_needs_nothing(opened: dict[str, Checkpoint], cache: Path) -> None:
    made = Recipe.from_dict({"merge_method": "passthrough", "models": [{"model": "a"}]})
    assert statistics_for(made, opened, CPU) == {}
    assert not cache.exists()


def test_a_base_is_run_once_for_all_candidates(opened: dict[str, Checkpoint], text: Path) -> None:
    first = statistics_for(recipe(text), opened, CPU)
    assert first.keys() == {"base"}
    (opened["base"].path / "config.json").write_text("no model any more")
    for omega in (0.2, 1.0):
        again = statistics_for(recipe(text, omega=omega), opened, CPU)
        assert again["base"].values.keys() == first["base"].values.keys()
        for key, value in first["base"].values.items():
            assert torch.equal(again["base"].values[key], value)


def test_other_content_is_measured_again(opened: dict[str, Checkpoint], text: Path) -> None:
    told: list[int] = []

    def measures(made: Recipe) -> bool:
        told.clear()
        statistics_for(made, opened, CPU, lambda done, blocks: told.append(done))
        return bool(told)

    assert measures(recipe(text))
    assert not measures(recipe(text))
    assert measures(recipe(text, blocks=3))
    assert measures(recipe(text, tokens=7))
    same = text.with_name("same.txt")
    same.write_bytes(text.read_bytes())
    assert not measures(recipe(same))
    same.write_text("\n".join(LINES[::-1] * 30), encoding="utf-8")
    assert measures(recipe(same))
    opened["base"] = opened["a"]
    assert measures(recipe(text))


def test_slices_have_bases_of_their_own(opened: dict[str, Checkpoint], text: Path) -> None:
    def piece(start: int, base: str) -> dict[str, Any]:
        source = {"model": "a", "layer_range": [start, start + 1]}
        return {"sources": [source], "base_model": base}

    made = Recipe.from_dict(
        {
            "merge_method": "passthrough",
            "slices": [piece(0, "base"), piece(1, "a")],
            "aim": {"calibration": str(text), "blocks": 2, "tokens": TOKENS},
        }
    )
    assert statistics_for(made, opened, CPU).keys() == {"base", "a"}


def test_a_calibration_file_that_is_not_there(opened: dict[str, Checkpoint], text: Path) -> None:
    text.unlink()
    with pytest.raises(InputError, match=r"calibration file '.*' cannot be read: No such file"):
        statistics_for(recipe(text), opened, CPU)


def test_a_state_dict_without_a_model_has_none(
    opened: dict[str, Checkpoint], tmp_path: Path, text: Path
) -> None:
    (tmp_path / "plain").mkdir()
    save_file({"x": torch.zeros(2, 2)}, tmp_path / "plain" / "x.safetensors")
    opened["base"] = Checkpoint.open(tmp_path / "plain")
    with pytest.raises(RecipeError, match="'base' is a plain state dict: no text runs through it"):
        statistics_for(recipe(text), opened, CPU)


def test_a_live_model_is_the_one_on_disk(
    opened: dict[str, Checkpoint], tmp_path: Path, text: Path
) -> None:
    made = recipe(text, omega=0.1)
    statistics = statistics_for(made, opened, CPU)
    write_checkpoint(make_plan(made, opened, statistics=statistics), opened, tmp_path / "out")
    pairs = [(LINES[0], "1 4"), (LINES[1], "9")]

    def seen(models: dict[str, Checkpoint], *recipes: Recipe) -> Any:
        engine = build(Section(device="cpu", threads=1), models, next(iter(models)))
        for one in recipes:
            engine.load(one)
        return engine.likelihoods(pairs)

    whole = Recipe.from_dict({"merge_method": "passthrough", "models": [{"model": "out"}]})
    written = seen({"out": Checkpoint.open(tmp_path / "out")}, whole)
    assert seen(opened, recipe(text, omega=0.7), made) == written
    assert seen(opened, recipe(text, omega=0.7)) != written


def test_content_is_told_by_its_hash(text: Path) -> None:
    one = content_sha(text)
    assert len(one) == 64
    text.write_text("other")
    assert content_sha(text) != one
