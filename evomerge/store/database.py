"""Connecting: URLs, pragmas, transactions, the schema's version.

Reads run in deferred transactions; writes take SQLite's write lock at once (BEGIN IMMEDIATE), so
that what they read first is still true when they write.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError, SQLAlchemyError

from evomerge.errors import StoreError
from evomerge.store.schema import VERSION

_BUSY_MS = 30_000


class Database:
    """An opened database whose schema is the newest."""

    def __init__(self, url: str, create: bool) -> None:
        self.url = url
        self.path = _sqlite_path(url)
        if not exists(url) and not create:
            raise StoreError(f"store '{url}': there is no such file: check --store")
        self._engine = _engine(url)
        try:
            self._open()
        except SQLAlchemyError as error:
            self.close()
            raise StoreError(f"store '{url}' cannot be opened: {_cause(error)}") from None
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        with self.read() as connection:
            version = _version(connection, self.url)
        if version is None:
            self._create()
        elif version > VERSION:
            raise StoreError(
                f"store '{self.url}' has schema {version}, this evomerge reads {VERSION}: "
                "use the evomerge that wrote it"
            )
        elif version < VERSION:
            raise StoreError(
                f"store '{self.url}' has schema {version}, this evomerge reads {VERSION}: bring it "
                f"up to date with: evomerge db upgrade --store {self.url}"
            )

    def _create(self) -> None:
        from evomerge.store.migrations import upgrade

        with self.write() as connection:
            if _version(connection, self.url) is None:  # another process may have been faster
                upgrade(connection)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view for several reads."""
        with self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction: committed whole at the end, or not at all. Raises StoreError."""
        with self._engine.connect() as plain:
            connection = plain.execution_options(evomerge_write=True)
            try:
                with connection.begin():
                    yield connection
            except OperationalError as error:
                raise StoreError(f"store '{self.url}': not written: {_cause(error)}") from error

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def upgrade(url: str) -> tuple[str, Path] | None:
    """Bring an older store's schema up to date, after a copy of it was made beside it.

    Gives the schema it had and the copy; None if it is up to date. Raises StoreError.
    """
    from evomerge.store import migrations

    if not exists(url):
        raise StoreError(f"store '{url}': there is no such file: check --store")
    path, engine = _sqlite_path(url), _engine(url)
    try:
        with engine.connect() as plain:
            version = _version(plain, url)
            if version == VERSION:
                return None
            if version is None or version > VERSION:
                raise StoreError(
                    f"store '{url}' has schema {version or 'none'}, this evomerge writes "
                    f"{VERSION}: use the evomerge that wrote it"
                )
            copy = path.with_name(f"{path.name}.schema-{version}")
            plain.rollback()
            with closing(sqlite3.connect(path)) as ours, closing(sqlite3.connect(copy)) as theirs:
                ours.backup(theirs)
            with plain.execution_options(evomerge_write=True).begin():
                migrations.upgrade(plain)
        return version, copy
    except SQLAlchemyError as error:
        raise StoreError(f"store '{url}' is not upgraded: {_cause(error)}") from None
    finally:
        engine.dispose()


def exists(url: str) -> bool:
    """Whether there is a database to open. Raises StoreError for what is no URL of a store."""
    path = _sqlite_path(url)
    if not path.parent.is_dir():
        raise StoreError(f"store '{url}': no folder '{path.parent}': create it first")
    return path.is_file()


def now() -> str:
    """The time, as columns hold it: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _version(connection: Connection, url: str) -> str | None:
    """Of the schema; None of an empty database."""
    names = text("SELECT name FROM sqlite_master WHERE type='table'")
    tables = set(connection.execute(names).scalars())
    if not tables:
        return None
    if "alembic_version" not in tables:
        raise StoreError(f"store '{url}' holds the tables of something else: use another file")
    version: str | None = connection.execute(
        text("SELECT version_num FROM alembic_version")
    ).scalar()
    return version


def _sqlite_path(url: str) -> Path:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise StoreError(f"store '{url}' is no URL: write sqlite:///FILE") from None
    if parsed.get_backend_name() != "sqlite" or not parsed.database or ":memory:" in url:
        raise StoreError(f"store '{url}': only SQLite files are supported: write sqlite:///FILE")
    return Path(parsed.database).absolute()


def _engine(url: str) -> Engine:
    engine = create_engine(url)

    @event.listens_for(engine, "connect")
    def connected(raw: Any, record: Any) -> None:
        raw.isolation_level = None  # transactions are begun by hand, below
        cursor = raw.cursor()
        for pragma in (
            f"busy_timeout={_BUSY_MS}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        writes = connection.get_execution_options().get("evomerge_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _cause(error: SQLAlchemyError) -> str:
    return str(error.orig) if isinstance(error, DatabaseError) and error.orig else str(error)
