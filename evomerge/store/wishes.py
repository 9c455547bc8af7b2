"""Wishes: what others ask of whoever conducts a search, to pause or to stop. Knows nothing of who
heeds them, nor when."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Row, select

from evomerge.errors import StoreError
from evomerge.store import schema
from evomerge.store.database import inserted, now
from evomerge.store.store import Store

_table = schema.wish


@dataclass(frozen=True)
class Wish:
    """What whoever conducts a search was asked for, by whom, and when: UTC, ISO 8601."""

    kind: Literal["pause", "stop"]
    by: str
    at: str


class Wishes:
    """Those that concern the searches of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._database = store.database

    def add(self, search: str, kind: Literal["pause", "stop"], by: str) -> None:
        """Ask whoever conducts a search of this name to pause, which is what Ctrl-C does, or to
        stop: to open no further generation, and choose a winner; a search that was paused does so
        when it is resumed. Raises StoreError where it cannot be asked for that."""
        row = self._store.search(search)
        if row.state not in ("running", *(["stopped"] if kind == "stop" else [])):
            raise StoreError(
                f"search '{search}' is {'paused' if row.state == 'stopped' else row.state}: only "
                "one that runs can be asked to " + kind
            )
        values = {"search_id": row.id, "kind": kind, "by": by, "at": now()}

        def attempt() -> None:
            with self._database.write() as db:
                inserted(db, _table, values)

        self._database.persist(attempt)

    def all(self, search: int) -> list[Wish]:
        """What a search was asked for and has not put behind it, oldest first."""

        def attempt() -> Sequence[Row[Any]]:
            with self._database.read() as db:
                own = _table.c.search_id == search
                return db.execute(select(_table).where(own).order_by(_table.c.id)).all()

        found: list[Wish] = []
        for row in self._database.persist(attempt):
            found = [] if row.kind == "none" else [*found, Wish(row.kind, row.by, row.at)]
        return found

    def latest(self, search: int) -> Wish | None:
        """What a search is asked for at present; None if for nothing."""
        wishes = self.all(search)
        return wishes[-1] if wishes else None
