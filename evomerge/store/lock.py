"""A file that shows that its process is alive: locked by it, and so unlocked when it dies.

It is no lock that anyone waits for: who conducts a search is decided in the database, see lease.
"""

import fcntl
import os
import tempfile
import weakref
from pathlib import Path


class LivenessFile:
    """A new file, locked from construction until `release` or the death of the process.

    name: in its folder. identity: of the file itself, which no other file of this host has while
    this one is open.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        """Raises OSError where there can be no file in the folder."""
        descriptor, path = tempfile.mkstemp(".lock", f"{stem}.", folder)
        os.fchmod(descriptor, 0o644)  # who else may see the folder may ask
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        self._path = Path(path)
        self._descriptor: int | None = descriptor
        self.name = self._path.name
        self.identity = _identity(os.fstat(descriptor))
        _ours.add(self)

    def release(self) -> None:
        """Unlock and remove it; harmless when done twice."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            self.abandon()

    def abandon(self) -> None:
        """As if this process had died: the file stays for others to see that nobody holds it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


# A forked child holds its parent's locks as well, and would seem to be the parent.
_ours: "weakref.WeakSet[LivenessFile]" = weakref.WeakSet()


def _forget() -> None:
    for file in list(_ours):
        file.abandon()


os.register_at_fork(after_in_child=_forget)


def is_alive(folder: Path, name: str, identity: str) -> bool | None:
    """Whether the process that made a file is alive; None if the file cannot be seen from here."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY)
    except OSError:
        return None
    try:
        if _identity(os.fstat(descriptor)) != identity:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _identity(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}"
