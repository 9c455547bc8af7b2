"""Checking a store: does everything in it still say what was written, and does it fit together?

Nothing is changed. What is wrong is named row by row, and a row that is damaged hides no other.
What has to hold within a search is in `invariants`; here is what holds between them.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from sqlalchemy import Connection, FromClause, Row, Select, Table, func, select

from evomerge.errors import StoreError, StoreUnavailable
from evomerge.store import schema
from evomerge.store.backend import backend_of
from evomerge.store.database import Database
from evomerge.store.invariants import Judge, SearchCheck, Violation, score_faults
from evomerge.store.ledger import GENESIS, row_hash
from evomerge.store.queue import ENDED, Kind, State

_DISTRUST = "do not trust what was claimed since"
_TOLD_EVERY = 100  # rows; drawing progress takes longer than most of them
_SEEN = (
    "search",
    "generation",
    "candidate",
    "evaluation",
    "score",
    "ledger",
    "reading",
    "device",
    "export",
    "sample",
    "wish",
    "submission",
    "token",
    "audit",
)
_SCOPES = {"read", "run", "admin", "unseal"}


@dataclass(frozen=True)
class Findings:
    """What a check found. url: without a password. checked: rows by table. notes: what is no damage
    and worth knowing."""

    url: str
    checked: dict[str, int]
    violations: tuple[Violation, ...]
    notes: tuple[str, ...]


def check(url: str, progress: Callable[[int, int], None]) -> Findings:
    """Check every invariant of a store, in one consistent view. progress: candidates and scores
    looked at, of all. Raises StoreError where the store cannot be opened."""
    database, found = Database(url, create=False), None
    try:
        with database.read() as db:
            found = _Check(database.shown, db, progress).run()
    except (StoreError, StoreUnavailable):  # of a damaged file the end may fail too
        if found is None:
            raise
    finally:
        database.close()
    return found


class _Check:
    def __init__(self, shown: str, db: Connection, progress: Callable[[int, int], None]) -> None:
        self._shown = shown
        self._db = db
        self._progress = progress
        self._judge = Judge()
        self._done = 0
        self._of = 0
        self._names: dict[int, str] = {}
        self._looks: dict[int, dict[str, str]] = defaultdict(dict)  # by search and subject, when
        self._allowed: dict[int, int] = {}  # looks by search
        self._unsealed: list[Row[Any]] = []

    def run(self) -> Findings:
        checked: dict[str, int] = {}
        with self._judge.judging(None, "the database"):
            for line in backend_of(self._db).damage(self._db):
                self._judge.wrong(None, "the database", line)
        for name in _SEEN:
            with self._judge.judging(None, f"table '{name}'"):
                table = schema.metadata.tables[name]
                counted = select(func.count()).select_from(table)
                checked[name] = self._db.execute(counted).scalar_one()
        self._of = checked.get("candidate", 0) + checked.get("score", 0)
        searches: list[Row[Any]] = []
        with self._judge.judging(None, "table 'search'"):
            searches += self._db.execute(select(schema.search).order_by(schema.search.c.id)).all()
        self._names = {row.id: row.name for row in searches}
        for row in searches:
            with self._judge.judging(row.name, "its job"):
                self._allowed[row.id] = json.loads(row.job)["guard"]["validation_looks"]
        with self._judge.judging(None, "the ledger"):
            self._ledger()
        for row in searches:
            SearchCheck(self._db, self._judge, row, self._looks[row.id], self._advance).run()
        self._progress(self._of, self._of)
        for part, where in (
            (self._exports, "exports"),
            (self._readings, "readings of test"),
            (self._submissions, "submissions"),
            (self._tokens, "tokens"),
            (self._audit, "the audit log"),
            (self._foreign_keys, "rows that point to others"),
        ):
            with self._judge.judging(None, where):
                part()
        judge = self._judge
        return Findings(self._shown, checked, tuple(judge.violations), tuple(judge.notes))

    def _advance(self, by: int) -> None:
        self._done += by
        if self._done % _TOLD_EVERY == 0:
            self._progress(self._done, self._of)

    def _ledger(self) -> None:
        table = schema.ledger
        previous, before = GENESIS, "the beginning"
        for row in self._db.execute(select(table).order_by(table.c.id)):
            search, where = self._names.get(row.search_id), f"ledger row {row.id}"
            if row.previous != previous:
                what = f"does not point to {before}: one between them was removed or changed"
                self._judge.wrong(search, where, what)
            previous, before = row.hash, f"row {row.id}"
            with self._judge.judging(search, where):
                values = {k: v for k, v in row._mapping.items() if k not in ("id", "hash")}
                if row_hash(values) != row.hash:
                    self._judge.wrong(search, where, "does not match its hash")
                self._use(row, search, where)
        for id, subjects in self._looks.items():
            if len(subjects) > self._allowed.get(id, len(subjects)):
                what = f"{len(subjects)} looks at validation, {self._allowed[id]} are allowed"
                self._judge.wrong(self._names.get(id), "the ledger", what, _DISTRUST)

    def _use(self, row: Row[Any], search: str | None, where: str) -> None:
        """What one row of the ledger says."""
        entry = json.loads(row.entry)
        if row.kind == "look":
            self._looks[row.search_id].setdefault(row.subject, row.at)
            if row.subject != f"{search}/{entry['candidate']}":
                self._judge.wrong(search, where, f"is of '{row.subject}' and another candidate")
        elif row.kind == "more looks":
            allowed = self._allowed.get(row.search_id, 0)
            self._allowed[row.search_id] = max(allowed, entry["to"])
        elif row.kind == "unseal":
            self._unsealed.append(row)
        else:
            self._judge.wrong(search, where, f"is of kind '{row.kind}'")

    def _exports(self) -> None:
        table, owner, split = schema.export, schema.candidate, schema.split
        opened = {(row.content, _recipe_of(row)) for row in self._unsealed}
        tests = defaultdict(list)
        for row in self._db.execute(select(split).where(split.c.split == "test")):
            tests[row.search_id].append(row)
        exported = set()
        rows = select(table, owner.c.recipe_sha, owner.c.search_id.label("owner")).outerjoin(
            owner, owner.c.id == table.c.candidate_id
        )
        for row in self._db.execute(rows):
            exported.add(row.recipe_sha)
            search, where = (
                self._names.get(row.search_id),
                f"export of candidate {row.candidate_id}",
            )
            with self._judge.judging(search, where):
                report = json.loads(row.report)
                says = report["search"], report["candidate"], report["recipe_sha"]
                if row.owner != row.search_id or says != (
                    search,
                    row.candidate_id,
                    row.recipe_sha,
                ):
                    self._judge.wrong(search, where, "its report is of another candidate")
                for test in tests[row.search_id]:
                    if (test.identity, row.recipe_sha) not in opened:
                        what = f"test of task '{test.task}' was never opened for it"
                        self._judge.wrong(search, where, what, _DISTRUST)
        for row in self._unsealed:
            if _recipe_of(row) not in exported:
                name = self._names.get(row.search_id)
                self._judge.notes.append(
                    f"search '{name}': test was opened for recipe {row.subject[:12]} at {row.at}, "
                    f"and no report was stored: the same export (evomerge export {name}) ends it"
                )

    def _readings(self) -> None:
        table, model = schema.reading, schema.model
        models = set(self._db.execute(select(model.c.sha256)).scalars())
        opened = {row.id: row for row in self._unsealed}
        for row in self._db.execute(select(table)):
            opening, where = opened.get(row.ledger_id), f"reading {row.id} of test of '{row.task}'"
            search = None if opening is None else self._names.get(opening.search_id)
            with self._judge.judging(search, where):
                if opening is None:
                    self._judge.wrong(search, where, "test was never opened for it", _DISTRUST)
                elif row.subject not in {_recipe_of(opening), *models}:
                    self._judge.wrong(search, where, "is of a model that it was not opened for")
                for what in score_faults(row, None):
                    self._judge.wrong(search, where, what)

    def _submissions(self) -> None:
        for row in self._db.execute(select(schema.submission)):
            where = f"submission {row.id}"
            with self._judge.judging(row.search, where):
                if row.kind not in get_args(Kind) or row.state not in get_args(State):
                    self._judge.wrong(row.search, where, f"is a '{row.state}' '{row.kind}'")
                elif (row.ended_at is not None) != (row.state in ENDED):
                    self._judge.wrong(row.search, where, f"is {row.state}, ended {row.ended_at}")
                for text in (row.document, row.overrides, row.result or "null"):
                    json.loads(text)

    def _tokens(self) -> None:
        for row in self._db.execute(select(schema.token)):
            if not re.fullmatch(r"[0-9a-f]{64}", row.sha256):
                self._judge.wrong(None, f"token '{row.name}'", "its hash is none")
            if unknown := set(row.scopes.split()) - _SCOPES:
                self._judge.wrong(None, f"token '{row.name}'", f"has scopes {sorted(unknown)}")

    def _audit(self) -> None:
        for row in self._db.execute(select(schema.audit)):
            with self._judge.judging(None, f"row {row.id} of the audit log"):
                json.loads(row.detail)

    def _foreign_keys(self) -> None:
        for table in schema.metadata.sorted_tables:
            for key in table.foreign_keys:
                with self._judge.judging(None, f"table '{table.name}'"):
                    for row in self._lost(table, key.parent.name, key.column.table):
                        named = ", ".join(map(str, row[:-1]))
                        what = f"points to {key.column.table.name} {row[-1]}, which is not there"
                        self._judge.wrong(None, f"{table.name} {named}", what)

    def _lost(self, table: Table, column: str, other: FromClause) -> Sequence[Row[Any]]:
        """Keys of rows that point to nothing, each with what they point to."""
        there = select(other.c.id).where(other.c.id == table.c[column]).exists()
        keys: Select[Any] = select(*table.primary_key.columns, table.c[column]).where(~there)
        return self._db.execute(keys.where(table.c[column].is_not(None))).all()


def _recipe_of(unsealing: Row[Any]) -> str:
    """The recipe that test was opened for; a second opening of it has a longer name."""
    return str(unsealing.subject).partition("/")[0]
