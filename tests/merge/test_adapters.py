"""Adapters against W + scaling * B A computed in float64, and what is refused.

That roundings are PEFT's is tested in `test_mergekit_adapters.py`.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from evomerge.errors import ModelError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.sources import open_model
from tests import tiny
from tests.merge.conftest import Tensors, altered, without

PREFIX = "base_model.model."
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
EMBEDDINGS = "model.embed_tokens"


def write_adapter(
    folder: Path,
    base: Path,
    modules: Mapping[str, int] | None = None,
    more: Tensors | None = None,
    file: str = "adapter_model.safetensors",
    **config: Any,
) -> Path:
    """A random adapter of `base` with the rank of each module, more tensors and keys of config."""
    modules = {Q: 4, DOWN: 4} if modules is None else modules
    generator = torch.Generator().manual_seed(7)
    weights = load_file(base / "model.safetensors")
    tensors: Tensors = {}
    for module, rank in modules.items():
        rows, columns = weights[f"{module}.weight"].shape
        factors = {"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank)}
        if module == EMBEDDINGS:
            factors = {"lora_embedding_A": (rank, rows), "lora_embedding_B": (columns, rank)}
        for factor, shape in factors.items():
            tensors[f"{PREFIX}{module}.{factor}"] = torch.randn(*shape, generator=generator)
    tensors |= more or {}
    folder.mkdir(parents=True)
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file, metadata={"format": "pt"})
    stated = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 6}
    (folder / "adapter_config.json").write_text(json.dumps(stated | config))
    return folder


def adapted(base: Path, adapter: Path, **options: Any) -> Checkpoint:
    return open_model(f"{base}+{adapter}", **options)


def update(adapter: Path, module: str, scaling: float) -> torch.Tensor:
    """scaling * B A in float64, as the weight is shaped."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    kind = "lora_embedding_{}" if module == EMBEDDINGS else "lora_{}.weight"
    a, b = (tensors[f"{PREFIX}{module}.{kind.format(f)}"].double() for f in "AB")
    product = torch.einsum("or,ri->oi", b, a) * scaling
    return product.T if module == EMBEDDINGS else product


def check(base: Path, adapter: Path, scalings: Mapping[str, float]) -> None:
    """Every value of the adapted model, and that nothing else has changed."""
    before, after = load_file(base / "model.safetensors"), adapted(base, adapter)
    assert set(after.headers) == set(before)
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        expected = tensor.double()
        if module in scalings:
            expected = expected + update(adapter, module, scalings[module])
            assert not torch.equal(after.tensor(name), tensor)
        assert after.tensor(name).dtype == after.headers[name].dtype == tensor.dtype
        torch.testing.assert_close(after.tensor(name), expected.to(tensor.dtype))


def test_updates_are_added(models: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "x", models["a"])
    check(models["a"], adapter, {Q: 6 / 4, DOWN: 6 / 4})


def test_a_low_precision_weight_stays_in_its_dtype(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", seed=0, dtype=torch.bfloat16)
    check(base, write_adapter(tmp_path / "x", base), {Q: 6 / 4, DOWN: 6 / 4})


def test_rank_stabilised_scaling(models: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "x", models["a"], use_rslora=True)
    check(models["a"], adapter, dict.fromkeys((Q, DOWN), 6 / math.sqrt(4)))


@pytest.mark.parametrize(
    ("ranks", "alphas", "rank", "alpha"),
    [
        ({"q_proj": 8}, {}, 8, 6),
        ({"proj": 8}, {}, 4, 6),  # a pattern fits whole parts of the name
        ({"layers.0.self_attn.q_proj": 8}, {"q_proj": 5}, 4, 5),
        ({r".*\.1\..*q_proj": 2}, {"down_proj": 5, r"model\..*\.q_proj": 1.5, "q_proj": 9}, 2, 1.5),
    ],
)
def test_patterns_of_rank_and_alpha(
    models: dict[str, Path],
    tmp_path: Path,
    ranks: dict[str, int],
    alphas: dict[str, float],
    rank: int,
    alpha: float,
) -> None:
    adapter = write_adapter(
        tmp_path / "x", models["a"], {Q: rank}, rank_pattern=ranks, alpha_pattern=alphas
    )
    check(models["a"], adapter, {Q: alpha / rank})


def test_embeddings_have_factors_of_their_own(models: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "x", models["a"], {EMBEDDINGS: 4, Q: 4})
    check(models["a"], adapter, {EMBEDDINGS: 6 / 4, Q: 6 / 4})


@pytest.mark.parametrize("more", [[], [DOWN]], ids=["config-says", "shapes-say"])
def test_weights_stored_the_other_way_round(
    models: dict[str, Path], tmp_path: Path, more: list[str]
) -> None:
    modules = dict.fromkeys([Q, *more], 4)
    adapter = write_adapter(tmp_path / "x", models["a"], modules, fan_in_fan_out=not more)
    base = altered(
        models["a"],
        tmp_path / "turned",
        lambda t: {k: v.T.contiguous() if k[:-7] in modules else v for k, v in t.items()},
    )
    turned = adapted(base, adapter)
    straight = altered(models["a"], tmp_path / "straight")
    (adapter / "adapter_config.json").write_text(
        (adapter / "adapter_config.json").read_text().replace("true", "false")
    )
    for module in modules:
        expected = adapted(straight, adapter).tensor(f"{module}.weight")
        torch.testing.assert_close(turned.tensor(f"{module}.weight"), expected.T)


def test_whole_modules_replace_the_bases(models: dict[str, Path], tmp_path: Path) -> None:
    """Also where they are updated on top, as PEFT saves embeddings that were resized."""
    head = torch.randn(load_file(models["a"] / "model.safetensors")["lm_head.weight"].shape)
    norm = torch.full((tiny.HIDDEN,), 3.0)
    more = {
        f"{PREFIX}lm_head.base_layer.weight": head,
        f"{PREFIX}model.norm.weight": norm,
    }
    adapter = write_adapter(tmp_path / "x", models["a"], {"lm_head": 4}, more)
    model = adapted(models["a"], adapter)
    assert torch.equal(model.tensor("model.norm.weight"), norm)
    assert model.headers["model.norm.weight"].file == "+adapter_model.safetensors"
    expected = head.double() + update(adapter, "lm_head", 6 / 4)
    torch.testing.assert_close(model.tensor("lm_head.weight"), expected.float())


def test_a_whole_module_takes_the_bases_dtype(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", seed=0, dtype=torch.bfloat16)
    norm = torch.rand(tiny.HIDDEN)
    adapter = write_adapter(tmp_path / "x", base, {}, {f"{PREFIX}model.norm.weight": norm})
    model = adapted(base, adapter)
    assert model.headers["model.norm.weight"].dtype == torch.bfloat16
    assert torch.equal(model.tensor("model.norm.weight"), norm.bfloat16())


def test_a_head_that_was_trained_whole_is_no_longer_tied(
    models: dict[str, Path], tmp_path: Path
) -> None:
    tied = altered(
        models["a"], tmp_path / "tied", without("lm_head.weight"), tie_word_embeddings=True
    )
    head = torch.rand(5, tiny.HIDDEN)
    adapter = write_adapter(tmp_path / "x", tied, {Q: 4}, {f"{PREFIX}lm_head.weight": head})
    model = adapted(tied, adapter)
    assert torch.equal(model.tensor("lm_head.weight"), head)
    assert model.config["tie_word_embeddings"] is False
    assert Checkpoint.open(tied).config["tie_word_embeddings"] is True


def test_biases_are_added(models: dict[str, Path], tmp_path: Path) -> None:
    start, added = torch.rand(tiny.HIDDEN), torch.rand(tiny.HIDDEN)
    base = altered(models["a"], tmp_path / "biased", lambda t: t | {f"{Q}.bias": start})
    adapter = write_adapter(
        tmp_path / "x", base, {Q: 4}, {f"{PREFIX}{Q}.lora_B.bias": added}, lora_bias=True
    )
    torch.testing.assert_close(adapted(base, adapter).tensor(f"{Q}.bias"), start + 6 / 4 * added)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"^model\.", ""),
        (r"^model\.", "language_model.model."),
        (r"^model\.", "model.language_model."),
        (r"^model\.", "transformer."),
    ],
)
def test_a_base_that_is_wrapped_otherwise(
    models: dict[str, Path], tmp_path: Path, old: str, new: str
) -> None:
    adapter = write_adapter(tmp_path / "x", models["a"])
    base = altered(
        models["a"],
        tmp_path / "wrapped",
        lambda tensors: {re.sub(old, new, name): tensor for name, tensor in tensors.items()},
    )
    there, here = adapted(base, adapter), adapted(models["a"], adapter)
    for name in here.headers:
        assert torch.equal(there.tensor(re.sub(old, new, name)), here.tensor(name))


def test_pickled_adapters_need_permission(models: dict[str, Path], tmp_path: Path) -> None:
    pickled = write_adapter(tmp_path / "x", models["a"], file="adapter_model.bin")
    with pytest.raises(ModelError, match="is pickled: convert it to safetensors"):
        adapted(models["a"], pickled)
    model = adapted(models["a"], pickled, allow_pickle=True)
    same = adapted(models["a"], write_adapter(tmp_path / "y", models["a"]))
    assert torch.equal(model.tensor(f"{Q}.weight"), same.tensor(f"{Q}.weight"))


def test_the_content_hash_includes_the_adapter(models: dict[str, Path], tmp_path: Path) -> None:
    plain = Checkpoint.open(models["a"])
    one = adapted(models["a"], write_adapter(tmp_path / "x", models["a"]))
    moved = adapted(models["a"], Path(shutil.copytree(tmp_path / "x", tmp_path / "moved")))
    other = adapted(models["a"], write_adapter(tmp_path / "y", models["a"], lora_alpha=7))
    assert one.sha == moved.sha
    assert len({plain.sha, one.sha, other.sha}) == 3
    assert set(one.files) - set(plain.files) == {
        "+adapter_config.json",
        "+adapter_model.safetensors",
    }


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model with an update of 70 rows of 9 values and of its transpose: no whole blocks."""
    folder = tmp_path_factory.mktemp("long")
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    (base / "config.json").write_text("{}")
    weights = {"x.0.up.weight": torch.rand(70, 9), "x.0.down.weight": torch.rand(9, 70)}
    save_file(weights, base / "model.safetensors")
    return adapted(base, write_adapter(adapter, base, {"x.0.up": 4, "x.0.down": 4}))


@settings(derandomize=True, deadline=None)
@given(st.sampled_from(["up", "down"]), st.lists(st.integers(0, 630), min_size=2, max_size=6))
def test_a_value_does_not_depend_on_the_span_it_is_read_in(
    long: Checkpoint, module: str, ends: list[int]
) -> None:
    name = f"x.0.{module}.weight"
    whole, read = long.tensor(name).reshape(-1), long.values(name)
    for start, stop in pairwise(ends):
        if start <= stop:
            assert torch.equal(read(start, stop), whole[start:stop])


def test_threads_read_the_same_values(long: Checkpoint) -> None:
    expected = {name: long.tensor(name).clone().reshape(-1) for name in long.headers}

    def check_one(at: int) -> bool:
        name = sorted(expected)[at % 2]
        return torch.equal(long.values(name)(at, at + 99), expected[name][at : at + 99])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check_one, range(500)))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "of the kind IA3"),
        ({"peft_type": "LOHA"}, "of the kind LOHA"),
        ({"peft_type": None}, "of the kind None"),
        ({"use_dora": True}, "uses DoRA"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "uses layer replication"),
        ({"trainable_token_indices": [1]}, "uses trainable tokens"),
        ({"target_parameters": ["experts.w"]}, "uses LoRA on bare parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialised by 'pissa_niter_4'"),
        ({"r": 5}, r"has rank 4, by adapter_config\.json 5"),
        ({"r": "4"}, r"'r' of adapter_config\.json is 4: give a number"),
        ({"lora_alpha": None}, r"'lora_alpha' of adapter_config\.json is None"),
        ({"rank_pattern": ["x"]}, "'rank_pattern' of .*: give numbers by module"),
        ({"alpha_pattern": {"(": 1}}, r"'\(' of alpha_pattern is no pattern"),
    ],
)
def test_what_cannot_be_applied_is_refused_by_name(
    models: dict[str, Path], tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    adapter = write_adapter(tmp_path / "x", models["a"], **config)
    with pytest.raises(ModelError, match=words) as raised:
        adapted(models["a"], adapter)
    assert str(adapter) in str(raised.value)
    assert "\n" not in str(raised.value)


MISPLACED: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "another-kind": ({f"{Q}.lora_magnitude_vector": (16,)}, "of an unknown kind"),
    "unknown-module": ({"model.nose.lora_A.weight": (4, 3)}, "updates 'model.nose.weight'"),
    "unknown-tensor": ({"model.nose.weight": (4,)}, "'base_model.model.model.nose.weight' has no"),
    "another-shape": ({"model.norm.weight": (4,)}, "cannot replace 'model.norm.weight'"),
    "one-factor": (
        {"model.layers.0.self_attn.q_proj.lora_A.weight": (4, 16)},
        "an update has two factors",
    ),
    "twice": (
        {
            "layers.1.self_attn.q_proj.lora_A.weight": (4, 16),
            "layers.1.self_attn.q_proj.lora_B.weight": (16, 4),
        },
        "updates 'model.layers.1.*twice",
    ),
    "two-kinds-of-factor": ({f"{Q}.lora_embedding_A": (4, 16)}, "an update has two factors"),
    "replaced-twice": (
        {"model.norm.weight": (16,), "norm.weight": (16,)},
        "replaces 'model.norm.weight' twice",
    ),
    "no-bias-there": ({f"{Q}.lora_B.bias": (16,)}, "updates 'model.layers.1.*bias'"),
    "another-width": (
        {
            "model.layers.0.self_attn.q_proj.lora_A.weight": (4, 17),
            "model.layers.0.self_attn.q_proj.lora_B.weight": (16, 4),
        },
        r"is \[16, 17\], the weight is \[16, 16\]",
    ),
    "convolution": (
        {
            "model.layers.0.self_attn.q_proj.lora_A.weight": (4, 16, 3, 3),
            "model.layers.0.self_attn.q_proj.lora_B.weight": (16, 4, 1, 1),
        },
        "only updates of matrices",
    ),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_every_tensor_has_a_place(models: dict[str, Path], tmp_path: Path, case: str) -> None:
    shapes, words = MISPLACED[case]
    more = {PREFIX + name: torch.zeros(shape) for name, shape in shapes.items()}
    adapter = write_adapter(tmp_path / "x", models["a"], {Q: 4}, more)
    with pytest.raises(ModelError, match=words):
        adapted(models["a"], adapter)


def test_a_quantised_base_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    eight = altered(
        models["a"],
        tmp_path / "eight",
        lambda t: t | {f"{Q}.weight": t[f"{Q}.weight"].to(torch.float8_e4m3fn)},
    )
    adapter = write_adapter(tmp_path / "x", models["a"])
    with pytest.raises(ModelError, match=rf"'{Q}\.weight' of the base is quantised"):
        adapted(eight, adapter)


def test_a_truncated_adapter_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "x", models["a"])
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="truncated"):
        adapted(models["a"], adapter)
    file.unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is missing"):
        adapted(models["a"], adapter)
