"""The audit log: who changed what through a server, and who was refused.

Lines are only ever added. Knows nothing of requests, nor of what is secret in a detail: whoever
writes a line has left that out.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, select

from evomerge.store import schema
from evomerge.store.database import now, storable
from evomerge.store.store import Store

_DETAIL = 4000  # characters of a line's detail at most

_table = schema.audit


@dataclass(frozen=True)
class AuditLine:
    """at: UTC, ISO 8601. who: a token's name, 'local', 'server', or 'unknown'."""

    id: int
    at: str
    who: str
    address: str
    action: str
    subject: str
    detail: dict[str, Any]


class Audit:
    """The audit log of a store. Every method is one transaction."""

    def __init__(self, store: Store) -> None:
        self._database = store.database

    def write(
        self, who: str, address: str, action: str, subject: str, detail: Mapping[str, Any]
    ) -> None:
        """Add a line; what is longer than its column is cut off. detail: plain data."""
        values = {
            "at": now(),
            "who": _short(who, 64),
            "address": _short(address, 64),
            "action": _short(action, 64),
            "subject": _short(subject, 128),
            "detail": _document(detail),
        }

        # Tried again after a lost connection, a line may stand there twice, but never not at all.
        def attempt() -> None:
            with self._database.write() as db:
                db.execute(insert(_table).values(values))

        self._database.persist(attempt)

    def lines(self, before: int | None = None, limit: int = 100) -> list[AuditLine]:
        """The newest first; before: only lines older than the one of this number."""
        query = select(_table).order_by(_table.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(_table.c.id < before)

        def attempt() -> list[AuditLine]:
            with self._database.read() as db:
                return [
                    AuditLine(
                        r.id, r.at, r.who, r.address, r.action, r.subject, json.loads(r.detail)
                    )
                    for r in db.execute(query)
                ]

        return self._database.persist(attempt)


def _short(text: str, length: int) -> str:
    text = storable(text)  # which may lengthen it
    return text if len(text) <= length else text[: length - 1] + "…"


def _document(detail: Mapping[str, Any]) -> str:
    text = json.dumps(detail)
    return text if len(text) <= _DETAIL else json.dumps({"cut": text[: _DETAIL // 2]})
