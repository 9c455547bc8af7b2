"""Who conducts a search: one process at a time, by a lease in the search's row.

A lease runs out unless its holder extends it, so a coordinator that nobody can see any more is
replaced when its time is up. On one host nobody waits: the holder keeps a file locked, and the lock
dies with it. Each lease has an epoch of its own, and every write is fenced by it: a holder that was
thought dead writes no more.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, bindparam, insert, select, update

from evomerge.errors import SearchBusy, StaleCoordinator, StoreError, StoreUnavailable
from evomerge.store import schema
from evomerge.store.database import Database, now
from evomerge.store.lock import LivenessFile, is_alive

LEASE = 30.0  # seconds, by the database's clock
_HEARTBEAT = LEASE / 3  # two may be lost
_POLL, _GLANCE = 1.0, 0.01  # seconds between looks at a lease that may run out

T = TypeVar("T")
_table = schema.search


@dataclass(frozen=True)
class Holder:
    """A process that holds a search, as the search's row names it.

    boot: of its host's kernel: inode numbers mean something under the same one only. lock, inode:
    of its liveness file; the name is unique.
    """

    host: str
    boot: str
    pid: int
    lock: str
    inode: str

    @classmethod
    def of(cls, file: LivenessFile) -> "Holder":
        """This process."""
        return cls(socket.gethostname(), _boot(), os.getpid(), file.name, file.identity)

    def as_json(self) -> str:
        """For the column."""
        return json.dumps(asdict(self))

    def is_alive(self, folder: Path) -> bool | None:
        """None if that cannot be told from here."""
        return is_alive(folder, self.lock, self.inode) if self.boot == _boot() else None


@dataclass(frozen=True)
class Held:
    """What a search's row says of its lease. remaining: seconds until it runs out."""

    epoch: int
    holder: str | None
    remaining: float
    until: float

    def by(self) -> Holder:
        """Its holder, of which there must be one."""
        return Holder(**json.loads(self.holder or "{}"))

    def is_taken(self, folder: Path) -> bool | None:
        """Whether somebody conducts the search: who is alive, or whose lease still runs. None if
        only that lease says so. folder: where coordinators on this host show that they live."""
        if self.holder is None:
            return False
        alive = self.by().is_alive(folder)
        if alive is None and self.remaining > 0:
            return None
        return bool(alive)


def held(row: Row[Any]) -> Held:
    """By a search's row with the database's time as `clock`."""
    until = row.lease_until or 0.0
    return Held(row.epoch, row.holder, until - row.clock, until)


class Lease:
    """The right to write one search, from `new` or `taken` until `release`.

    It is extended by every write and, as evaluations may last long, by a thread of its own.
    """

    def __init__(
        self, database: Database, search: int, name: str, row: Row[Any], file: LivenessFile
    ) -> None:
        self.epoch: int = row.epoch
        self._database = database
        self._search = search
        self._name = name
        self._file = file
        self._holder: str = row.holder
        # Built once, as they are run for every result.
        ours = (_table.c.id == search) & (_table.c.epoch == self.epoch)
        ours &= _table.c.holder == self._holder
        self._extension = update(_table).where(ours).values(lease_until=database.clock + LEASE)
        self._fencing = self._extension.values(active_seconds=bindparam("spent"))
        self._active: float = row.active_seconds
        self._counts = row.state != "finished"  # an export spends none of a search's hours
        self._since = time.monotonic()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._extend, daemon=True, name=f"lease of {name}")
        self._thread.start()

    def write(
        self,
        work: Callable[[Connection], T],
        committed: Callable[[Connection], T | None] | None = None,
    ) -> T:
        """What `work` gives, in a transaction of its own. While the database is away it is tried
        again, see Database.persist; so `work` must do no harm when done twice. Where it would,
        `committed` is asked before another attempt: what the last one gave, if it was committed
        after all; else None.

        Raises StaleCoordinator after another process has taken over.
        """
        again = False

        def attempt() -> T:
            nonlocal again
            with self._database.write() as db:
                self._fence(db)
                if again and committed is not None:
                    found = committed(db)
                    if found is not None:
                        return found
                again = True
                return work(db)

        try:
            return self._database.persist(attempt)
        except StaleCoordinator:
            self._note_refusal()
            raise

    def _fence(self, db: Connection) -> None:
        """First in every transaction: hold the search's row, and refuse to write after someone
        else took over. The time spent is written as a sum, so that writing it twice is harmless."""
        spent = time.monotonic() - self._since if self._counts else 0.0
        if db.execute(self._fencing, {"spent": self._active + spent}).rowcount != 1:
            raise StaleCoordinator(
                f"search '{self._name}' was taken over by another process: nothing more is "
                "written from here"
            )

    def _note_refusal(self) -> None:
        """Leave a trace of a late write: all that a stale coordinator may still write."""
        text = f"a late write of epoch {self.epoch}, from process {os.getpid()}, was refused"
        row = {"search_id": self._search, "at": now(), "kind": "stale", "text": text}
        try:
            with self._database.write() as db:
                db.execute(insert(schema.event), row)
        except (StoreError, StoreUnavailable):
            pass  # that it was refused is raised in any case

    def _extend(self) -> None:
        while not self._released.wait(_HEARTBEAT):
            try:
                with self._database.write() as db:
                    db.execute(self._extension)
            except (StoreError, StoreUnavailable):
                pass  # the next write tells; it also finds out who has taken over meanwhile

    def release(self) -> None:
        """Let go of the search; harmless when done twice."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        mine = (_table.c.id == self._search) & (_table.c.holder == self._holder)
        try:
            with self._database.write() as db:
                db.execute(update(_table).where(mine).values(holder=None, lease_until=None))
        except (StoreError, StoreUnavailable):
            self._file.abandon()  # on this host it shows; elsewhere the lease runs out
        self._file.release()


def terms(database: Database, holder: str) -> dict[str, Any]:
    """What a search's row says of a lease that begins now. holder: as JSON."""
    return {"holder": holder, "lease_until": database.clock + LEASE}


def liveness(database: Database, name: str) -> LivenessFile:
    """A file that shows that this process conducts a search. Raises StoreError."""
    folder = database.lock_folder()
    stem = f"{database.path.name}.{name}" if database.path is not None else name
    try:
        return LivenessFile(folder, stem)
    except OSError as error:
        raise StoreError(
            f"store '{database.shown}': no lock can be made in '{folder}': {error.strerror}: "
            "make the folder writable"
        ) from None


def taken(database: Database, search: int, name: str, tell: Callable[[str], None]) -> Lease:
    """The lease of an existing search, from whoever held it and is gone.

    Waits for the end of a lease whose holder cannot be seen from here. Raises SearchBusy where
    somebody conducts it, StoreError.
    """
    database.probe()
    file = liveness(database, name)
    try:
        while True:
            seen = _free(database, search, name, tell)
            row = _exchanged(database, search, seen, Holder.of(file).as_json())
            if row is not None:
                _tidy(database.lock_folder(), seen)
                return Lease(database, search, name, row, file)
    except BaseException:
        file.release()
        raise


def _free(database: Database, search: int, name: str, tell: Callable[[str], None]) -> Held:
    """A search's row, seen when nobody held it. Raises SearchBusy."""
    first: Held | None = None
    since, told = 0.0, False
    while True:
        seen = _seen(database, search)
        taken = seen.is_taken(database.lock_folder())
        if taken is False:
            return seen
        who = f"process {seen.by().pid} on host {seen.by().host}"
        same = first is not None and (seen.epoch, seen.holder) == (first.epoch, first.holder)
        if taken or (same and first is not None and seen.until > first.until):
            raise SearchBusy(
                f"search '{name}' is being conducted by {who}: wait for it, or stop it with: "
                f"evomerge stop {name}"
            )
        if not same:  # look again: it may just have been letting go
            first, since = seen, time.monotonic()
            time.sleep(_GLANCE)
            continue
        if time.monotonic() - since > LEASE:
            return seen  # it was not extended; the database's clock has been set back
        if not told:
            tell(f"search '{name}' was held by {who}: waiting {LEASE:.0f} s at most for a sign")
            told = True
        time.sleep(min(_POLL, max(seen.remaining, _GLANCE)))


def _seen(database: Database, search: int) -> Held:
    query = select(_table, database.clock.label("clock")).where(_table.c.id == search)

    def attempt() -> Held:
        with database.read() as db:
            return held(db.execute(query).one())

    return database.persist(attempt)


def _exchanged(database: Database, search: int, seen: Held, holder: str) -> Row[Any] | None:
    """Compare and swap: the row with a new epoch and holder; None where it is no longer as it was
    seen. Done twice it is harmless, as a holder is unique."""
    unchanged = (
        (_table.c.id == search)
        & (_table.c.epoch == seen.epoch)
        & _table.c.holder.is_not_distinct_from(seen.holder)
        & _table.c.lease_until.is_not_distinct_from(seen.until or None)
    )
    new = {"epoch": _table.c.epoch + 1, **terms(database, holder)}
    swap = update(_table).where(unchanged).values(new)
    ours = (_table.c.id == search) & (_table.c.holder == holder)

    def attempt() -> Row[Any] | None:
        with database.write() as db:
            db.execute(swap)
            return db.execute(select(_table).where(ours)).first()

    return database.persist(attempt)


def _tidy(folder: Path, seen: Held) -> None:
    """Remove the file of a holder that has died and could not."""
    if seen.holder is not None and seen.by().is_alive(folder) is False:
        (folder / seen.by().lock).unlink(missing_ok=True)


@cache
def _boot() -> str:
    """Of this host's kernel; where it has no such name, of the host."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
