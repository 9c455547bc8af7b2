"""Opening models: what is read, what is refused and with which words, content hashes, licences."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import ModelError
from evomerge.merge.checkpoint import Checkpoint, dtype_name
from evomerge.merge.licence import licence
from tests.merge.conftest import altered, without

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copied(models: dict[str, Path], tmp_path: Path) -> Path:
    """A model's folder, free to be broken."""
    return Path(shutil.copytree(models["a"], tmp_path / "model"))


def sharded(source: Path, folder: Path) -> Path:
    """The same model in three files with an index."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::3]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def cut(size: int) -> Callable[[Path], None]:
    """Keep the first bytes of the weights, or all but the last."""
    return lambda folder: write_weights(folder, (folder / WEIGHTS).read_bytes()[:size])


def write_weights(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS).write_bytes(data)


def overwrite(at: int, data: bytes) -> Callable[[Path], None]:
    """Damage the weights' file."""

    def damage(folder: Path) -> None:
        old = (folder / WEIGHTS).read_bytes()
        write_weights(folder, old[:at] + data + old[at + len(data) :])

    return damage


def indexed(weight_map: object) -> Callable[[Path], None]:
    """Add an index."""
    return lambda folder: write_json(folder / INDEX, {"weight_map": weight_map})


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "config-missing": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config-cut-off": (lambda f: (f / "config.json").write_text('{"a": '), "is not JSON"),
    "config-binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "is not JSON"),
    "config-list": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "no-weights": (lambda f: (f / WEIGHTS).unlink(), "no safetensors file"),
    "weights-empty": (cut(0), "truncated"),
    "weights-lack-a-byte": (cut(-1), "truncated"),
    "weights-cut-in-header": (cut(100), "truncated"),
    "header-length-damaged": (overwrite(0, b"\xff" * 8), "truncated or no safetensors"),
    "header-text-damaged": (overwrite(8, b"x" * 20), "truncated or no safetensors"),
    "weights-too-long": (
        lambda f: write_weights(f, (f / WEIGHTS).read_bytes() + b"x"),
        "truncated",
    ),
    "shard-missing": (indexed({"x": "gone.safetensors"}), "shard 'gone.safetensors'"),
    "index-of-lists": (indexed(["x"]), "maps no tensors to files"),
    "index-of-numbers": (indexed({"x": 3}), "maps no tensors to files"),
    "index-without-map": (lambda f: write_json(f / INDEX, {}), "maps no tensors to files"),
    "index-cut-off": (lambda f: (f / INDEX).write_text("{"), "is not JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_refused_in_one_line(copied: Path, case: str) -> None:
    damage, words = BROKEN[case]
    damage(copied)
    with pytest.raises(ModelError) as raised:
        Checkpoint.open(copied)
    assert words in str(raised.value)
    assert str(copied) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["nowhere", "model/config.json"])
def test_what_is_no_folder_is_refused(copied: Path, name: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        Checkpoint.open(copied.parent / name)


def test_a_file_without_tensors_is_refused(copied: Path) -> None:
    save_file({}, copied / WEIGHTS)
    with pytest.raises(ModelError, match="hold no tensor"):
        Checkpoint.open(copied)


def test_a_dtype_that_cannot_be_merged_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = altered(
        models["a"],
        tmp_path / "eight",
        lambda t: t | {"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)},
    )
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' is F8_E4M3: not supported"):
        Checkpoint.open(folder)


def test_headers_say_what_the_tensors_are(opened: dict[str, Checkpoint]) -> None:
    model = opened["half"]
    stored = load_file(model.path / WEIGHTS)
    assert set(model.headers) == set(stored)
    for name, header in model.headers.items():
        assert header.shape == tuple(stored[name].shape)
        assert header.dtype == stored[name].dtype
        assert header.bytes == stored[name].nbytes
        assert torch.equal(model.tensor(name), stored[name])


def test_an_unknown_tensor_is_an_error(opened: dict[str, Checkpoint]) -> None:
    with pytest.raises(ModelError, match=r"has no tensor 'model\.nose\.weight'"):
        opened["a"].tensor("model.nose.weight")


def test_shards_read_like_one_file(models: dict[str, Path], tmp_path: Path) -> None:
    whole = Checkpoint.open(models["a"])
    parts = Checkpoint.open(sharded(models["a"], tmp_path / "sharded"))
    assert parts.headers.keys() == whole.headers.keys()
    assert parts.layout.layers == whole.layout.layers
    for name in whole.headers:
        assert torch.equal(parts.tensor(name), whole.tensor(name))


def test_shards_without_an_index_are_read_too(models: dict[str, Path], tmp_path: Path) -> None:
    folder = sharded(models["a"], tmp_path / "sharded")
    (folder / INDEX).unlink()
    assert set(Checkpoint.open(folder).headers) == set(Checkpoint.open(models["a"]).headers)


def test_other_safetensors_beside_the_model_are_left_out(copied: Path) -> None:
    save_file({"adapter": torch.ones(2)}, copied / "adapter_model.safetensors")
    assert "adapter" not in Checkpoint.open(copied).headers


def test_the_layout_counts_the_layers(opened: dict[str, Checkpoint]) -> None:
    assert [opened[name].layout.layers for name in ("base", "deep")] == [3, 5]


def test_a_model_without_one_of_its_layers_is_refused_by_name(
    models: dict[str, Path], tmp_path: Path
) -> None:
    missing = [name for name in load_file(models["a"] / WEIGHTS) if ".layers.1." in name]
    folder = altered(models["a"], tmp_path / "gap", without(*missing))
    with pytest.raises(ModelError, match=rf"{folder}.*layers \[1\]"):
        _ = Checkpoint.open(folder).layout


def test_the_dtype_is_that_of_most_values(models: dict[str, Path], tmp_path: Path) -> None:
    folder = altered(
        models["a"],
        tmp_path / "mixed",
        lambda t: {k: v if v.ndim == 1 else v.bfloat16() for k, v in t.items()},
    )
    model = Checkpoint.open(folder)
    assert model.dtype == torch.bfloat16
    assert dtype_name(model.dtype) == "bfloat16"


def test_the_content_hash_does_not_depend_on_the_place(
    models: dict[str, Path], copied: Path
) -> None:
    (copied / "README.md").write_text("another card")
    assert Checkpoint.open(copied).sha == Checkpoint.open(models["a"]).sha


@pytest.mark.parametrize("file", [WEIGHTS, "config.json", "tokenizer.json"])
def test_the_content_hash_depends_on_every_file(
    models: dict[str, Path], copied: Path, file: str
) -> None:
    data = bytearray((copied / file).read_bytes())
    if file == WEIGHTS:
        data[-1] ^= 1
    else:
        data += b"\n"
    (copied / file).write_bytes(data)
    changed, original = Checkpoint.open(copied), Checkpoint.open(models["a"])
    assert changed.sha != original.sha
    assert {name for name in original.files if changed.files[name] != original.files[name]} == {
        file
    }


def test_the_content_hash_depends_on_which_files_there_are(
    models: dict[str, Path], copied: Path
) -> None:
    (copied / "tokenizer_config.json").unlink()
    assert Checkpoint.open(copied).sha != Checkpoint.open(models["a"]).sha


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        pytest.param(["mit"], "mit", id="one"),
        pytest.param(["mit", "mit"], "mit", id="all-agree"),
        pytest.param(["mit", "apache-2.0"], "other", id="they-differ"),
        pytest.param(["mit", None], "unknown", id="no-card"),
        pytest.param(["mit", ""], "unknown", id="card-without-licence"),
    ],
)
def test_licence_of_a_merge(
    models: dict[str, Path], tmp_path: Path, cards: list[str | None], expected: str
) -> None:
    opened = []
    for number, stated in enumerate(cards):
        folder = Path(shutil.copytree(models["a"], tmp_path / str(number)))
        if stated is not None:
            line = f"license: {stated}\n" if stated else "language: ja\n"
            (folder / "README.md").write_text(f"---\n{line}---\n\n# A model\n")
        opened.append(Checkpoint.open(folder))
    assert licence(opened) == expected


@pytest.mark.parametrize(
    "card",
    ["# license: mit\n", "---\nlicense: [\n---\n", "---\n- mit\n---\n", "---\nlicense: mit\n"],
)
def test_a_card_without_proper_front_matter_states_no_licence(copied: Path, card: str) -> None:
    (copied / "README.md").write_text(card)
    assert licence([Checkpoint.open(copied)]) == "unknown"
