"""The door to a database system: everything in which SQLite and PostgreSQL differ.

Knows nothing of searches; what a transaction does is the same for both.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import URL, ColumnElement, Connection, Engine, Table, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from evomerge.errors import StoreError
from evomerge.messages import without_password

_MISWRITTEN = re.compile(r"[a-zA-Z][\w+]*:")  # a URL whose slashes are missing
if TYPE_CHECKING:
    from evomerge.store.leadership import Leadership

WRITES = "evomerge_write"  # the execution option of a connection whose transactions write


class Backend(Protocol):
    """One database, which need not be there yet.

    shown: its URL without a password. path: the file that it is, if it is one. clock: an SQL
    expression, seconds since 1970 by the database's own clock.
    """

    shown: str
    path: Path | None
    clock: ColumnElement[float]

    def may_exist(self) -> bool:
        """False if there is certainly no database. Raises StoreError where there cannot be one."""
        ...

    def engine(self) -> Engine:
        """New connections to it. A transaction sees one consistent state and cannot write, unless
        its connection has the option WRITES: then what it has read stays true until it ends.

        Raises StoreError where the database must not be used.
        """
        ...

    def lock_folder(self) -> Path:
        """Where coordinators on this host show that they are alive."""
        ...

    def check(self, connection: Connection) -> tuple[str, ...]:
        """What users should be warned of. Raises StoreError for a version that is too old."""
        ...

    def probe(self, connection: Connection) -> None:
        """Write, in a transaction that is rolled back or changes nothing. Raises StoreError, or
        what the database raises, when one cannot."""
        ...

    def probe_place(self, engine: Engine) -> None:
        """The same before there are tables, or a database; leaves nothing behind."""
        ...

    def is_away(self, error: DBAPIError) -> bool:
        """Whether the database may be back in a moment: what failed can be tried again."""
        ...

    def remedy(self, error: DBAPIError) -> str:
        """What to do about an error; empty where there is nothing to be said."""
        ...

    def lead(self, engine: Engine) -> "Leadership | None":
        """The right to work off the queue; None while another process has it. Raises OSError, or
        what the database raises."""
        ...

    @staticmethod
    def lock_schema(connection: Connection) -> None:
        """Wait until no other transaction that has called this is left."""
        ...

    @staticmethod
    def lock_ledger(connection: Connection) -> None:
        """The same, of a lock of its own."""
        ...

    @staticmethod
    def lock_queue(connection: Connection) -> None:
        """The same, of another."""
        ...

    @staticmethod
    def insert_or_ignore(table: Table) -> Any:
        """An INSERT that does nothing where a unique key is taken."""
        ...

    @staticmethod
    def hold_still(connection: Connection, tables: Sequence[Table]) -> None:
        """Let nobody else write until this transaction ends, however long it takes."""
        ...

    @staticmethod
    def continue_ids(connection: Connection, tables: Sequence[Table]) -> None:
        """Let new rows go on after ids that were written by hand."""
        ...

    @staticmethod
    def damage(connection: Connection) -> list[str]:
        """What the database itself finds wrong with its files; empty where it cannot be asked.
        From then on the connection gives text that is damaged as well, as far as it can be read."""
        ...


def backend(url: str) -> Backend:
    """Of a URL, or of the path of a SQLite file. Raises StoreError for what is neither."""
    from evomerge.store.postgres import Postgres
    from evomerge.store.sqlite import Sqlite

    kinds = "write a file's path, or postgresql://USER@HOST/DATABASE"
    if url and "://" not in url and not _MISWRITTEN.match(url):
        url = f"sqlite:///{os.path.expanduser(url)}"
    try:
        parsed: URL = make_url(url)
    except (ArgumentError, ValueError):  # the latter of a port that is no number
        raise StoreError(f"store '{without_password(url)}' is no URL: {kinds}") from None
    if parsed.drivername == "sqlite" and parsed.database and parsed.database != ":memory:":
        return Sqlite(url, Path(parsed.database).absolute())
    if parsed.drivername in ("postgresql", "postgresql+psycopg") and parsed.database:
        return Postgres(parsed)
    shown = without_password(parsed.render_as_string(hide_password=True))
    raise StoreError(f"store '{shown}' is neither a SQLite file nor PostgreSQL: {kinds}")


def backend_of(connection: Connection) -> type[Backend]:
    """What is the same for all databases of the system that a connection leads to."""
    from evomerge.store.postgres import Postgres
    from evomerge.store.sqlite import Sqlite

    return Postgres if connection.dialect.name == "postgresql" else Sqlite
