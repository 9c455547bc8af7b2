"""Safetensors files written in parallel: what other readers find in them, and what fails."""

import errno
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evomerge.merge.operand import Operand
from evomerge.merge.plan import Input, TensorPlan
from evomerge.merge.writer import TensorFile, write_files
from tests.merge.conftest import Tensors, spans_of

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def planned(name: str, tensor: torch.Tensor) -> TensorPlan:
    source = Input("a", name)
    shape, dtype = tuple(tensor.shape), tensor.dtype
    return TensorPlan(name, shape, "copy", (source,), None, (), {}, dtype, dtype)


def file_of(path: Path, tensors: Tensors) -> TensorFile:
    return TensorFile(path, tuple((name, planned(name, t)) for name, t in tensors.items()))


def of(tensors: Tensors) -> Callable[[TensorPlan], Operand]:
    return lambda plan: Operand.of(tensors[plan.name])


def write(files: Sequence[TensorFile], tensors: Tensors, threads: int = 2) -> list[int]:
    """Write the files; what progress was told."""
    told: list[int] = []
    write_files(files, of(tensors), told.append, threads)
    return told


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in expected.items()
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    threads=st.integers(1, 4),
    length=st.sampled_from([1, 5, 64]),
)
def test_the_reference_reader_finds_every_tensor(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[list[int]],
    dtypes: list[torch.dtype],
    threads: int,
    length: int,
) -> None:
    tensors = {
        f"t{i}.ü": (torch.arange(math.prod(shape)).view(shape) % 5).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    with spans_of(length):
        told = write([file_of(path, tensors)], tensors, threads)
    assert same(load_file(path), tensors)
    assert told == sorted(told)
    assert told[-1] == sum(t.nbytes for t in tensors.values())
    with safe_open(path, "pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_the_header_is_aligned_and_keeps_the_order(tmp_path: Path) -> None:
    tensors = {name: torch.ones(3) for name in ("z", "a", "m")}
    write([file_of(tmp_path / "x.safetensors", tensors)], tensors)
    content = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert list(header) == ["__metadata__", "z", "a", "m"]
    assert len(content) == 8 + length + 36


def test_a_tensor_may_be_called_otherwise_in_its_file(tmp_path: Path) -> None:
    tensors = {"unet/conv.weight": torch.ones(3)}
    plan = planned("unet/conv.weight", tensors["unet/conv.weight"])
    path = tmp_path / "x.safetensors"
    write([TensorFile(path, (("conv.weight", plan),))], tensors)
    assert load_file(path).keys() == {"conv.weight"}


@pytest.mark.parametrize("threads", [1, 3])
def test_several_files_are_written_at_once(tmp_path: Path, threads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {f"t{i}": torch.randn(50, 20, generator=generator) for i in range(30)}
    names = list(tensors)
    parts = [{n: tensors[n] for n in names[i::3]} for i in range(3)]
    files = [file_of(tmp_path / f"{i}.safetensors", part) for i, part in enumerate(parts)]
    with spans_of(64):
        write(files, tensors, threads)
    for file, part in zip(files, parts, strict=True):
        assert same(load_file(file.path), part)


def test_files_of_both_writers_are_read_alike(tmp_path: Path) -> None:
    tensors = {"b": torch.linspace(-1, 1, 20).view(4, 5), "a": torch.ones(3, dtype=torch.int64)}
    write([file_of(tmp_path / "ours.safetensors", tensors)], tensors)
    save_file(tensors, tmp_path / "theirs.safetensors")
    ours, theirs = (load_file(tmp_path / f"{w}.safetensors") for w in ("ours", "theirs"))
    assert same(ours, theirs)


def test_room_is_reserved_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"t{i}": torch.ones(1000) for i in range(2)}
    files = [file_of(tmp_path / f"{n}.safetensors", {n: t}) for n, t in tensors.items()]
    sizes: list[list[int]] = []

    def compute(plan: TensorPlan) -> Operand:
        sizes.append([file.path.stat().st_size for file in files])
        return Operand.of(tensors[plan.name])

    write_files(files, compute, lambda written: None, 1)
    assert sizes[0] == [file.path.stat().st_size for file in files]
    assert min(sizes[0]) > 4000


def test_a_write_that_takes_a_part_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pwrite
    tensors = {"a": torch.arange(100.0), "b": torch.arange(7)}
    path = tmp_path / "x.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda number, data, at: whole(number, data[:13], at))
        write([file_of(path, tensors)], tensors)
    assert same(load_file(path), tensors)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_is_an_os_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, threads: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    tensors = {f"t{i}": torch.ones(10) for i in range(5)}
    with pytest.raises(OSError, match="No space left on device"):
        write([file_of(tmp_path / "x.safetensors", tensors)], tensors, threads)


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("mine")
    tensors = {"a": torch.ones(3)}
    with pytest.raises(FileExistsError):
        write([file_of(tmp_path / "x.safetensors", tensors)], tensors)
    assert (tmp_path / "x.safetensors").read_text() == "mine"


@pytest.mark.parametrize("threads", [1, 3])
def test_after_a_failure_no_more_is_computed_and_all_files_are_closed(
    tmp_path: Path, threads: int
) -> None:
    tensors = {f"t{i}": torch.ones(10) for i in range(100)}
    computed: list[str] = []

    def compute(plan: TensorPlan) -> Operand:
        computed.append(plan.name)
        raise ValueError(plan.name)

    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    with pytest.raises(ValueError, match="t"):
        write_files(
            [file_of(tmp_path / "x.safetensors", tensors)], compute, lambda n: None, threads
        )
    assert len(computed) <= threads
    if before:
        assert set(os.listdir("/proc/self/fd")) <= before


def test_the_longest_tensors_come_first(tmp_path: Path) -> None:
    sizes = [3, 1000, 20, 7]
    tensors = {f"t{size}": torch.ones(size) for size in sizes}
    computed: list[str] = []

    def compute(plan: TensorPlan) -> Operand:
        computed.append(plan.name)
        return Operand.of(tensors[plan.name])

    write_files([file_of(tmp_path / "x.safetensors", tensors)], compute, lambda n: None, 1)
    assert computed == ["t1000", "t20", "t7", "t3"]
