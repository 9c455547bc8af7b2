"""What a node lacks is sent to it: files, piece by piece, into the cache of the node.

A parcel is known by what its files hash to, on both sides, and lies in a cache when all of them do.
Knows nothing of what is in a parcel, and not by which way the pieces come.
"""

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Protocol

from evomerge import cache
from evomerge.errors import InputError

PIECE = 4 * 2**20  # bytes that are sent at once, as long as there are as many

_STEP = 2.0  # seconds after which whoever waits for a parcel is told that it is on its way
_WORD = 60.0  # seconds after which people are
_POLL = 0.2  # seconds between two looks at a lock

Contents = Mapping[str, Path | bytes]  # where the files of a parcel lie, or what they hold


@dataclass(frozen=True)
class File:
    """size: in bytes. sha: SHA-256 of what it holds."""

    size: int
    sha: str

    @classmethod
    def of(cls, content: bytes) -> "File":
        """Of a file that holds this."""
        return cls(len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Parcel:
    """Files by their names, which may have folders in them."""

    files: Mapping[str, File]

    @cached_property
    def key(self) -> str:
        """SHA-256 of the whole content: what it is asked for by, and where it lies in a cache."""
        text = json.dumps({name: file.sha for name, file in self.files.items()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Of all files, in bytes."""
        return sum(file.size for file in self.files.values())


@dataclass(frozen=True)
class Step:
    """On the way to something that has to be fetched. word: for people, where there is any. lacks:
    nothing is fetched before a source is given."""

    word: str | None = None
    lacks: bool = False


class Source(Protocol):
    """The other side."""

    def pieces(self, key: str, name: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) of a file of a parcel, in order. Raises InputError where it is
        not what it was."""
        ...


class Stock:
    """What can be sent: parcels by their keys. Nothing else can be asked for: a name that is sent
    here is looked up, and never opened."""

    def __init__(self, parcels: Mapping[str, Callable[[], Contents]]) -> None:
        """Each is made ready when it is first asked for."""
        self._parcels = parcels
        self._ready: dict[str, Contents] = {}

    def read(self, key: str, name: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a file. Raises InputError for one that is shorter or away, or
        that belongs to no parcel."""
        if key not in self._parcels:
            raise InputError(f"parcel '{key}' is none of this search")
        if key not in self._ready:
            self._ready[key] = self._parcels[key]()
        if name not in self._ready[key]:
            raise InputError(f"file '{name}' is not in parcel '{key}'")
        where = self._ready[key][name]
        if isinstance(where, bytes):
            return where[start:stop]
        try:
            with where.open("rb") as file:
                file.seek(start)
                found = file.read(stop - start)
        except OSError as error:
            raise _changed(where, f"cannot be read: {error.strerror}") from None
        if len(found) < stop - start:
            raise _changed(where, "is shorter than when the search was started")
        return found


def fetching(
    parcel: Parcel, what: str, *, suspect: bool = False
) -> Generator[Step, Source | None, Path]:
    """Bring a parcel into this node's cache, unless it is there; gives its folder.

    One process of a node fetches it, the others wait. What a process that was killed has left is
    gone on with. Yields every few seconds; where it lacks a source, it has to be sent one. what:
    for people. suspect: what lies in the cache is compared with the hashes, while others go on
    using it, and fetched again where it is damaged. Raises InputError where it cannot be kept, and
    where what comes is not what was promised.
    """
    folder = cache.folder("parcels")
    ready, partial = folder / parcel.key, folder / f"{parcel.key}.partial"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / f"{parcel.key}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            yield from _locking(lock)
            if ready.is_dir():
                if not suspect or (yield from _comparing(ready, parcel)):
                    return ready
                ready.rename(partial)
            source = None
            while source is None:
                source = yield Step(f"{what} is not there as it is here", lacks=True)
            yield from _filling(partial, parcel, what, source)
            partial.rename(ready)
        finally:
            os.close(lock)
    except OSError as error:
        raise InputError(
            f"{what} cannot be kept in '{folder}': {error.strerror}: make room there, set "
            "EVOMERGE_CACHE to a folder that has it, or use a path that all nodes share"
        ) from None
    return ready


def _locking(lock: int) -> Iterator[Step]:
    """Until this process holds the lock: the death of one that does unlocks it."""
    told = time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_POLL)
        if time.monotonic() - told > _STEP:
            told = time.monotonic()
            yield Step()


def _comparing(folder: Path, parcel: Parcel) -> Generator[Step, None, bool]:
    """Whether each file is what it was when it came."""
    told = time.monotonic()
    for name, due in parcel.files.items():
        try:
            with (folder / name).open("rb") as file:
                digest, have = _digest(file)
        except FileNotFoundError:
            return False
        if have != due.size or digest.hexdigest() != due.sha:
            return False
        if time.monotonic() - told > _STEP:
            told = time.monotonic()
            yield Step()
    return True


def _filling(partial: Path, parcel: Parcel, what: str, source: Source) -> Iterator[Step]:
    """Fetch whatever of a parcel is not in the folder yet."""
    partial.mkdir(mode=0o700, exist_ok=True)
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    missing = max(0, parcel.size - there)
    _check_room(partial, missing)
    yield Step(
        f"{what} is not there as it is here: {_size(missing)} are sent to '{partial.parent}'; a "
        "path that all nodes share would spare that"
    )
    started = told = said = time.monotonic()
    arrived = 0
    for name, file in parcel.files.items():
        for count in _copying(partial / name, file, parcel.key, name, source):
            arrived, now = arrived + count, time.monotonic()
            if now - said > _WORD:
                said = told = now
                rate = arrived / (now - started)
                yield Step(f"{what}: {_size(arrived)} sent, {_size(rate)} a second")
            elif now - told > _STEP:
                told = now
                yield Step()
    yield Step(f"{what}: all sent, {_size(arrived)} in {time.monotonic() - started:.0f} s")


def _copying(path: Path, due: File, key: str, name: str, source: Source) -> Iterator[int]:
    """Fetch what is missing of a file; gives how many bytes have come since it last did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        digest, have = _digest(file)
        if have > due.size or (have == due.size and digest.hexdigest() != due.sha):
            file.truncate(0)
            digest, have = hashlib.sha256(), 0
        yield 0  # what was left here was read, which takes its time
        for piece in source.pieces(key, name, have, due.size):
            file.write(piece)
            digest.update(piece)
            yield len(piece)
        file.flush()
        os.fsync(file.fileno())  # before anything says that it is whole
    if digest.hexdigest() == due.sha:
        return
    path.unlink()
    if not have:
        raise InputError(
            f"'{name}' is not what it was when the search was started, or was damaged on its way: "
            "put the old file back and resume the search"
        )
    yield from _copying(path, due, key, name, source)  # what was left here was damaged


def _digest(file: BufferedReader | BufferedRandom) -> tuple["hashlib._Hash", int]:
    """Of what a file holds, and how much that is."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")
    return digest, file.seek(0, os.SEEK_END)


def _check_room(folder: Path, needed: int) -> None:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise OSError(errno.ENOSPC, f"{_size(needed)} are needed and {_size(free)} free")


def _changed(path: Path, how: str) -> InputError:
    return InputError(f"'{path}' {how}: put the old file back and resume the search")


def _size(count: float) -> str:
    """For people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
