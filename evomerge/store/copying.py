"""A copy of a whole store, whatever its schema: a backup, a restored store, or a move to the other
database system.

The copy is of one moment, while searches may go on writing; ids stay, nobody conducts a search of
it, and it is read back before it counts. Knows nothing of what the tables mean.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, MetaData, Row, Table, func, insert, inspect, select, update
from sqlalchemy.exc import SQLAlchemyError

from evomerge.errors import StoreError
from evomerge.messages import one_line
from evomerge.store import migrations
from evomerge.store.backend import WRITES, backend, backend_of
from evomerge.store.database import (
    connect,
    exists,
    explained,
    shown,
    sqlite_file,
    storable,
    version_of,
)
from evomerge.store.schema import VERSION

_BATCH = 500  # rows that are in memory at once
_OWN = frozenset(("holder", "lease_until"))  # of the store, not of what it holds: see lease

_Pairs = Sequence[tuple[Table, Table]]  # each table as it is here, and there


@dataclass(frozen=True)
class Copied:
    """A copy that was made. url: without a password. schema: its version. rows: by table."""

    url: str
    schema: str
    rows: Mapping[str, int]


def copy(source: str, target: str, progress: Callable[[int, int], None]) -> Copied:
    """Copy the store `source` to a new SQLite file, or into a PostgreSQL database with nothing in
    it; both are URLs or files.

    A file is there complete or not at all. progress: rows done, of all rows. Raises StoreError,
    also where the target holds something already.
    """
    if not exists(source):
        raise StoreError(f"store '{shown(source)}': there is no such store: check --store")
    file = sqlite_file(target)
    try:
        if file is None:
            return _copied(source, target, shown(target), progress)
        with _complete_or_absent(file) as unfinished:
            return _copied(source, f"sqlite:///{unfinished}", shown(target), progress)
    except (SQLAlchemyError, OSError) as error:
        if isinstance(error, SQLAlchemyError):
            said = explained(backend(target), error)
        else:
            said = one_line(error)
        raise StoreError(
            f"store '{shown(source)}' is not copied to '{shown(target)}': {said}"
        ) from None


def _copied(source: str, target: str, named: str, progress: Callable[[int, int], None]) -> Copied:
    ours, theirs = connect(source), connect(target)
    try:
        with (
            ours.connect() as reader,
            theirs.connect().execution_options(**{WRITES: True}) as writer,
            reader.begin(),
            writer.begin(),
        ):
            backend_of(writer).lock_schema(writer)
            if inspect(writer).get_table_names():
                raise StoreError(f"'{named}' is not empty: name a new file or an empty database")
            schema = version_of(reader, shown(source)) or ""
            if schema > VERSION:
                raise StoreError(
                    f"store '{shown(source)}' has schema {schema}, this evomerge writes {VERSION}: "
                    "use the evomerge that wrote it"
                )
            migrations.upgrade(writer, schema)
            targets = {table.name: table for table in tables_of(writer)}
            pairs = [(table, targets[table.name]) for table in tables_of(reader)]
            rows = _copy_rows(reader, writer, pairs, progress)
            _compare(reader, writer, pairs, named)
        return Copied(named, schema, rows)
    finally:
        ours.dispose()
        theirs.dispose()


def _copy_rows(
    reader: Connection, writer: Connection, pairs: _Pairs, progress: Callable[[int, int], None]
) -> dict[str, int]:
    """Gives the number of rows by table."""
    count = select(func.count())
    sizes = {t.name: reader.execute(count.select_from(t)).scalar_one() for t, _ in pairs}
    done = 0
    for table, target in pairs:
        for rows in _batches(reader, table):
            writer.execute(insert(target), [dict(row._mapping) for row in rows])
            done += len(rows)
            progress(done, sum(sizes.values()))
        free = dict.fromkeys(_OWN & set(target.c.keys()))
        if free:
            writer.execute(update(target).values(free))
    backend_of(writer).continue_ids(writer, [target for _, target in pairs])
    return sizes


def _compare(reader: Connection, writer: Connection, pairs: _Pairs, named: str) -> None:
    """Raise StoreError where a table of the copy is not what was read.

    Both are read side by side: a server ends a transaction that asks for nothing for long.
    """
    for table, target in pairs:
        both = _batches(reader, table), _batches(writer, target)
        for ours, theirs in zip_longest(*both, fillvalue=()):
            if list(map(_values, ours)) != list(map(_values, theirs)):
                raise StoreError(
                    f"'{named}' is not what was read: table '{table.name}' came out otherwise: "
                    "try another disk or server"
                )


def _values(row: Row[Any]) -> list[Any]:
    """Of a row, as the other database system holds them too."""
    return [
        storable(value) if isinstance(value, str) else value
        for name, value in row._mapping.items()
        if name not in _OWN
    ]


def _batches(connection: Connection, table: Table) -> Iterator[Sequence[Row[Any]]]:
    # By names in their order: columns that a migration added stand where it put them.
    columns = sorted(table.c, key=lambda column: column.name)
    rows = select(*columns).order_by(*table.primary_key.columns)
    yield from connection.execute(rows, execution_options={"yield_per": _BATCH}).partitions()


def tables_of(connection: Connection) -> list[Table]:
    """The tables of a store as they are in the database, those first that others point to; but for
    that of the schema's version."""
    metadata = MetaData()
    metadata.reflect(connection)
    return [table for table in metadata.sorted_tables if table.name != "alembic_version"]


@contextmanager
def _complete_or_absent(file: Path) -> Iterator[Path]:
    """Another name for a file that is being written; it gets its own when that has succeeded."""
    if file.exists():
        raise StoreError(f"'{file}' is there already: name a new file")
    if not file.parent.is_dir():
        raise StoreError(f"'{file}': no folder '{file.parent}': create it")
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        # SQLite ends without a word when its log could not be written back into the file.
        if unfinished.with_name(f"{unfinished.name}-wal").exists():
            raise StoreError(f"'{file}' is not written to its end: make room on its disk")
        _sync(unfinished)
        unfinished.rename(file)
        _sync(file.parent)
    finally:
        for part in ("", "-wal", "-shm", "-journal"):
            unfinished.with_name(unfinished.name + part).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
