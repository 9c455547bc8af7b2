"""One coordinator per search on a host, by an operating-system lock that dies with its process."""

import fcntl
import os
from pathlib import Path

from evomerge.errors import SearchBusy


class SearchLock:
    """Held from construction until `release` or the death of the process.

    The lock is a file beside the database; its text is the holder's process id, for messages.
    """

    def __init__(self, database: Path, search: str) -> None:
        self._path = lock_path(database, search)
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 32).decode(errors="replace").strip()
                os.close(descriptor)
                raise SearchBusy(
                    f"search '{search}' is being conducted by process {holder}: "
                    "wait for it, or stop it"
                ) from None
            if _is_current(descriptor, self._path):
                break
            os.close(descriptor)  # its last holder removed the file in between: once more
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


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
