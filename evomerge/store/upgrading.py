"""Bringing an older store's schema up to date, after a copy of it was made."""

import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, select
from sqlalchemy.exc import SQLAlchemyError

from evomerge.errors import SearchBusy, StoreError
from evomerge.store import lease, migrations, schema
from evomerge.store.backend import WRITES, Backend, backend
from evomerge.store.copying import copy, tables_of
from evomerge.store.database import Database, connect, exists, explained, version_of
from evomerge.store.schema import VERSION

_LEASES_SINCE = "004"  # before, a search was held by a lock on a file alone


@dataclass(frozen=True)
class Upgraded:
    """What became of a store. url: without a password. schema: what it had; None where there was
    no store. copy: the SQLite file with the store as it was; None where nothing was to be kept."""

    url: str
    schema: str | None
    copy: str | None


def upgrade(url: str, progress: Callable[[int, int], None]) -> Upgraded:
    """Bring an older store's schema up to date, in one transaction, after a copy of it was made:
    beside a SQLite file, and of a PostgreSQL database a SQLite file in the working directory. An
    empty PostgreSQL database becomes a store: somebody made it for that, where a SQLite file that
    is not there may be a slip of the pen.

    progress: rows copied, of all. Raises SearchBusy while one of its searches is conducted, and
    StoreError.
    """
    found = backend(url)
    if not exists(url):
        if found.path is not None:
            raise StoreError(f"store '{found.shown}': there is no such store: check --store")
        Database(url, create=True).close()
        return Upgraded(found.shown, None, None)
    engine = connect(url)
    try:
        with engine.connect() as reader:
            if _version(reader, found) == VERSION:
                return Upgraded(found.shown, VERSION, None)
        with engine.connect().execution_options(**{WRITES: True}) as writer, writer.begin():
            found.lock_schema(writer)
            version = _version(writer, found)
            if version == VERSION:  # another process was faster
                return Upgraded(found.shown, VERSION, None)
            found.hold_still(writer, tables_of(writer))
            for search, who in _conducted(writer, found, version):
                raise SearchBusy(
                    f"store '{found.shown}' is not upgraded: search '{search}' is being conducted "
                    f"by {who}: wait for it, or stop it"
                )
            kept = _free_name(found, version)
            copy(url, str(kept), progress)
            migrations.upgrade(writer)
        return Upgraded(found.shown, version, str(kept))
    except SQLAlchemyError as error:
        raise StoreError(
            f"store '{found.shown}' is not upgraded: {explained(found, error)}"
        ) from None
    finally:
        engine.dispose()


def _version(connection: Connection, found: Backend) -> str:
    version = version_of(connection, found.shown)
    if version is None or version > VERSION:
        raise StoreError(
            f"store '{found.shown}' has schema {version or 'none'}, this evomerge writes "
            f"{VERSION}: use the evomerge that wrote it"
        )
    return version


def _free_name(found: Backend, version: str) -> Path:
    """Where the copy goes. An earlier one stays: it may be of an upgrade that did not succeed."""
    name = found.path or Path.cwd() / found.shown.rsplit("/", 1)[-1].partition("?")[0]
    number, kept = 1, name.with_name(f"{name.name}.schema-{version}")
    while kept.exists():
        number += 1
        kept = name.with_name(f"{name.name}.schema-{version}.{number}")
    return kept


def _conducted(connection: Connection, found: Backend, version: str) -> Iterator[tuple[str, str]]:
    """Searches that somebody conducts, and who."""
    table = schema.search
    if version >= _LEASES_SINCE:
        columns = (table.c.epoch, table.c.holder, table.c.lease_until, found.clock.label("clock"))
        for row in connection.execute(select(table.c.name, *columns)):
            held = lease.held(row)
            if held.is_taken(found.lock_folder()) is not False:
                yield row.name, f"process {held.by().pid} on host {held.by().host}"
    elif found.path is not None:
        for name in connection.execute(select(table.c.name)).scalars():
            lock = found.path.with_name(f"{found.path.name}.{name}.lock")
            if _is_locked(lock):
                yield name, f"process {lock.read_text().strip()}"


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
