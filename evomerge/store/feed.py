"""What is new in a store, for those who watch: read often, so little is read.

Whoever watches a search keeps a `Mark`, how far they have read: its rows are numbered in the order
in which its one coordinator wrote them. Knows the tables, and nothing of who watches. Scores are
not here; nothing that a test split says is.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Row, Select, Table, func, select

from evomerge.store import lease, schema
from evomerge.store.store import Store

T = TypeVar("T")

_search, _generation, _candidate = schema.search, schema.generation, schema.candidate
_evaluation, _event, _submission = schema.evaluation, schema.event, schema.submission


@dataclass(frozen=True)
class Mark:
    """How far a search was read: the number of the last line of its log, and of the last of its
    evaluations."""

    line: int
    evaluation: int

    def covers(self, other: "Mark") -> bool:
        """Whether everything up to the other mark was read."""
        return self.line >= other.line and self.evaluation >= other.evaluation


@dataclass(frozen=True)
class Line:
    """A line of a search's log. at: UTC, ISO 8601."""

    id: int
    at: str
    kind: str
    text: str


@dataclass(frozen=True)
class Evaluated:
    """An evaluation that was recorded, see EvaluationRow; purpose: train | monitor | full |
    validation; state: scored | failed; label: of a baseline."""

    id: int
    candidate: int
    generation: int
    slot: int
    label: str | None
    purpose: str
    stage: int
    state: str
    seconds: float
    device: str | None
    recorded_at: str


@dataclass(frozen=True)
class News:
    """Of one search, the oldest first. more: whether there is more than was read."""

    lines: tuple[Line, ...]
    evaluations: tuple[Evaluated, ...]
    more: bool

    def __len__(self) -> int:
        return len(self.lines) + len(self.evaluations)

    def end(self, begin: Mark) -> Mark:
        """How far these go that were read from there on."""
        return Mark(
            self.lines[-1].id if self.lines else begin.line,
            self.evaluations[-1].id if self.evaluations else begin.evaluation,
        )

    def followed_by(self, other: "News") -> "News":
        """Both; the other was read from the end of these on."""
        return News(
            self.lines + other.lines,
            self.evaluations + other.evaluations,
            self.more or other.more,
        )

    def until(self, mark: Mark) -> "News":
        """Those up to a mark."""
        return News(
            tuple(one for one in self.lines if one.id <= mark.line),
            tuple(one for one in self.evaluations if one.id <= mark.evaluation),
            self.more,
        )


@dataclass(frozen=True)
class Pulse:
    """What changes of a search as it goes on. state: see SearchRow; None before it has begun.
    queued: the state of the latest submission that asks for it; None where nobody did. epoch: how
    often it has changed hands. generations: opened so far; told: of these, complete. done: of its
    candidates, how many are settled, while it can go on; None before that and afterwards."""

    search: str
    state: str | None
    queued: str | None
    epoch: int
    generations: int
    told: int
    done: int | None
    stop_reason: str | None


@dataclass(frozen=True)
class Totals:
    """Of a whole store: searches, submissions and candidates by state; evaluations that were made,
    copies left out, and the GPU seconds that they took."""

    searches: dict[str, int]
    submissions: dict[str, int]
    candidates: dict[str, int]
    evaluations: int
    gpu_seconds: float


class Feed:
    """Of a store."""

    def __init__(self, store: Store) -> None:
        self._database = store.database

    def mark(self, search: str) -> Mark:
        """Of all that there is of a search by now, zeros of one that has not begun."""

        def read(db: Connection) -> Mark:
            line = db.execute(select(func.max(_event.c.id)).where(_owned(_event, search))).scalar()
            # From the latest of the store back, which is near for a search that goes on.
            evaluation = db.execute(
                _evaluations(search, _evaluation.c.id).order_by(_evaluation.c.id.desc()).limit(1)
            ).scalar()
            return Mark(line or 0, evaluation or 0)

        return self._read(read)

    def since(self, search: str, mark: Mark, limit: int) -> News:
        """What came after a mark, at most so many lines and so many evaluations."""
        lines = (
            select(_event)
            .where(_owned(_event, search) & (_event.c.id > mark.line))
            .order_by(_event.c.id)
            .limit(limit + 1)
        )
        evaluations = (
            _evaluations(
                search,
                _evaluation.c.id,
                _candidate.c.id.label("candidate"),
                _candidate.c.generation,
                _candidate.c.slot,
                _candidate.c.label,
                _evaluation.c.purpose,
                _evaluation.c.stage,
                _evaluation.c.state,
                _evaluation.c.seconds,
                _evaluation.c.device,
                _evaluation.c.recorded_at,
            )
            .where(_evaluation.c.id > mark.evaluation)
            .order_by(_evaluation.c.id)
            .limit(limit + 1)
        )

        def read(db: Connection) -> News:
            told = [Line(r.id, r.at, r.kind, r.text) for r in db.execute(lines)]
            made = [Evaluated(*row) for row in db.execute(evaluations)]
            more = len(told) > limit or len(made) > limit
            return News(tuple(told[:limit]), tuple(made[:limit]), more)

        return self._read(read)

    def pulses(self) -> dict[str, Pulse]:
        """Of every search by name, those that have not begun included."""

        def read(db: Connection) -> dict[str, Pulse]:
            rows = db.execute(
                select(
                    _search.c.id,
                    _search.c.name,
                    _search.c.state,
                    _search.c.epoch,
                    _search.c.holder,
                    _search.c.lease_until,
                    _search.c.stop_reason,
                    self._database.clock.label("clock"),
                )
            ).all()
            generations = {
                id: (opened, told)
                for id, opened, told in db.execute(
                    select(
                        _generation.c.search_id, func.count(), func.count(_generation.c.told_at)
                    ).group_by(_generation.c.search_id)
                )
            }
            settled = (_candidate.c.state != "open") & _candidate.c.search_id.in_(
                [row.id for row in rows if row.state == "open"]
            )
            done = dict(
                map(
                    tuple,
                    db.execute(
                        select(_candidate.c.search_id, func.count())
                        .where(settled)
                        .group_by(_candidate.c.search_id)
                    ),
                )
            )
            queued = self._queued(db)
            found = {
                name: Pulse(name, None, state, 0, 0, 0, None, None)
                for name, state in queued.items()
            }
            for row in rows:
                found[row.name] = Pulse(
                    row.name,
                    self._state(row),
                    queued.get(row.name),
                    row.epoch,
                    *generations.get(row.id, (0, 0)),
                    done.get(row.id, 0) if row.state == "open" else None,
                    row.stop_reason,
                )
            return found

        return self._read(read)

    def totals(self) -> Totals:
        """What there is of everything."""
        pulses = self.pulses().values()

        def by_state(db: Connection, table: Table) -> dict[str, int]:
            rows = db.execute(select(table.c.state, func.count()).group_by(table.c.state)).all()
            return {row[0]: row[1] for row in rows}

        def read(db: Connection) -> Totals:
            made, seconds = db.execute(
                select(func.count(), func.sum(_evaluation.c.seconds * _evaluation.c.gpus)).where(
                    _evaluation.c.copied_from.is_(None)
                )
            ).one()
            return Totals(
                dict(Counter(pulse.state for pulse in pulses if pulse.state is not None)),
                by_state(db, _submission),
                by_state(db, _candidate),
                made,
                seconds or 0.0,
            )

        return self._read(read)

    def _queued(self, db: Connection) -> dict[str, str]:
        """The state of the latest submission of each search."""
        latest = (
            select(func.max(_submission.c.id))
            .where(_submission.c.kind == "search")
            .group_by(_submission.c.search)
        )
        own = select(_submission.c.search, _submission.c.state)
        return {
            row.search: row.state for row in db.execute(own.where(_submission.c.id.in_(latest)))
        }

    def _state(self, row: Row[Any]) -> str:
        if row.state != "open":
            return str(row.state)
        free = lease.held(row).is_taken(self._database.lock_folder()) is False
        return "stopped" if free else "running"

    def _read(self, read: Callable[[Connection], T]) -> T:
        def attempt() -> T:
            with self._database.read() as db:
                return read(db)

        return self._database.persist(attempt)


def _owned(table: Table, search: str) -> ColumnElement[bool]:
    id = select(_search.c.id).where(_search.c.name == search).scalar_subquery()
    return table.c.search_id == id


def _evaluations(search: str, *columns: ColumnElement[Any]) -> Select[Any]:
    return (
        select(*columns)
        .select_from(_evaluation)
        .join(_candidate, _candidate.c.id == _evaluation.c.candidate_id)
        .where(_owned(_candidate, search))
    )
