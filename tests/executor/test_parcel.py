"""What is sent to a node: it arrives as it is or not at all, once, and nothing else can be had."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import InputError
from evomerge.executor import parcel as module
from evomerge.executor.parcel import Contents, File, Parcel, Stock, fetching

HELD = {
    "model/config.json": b"{}",
    "model/model.safetensors": bytes(range(256)) * 40,
    "adapter/adapter_model.safetensors": b"adapter" * 100,
    "model/empty.model": b"",
}
WHAT = "model 'm'"


class Wire:
    """A source that reads from a stock, a few bytes at a time, and can be cut: see Source.

    asked: how many bytes of each file were read.
    """

    def __init__(self, held: Contents, key: str, cut: int | None = None, size: int = 1000) -> None:
        self._stock = Stock({key: lambda: held})
        self._left, self._size = cut, size
        self.asked: dict[str, int] = {}

    @property
    def is_cut(self) -> bool:
        return self._left is not None and self._left < 0

    def pieces(self, key: str, name: str, start: int, stop: int) -> Iterator[bytes]:
        for at in range(start, stop, self._size):
            piece = self._stock.read(key, name, at, min(at + self._size, stop))
            if self._left is not None:
                self._left -= 1
            if self.is_cut:
                raise InputError("the line was cut")
            self.asked[name] = self.asked.get(name, 0) + len(piece)
            yield piece


def parcel_of(held: Mapping[str, bytes]) -> Parcel:
    return Parcel({name: File.of(content) for name, content in held.items()})


def fetched(
    parcel: Parcel, source: Wire | None, words: list[str] | None = None, suspect: bool = False
) -> Path:
    """Fetch it, from a source that is asked for only where something is lacking."""
    steps = fetching(parcel, WHAT, suspect=suspect)
    sent = None
    while True:
        try:
            step = steps.send(sent)
        except StopIteration as end:
            folder: Path = end.value
            return folder
        if step.lacks:
            assert source is not None, "nothing is lacking"
        sent = source if step.lacks else None
        if words is not None and step.word:
            words.append(step.word)


def held_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a node that has nothing."""
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "node"))
    return tmp_path / "node"


@pytest.fixture
def parcel() -> Parcel:
    return parcel_of(HELD)


def test_what_is_sent_arrives_as_it_is_and_is_said(parcel: Parcel, node: Path) -> None:
    words: list[str] = []
    folder = fetched(parcel, Wire(HELD, parcel.key), words)
    assert folder == node / "parcels" / parcel.key
    assert held_in(folder) == HELD
    assert words[1].startswith("model 'm' is not there as it is here: 10.9 kB are sent to '")
    assert words[-1].startswith("model 'm': all sent, 10.9 kB in ")


def test_it_is_sent_once(parcel: Parcel) -> None:
    folder = fetched(parcel, Wire(HELD, parcel.key))
    assert fetched(parcel, None) == folder


def test_files_lie_where_they_are_until_they_are_sent(parcel: Parcel, tmp_path: Path) -> None:
    there: dict[str, Path] = {}
    for number, (name, content) in enumerate(HELD.items()):
        there[name] = tmp_path / f"file-{number}"
        there[name].write_bytes(content)
    assert held_in(fetched(parcel, Wire(there, parcel.key))) == HELD


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 8), max_size=4),
)
def test_wherever_the_line_is_cut_it_is_gone_on_with(sizes: list[int], cuts: list[int]) -> None:
    held = {f"{n}/file": hashlib.shake_128(bytes([n])).digest(s) for n, s in enumerate(sizes)}
    parcel = parcel_of(held)
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOMERGE_CACHE", cache)
        asked = 0
        for cut in [*cuts, None]:
            wire = Wire(held, parcel.key, cut)
            with suppress(InputError):
                fetched(parcel, wire)
            asked += sum(wire.asked.values())
            ready = Path(cache) / "parcels" / parcel.key
            assert ready.exists() == (asked == parcel.size and not wire.is_cut)
            if ready.exists():
                break
        assert held_in(ready) == held
        assert asked == parcel.size  # no byte came twice


BIG = {"model/model.safetensors": bytes(1 << 20)}  # more than is kept in a file's buffer

KILLED = """
import os, signal
from tests.executor.test_parcel import BIG, Wire, fetched, parcel_of

class Killing(Wire):
    def pieces(self, *asked):
        for number, piece in enumerate(super().pieces(*asked)):
            if number == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            yield piece

parcel = parcel_of(BIG)
fetched(parcel, Killing(BIG, parcel.key, size=1 << 17))
"""


@pytest.mark.slow
def test_what_a_killed_process_has_left_is_gone_on_with(node: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    parcel = parcel_of(BIG)
    (left,) = held_in(node / "parcels" / f"{parcel.key}.partial").values()
    assert 0 < len(left) < parcel.size
    wire = Wire(BIG, parcel.key)
    assert held_in(fetched(parcel, wire)) == BIG
    assert sum(wire.asked.values()) == parcel.size - len(left)


@pytest.mark.slow
def test_the_workers_of_a_node_wait_for_the_one_that_fetches(
    parcel: Parcel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STEP", 0.0)
    first, second = fetching(parcel, WHAT), fetching(parcel, WHAT)
    assert next(first).lacks
    assert [next(second).lacks for _ in range(2)] == [False, False]
    wire = Wire(HELD, parcel.key)
    first.send(wire)
    assert not next(second).lacks
    for _ in first:
        pass
    with pytest.raises(StopIteration):
        next(second)


def test_the_next_goes_on_where_the_first_has_ended(
    parcel: Parcel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STEP", 0.0)
    first, second = fetching(parcel, WHAT), fetching(parcel, WHAT)
    assert next(first).lacks
    assert not next(second).lacks
    first.close()
    assert next(second).lacks


def test_whoever_drives_it_hears_of_it_again_and_again(
    parcel: Parcel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STEP", 0.0)
    steps = fetching(parcel, WHAT)
    next(steps)
    steps.send(Wire(HELD, parcel.key))
    assert len([*steps]) >= 11  # one for each piece


@pytest.mark.parametrize("left", [b"damaged", bytes(10_240), bytes(20_000)])
def test_damaged_leftovers_are_fetched_again(parcel: Parcel, node: Path, left: bytes) -> None:
    partial = node / "parcels" / f"{parcel.key}.partial" / "model" / "model.safetensors"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(left)
    assert held_in(fetched(parcel, Wire(HELD, parcel.key))) == HELD


def test_a_suspect_copy_that_is_whole_stays_where_it_is(parcel: Parcel) -> None:
    folder = fetched(parcel, Wire(HELD, parcel.key))
    before = folder.stat()
    assert fetched(parcel, None, suspect=True) == folder
    after = folder.stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)


def test_of_a_suspect_copy_only_what_is_damaged_is_fetched_again(parcel: Parcel) -> None:
    folder = fetched(parcel, Wire(HELD, parcel.key))
    (folder / "model" / "config.json").write_bytes(b"[]")
    wire = Wire(HELD, parcel.key)
    assert held_in(fetched(parcel, wire, suspect=True)) == HELD
    assert wire.asked == {"model/config.json": 2}


@pytest.mark.parametrize("other", [b"x" * 10_240, b"x" * 10_241])
def test_a_file_that_has_become_another_is_never_kept(
    parcel: Parcel, node: Path, other: bytes
) -> None:
    changed = HELD | {"model/model.safetensors": other}
    with pytest.raises(InputError, match=r"'model/model.safetensors' is not what it was when"):
        fetched(parcel, Wire(changed, parcel.key))
    assert not (node / "parcels" / parcel.key).exists()
    assert held_in(fetched(parcel, Wire(HELD, parcel.key))) == HELD  # it has been put back


class Short(Wire):
    """Loses the last piece of every file."""

    def pieces(self, key: str, name: str, start: int, stop: int) -> Iterator[bytes]:
        yield from [*super().pieces(key, name, start, stop)][:-1]


def test_a_file_that_comes_to_an_end_too_early_is_never_kept(parcel: Parcel, node: Path) -> None:
    with pytest.raises(InputError, match=r"is not what it was when .*, or was damaged on its way"):
        fetched(parcel, Short(HELD, parcel.key))
    assert not (node / "parcels" / parcel.key).exists()


def test_too_little_room_is_told_before_anything_is_sent(
    parcel: Parcel, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.statvfs_result((4096, 4096, 100, 2, 2, 100, 50, 50, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    wire = Wire(HELD, parcel.key)
    message = (
        r"^model 'm' cannot be kept in '.*/parcels': 10.9 kB are needed and 8.2 kB free: make room "
        r"there, set EVOMERGE_CACHE to a folder that has it, or use a path that all nodes share$"
    )
    with pytest.raises(InputError, match=message):
        fetched(parcel, wire)
    assert not wire.asked


def test_a_disk_that_fills_up_meanwhile_is_told(
    parcel: Parcel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space left on device: make room there"):
            fetched(parcel, Wire(HELD, parcel.key))
    assert held_in(fetched(parcel, Wire(HELD, parcel.key))) == HELD


def test_a_cache_that_cannot_be_written_is_told(
    parcel: Parcel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="Not a directory: make room there, set EVOMERGE_CACHE"):
        fetched(parcel, None)


@pytest.mark.parametrize("name", ["../secret", "secret", "model/../../secret", "model", "", "/"])
def test_nothing_but_the_files_of_a_parcel_can_be_asked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    stock = Stock({"key": lambda: {"model/config.json": tmp_path / "model" / "config.json"}})
    assert stock.read("key", "model/config.json", 0, 2) == b"{}"
    for asked in (name, str(tmp_path / "secret")):
        with pytest.raises(InputError, match=r"file '.*' is not in parcel 'key'"):
            stock.read("key", asked, 0, 2)
    with pytest.raises(InputError, match=r"parcel '.*' is none of this search"):
        stock.read(str(tmp_path), "secret", 0, 2)


def test_a_file_that_is_shorter_or_away_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    stock = Stock({"key": lambda: {"config.json": path}})
    with pytest.raises(InputError, match=r"config.json' cannot be read: No such file .* resume"):
        stock.read("key", "config.json", 0, 2)
    path.write_text("{")
    with pytest.raises(InputError, match="is shorter than when the search was started: put the"):
        stock.read("key", "config.json", 0, 2)


def test_parcels_of_the_same_content_are_the_same() -> None:
    turned = dict(reversed(HELD.items()))
    assert parcel_of(HELD).key == parcel_of(turned).key
    assert parcel_of(HELD).key != parcel_of(HELD | {"model/config.json": b"[]"}).key
