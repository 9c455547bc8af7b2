"""The ledger: every use of a guarded split, in a chain of hashes over all searches of a store; and
what an opened test split said of a model, which is read once, whoever asks again.

Each function works inside a transaction of its caller, which holds the search; other searches wait
from its first line on, so that what it finds is still so when it writes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select

from evomerge.errors import LooksSpent, StoreError
from evomerge.fitness.results import Scores
from evomerge.store import codec, schema
from evomerge.store.database import inserted_once, now, serialise_ledger
from evomerge.store.rows import SearchRow

GENESIS = "0" * 64  # what the first row points back to


@dataclass(frozen=True)
class Opening:
    """An opening of a test split.

    id: of its row. search: the name of the one that opened it. before: how often these records
    were opened earlier, for other recipes, by `searches`.
    """

    id: int
    at: str
    search: str
    before: int
    searches: tuple[str, ...]


@dataclass(frozen=True)
class NewReading:
    """What a test split said of a model.

    opening: the row under which it was read. asked: see `unseal`. subject: the hash of the recipe,
    or of a parent's content.
    """

    opening: int
    asked: str
    subject: str
    task: str
    scores: Scores


def look(db: Connection, search: SearchRow, content: str, candidate: int, allowed: int) -> None:
    """Reserve a use of validation for a candidate; one candidate's look counts once.

    Raises LooksSpent when none is left.
    """
    _hold(db)
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


def more_looks(db: Connection, search: SearchRow, content: str, before: int, allowed: int) -> None:
    """Write down that a search is allowed more looks than it was."""
    _hold(db)
    entry = {"from": before, "to": allowed, "search": search.name}
    _append(db, search, "more looks", content, f"{search.name}/{allowed}", entry)


def unseal(
    db: Connection,
    search: SearchRow,
    content: str,
    recipe_sha: str,
    asked: str,
    entry: Mapping[str, Any],
) -> Opening:
    """Write down that a test split is read for a recipe, and with what in mind: `entry`.

    asked: the hash of how it is asked and scored. An opening that was begun and not finished is the
    same opening, and so is that of another search for the same recipe, unless what was read then
    was asked otherwise: these records are used once more.
    """
    _hold(db)
    table = schema.ledger
    same = (table.c.kind == "unseal") & (table.c.content == content)
    otherwise = f"{recipe_sha}/{asked[:16]}"
    either = select(table).where(same & table.c.subject.in_((recipe_sha, otherwise)))
    found = {row.subject: row for row in db.execute(either)}
    opening = found.get(recipe_sha)
    theirs = opening if opening is not None and opening.search_id != search.id else None
    again = theirs is not None and _read_otherwise(db, theirs.id, recipe_sha, asked)
    subject = otherwise if again or otherwise in found else recipe_sha
    if subject not in found:
        _append(db, search, "unseal", content, subject, {**entry, "search": search.name})
        found[subject] = db.execute(select(table).where(same & (table.c.subject == subject))).one()
    row, owner = found[subject], schema.search
    names = {row.id: row.name for row in db.execute(select(owner.c.id, owner.c.name))}
    earlier = select(table.c.search_id).where(same & (table.c.id < row.id)).order_by(table.c.id)
    before = [names[id] for id in db.execute(earlier).scalars()]
    return Opening(row.id, row.at, names[row.search_id], len(before), tuple(dict.fromkeys(before)))


def _read_otherwise(db: Connection, opening: int, recipe_sha: str, asked: str) -> bool:
    """Whether a recipe was read under an opening, but never as it is asked now."""
    table = schema.reading
    own = (table.c.ledger_id == opening) & (table.c.subject == recipe_sha)
    read = set(db.execute(select(table.c.asked).where(own)).scalars())
    return bool(read) and asked not in read


def save_readings(db: Connection, readings: Sequence[NewReading]) -> None:
    """Keep what was read; of what another process was faster to write down, that stays."""
    for new in readings:
        blob = codec.pack_scores(new.scores)
        row = {
            "ledger_id": new.opening,
            "asked": new.asked,
            "subject": new.subject,
            "task": new.task,
            "n": len(new.scores),
            "codec": codec.SCORES_CODEC,
            "blob": blob,
            "sha256": codec.sha256(blob),
        }
        inserted_once(db, schema.reading, row)


def rows(db: Connection) -> list[Row[Any]]:
    """All of them, oldest first. Raises StoreError where the chain is broken: who counts uses must
    not count on rows that are not what was written."""
    table, previous = schema.ledger, GENESIS
    found = list(db.execute(select(table).order_by(table.c.id)))
    for row in found:
        values = {k: v for k, v in row._mapping.items() if k not in ("id", "hash")}
        if row.previous != previous or row_hash(values) != row.hash:
            raise StoreError(
                f"the store is damaged: ledger row {row.id} does not match the chain of hashes: "
                "restore a copy"
            )
        previous = row.hash
    return found


def _hold(db: Connection) -> None:
    """Wait until nobody else appends, and see that the chain is whole. Raises StoreError."""
    serialise_ledger(db)
    rows(db)


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
    previous = db.execute(last).scalar() or GENESIS
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
