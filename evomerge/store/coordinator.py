"""Writing a search: one process at a time, each write fenced by the epoch it took over with.

Every method is one transaction, which may be tried again after its answer was lost, see lease. What
is there already stays, or is refused.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, bindparam, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from evomerge.coordinates import Coordinate
from evomerge.devices import Device
from evomerge.errors import NameTaken, StoreError, Withdrawn
from evomerge.fitness.results import Evaluation, Scored, Scores
from evomerge.fitness.task import Unsealed
from evomerge.store import codec, ledger, schema
from evomerge.store.backend import backend_of
from evomerge.store.database import inserted, inserted_once, now
from evomerge.store.lease import Holder, Lease, liveness, taken, terms
from evomerge.store.rows import SearchRow
from evomerge.store.store import Store, held_in_queue
from evomerge.store.wishes import Wish, Wishes
from evomerge.store.writes import Writes

_log = logging.getLogger(__name__)

_GLANCE = 2.0  # seconds between looks at what others wish

_RATED = ("train", "full")  # purposes that say whether a candidate could be scored
_UNTOLD = ("full", "validation")  # those of which no optimizer is told

# Of a candidate by its id, given as 'changed'; built once, as it is run for every result.
_CHANGE = update(schema.candidate).where(schema.candidate.c.id == bindparam("changed"))


@dataclass(frozen=True)
class NewModel:
    """A model of a new search; files: SHA-256 by file name. first: it gives config and
    tokenizer."""

    name: str
    uri: str
    sha256: str
    files: Mapping[str, str]
    first: bool


@dataclass(frozen=True)
class NewSplit:
    """A split of a new search, see Task.content and Task.identity; items: the hash of each."""

    task: str
    split: str
    content: str
    identity: str
    items: Sequence[str]


@dataclass(frozen=True)
class NewCandidate:
    """A candidate to be opened. Without a recipe it is infeasible, for `reason`."""

    slot: int
    label: str | None
    genotype: NDArray[np.float64] | None
    recipe: dict[str, Any] | None
    recipe_sha: str | None
    reason: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a candidate came out of its generation.

    told: what the optimizer was told, of several objectives the first. objectives: all of them,
    higher being better; None in a search with one, and without scores. violation: by how much it
    breaks the job's constraints; None without scores.
    """

    told: float | None = None
    objectives: tuple[float, ...] | None = None
    violation: float | None = None


@dataclass(frozen=True)
class Placement:
    """Where an evaluation was made: on which device, with how many GPUs held, on a CPU 1; see
    executor.Landed. waited: seconds from when it was wanted until a device began with it."""

    device: str | None = None
    gpus: float = 1.0
    waited: float = 0.0


NOWHERE = Placement()


class Coordinator:
    """The one writer of a search, from `launch` or `take_over` until `close`."""

    def __init__(self, store: Store, row: SearchRow, lease: Lease) -> None:
        self.store = store
        self.search = row
        self._lease = lease
        self._writes = Writes(lease)
        self._write = self._writes.write
        self._wishes = Wishes(store)
        self._wish: Wish | None = None
        self._looked = -math.inf  # when at wishes

    @classmethod
    def launch(
        cls,
        store: Store,
        name: str,
        seed: int,
        job: Mapping[str, Any],
        versions: Mapping[str, str],
        models: Sequence[NewModel],
        splits: Sequence[NewSplit],
        coordinates: Sequence[Coordinate] = (),
        contamination: Mapping[str, Any] | None = None,
        tell: Callable[[str], None] = _log.warning,
        submission: int | None = None,
    ) -> "Coordinator":
        """Write a new search down and hold it.

        coordinates: what the values of its genotypes are, where that is known. contamination: what
        its splits were found to share. tell: who hears of a database that is waited for.
        submission: the one of the queue that asks for it. Raises NameTaken when there is a search
        of this name, or another submission asks for one; Withdrawn.
        """
        database = store.database
        database.wait_with(tell)
        file = liveness(database, name)
        holder = Holder.of(file).as_json()
        row = {
            "name": name,
            "state": "open",
            "epoch": 1,
            "seed": seed,
            "job": json.dumps(job),
            "versions": json.dumps(versions),
            "created_at": now(),
            "active_seconds": 0.0,
            "coordinates": codec.pack_coordinates(coordinates),
            "contamination": None if contamination is None else json.dumps(contamination),
            **terms(database, holder),
        }
        ours = select(schema.search).where(schema.search.c.holder == holder)

        def attempt() -> Row[Any]:
            with database.write() as db:
                if (written := db.execute(ours).first()) is not None:
                    return written  # by an attempt whose answer was lost
                _check_wanted(db, name, submission)
                new = insert(schema.search).values(row).returning(schema.search.c.id)
                search = db.execute(new).scalar_one()  # the database's clock is among the values
                for model in models:
                    _add_model(db, search, model)
                for split in splits:
                    _add_split(db, search, split)
                return db.execute(ours).one()

        try:
            written = database.persist(attempt)
            found = store.search(name)
        except IntegrityError:
            file.release()
            store.refuse_taken(name)
            raise
        except BaseException:
            file.release()
            raise
        return cls(store, found, Lease(database, written.id, name, written, file))

    @classmethod
    def take_over(
        cls, store: Store, name: str, tell: Callable[[str], None] = _log.warning
    ) -> "Coordinator":
        """Hold an existing search; whoever held it before can write no more.

        tell: who hears of a lease or a database that is waited for. Raises SearchBusy while another
        process conducts it.
        """
        row = store.search(name)
        store.database.wait_with(tell)
        lease = taken(store.database, row.id, name, tell)
        try:
            found = store.search(name)
            # Ours, and not what may be read after another process has taken over in its turn.
            coordinator = cls(store, replace(found, epoch=lease.epoch), lease)
            coordinator._lift("pause")
        except BaseException:
            lease.release()
            raise
        return coordinator

    def close(self) -> None:
        """Write what waits, and let go of the search."""
        try:
            self._writes.close()
        finally:
            self._lease.release()

    def flush(self) -> None:
        """Write what waits; every other write does so too."""
        self._writes.flush()

    def __enter__(self) -> "Coordinator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open_generation(
        self,
        number: int,
        kind: str,
        step_size: float | None,
        candidates: Sequence[NewCandidate],
        optimizer: Mapping[str, Any] | None = None,
        ask: int | None = None,
    ) -> list[int]:
        """Commit a generation before any work on it starts. Gives the candidates' ids.

        optimizer: the section of the job that proposed it, None where no optimizer did. ask: its
        place in the log of asks and tells. Raises StoreError when it is there already, or two
        candidates share a slot.
        """
        search = self.search
        row = {
            "search_id": search.id,
            "number": number,
            "kind": kind,
            "step_size": step_size,
            "opened_at": now(),
            "optimizer": None if optimizer is None else json.dumps(optimizer, sort_keys=True),
            "ask": ask,
        }
        values = [_candidate_values(search.id, number, new) for new in candidates]

        def write(db: Connection) -> list[int]:
            generation = inserted(db, schema.generation, row)
            db.execute(
                insert(schema.candidate), [{**one, "generation_id": generation} for one in values]
            )
            return committed(db) or []

        def committed(db: Connection) -> list[int] | None:
            table, owner = schema.candidate, schema.generation
            same = [owner.c[key] == row[key] for key in ("search_id", "number", "opened_at")]
            found = db.execute(
                select(table.c.id, table.c.slot)
                .join(owner, owner.c.id == table.c.generation_id)
                .where(*same)
            )
            ids = {slot: id for id, slot in found}
            return [ids[new.slot] for new in candidates] if ids else None

        try:
            return self._write(write, committed)
        except IntegrityError:
            raise StoreError(
                f"generation {number} of search '{search.name}' is opened already, or two of its "
                "candidates share a slot"
            ) from None

    def record(
        self,
        candidate: int,
        purpose: str,
        stage: int,
        evaluation: Evaluation,
        fitness: float | None = None,
        copied_from: int | None = None,
        placement: Placement = NOWHERE,
    ) -> None:
        """Write an evaluation as it lands, in one transaction with others that land within a
        moment, see Writes.soon; the first one of a purpose and stage stays.

        fitness: the candidate's, from now on; None leaves it as it is. copied_from: the candidate
        with the same recipe whose result this is, where it was not scored again.
        """
        if isinstance(evaluation, Scored):
            state, reason, merge_seconds = "scored", None, evaluation.merge_seconds
            scores = [_score_values(task, found) for task, found in evaluation.tasks.items()]
            samples = [
                {"task": task, "position": position, "reply": reply}
                for task, replies in evaluation.replies.items()
                for position, reply in replies.items()
            ]
        else:
            state, reason, merge_seconds = "failed", evaluation.reason, 0.0
            scores, samples = [], []
        row = {
            "candidate_id": candidate,
            "purpose": purpose,
            "stage": stage,
            "epoch": self.search.epoch,
            "state": state,
            "reason": reason,
            "merge_seconds": merge_seconds,
            "seconds": evaluation.seconds,
            "recorded_at": now(),
            "copied_from": copied_from,
            **asdict(placement),
        }
        values: dict[str, Any] = {} if fitness is None else {"fitness": fitness}
        if purpose in _RATED:  # elsewhere a failure says nothing of these
            values |= {"state": state, "reason": reason}

        def write(db: Connection) -> None:
            evaluation_id = inserted_once(db, schema.evaluation, row)
            if evaluation_id is None:
                return
            for one in scores:
                inserted(db, schema.score, {**one, "evaluation_id": evaluation_id})
            if samples:
                owned = [{**one, "evaluation_id": evaluation_id} for one in samples]
                db.execute(insert(schema.sample), owned)
            if values:
                db.execute(_CHANGE, {**values, "changed": candidate})

        self._writes.soon(write)

    def close_generation(
        self,
        number: int,
        outcomes: Mapping[int, Outcome],
        review: Mapping[str, Any] | None,
        tell: int | None = None,
        warning: str | None = None,
    ) -> None:
        """Write down how each candidate came out, by id, the guard's review, and as an event what
        it warns of.

        tell: its place in the log of asks and tells.
        """
        table, told_at = schema.generation, now()
        event = None if warning is None else self._event("gap", warning)
        text = None if review is None else json.dumps(review)
        values = [
            {
                "changed": candidate,
                "told": outcome.told,
                "objectives": (
                    None if outcome.objectives is None else json.dumps(outcome.objectives)
                ),
                "violation": outcome.violation,
            }
            for candidate, outcome in outcomes.items()
        ]

        def write(db: Connection) -> None:
            if values:
                db.execute(_CHANGE, values)
            db.execute(
                update(table)
                .where((table.c.search_id == self.search.id) & (table.c.number == number))
                .values(told_at=told_at, tell=tell, review=text)
            )
            if event is not None:
                inserted(db, schema.event, event)

        self._write(write, None if event is None else _noted(event))

    def save_devices(self, devices: Sequence[Device]) -> None:
        """Write down where the time of devices went that this coordinator has held, as it stands
        now; by name, over what was written before."""
        table, seen_at = schema.device, now()
        key = ("search_id", "epoch", "name")
        own = {"search_id": self.search.id, "epoch": self.search.epoch, "seen_at": seen_at}
        rows = [own | asdict(device) for device in devices]
        same = [table.c[column] == bindparam(f"its_{column}") for column in key]
        changes = [row | {f"its_{column}": row[column] for column in key} for row in rows]

        def write(db: Connection) -> None:
            db.execute(backend_of(db).insert_or_ignore(table), rows)
            db.execute(update(table).where(*same), changes)

        if rows:
            self._writes.soon(write)

    def rate(self, fitness: Mapping[int, float]) -> None:
        """Write down candidates' fitness that could not be told when they were scored."""
        values = [{"changed": candidate, "fitness": value} for candidate, value in fitness.items()]
        self._write(lambda db: db.execute(_CHANGE, values))

    def look(self, content: str, candidate: int, allowed: int) -> None:
        """Reserve a use of validation for a candidate, before it happens.

        One candidate's look counts once, however often it is begun. Raises LooksSpent when none is
        left.
        """
        self._write(lambda db: ledger.look(db, self.search, content, candidate, allowed))

    def allow_looks(self, content: str, allowed: int) -> None:
        """Allow the search more looks than it had, in the ledger and in its job; a finished one is
        open again, and its verdict is to be made anew."""
        before = self.search.job["guard"]["validation_looks"]
        job = {**self.search.job, "guard": {**self.search.job["guard"]}}
        job["guard"]["validation_looks"] = allowed
        verdict = self.search.verdict
        text = f"from {before} to {allowed} looks at validation"
        if verdict is not None:
            promoted = "promoted" if verdict["promoted"] else "not promoted"
            text += f"; candidate {verdict['winner']} had won, {promoted}"
        event = self._event("more looks", text)
        values: dict[str, Any] = {"job": json.dumps(job)}
        if verdict is not None:
            values |= {"state": "open", "verdict": None}

        def write(db: Connection) -> None:
            ledger.more_looks(db, self.search, content, before, allowed)
            inserted(db, schema.event, event)
            self._update(db, **values)

        self._write(write, _noted(event))
        state = self.search.state if verdict is None else "running"
        self.search = replace(self.search, job=job, state=state, verdict=None)

    def unseal(
        self, content: str, recipe_sha: str, asked: str, entry: Mapping[str, Any]
    ) -> tuple[Unsealed, ledger.Opening]:
        """Write down that a test split is read for a recipe, and give leave to read it; see
        ledger.unseal."""
        opening = self._write(
            lambda db: ledger.unseal(db, self.search, content, recipe_sha, asked, entry)
        )
        return Unsealed(content), opening

    def save_readings(self, readings: Sequence[ledger.NewReading]) -> None:
        """Keep what test splits said of a model; see ledger.save_readings."""
        self._write(lambda db: ledger.save_readings(db, readings))

    def save_report(self, candidate: int, report: str) -> None:
        """Keep an export's report for ever; the first one stays."""
        row = {"search_id": self.search.id, "candidate_id": candidate, "report": report}
        self._write(lambda db: inserted_once(db, schema.export, {**row, "at": now()}))

    def log(self, kind: str, text: str) -> None:
        """Note an event of the search."""
        event = self._event(kind, text)
        self._write(lambda db: inserted(db, schema.event, event), _noted(event))

    def change(self, job: Mapping[str, Any], text: str) -> None:
        """Go on under another job from here; `text` says what is different."""
        event = self._event("changed", text)

        def write(db: Connection) -> None:
            self._update(db, job=json.dumps(job))
            # Stores of the first schema did not say who proposed: it was the job's until now.
            before, after = self.search.job.get("optimizer", {}), job.get("optimizer", {})
            if before.items() - after.items():
                older = schema.generation
                unknown = (older.c.search_id == self.search.id) & older.c.optimizer.is_(None)
                db.execute(
                    update(older)
                    .where(unknown & (older.c.kind == "proposed"))
                    .values(optimizer=json.dumps(before, sort_keys=True))
                )
            inserted(db, schema.event, event)

        self._write(write, _noted(event))
        self.search = replace(self.search, job=dict(job))

    def stop(self, reason: str | None) -> None:
        """Write down why no further generation is opened; the finals may still follow. None if
        they are after all: who wished otherwise before is not heeded any more."""
        self._set(stop_reason=reason)
        self.search = replace(self.search, stop_reason=reason)
        if reason is None:
            self._lift("stop")

    def wished(self) -> Wish | None:
        """What others ask this search for, looked up every few seconds: to pause, until it is taken
        over again, or to stop, until it goes on under other limits."""
        if time.monotonic() - self._looked > _GLANCE:
            self._wish = self._wishes.latest(self.search.id)
            self._looked = time.monotonic()
        return self._wish

    def _lift(self, kind: str) -> None:
        """Heed what was wished of this kind no longer; what else was still counts."""
        table, wishes = schema.wish, self._wishes.all(self.search.id)
        if all(wish.kind != kind for wish in wishes):
            return
        row = {"search_id": self.search.id, "by": "", "at": now()}
        rows = [row | {"kind": "none"}]
        rows += [row | {"kind": w.kind, "by": w.by, "at": w.at} for w in wishes if w.kind != kind]
        self._write(lambda db: db.execute(insert(table), rows))  # harmless when done twice
        self._looked = -math.inf

    def reopen(self) -> None:
        """Go on with a failed search, whose cause may be gone: failures that the optimizer was not
        told of are forgotten, so that these evaluations are made again."""
        evaluation, owner, generation = schema.evaluation, schema.candidate, schema.generation
        event = self._event("reopened", "what had failed last is evaluated again")
        retried = (
            select(evaluation.c.id, evaluation.c.candidate_id)
            .join(owner, owner.c.id == evaluation.c.candidate_id)
            .join(generation, generation.c.id == owner.c.generation_id)
            .where((owner.c.search_id == self.search.id) & (evaluation.c.state == "failed"))
            .where(generation.c.told_at.is_(None) | evaluation.c.purpose.in_(_UNTOLD))
        )
        left = (
            select(evaluation.c.state, evaluation.c.reason)
            .where(evaluation.c.candidate_id == bindparam("changed"))
            .where(evaluation.c.purpose.in_(_RATED))
            .order_by(evaluation.c.id.desc())
        )

        def write(db: Connection) -> None:
            found = db.execute(retried).all()
            db.execute(delete(evaluation).where(evaluation.c.id.in_([row.id for row in found])))
            for candidate in {row.candidate_id for row in found}:
                last = db.execute(left, {"changed": candidate}).first()
                state, reason = ("open", None) if last is None else last
                db.execute(_CHANGE, {"changed": candidate, "state": state, "reason": reason})
            self._update(db, state="open", stop_reason=None)
            inserted(db, schema.event, event)

        self._write(write, _noted(event))
        self.search = replace(self.search, state="running", stop_reason=None)

    def finish(self, state: str, verdict: Mapping[str, Any] | None) -> None:
        """The end. state: finished | failed."""
        self._set(state=state, verdict=None if verdict is None else json.dumps(verdict))

    def _set(self, **values: Any) -> None:
        self._write(lambda db: self._update(db, **values))

    def _update(self, db: Connection, **values: Any) -> None:
        table = schema.search
        db.execute(update(table).where(table.c.id == self.search.id).values(**values))

    def _event(self, kind: str, text: str) -> dict[str, Any]:
        return {"search_id": self.search.id, "at": now(), "kind": kind, "text": text}


def _noted(event: Mapping[str, Any]) -> Callable[[Connection], int | None]:
    """What gives the id of an event that is there already."""
    table = schema.event
    same = [table.c[key] == value for key, value in event.items()]

    def find(db: Connection) -> int | None:
        found: int | None = db.execute(select(table.c.id).where(*same)).scalar()
        return found

    return find


def _candidate_values(search: int, number: int, new: NewCandidate) -> dict[str, Any]:
    blob = None if new.genotype is None else codec.pack_genotype(new.genotype)
    return {
        "search_id": search,
        "generation": number,
        "slot": new.slot,
        "label": new.label,
        "state": "infeasible" if new.recipe is None else "open",
        "reason": new.reason,
        "genotype": blob,
        "genotype_sha": None if blob is None else codec.sha256(blob),
        "recipe": None if new.recipe is None else json.dumps(new.recipe),
        "recipe_sha": new.recipe_sha,
    }


def _score_values(task: str, scores: Scores) -> dict[str, Any]:
    blob = codec.pack_scores(scores)
    return {
        "task": task,
        "n": len(scores),
        "mean": scores.mean,
        "truncated": int(scores.truncated.sum()),
        "tokens": int(scores.tokens.sum(dtype=np.int64)),
        "overlong": int(scores.overlong.sum()),
        "failed": len(scores.failures),
        "codec": codec.SCORES_CODEC,
        "blob": blob,
        "sha256": codec.sha256(blob),
    }


def _check_wanted(db: Connection, name: str, submission: int | None) -> None:
    """A search that waits in the queue is begun for its submission alone, as long as that runs."""
    backend_of(db).lock_queue(db)
    if submission is None:
        if held_in_queue(db, name):
            raise NameTaken(
                f"the name '{name}' is taken by a search in the queue: choose another (name=...)"
            )
        return
    table = schema.submission
    own = select(table.c.state).where(table.c.id == submission).with_for_update()
    if (state := db.execute(own).scalar_one()) != "running":
        raise Withdrawn(f"search '{name}' is {state} by now: it is not begun")


def _add_model(db: Connection, search: int, model: NewModel) -> None:
    row = {
        "search_id": search,
        "name": model.name,
        "uri": model.uri,
        "sha256": model.sha256,
        "files": json.dumps(model.files),
        "first": model.first,
    }
    inserted(db, schema.model, row)


def _add_split(db: Connection, search: int, split: NewSplit) -> None:
    row = {
        "search_id": search,
        "task": split.task,
        "split": split.split,
        "content": split.content,
        "identity": split.identity,
        "n": len(split.items),
    }
    owner = inserted(db, schema.split, row)
    db.execute(
        insert(schema.split_item),
        [
            {"split_id": owner, "position": position, "hash": item}
            for position, item in enumerate(split.items)
        ],
    )
