"""A store in a SQLite file, which several processes of one host may share.

Reads run in deferred transactions; writes take the write lock at once (BEGIN IMMEDIATE), so that
what they read first is still true when they write. The log is written ahead (WAL), so readers and
the writer do not wait for each other, and synced at every commit.
"""

import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Float,
    Table,
    create_engine,
    event,
    literal_column,
)
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DBAPIError

from evomerge.errors import StoreError
from evomerge.store.backend import WRITES
from evomerge.store.leadership import FileLeadership

_BUSY_MS = 30_000  # a writer holds the lock for milliseconds; the disk may stall for seconds
_PROBE_BYTES = 2**20  # a store without a search has some 100 KB, and its log as much
_MOUNTS = Path("/proc/self/mountinfo")
# https://sqlite.org/wal.html#walresetbug; later releases of two older branches have the cure too.
_WAL_RESET_BUG = (3, 7, 0), (3, 51, 3)
_CURED = {(3, 44): 6, (3, 50): 7}

# Their locks and shared memory do not hold between hosts, or not at all.
# fmt: off
_NETWORK = frozenset({
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "davfs2", "gcsfuse", "gfs2",
    "glusterfs", "gpfs", "juicefs", "lustre", "mfs", "moosefs", "ncpfs", "nfs", "nfs4", "ocfs2",
    "orangefs", "panfs", "pvfs2", "quobyte", "rclone", "s3fs", "smb3", "smbfs", "sshfs", "weka",
    "wekafs",
})
# fmt: on


class Sqlite:
    """See Backend."""

    clock: ColumnElement[float] = literal_column(
        "(julianday('now') - 2440587.5) * 86400.0", Float()
    )

    def __init__(self, url: str, path: Path) -> None:
        self.shown = url
        self.path: Path | None = path
        self._path = path

    def may_exist(self) -> bool:
        if not self._path.parent.is_dir():
            raise StoreError(f"store '{self.shown}': no folder '{self._path.parent}': create it")
        return self._path.is_file()

    def engine(self) -> Engine:
        found = network_filesystem(self._path)
        if found is not None:
            raise StoreError(
                f"store '{self.shown}' is on a network file system ({found}), where SQLite's locks "
                "do not hold: name a file on a local disk, or use PostgreSQL"
            )
        engine = create_engine(self._address())
        event.listen(engine, "connect", _set_up)
        event.listen(engine, "begin", _begin)
        return engine

    def _address(self) -> str:
        """The file, for SQLAlchemy. Even a reader needs files beside it, which it may be unable to
        make, or would leave there for others to stumble over. Of a file that is read-only for us,
        and that nobody has open to write, none is needed: it is read as one that never changes."""
        log, plain = self._path.with_name(f"{self._path.name}-wal"), f"sqlite:///{self._path}"
        if not self._path.exists() or log.exists():
            return plain
        if _may_write(self._path) and _may_write(self._path.parent):
            return plain
        return f"sqlite:///file:{quote(str(self._path))}?immutable=1&uri=true"

    def lock_folder(self) -> Path:
        return self._path.parent

    def check(self, connection: Connection) -> tuple[str, ...]:
        warning = wal_reset_warning(sqlite3.sqlite_version_info)
        return () if warning is None else (warning,)

    def probe(self, connection: Connection) -> None:
        # SQLite leaves out writes that change nothing, except of this number; it is not used.
        version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        connection.exec_driver_sql(f"PRAGMA user_version = {int(version)}")

    def probe_place(self, engine: Engine) -> None:
        folder = self._path.parent
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(_PROBE_BYTES))
                os.fsync(file.fileno())
        except OSError as error:
            raise StoreError(
                f"store '{self.shown}' cannot be made in '{folder}': {error.strerror}: name a "
                "file that can be written"
            ) from None

    def is_away(self, error: DBAPIError) -> bool:
        return _code(error) in (
            sqlite3.SQLITE_BUSY,
            sqlite3.SQLITE_LOCKED,
            sqlite3.SQLITE_PROTOCOL,
        )

    def remedy(self, error: DBAPIError) -> str:
        return {
            sqlite3.SQLITE_READONLY: "make the file and its folder writable",
            sqlite3.SQLITE_FULL: "make room on its disk",
            sqlite3.SQLITE_IOERR: "see whether its disk is full or broken",
            sqlite3.SQLITE_CORRUPT: "restore a copy of it",
            sqlite3.SQLITE_CANTOPEN: "see whether the file and its folder may be read and written",
            sqlite3.SQLITE_BUSY: "wait for the process that holds its lock",
            sqlite3.SQLITE_NOTADB: "name another file",
        }.get(_code(error), "")

    def lead(self, engine: Engine) -> FileLeadership | None:
        return FileLeadership.sought(self._path.with_name(f"{self._path.name}.server.lock"))

    @staticmethod
    def lock_schema(connection: Connection) -> None:
        """Nothing to do: a transaction that writes is the only one."""

    @staticmethod
    def lock_ledger(connection: Connection) -> None:
        """Nothing to do: a transaction that writes is the only one."""

    @staticmethod
    def lock_queue(connection: Connection) -> None:
        """Nothing to do: a transaction that writes is the only one."""

    @staticmethod
    def insert_or_ignore(table: Table) -> Any:
        return insert(table).on_conflict_do_nothing()

    @staticmethod
    def hold_still(connection: Connection, tables: Sequence[Table]) -> None:
        """Nothing to do: a transaction that writes is the only one."""

    @staticmethod
    def continue_ids(connection: Connection, tables: Sequence[Table]) -> None:
        """Nothing to do: the next id is one more than the last."""

    @staticmethod
    def damage(connection: Connection) -> list[str]:
        raw: Any = connection.connection.dbapi_connection
        raw.text_factory = lambda text: text.decode("utf-8", "replace")
        found = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
        return [] if found == ["ok"] else [str(line) for line in found]


def network_filesystem(path: Path) -> str | None:
    """The kind of network file system that a file is on, or would be; None if on none that is
    known as one."""
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # not Linux
        return None
    return _kind(str(path.resolve()), mounts)


def _kind(path: str, mounts: str) -> str | None:
    """Of a path without symbolic links, by the text of a mountinfo file, see proc(5)."""
    longest, found = -1, None
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), before.split(" ")[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= longest:  # of two on one point, the later one hides the first
            kind, _, options = after.split(" ", 2)
            longest, found = len(point), kind.removeprefix("fuse.")
            if found == "9p" and not re.search(r"\btrans=(tcp|rdma)\b", options):
                found = None  # of a virtual machine and its host
    return found if found in _NETWORK else None


def wal_reset_warning(version: tuple[int, ...]) -> str | None:
    """What to say of a version of SQLite that may damage a file; None of others."""
    first, cured = _WAL_RESET_BUG
    branch = version[0], version[1]
    if not first <= version < cured or version[2] >= _CURED.get(branch, 1000):
        return None
    return (
        f"SQLite {'.'.join(map(str, version))} may, very rarely, damage a file that several "
        "processes write (the WAL-reset bug): use 3.51.3 or newer, or PostgreSQL"
    )


def _set_up(raw: Any, record: Any) -> None:
    """A new connection."""
    raw.isolation_level = None  # transactions are begun by hand, below
    cursor = raw.cursor()
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    try:
        _write_ahead(cursor)
    finally:
        cursor.close()


def _write_ahead(cursor: Any) -> None:
    """Keep the log ahead; of a new file, which others may open in the same moment, SQLite does not
    wait for its turn by itself."""
    deadline = time.monotonic() + _BUSY_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            code = error.sqlite_errorcode & 0xFF
            if code == sqlite3.SQLITE_READONLY:
                return  # it can be read as it is
            if code != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql(f"PRAGMA query_only={int(not writes)}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _code(error: DBAPIError) -> int:
    """SQLite's primary result code; 0 where the error is not SQLite's own."""
    return int(getattr(error.orig, "sqlite_errorcode", 0)) & 0xFF


def _may_write(path: Path) -> bool:
    effective = os.access in os.supports_effective_ids
    return os.access(path, os.W_OK, effective_ids=effective)
