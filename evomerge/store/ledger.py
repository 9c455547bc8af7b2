"""The ledger: every use of a guarded split, in a chain of hashes over all searches of a store.

Each function works inside a transaction of its caller, which holds the search. Knows nothing of
scores: it says what may be read, and that it was.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select

from evomerge.errors import LooksSpent
from evomerge.store import schema
from evomerge.store.database import now
from evomerge.store.store import SearchRow

_GENESIS = "0" * 64  # what the first row points back to


@dataclass(frozen=True)
class Opening:
    """An opening of a test split. id: of its row. before: how often these records were opened
    earlier, for other recipes, by any search of the store."""

    id: int
    at: str
    before: int


def look(db: Connection, search: SearchRow, content: str, candidate: int, allowed: int) -> None:
    """Reserve a use of validation for a candidate; one candidate's look counts once.

    Raises LooksSpent when none is left.
    """
    table = schema.ledger
    own = (table.c.kind == "look") & (table.c.search_id == search.id)
    subject = f"{search.name}/{candidate}"
    if db.execute(select(table.c.id).where(own & (table.c.subject == subject))).first():
        return
    used = db.execute(select(func.count(table.c.subject.distinct())).where(own)).scalar_one()
    if used >= allowed:
        raise LooksSpent(
            f"all {allowed} looks at validation are spent: none is left for candidate {candidate}"
        )
    _append(db, search, "look", content, subject, {"candidate": candidate})


def unseal(db: Connection, search: SearchRow, content: str, recipe_sha: str) -> Opening:
    """Write down that a test split is read for a recipe. An opening that was begun and not
    finished is the same opening."""
    table = schema.ledger
    same = (table.c.kind == "unseal") & (table.c.content == content)
    row = db.execute(select(table).where(same & (table.c.subject == recipe_sha))).first()
    if row is None:
        entry = {"search": search.name, "purpose": "export"}
        _append(db, search, "unseal", content, recipe_sha, entry)
        row = db.execute(select(table).where(same & (table.c.subject == recipe_sha))).one()
    before = db.execute(
        select(func.count()).select_from(table).where(same & (table.c.id < row.id))
    ).scalar_one()
    return Opening(row.id, row.at, before)


def _append(
    db: Connection,
    search: SearchRow,
    kind: str,
    content: str,
    subject: str,
    entry: Mapping[str, Any],
) -> None:
    """Add a row to the chain."""
    table = schema.ledger
    last = select(table.c.hash).order_by(table.c.id.desc()).limit(1)
    previous = db.execute(last).scalar() or _GENESIS
    row = {
        "search_id": search.id,
        "kind": kind,
        "content": content,
        "subject": subject,
        "entry": json.dumps(entry, sort_keys=True),
        "at": now(),
        "previous": previous,
    }
    db.execute(insert(table), {**row, "hash": row_hash(row)})


def row_hash(row: Mapping[str, Any]) -> str:
    """Of a row's columns but for its id and the hash itself."""
    return hashlib.sha256(json.dumps(dict(row), sort_keys=True).encode()).hexdigest()
