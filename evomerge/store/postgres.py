"""A store in a PostgreSQL database, which processes of several hosts may share.

Reads see one snapshot. Writes are at the level READ COMMITTED: the first statement of a transaction
that writes a search updates its row, and whoever writes the same search waits there.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Float,
    Table,
    create_engine,
    event,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError, OperationalError

from evomerge.errors import StoreError
from evomerge.messages import without_password
from evomerge.store.backend import WRITES
from evomerge.store.leadership import SessionLeadership
from evomerge.store.schema import metadata

_OLDEST = 15
# Advisory locks: "evo" and a number.
_SCHEMA, _LEDGER, _QUEUE, _SERVER = 0x65766F01, 0x65766F02, 0x65766F03, 0x65766F04

# A client that froze or vanished in mid-transaction lets go within a minute; a connection that
# has died without a word is noticed within half of one.
_SESSION = "-c lock_timeout=30s -c idle_in_transaction_session_timeout=60s"
# Who reads holds nobody up, and may have the files of tasks to read meanwhile.
_READING = (
    "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY; "
    "SET LOCAL idle_in_transaction_session_timeout = '15min'"
)
_CONNECTION = {
    "application_name": "evomerge",
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "25000",
}

# Classes and codes of errors after which the same may succeed: connection exceptions, too many
# connections, shutting down or starting up, deadlock, waited too long for a lock, idle too long.
_AWAY_CLASSES = ("08", "57P")
_AWAY_CODES = ("53300", "40001", "40P01", "55P03", "25P03", "25P04")

_PROBE = text(
    "INSERT INTO search (id, name, state, epoch, seed, job, versions, created_at, active_seconds)"
    " VALUES (0, '', '', 0, 0, '', '', '', 0)"
)
_FORBIDDEN = text(
    "SELECT name FROM unnest(CAST(:tables AS text[])) AS name WHERE NOT ("
    " has_table_privilege(name, 'SELECT') AND has_table_privilege(name, 'INSERT')"
    " AND has_table_privilege(name, 'UPDATE'))"
)
_NOT_NUMBERED = text(  # no new ids for its rows
    "SELECT owned FROM unnest(CAST(:tables AS text[])) AS name,"
    " pg_get_serial_sequence(name, 'id') AS owned"
    " WHERE NOT has_sequence_privilege(owned, 'USAGE, UPDATE')"
)


class Postgres:
    """See Backend."""

    clock: ColumnElement[float] = literal_column(
        "EXTRACT(EPOCH FROM clock_timestamp())::float8", Float()
    )
    path: Path | None = None

    def __init__(self, url: URL) -> None:
        self.shown = without_password(url.render_as_string(hide_password=True))
        self._url = url.set(drivername="postgresql+psycopg")

    def may_exist(self) -> bool:
        return True

    def engine(self) -> Engine:
        settings = {**_CONNECTION, "options": _SESSION}
        try:
            engine = create_engine(
                self._url,
                isolation_level="READ COMMITTED",
                pool_pre_ping=True,
                connect_args={k: v for k, v in settings.items() if k not in self._url.query},
            )
        except ModuleNotFoundError:
            raise StoreError(
                f"store '{self.shown}': PostgreSQL needs psycopg: pip install 'evomerge[postgres]'"
            ) from None
        event.listen(engine, "begin", _begin)
        return engine

    def lock_folder(self) -> Path:
        folder = Path(tempfile.gettempdir()) / f"evomerge-{os.geteuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.lstat()
        except OSError as error:
            raise StoreError(
                f"folder '{folder}' cannot be made: {error.strerror}: set TMPDIR to one of yours"
            ) from None
        if status.st_uid != os.geteuid() or status.st_mode & 0o170022 != 0o040000:
            raise StoreError(
                f"'{folder}' is not a folder that only you can write: remove it, or set TMPDIR"
            )
        return folder

    def check(self, connection: Connection) -> tuple[str, ...]:
        version = connection.exec_driver_sql("SHOW server_version_num").scalar_one()
        if (major := int(version) // 10_000) < _OLDEST:
            raise StoreError(f"store '{self.shown}' is PostgreSQL {major}: use {_OLDEST} or newer")
        return ()

    def probe(self, connection: Connection) -> None:
        tables = metadata.sorted_tables
        for query, names, right in (
            (_FORBIDDEN, [t.name for t in tables], "SELECT, INSERT, UPDATE ON"),
            (_NOT_NUMBERED, [t.name for t in tables if "id" in t.c], "USAGE ON SEQUENCE"),
        ):
            forbidden = connection.execute(query, {"tables": names}).scalars().all()
            if forbidden:
                raise StoreError(
                    f"store '{self.shown}' is not yours to write: GRANT {right} "
                    f"{', '.join(forbidden)} TO {self._url.username or 'your role'}"
                )
        with connection.begin_nested() as point:
            connection.execute(_PROBE)
            point.rollback()

    def probe_place(self, engine: Engine) -> None:
        with engine.connect().execution_options(**{WRITES: True}) as connection:
            self.check(connection)
            connection.exec_driver_sql("CREATE TABLE evomerge_probe (id integer)")
            connection.rollback()

    def is_away(self, error: DBAPIError) -> bool:
        state = getattr(error.orig, "sqlstate", None)
        if state is None:  # the client's own: no connection, or none any more
            return error.connection_invalidated or isinstance(error, OperationalError)
        return state.startswith(_AWAY_CLASSES) or state in _AWAY_CODES

    def remedy(self, error: DBAPIError) -> str:
        return {
            None: "see whether the server is up, and the URL right",  # it has not said anything
            "25006": "name a server that can be written, not a copy of one",
            "42501": "ask the database's owner for the right",
            "53100": "make room on the server's disk",
        }.get(getattr(error.orig, "sqlstate", ""), "")

    def lead(self, engine: Engine) -> SessionLeadership | None:
        return SessionLeadership.sought(engine, _SERVER)

    @staticmethod
    def lock_schema(connection: Connection) -> None:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_SCHEMA})")

    @staticmethod
    def lock_ledger(connection: Connection) -> None:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LEDGER})")

    @staticmethod
    def lock_queue(connection: Connection) -> None:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_QUEUE})")

    @staticmethod
    def insert_or_ignore(table: Table) -> Any:
        return insert(table).on_conflict_do_nothing()

    @staticmethod
    def hold_still(connection: Connection, tables: Sequence[Table]) -> None:
        names = ", ".join(f'"{table.name}"' for table in tables)
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
        connection.exec_driver_sql(f"LOCK TABLE {names} IN EXCLUSIVE MODE")

    @staticmethod
    def continue_ids(connection: Connection, tables: Sequence[Table]) -> None:
        for table in tables:
            if "id" in table.c:
                ids = func.pg_get_serial_sequence(table.name, "id"), func.max(table.c.id)
                connection.execute(select(func.setval(*ids)))

    @staticmethod
    def damage(connection: Connection) -> list[str]:
        return []


def _begin(connection: Connection) -> None:
    if not connection.get_execution_options().get(WRITES, False):
        connection.exec_driver_sql(_READING)
