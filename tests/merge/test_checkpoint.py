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


def test_a_dtype_that_is_not_known_is_refused(copied: Path) -> None:
    save_file({"x": torch.ones(2, dtype=torch.complex64)}, copied / WEIGHTS)
    with pytest.raises(ModelError, match=r"'x' is C64: not supported: known: F64"):
        Checkpoint.open(copied)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_float8_is_opened_and_marked_as_packed(
    models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    dtype = getattr(torch, kind)
    folder = altered(
        models["a"],
        tmp_path / "eight",
        lambda t: t | {"model.norm.weight": t["model.norm.weight"].to(dtype)},
    )
    model = Checkpoint.open(folder)
    assert model.headers["model.norm.weight"].dtype == dtype
    assert [name for name, header in model.headers.items() if header.packed] == [
        "model.norm.weight"
    ]


@pytest.mark.parametrize("quantised", [False, True])
def test_integers_are_packed_weights_only_in_a_quantised_model(
    models: dict[str, Path], tmp_path: Path, quantised: bool
) -> None:
    buffers = {"position_ids": torch.arange(4), "mask": torch.tensor([True, False])}
    config = {"quantization_config": {"quant_method": "bitsandbytes"}} if quantised else {}
    folder = altered(models["a"], tmp_path / "b", lambda t: t | buffers, **config)
    model = Checkpoint.open(folder)
    packed = {name for name, header in model.headers.items() if header.packed}
    assert packed == (set(buffers) if quantised else set())
    for name, tensor in buffers.items():
        assert torch.equal(model.tensor(name), tensor)


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


def test_values_are_spans_of_the_mapped_file(opened: dict[str, Checkpoint]) -> None:
    name = "model.embed_tokens.weight"
    stored = load_file(opened["a"].path / WEIGHTS)[name].flatten()
    read = opened["a"].values(name)
    for start, stop in ((0, 1), (5, 50), (stored.numel() - 3, stored.numel()), (7, 7)):
        assert torch.equal(read(start, stop), stored[start:stop])
    assert read(0, 8).data_ptr() == read(0, stored.numel()).data_ptr()


def test_the_index_says_which_of_two_tensors_counts(
    models: dict[str, Path], tmp_path: Path
) -> None:
    folder = sharded(models["a"], tmp_path / "sharded")
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    last = "model-00003-of-00003.safetensors"
    doubled = next(name for name, file in names.items() if file != last)
    tensors = load_file(folder / last)
    save_file(tensors | {doubled: torch.zeros(3)}, folder / last, metadata={"format": "pt"})
    assert torch.equal(
        Checkpoint.open(folder).tensor(doubled), Checkpoint.open(models["a"]).tensor(doubled)
    )
    (folder / INDEX).unlink()
    with pytest.raises(ModelError, match=f"tensor '{doubled}' is in '.*' and in '{last}'"):
        Checkpoint.open(folder)


def test_a_tensor_that_only_the_index_knows_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    folder = sharded(models["a"], tmp_path / "sharded")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.nose"] = "model-00001-of-00003.safetensors"
    write_json(folder / INDEX, index)
    with pytest.raises(ModelError, match=r"tensor 'model\.nose' of its index is missing"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "file", ["../a/model.safetensors", "/a/model.safetensors", "x/../../y", ""]
)
def test_an_index_leads_to_no_other_folder(copied: Path, file: str) -> None:
    write_json(copied / INDEX, {"weight_map": {"x": file}})
    with pytest.raises(ModelError, match="which is not in its folder"):
        Checkpoint.open(copied)


def test_an_adapter_without_its_base_is_refused(copied: Path) -> None:
    (copied / WEIGHTS).rename(copied / "adapter_model.safetensors")
    write_json(copied / "adapter_config.json", {})
    with pytest.raises(ModelError, match=r"is an adapter without its base: name BASE\+"):
        Checkpoint.open(copied)


def test_the_layout_counts_the_layers(opened: dict[str, Checkpoint]) -> None:
    assert [opened[name].layout.layers for name in ("base", "deep")] == [3, 5]


def test_a_model_without_one_of_its_layers_is_refused_by_name(
    models: dict[str, Path], tmp_path: Path
) -> None:
    missing = [name for name in load_file(models["a"] / WEIGHTS) if ".layers.1." in name]
    folder = altered(models["a"], tmp_path / "gap", without(*missing))
    with pytest.raises(ModelError, match=rf"{folder}.*layers \[1\]"):
        _ = Checkpoint.open(folder).layout
    assert Checkpoint.open(folder).parts["default"].layers == 0


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


def pickled(folder: Path, *parts: object, index: bool = False) -> Path:
    """The same model with its weights pickled; `parts`: what the files hold instead."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    halves = [{name: tensors[name] for name in names[start::2]} for start in (0, 1)]
    for number, part in enumerate(parts or (halves if index else [tensors])):
        name = f"pytorch_model-{number + 1:05d}-of-00002.bin" if index else "pytorch_model.bin"
        torch.save(part, folder / name)
    if index:
        files = {
            name: f"pytorch_model-0000{at % 2 + 1}-of-00002.bin" for at, name in enumerate(names)
        }
        write_json(folder / "pytorch_model.bin.index.json", {"weight_map": files})
    return folder


@pytest.mark.parametrize("index", [False, True], ids=["one-file", "sharded"])
def test_pickled_weights_are_read_where_that_is_allowed(
    models: dict[str, Path], copied: Path, index: bool
) -> None:
    pickled(copied, index=index)
    with pytest.raises(ModelError, match="is pickled: convert it to safetensors; `evo"):
        Checkpoint.open(copied)
    model, same = Checkpoint.open(copied, allow_pickle=True), Checkpoint.open(models["a"])
    assert {name: (h.shape, h.dtype) for name, h in model.headers.items()} == {
        name: (h.shape, h.dtype) for name, h in same.headers.items()
    }
    for name in same.headers:
        assert torch.equal(model.tensor(name), same.tensor(name))
    assert {file for file in model.files if file.endswith(".bin")} == {
        header.file for header in model.headers.values()
    }


def test_pickled_copies_beside_safetensors_are_left_alone(copied: Path) -> None:
    torch.save({"x": torch.ones(1)}, copied / "pytorch_model.bin")
    write_json(copied / "pytorch_model.bin.index.json", {"weight_map": {"x": "gone.bin"}})
    assert "x" not in Checkpoint.open(copied, allow_pickle=True).headers


def test_pickled_tensors_may_be_shared_and_turned(copied: Path) -> None:
    square = torch.arange(6.0).reshape(2, 3)
    pickled(copied, {"a": square, "b": square, "turned": square.T})
    model = Checkpoint.open(copied, allow_pickle=True)
    assert torch.equal(model.tensor("a"), model.tensor("b"))
    assert torch.equal(model.values("turned")(1, 4), torch.tensor([3.0, 1.0, 4.0]))


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, ("raise SystemExit('code of a pickle ran')",)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"x": Payload()}, "holds more than tensors"),
        ({"x": 3}, "'x' is no tensor"),
        ({"state_dict": {"x": torch.ones(1)}}, "'state_dict' is no tensor"),
        ({3: torch.ones(1)}, "'3' is no tensor"),
        ([torch.ones(1)], "holds no tensors by name"),
        ({}, "holds no tensors by name"),
        ({"x": torch.eye(2).to_sparse()}, "'x' is sparse"),
        ({"x": torch.ones(1, dtype=torch.complex64)}, "'x' is torch.complex64: not supported"),
    ],
)
def test_a_pickled_file_holds_tensors_and_nothing_else(
    copied: Path, held: object, words: str
) -> None:
    pickled(copied, held)
    with pytest.raises(ModelError, match=words) as raised:
        Checkpoint.open(copied, allow_pickle=True)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [0, 1, 100, -1, -1000])
def test_a_truncated_pickled_file_is_refused(copied: Path, size: int) -> None:
    file = pickled(copied) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match="truncated"):
        Checkpoint.open(copied, allow_pickle=True)


def test_a_pickled_file_of_old_is_refused(copied: Path) -> None:
    torch.save(
        {"x": torch.ones(1)},
        pickled(copied) / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    with pytest.raises(ModelError, match=r"no archive of torch 1\.6 or later"):
        Checkpoint.open(copied, allow_pickle=True)
