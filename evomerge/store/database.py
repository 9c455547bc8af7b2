"""Connecting: transactions, the schema's version, and waiting for a database that went away.

Knows nothing of searches, and of SQLite and PostgreSQL only that both are backends.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Table,
    event,
    insert,
    inspect,
    text,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from evomerge.errors import StoreError, StoreUnavailable
from evomerge.store.backend import WRITES, Backend, backend, backend_of
from evomerge.store.leadership import Leadership
from evomerge.store.schema import VERSION

# A server that is restarted, upgraded or replaced is back by then; else somebody has to look.
_PATIENCE = 600.0  # seconds
_PAUSES = (0.1, 5.0)  # seconds between attempts: the first, doubled each time up to the last

T = TypeVar("T")


class _View(threading.local):
    """What a thread reads through meanwhile, see Database.consistent, and what it has read."""

    connection: Connection | None = None
    known: dict[Any, Any] | None = None


class Database:
    """An opened database whose schema is the newest.

    shown: its URL without a password, for messages. path: the file that it is, if it is one.
    warnings: what whoever starts a search should be told of it.
    """

    def __init__(self, url: str, create: bool, tell: Callable[[str], None] | None = None) -> None:
        """tell: be patient from the opening on, see `wait_with`. Raises StoreError."""
        self.url = url
        self._backend = backend(url)
        self.shown = self._backend.shown
        self.path = self._backend.path
        self.warnings: tuple[str, ...] = ()
        self._tell = tell
        self._view = _View()
        if not self._backend.may_exist() and not create:
            raise StoreError(f"store '{self.shown}': there is no such file: check --store")
        self._engine = _engine(self._backend)
        try:
            self.persist(lambda: self._open(create))
        except BaseException:
            self.close()
            raise

    def _open(self, create: bool) -> None:
        try:
            with self._engine.connect() as connection:
                self.warnings = self._backend.check(connection)
                version = version_of(connection, self.shown)
        except SQLAlchemyError as error:
            # Whether a server that refuses will be back, only who is patient wants to find out.
            if self._tell is not None and self._is_away(error):
                raise self._unavailable("not opened", error) from error
            raise _not_opened(self._backend, error) from None
        if version is None and not create:
            raise StoreError(
                f"store '{self.shown}' is empty: check --store, or launch a search (evomerge run)"
            )
        if version is None:
            self._create()
        elif version > VERSION:
            raise StoreError(
                f"store '{self.shown}' has schema {version}, this evomerge reads {VERSION}: "
                "use the evomerge that wrote it"
            )
        elif version < VERSION:
            raise StoreError(
                f"store '{self.shown}' has schema {version}, this evomerge reads {VERSION}: bring "
                f"it up to date with: evomerge db upgrade --store {self.shown}"
            )
        if create:
            self.probe()

    def _create(self) -> None:
        from evomerge.store.migrations import upgrade

        with self.write() as connection:
            self._backend.lock_schema(connection)
            if version_of(connection, self.shown) is None:  # another process may have been faster
                upgrade(connection)

    def probe(self) -> None:
        """Find out whether this database can be written now, by writing. Raises StoreError."""
        with self.write() as connection:
            self._backend.probe(connection)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view for several reads. Raises StoreUnavailable, after which they may be
        made again, see `persist`; StoreError."""
        with self._translated("not read"):
            if self._view.connection is not None:
                yield self._view.connection
                return
            with self._engine.connect() as connection, connection.begin():
                yield connection

    def consistent(self, attempt: Callable[[], T]) -> T:
        """What `attempt` gives, for which all that this thread reads is one consistent view. It is
        made again as a whole, see `persist`."""
        if self._view.connection is not None:
            return attempt()

        def at_once() -> T:
            with self.read() as self._view.connection:
                self._view.known = {}
                try:
                    return attempt()
                finally:
                    self._view.connection = self._view.known = None

        return self.persist(at_once)

    @property
    def known(self) -> dict[Any, Any] | None:
        """Where this thread may remember what it reads, as long as its view is consistent; None
        when it is not."""
        return self._view.known

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction: committed whole at the end, or not at all.

        Raises StoreUnavailable, after which nobody can say whether it was committed; StoreError,
        after which it was not; IntegrityError, for the caller to explain.
        """
        with self._translated("not written"), self._engine.connect() as plain:
            connection = plain.execution_options(**{WRITES: True})
            with connection.begin():
                yield connection

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except PoolTimeout as error:
            raise self._unavailable(what, error) from error
        except DBAPIError as error:
            if self._is_away(error):
                raise self._unavailable(what, error) from error
            said = explained(self._backend, error)
            raise StoreError(f"store '{self.shown}': {what}: {said}") from error

    def _is_away(self, error: SQLAlchemyError) -> bool:
        return isinstance(error, DBAPIError) and self._backend.is_away(error)

    def _unavailable(self, what: str, error: SQLAlchemyError) -> StoreUnavailable:
        return StoreUnavailable(f"store '{self.shown}': {what}: {cause(error)}: try again")

    def wait_with(self, tell: Callable[[str], None]) -> None:
        """From now on be patient when the database is away for a moment; `tell` hears of it."""
        self._tell = tell

    def persist(self, attempt: Callable[[], T]) -> T:
        """What `attempt` gives, which is made again while it raises StoreUnavailable, for minutes;
        once only before `wait_with`."""
        deadline, pause = 0.0, _PAUSES[0]
        while True:
            try:
                found = attempt()
            except StoreUnavailable as error:
                if self._tell is None or self._view.connection is not None:
                    raise
                if not deadline:
                    deadline = time.monotonic() + _PATIENCE
                    self._tell(f"{error}: evomerge does, for up to {_PATIENCE / 60:.0f} minutes")
                elif time.monotonic() > deadline:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, _PAUSES[1])
            else:
                if deadline and self._tell is not None:
                    self._tell(f"store '{self.shown}' answers again")
                return found

    @property
    def clock(self) -> ColumnElement[float]:
        """An SQL expression: seconds since 1970 by the database's own clock."""
        return self._backend.clock

    def lock_folder(self) -> Path:
        """Where coordinators on this host show that they are alive. Raises StoreError."""
        return self._backend.lock_folder()

    def lead(self) -> Leadership | None:
        """The right to work off the queue; None while another process has it. Raises StoreError,
        StoreUnavailable."""
        with self._translated("not to be led"):
            try:
                return self._backend.lead(self._engine)
            except OSError as error:
                raise StoreError(
                    f"store '{self.shown}': no lock can be made beside it: {error.strerror}: make "
                    "its folder writable"
                ) from None

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def exists(url: str) -> bool:
    """Whether there is a store. Raises StoreError for what is no URL of one, and for a database
    that cannot be opened."""
    found = backend(url)
    if not found.may_exist():
        return False
    engine = _engine(found)
    try:
        with engine.connect() as connection:
            return version_of(connection, found.shown) is not None
    except SQLAlchemyError as error:
        raise _not_opened(found, error) from None
    finally:
        engine.dispose()


def probe(url: str) -> None:
    """Find out whether a store can be written, or made, where it is to be. Nothing is left behind.
    Raises StoreError."""
    if exists(url):
        opened = Database(url, create=False)
        try:
            opened.probe()
        finally:
            opened.close()
        return
    found = backend(url)
    engine = _engine(found)
    try:
        found.probe_place(engine)
    except SQLAlchemyError as error:
        raise _not_opened(found, error) from None
    finally:
        engine.dispose()


def connect(url: str) -> Engine:
    """An engine for a database of any schema. With the execution option WRITES a connection's
    transactions can write. Raises StoreError."""
    return _engine(backend(url))


def shown(url: str) -> str:
    """A store's URL without its password, for messages. Raises StoreError."""
    return backend(url).shown


def sqlite_file(url: str) -> Path | None:
    """The file that a store is; None where it is none. Raises StoreError for what is no URL of a
    store."""
    return backend(url).path


def serialise_ledger(connection: Connection) -> None:
    """Wait until no other transaction that appends to the ledger is left: each row points back to
    the last one, whichever search wrote it."""
    backend_of(connection).lock_ledger(connection)


def inserted(connection: Connection, table: Table, row: Mapping[str, Any]) -> int:
    """The id of a new row. Raises IntegrityError."""
    return int(connection.execute(_insertion(table), row).scalar_one())


def inserted_once(connection: Connection, table: Table, row: Mapping[str, Any]) -> int | None:
    """The id of a new row; None where a unique key of the table is taken, and nothing is done."""
    statement = _insertion_once(backend_of(connection), table)
    found: int | None = connection.execute(statement, row).scalar()
    return found


@cache  # to build a statement takes longer than to run it
def _insertion(table: Table) -> Executable:
    return insert(table).returning(table.c.id)


@cache
def _insertion_once(backend: type[Backend], table: Table) -> Executable:
    statement: Executable = backend.insert_or_ignore(table).returning(table.c.id)
    return statement


def now() -> str:
    """The time, as columns hold it: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def version_of(connection: Connection, shown: str) -> str | None:
    """Of the schema; None of an empty database. Raises StoreError."""
    tables = inspect(connection).get_table_names()
    if not tables:
        return None
    if not {"alembic_version", "search"} <= {*tables}:  # other programs use Alembic too
        raise StoreError(f"store '{shown}' holds the tables of something else: name another")
    version: str | None = connection.execute(
        text("SELECT version_num FROM alembic_version")
    ).scalar()
    return version


def cause(error: SQLAlchemyError) -> str:
    """What the database itself said, in one line."""
    said = error.orig if isinstance(error, DBAPIError) and error.orig else error
    return next(iter(str(said).strip().splitlines()), type(said).__name__)


def storable(text: str) -> str:
    """The text that is stored: PostgreSQL holds no NUL, and UTF-8 no half of a surrogate pair."""
    if text.isascii() and "\0" not in text:
        return text
    shown = text.replace("\0", "\N{SYMBOL FOR NULL}")
    return shown.encode("utf-8", "backslashreplace").decode("utf-8")


def _not_opened(found: Backend, error: SQLAlchemyError) -> StoreError:
    return StoreError(f"store '{found.shown}' cannot be opened: {explained(found, error)}")


def explained(found: Backend, error: SQLAlchemyError) -> str:
    """What the database said, and what to do about it where that is known."""
    remedy = found.remedy(error) if isinstance(error, DBAPIError) else ""
    return cause(error) + (remedy and f": {remedy}")


def _engine(found: Backend) -> Engine:
    engine = found.engine()
    event.listen(engine, "before_cursor_execute", _make_storable, retval=True)
    return engine


def _make_storable(
    connection: Connection,
    cursor: Any,
    statement: str,
    parameters: Any,
    context: Any,
    executemany: bool,
) -> tuple[str, Any]:
    """Every text that goes into the database passes here."""
    if executemany:
        return statement, [_storable_row(row) for row in parameters]
    return statement, _storable_row(parameters)


def _storable_row(row: Any) -> Any:
    if isinstance(row, Mapping):
        return {k: storable(v) if isinstance(v, str) else v for k, v in row.items()}
    return tuple(storable(v) if isinstance(v, str) else v for v in row)
