"""What a server was asked to do: searches, exports and pushes, in one queue that outlives it.

Whoever opens the store may submit and steer; one scheduler takes things out and says how they
ended. Knows nothing of processes, nor of what a document means.
"""

import json
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, select, update

from evomerge.errors import KeyReused, NameTaken, NotFound, StoreError
from evomerge.store import codec, schema
from evomerge.store.backend import backend_of
from evomerge.store.database import inserted_once, now
from evomerge.store.leadership import Leadership
from evomerge.store.store import Store, held_in_queue
from evomerge.store.wishes import Wishes

Kind = Literal["search", "export", "push"]
State = Literal["queued", "running", "paused", "finished", "failed", "cancelled"]

# What each state may become. A pause, or the end of an export, is asked for before its process has
# ended, which may find the end of its work first.
_MAY_BECOME: Mapping[str, frozenset[str]] = {
    "queued": frozenset({"running", "paused", "failed", "cancelled"}),
    "running": frozenset({"queued", "paused", "finished", "failed", "cancelled"}),
    "paused": frozenset({"queued", "finished", "failed", "cancelled"}),
    "finished": frozenset({"queued"}),
    "failed": frozenset({"queued"}),
    "cancelled": frozenset(),
}
ENDED = frozenset({"finished", "failed", "cancelled"})

_table = schema.submission


@dataclass(frozen=True)
class Submission:
    """One thing that a server was asked to do.

    search: its name; before a search has begun the store has no row of it. document: of a search
    its job, of an export or push what it is of. overrides: `key=value` that a search goes on with.
    priority: higher goes first. error: why it has failed. result: what came of it. by: who asked.
    attempts: how often it was begun since it last got anywhere. Times are UTC, ISO 8601.
    """

    id: int
    kind: Kind
    search: str
    document: dict[str, Any]
    overrides: tuple[str, ...]
    priority: int
    state: State
    error: str | None
    result: dict[str, Any] | None
    webhook: str | None
    by: str
    attempts: int
    submitted_at: str
    started_at: str | None
    ended_at: str | None


@dataclass(frozen=True)
class Head:
    """Of a submission, see there, without what is long."""

    id: int
    state: State
    submitted_at: str


class Queue:
    """The submissions of a store. Each change of a submission is one transaction. What hangs on the
    row of its search too, as in `pause`, has read that in one before, and leaves a wish there."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._database = store.database
        self._wishes = Wishes(store)

    def submit(
        self,
        kind: Kind,
        search: str,
        document: Mapping[str, Any],
        *,
        by: str,
        priority: int = 0,
        webhook: str | None = None,
        key: str | None = None,
    ) -> Submission:
        """Ask for something. The same `key` with the same content gives what was asked for first.

        Raises KeyReused for a key that came with other content, NameTaken for a new search whose
        name is in use, StoreError for an export of a search that is not there.
        """
        content = [kind, search, document, priority, webhook]
        asked = codec.sha256(json.dumps(content, sort_keys=True).encode())
        row = _row(kind, search, document, by) | {
            "priority": priority,
            "webhook": webhook,
            "key": key or secrets.token_hex(16),  # tried again, it is written once
            "asked": asked,
        }

        def attempt() -> Submission:
            with self._database.write() as db:
                backend_of(db).lock_queue(db)
                same = db.execute(select(_table).where(_table.c.key == row["key"])).first()
                if same is None:
                    self._check_name(db, kind, search)
                    inserted_once(db, _table, row)
                    same = db.execute(select(_table).where(_table.c.key == row["key"])).one()
                elif same.asked != asked:
                    raise KeyReused(
                        f"idempotency key '{key}' came with another request before: use a new one"
                    )
                return _submission(same)

        return self._database.persist(attempt)

    def _check_name(self, db: Connection, kind: str, name: str) -> None:
        shown = self._database.shown
        there = _is_stored(db, name)
        if kind != "search":
            if not there:
                raise NotFound(f"store '{shown}' has no search '{name}'")
        elif there or held_in_queue(db, name):
            raise NameTaken(f"the name '{name}' is taken in store '{shown}': choose another")

    def all(self, state: State | None = None) -> list[Submission]:
        """Of this state, by default all, in the order they came in."""
        query = select(_table).order_by(_table.c.id)
        return self._read(query if state is None else query.where(_table.c.state == state))

    def waiting(self) -> list[Submission]:
        """What is queued, the next first: by priority, then what was begun before, then in the
        order it came in."""
        queued = self.all("queued")
        return sorted(queued, key=lambda one: (-one.priority, one.started_at is None, one.id))

    def places(self) -> dict[int, int]:
        """Of what is queued, by number: where it stands in `waiting`, from 1."""
        order = (_table.c.priority.desc(), _table.c.started_at.is_(None), _table.c.id)
        query = select(_table.c.id).where(_table.c.state == "queued").order_by(*order)
        return {row.id: place for place, row in enumerate(self._rows(query), 1)}

    def heads(self) -> dict[str, Head]:
        """Of each search, the latest that asks for it itself: as much as a long list needs."""
        query = (
            select(_table.c.id, _table.c.search, _table.c.state, _table.c.submitted_at)
            .where(_table.c.kind == "search")
            .order_by(_table.c.id)
        )
        return {row.search: Head(row.id, row.state, row.submitted_at) for row in self._rows(query)}

    def some(self, ids: Collection[int]) -> dict[int, Submission]:
        """Those of these numbers that there are."""
        found = self._read(select(_table).where(_table.c.id.in_(ids))) if ids else []
        return {one.id: one for one in found}

    def exports(self, search: str | None = None) -> list[Submission]:
        """Exports and pushes, by default of all searches, the latest first."""
        query = select(_table).where(_table.c.kind != "search").order_by(_table.c.id.desc())
        return self._read(query if search is None else query.where(_table.c.search == search))

    def get(self, id: int) -> Submission:
        """Raises NotFound when there is none of this number."""
        found = self._read(select(_table).where(_table.c.id == id))
        if not found:
            raise NotFound(f"store '{self._database.shown}' has no submission {id}")
        return found[0]

    def of(self, search: str) -> Submission | None:
        """The latest that asks for the search of this name itself; None where nobody did."""
        own = (_table.c.search == search) & (_table.c.kind == "search")
        found = self._read(select(_table).where(own).order_by(_table.c.id.desc()).limit(1))
        return found[0] if found else None

    def change(
        self,
        id: int,
        *,
        state: State | None = None,
        priority: int | None = None,
        overrides: Sequence[str] | None = None,
        error: str | None = None,
        result: Mapping[str, Any] | None = None,
        attempts: int | None = None,
        was: State | None = None,
    ) -> Submission:
        """Write down what is new of it; None leaves a thing as it is. What is queued anew has no
        error and no result any more. was: leave all as it is if this is not its state. Raises
        StoreError for a state that does not follow on the present one."""

        def decide(found: Submission) -> dict[str, Any]:
            if was not in (None, found.state):
                return {}
            values: dict[str, Any] = {} if state is None else _to_state(found, state)
            if priority is not None:
                values["priority"] = priority
            if overrides is not None:
                values["overrides"] = json.dumps(list(overrides))
            if error is not None:
                values["error"] = error
            if result is not None:
                values["result"] = json.dumps(result)
            if attempts is not None:
                values["attempts"] = attempts
            return values

        return self._changed(id, decide)

    def lead(self) -> Leadership | None:
        """The right to work it off, which one process has at a time; None while another has it.
        Raises StoreError, StoreUnavailable."""
        return self._database.lead()

    def end(
        self,
        id: int,
        state: Literal["finished", "failed"],
        taken: Sequence[str],
        error: str | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> Submission:
        """Write down how it ended, with the overrides that it was begun with. What was asked for
        anew meanwhile is queued; of what failed, nothing is tried again by itself; what was
        cancelled meanwhile stays so."""

        def decide(found: Submission) -> dict[str, Any]:
            if found.state == "cancelled":
                return {}
            rest = () if state == "failed" else _rest(found.overrides, taken)
            if found.state == "queued" or rest:
                return {"state": "queued", "overrides": json.dumps(rest or found.overrides)}
            return {
                **_to_state(found, state),
                "overrides": "[]",
                "error": error,
                "result": None if result is None else json.dumps(result),
            }

        return self._changed(id, decide)

    def add_result(self, ended: Submission, more: Mapping[str, Any]) -> None:
        """Say more of how it ended; if it has gone on since, that is no longer of interest."""

        def decide(found: Submission) -> dict[str, Any]:
            if found.ended_at != ended.ended_at:
                return {}
            return {"result": json.dumps({**(found.result or {}), **more})}

        self._changed(ended.id, decide)

    def begin(self, id: int) -> Submission | None:
        """Take it out of the queue to be run, one attempt more; None if it is no longer queued."""

        def attempt() -> Submission | None:
            with self._database.write() as db:
                taken = db.execute(
                    update(_table)
                    .where((_table.c.id == id) & (_table.c.state == "queued"))
                    .values(state="running", started_at=now(), attempts=_table.c.attempts + 1)
                )
                return _submission(_locked(db, id)) if taken.rowcount else None

        return self._database.persist(attempt)

    def pause(self, search: str, by: str) -> None:
        """As Ctrl-C: what is under way lands, and the search can be resumed. Of one that waits in
        the queue: it waits outside of it. Raises StoreError where there is nothing to pause."""
        found = self.of(search)
        if found is None or found.state not in ("queued", "running"):
            if found is not None and self._row_state(search) is None:
                raise StoreError(f"search '{search}' is {found.state}: there is nothing to pause")
            self._wishes.add(search, "pause", by)
            return
        self.change(found.id, state="paused")
        if found.state == "running" and self._is_running(search):
            self._wishes.add(search, "pause", by)

    def stop(self, search: str, by: str) -> None:
        """No further generation is opened; the finals follow, of a paused search once it is run
        again, which this asks for too. Raises StoreError where there is nothing to stop."""
        found = self._own(search)
        if found is not None and self._row_state(search) is None:
            remedy = "try again in a moment" if found.state == "running" else "cancel it instead"
            raise StoreError(f"search '{search}' has not begun: {remedy}")
        self._wishes.add(search, "stop", by)
        if found is not None and found.state in ("paused", "failed"):
            self.change(found.id, state="queued")

    def resume(self, search: str, by: str, overrides: Sequence[str] = ()) -> Submission:
        """Have a search gone on with that is paused, failed or finished, or that nobody conducts;
        overrides: see search.resume. Raises StoreError where it runs or is cancelled."""
        found = self._own(search)
        if found is None:
            return self._submit_stored(search, by, overrides)
        if found.state == "running" or (found.state == "queued" and not overrides):
            raise StoreError(f"search '{search}' is {found.state}: it needs no resuming")

        def decide(one: Submission) -> dict[str, Any]:
            return {
                **_to_state(one, "queued"),
                "overrides": json.dumps(_with(one.overrides, overrides)),
                "attempts": 0,
            }

        return self._changed(found.id, decide)

    def extend(self, search: str, by: str, overrides: Sequence[str]) -> Submission:
        """Go on under other limits, `key=value` each. A running search is paused for that, and
        goes on by itself; any other is resumed. Raises StoreError as `resume`."""
        found = self._own(search)
        if found is None or found.state != "running":
            return self.resume(search, by, overrides)
        changed = self._changed(
            found.id, lambda one: {"overrides": json.dumps(_with(one.overrides, overrides))}
        )
        if self._is_running(search):
            self._wishes.add(search, "pause", by)
        return changed

    def cancel(self, search: str) -> Submission:
        """Take a search out of the queue that has not begun. Raises StoreError for any other."""
        found = self.of(search)
        if found is None and self._row_state(search) is None:
            raise NotFound(f"store '{self._database.shown}': '{search}' is not in its queue")
        if found is None:
            raise StoreError(f"search '{search}' has begun: stop it, or pause it")
        id = found.id

        def attempt() -> Submission:
            with self._database.write() as db:
                backend_of(db).lock_queue(db)  # its process may be about to begin it
                one, has_begun = _submission(_locked(db, id)), _is_stored(db, search)
                if has_begun or one.state not in ("queued", "paused", "cancelled"):
                    raise StoreError(f"search '{search}' has begun: stop it, or pause it")
                if values := _to_state(one, "cancelled"):
                    db.execute(update(_table).where(_table.c.id == id).values(values))
                return _submission(_locked(db, id))

        return self._database.persist(attempt)

    def prioritize(self, search: str, priority: int) -> Submission:
        """Give a search another place among those that wait; of one that runs, for when it waits
        again. Raises NotFound where nobody asked for it, StoreError where it has ended."""
        found = self.of(search)
        if found is None:
            raise NotFound(f"store '{self._database.shown}': '{search}' is not in its queue")

        def decide(one: Submission) -> dict[str, Any]:
            if one.state in ENDED:
                raise StoreError(f"search '{search}' is {one.state}: it waits for nothing")
            return {"priority": priority}

        return self._changed(found.id, decide)

    def take_overrides(self, id: int, taken: Sequence[str]) -> None:
        """Forget the first of its overrides, which are in force now; what came since stays."""
        self._changed(id, lambda one: {"overrides": json.dumps(_rest(one.overrides, taken))})

    def _submit_stored(self, search: str, by: str, overrides: Sequence[str]) -> Submission:
        """Of a search that was begun without a server."""
        row = self._store.search(search)
        if row.state == "running":
            raise StoreError(f"search '{search}' is running: it needs no resuming")
        values = _row("search", search, row.job, by) | {
            "overrides": json.dumps(list(overrides)),
            "key": secrets.token_hex(16),
        }

        def attempt() -> Submission:
            with self._database.write() as db:
                backend_of(db).lock_queue(db)
                own = select(_table).where(_table.c.key == values["key"])
                if (found := db.execute(own).first()) is None:
                    if held_in_queue(db, search):
                        raise StoreError(f"search '{search}' is queued: it needs no resuming")
                    inserted_once(db, _table, values)
                    found = db.execute(own).one()
                return _submission(found)

        return self._database.persist(attempt)

    def _own(self, search: str) -> Submission | None:
        """The latest of this search, if it is not one that somebody else began once that was over
        before it had."""
        found = self.of(search)
        if found is not None and found.state in ("failed", "cancelled"):
            with suppress(NotFound):
                row = self._store.search(search)
                if found.state == "cancelled" or row.created_at > (found.ended_at or ""):
                    return None
        return found

    def _row_state(self, search: str) -> str | None:
        try:
            return self._store.search(search).state
        except NotFound:
            return None

    def _is_running(self, search: str) -> bool:
        return self._row_state(search) == "running"

    def _changed(self, id: int, decide: Callable[[Submission], dict[str, Any]]) -> Submission:
        def attempt() -> Submission:
            with self._database.write() as db:
                if values := decide(_submission(_locked(db, id))):
                    db.execute(update(_table).where(_table.c.id == id).values(values))
                return _submission(_locked(db, id))

        return self._database.persist(attempt)

    def _read(self, query: Any) -> list[Submission]:
        return [_submission(row) for row in self._rows(query)]

    def _rows(self, query: Any) -> Sequence[Row[Any]]:
        def attempt() -> Sequence[Row[Any]]:
            with self._database.read() as db:
                rows: Sequence[Row[Any]] = db.execute(query).all()
                return rows

        return self._database.persist(attempt)


def _row(kind: str, search: str, document: Mapping[str, Any], by: str) -> dict[str, Any]:
    """Of a new one."""
    return {
        "kind": kind,
        "search": search,
        "document": json.dumps(document),
        "overrides": "[]",
        "priority": 0,
        "state": "queued",
        "by": by,
        "attempts": 0,
        "submitted_at": now(),
    }


def _to_state(found: Submission, state: State) -> dict[str, Any]:
    """What changes with the state."""
    if state == found.state:
        return {}
    if state not in _MAY_BECOME[found.state]:
        raise StoreError(
            f"submission {found.id} of search '{found.search}' is {found.state}: it cannot become "
            f"{state}"
        )
    values: dict[str, Any] = {"state": state, "ended_at": now() if state in ENDED else None}
    if state == "queued":
        values |= {"error": None, "result": None}  # it has not ended any more
    return values


def _with(overrides: tuple[str, ...], more: Sequence[str]) -> list[str]:
    """Those that are to come into force; what is asked for twice in a row, once."""
    asked_before = overrides[len(overrides) - len(more) :] == tuple(more)
    return [*overrides] if asked_before else [*overrides, *more]


def _rest(overrides: tuple[str, ...], taken: Sequence[str]) -> tuple[str, ...]:
    """Without those that were taken; they may be gone already."""
    return overrides[len(taken) :] if overrides[: len(taken)] == tuple(taken) else overrides


def _is_stored(db: Connection, search: str) -> bool:
    own = select(schema.search.c.id).where(schema.search.c.name == search)
    return db.execute(own).first() is not None


def _locked(db: Connection, id: int) -> Row[Any]:
    """The row, which nobody else changes until the transaction ends."""
    row = db.execute(select(_table).where(_table.c.id == id).with_for_update()).first()
    if row is None:
        raise StoreError(f"there is no submission {id}")
    return row


def _submission(row: Row[Any]) -> Submission:
    return Submission(
        row.id,
        row.kind,
        row.search,
        json.loads(row.document),
        tuple(json.loads(row.overrides)),
        row.priority,
        row.state,
        row.error,
        None if row.result is None else json.loads(row.result),
        row.webhook,
        row.by,
        row.attempts,
        row.submitted_at,
        row.started_at,
        row.ended_at,
    )
