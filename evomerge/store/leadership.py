"""Who works off a store's queue: one process at a time, until it lets go or dies.

Another server that is started on the same store stands by. Knows nothing of the queue.
"""

import fcntl
import os
from pathlib import Path
from typing import Protocol

from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from evomerge.store.backend import WRITES

_TRY = text("SELECT pg_try_advisory_lock(:number)")


class Leadership(Protocol):
    """A lock that one process has."""

    def is_held(self) -> bool:
        """Whether it is still ours: a connection that was lost takes its lock along."""
        ...

    def release(self) -> None:
        """Let go; harmless when done twice."""
        ...


class FileLeadership:
    """Beside a store that is a file, by a lock of the operating system's. The file stays: who
    removed it would let two lock two files of one name."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @classmethod
    def sought(cls, path: Path) -> "FileLeadership | None":
        """None while another process has it. Raises OSError."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return cls(descriptor)

    def is_held(self) -> bool:
        """See Leadership."""
        return self._descriptor is not None

    def release(self) -> None:
        """See Leadership."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class SessionLeadership:
    """In a PostgreSQL database, by an advisory lock of a connection of its own."""

    def __init__(self, engine: Engine, number: int) -> None:
        self._connection = engine.connect().execution_options(
            isolation_level="AUTOCOMMIT", **{WRITES: True}
        )
        self._number = number

    @classmethod
    def sought(cls, engine: Engine, number: int) -> "SessionLeadership | None":
        """None while another process has it. Raises DBAPIError."""
        found = cls(engine, number)
        if found._connection.execute(_TRY, {"number": number}).scalar_one():
            return found
        found.release()
        return None

    def is_held(self) -> bool:
        """See Leadership."""
        try:
            self._connection.execute(text("SELECT 1"))
        except SQLAlchemyError:
            return False
        return True

    def release(self) -> None:
        """See Leadership."""
        if not self._connection.closed:
            self._connection.invalidate()  # its end ends the lock; back in the pool it would last
            self._connection.close()
