"""One coordinator per search on a host, by an operating-system lock that dies with its process."""

import fcntl
import os
import time
from pathlib import Path

from evomerge.errors import SearchBusy

# A refusal is final only after a while: somebody may just be asking whether the lock is held.
_TRIES, _PAUSE = 30, 0.01


class SearchLock:
    """Held from construction until `release` or the death of the process.

    The lock is a file beside the database; its text is the holder's process id, for messages.
    """

    def __init__(self, database: Path, search: str) -> None:
        self._path = lock_path(database, search)
        refusals = 0
        while (descriptor := _locked(self._path)) is None:
            refusals += 1
            if refusals == _TRIES:
                raise SearchBusy(
                    f"search '{search}' is being conducted by process {_holder(self._path)}: "
                    "wait for it, or stop it"
                )
            time.sleep(_PAUSE)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Give the lock back and remove its file; harmless when done twice."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def lock_path(database: Path, search: str) -> Path:
    """The lock file of a search."""
    return database.with_name(f"{database.name}.{search}.lock")


def is_held(database: Path, search: str) -> bool:
    """Whether some process conducts the search at this moment."""
    try:
        descriptor = os.open(lock_path(database, search), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock; None while somebody else does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if _is_current(descriptor, path):
            return descriptor
        os.close(descriptor)  # its last holder removed the file in between: once more


def _holder(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except FileNotFoundError:  # it has just let go
        return "?"


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
