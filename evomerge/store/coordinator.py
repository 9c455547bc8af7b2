"""Writing a search: one process at a time, each write fenced by the epoch it took over with.

Every method is one transaction. What is there already stays, or is refused.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, insert, update
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.exc import IntegrityError

from evomerge.errors import StaleCoordinator, StoreError
from evomerge.fitness.results import Evaluation, Scored
from evomerge.fitness.task import Unsealed
from evomerge.store import codec, ledger, schema
from evomerge.store.database import now
from evomerge.store.lock import SearchLock
from evomerge.store.store import SearchRow, Store


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


class Coordinator:
    """The one writer of a search, from `launch` or `take_over` until `close`."""

    def __init__(self, store: Store, row: SearchRow, lock: SearchLock) -> None:
        self.store = store
        self.search = row
        self._lock = lock
        self._db = store.database
        self._clock = time.monotonic()

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
    ) -> "Coordinator":
        """Write a new search down and hold it. Raises StoreError when the name is taken."""
        lock = SearchLock(store.database.path, name)
        try:
            with store.database.write() as db:
                row = {
                    "name": name,
                    "state": "open",
                    "epoch": 1,
                    "seed": seed,
                    "job": json.dumps(job),
                    "versions": json.dumps(versions),
                    "created_at": now(),
                    "active_seconds": 0.0,
                }
                search = _inserted(db, schema.search, row)
                for model in models:
                    _inserted(
                        db,
                        schema.model,
                        {
                            "search_id": search,
                            "name": model.name,
                            "uri": model.uri,
                            "sha256": model.sha256,
                            "files": json.dumps(model.files),
                            "first": model.first,
                        },
                    )
                for split in splits:
                    _add_split(db, search, split)
        except IntegrityError:
            lock.release()
            store.refuse_taken(name)
            raise
        except BaseException:
            lock.release()
            raise
        return cls(store, store.search(name), lock)

    @classmethod
    def take_over(cls, store: Store, name: str) -> "Coordinator":
        """Hold an existing search; whoever held it before can write no more.

        Raises SearchBusy while another process on this host conducts it.
        """
        row = store.search(name)
        lock = SearchLock(store.database.path, name)
        table = schema.search
        try:
            with store.database.write() as db:
                epoch = db.execute(
                    update(table)
                    .where(table.c.id == row.id)
                    .values(epoch=table.c.epoch + 1)
                    .returning(table.c.epoch)
                ).scalar_one()
        except BaseException:
            lock.release()
            raise
        # Ours, and not what may be read after another host has taken over in its turn.
        return cls(store, replace(store.search(name), epoch=epoch), lock)

    def close(self) -> None:
        """Let go of the search."""
        self._lock.release()

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
    ) -> list[int]:
        """Commit a generation before any work on it starts. Gives the candidates' ids.

        optimizer: the section of the job that proposed it, None where no optimizer did.
        Raises StoreError when it is there already, or two candidates share a slot.
        """
        search = self.search
        row = {
            "search_id": search.id,
            "number": number,
            "kind": kind,
            "step_size": step_size,
            "opened_at": now(),
            "optimizer": None if optimizer is None else json.dumps(optimizer, sort_keys=True),
        }
        try:
            with self._db.write() as db:
                self._fence(db)
                generation = _inserted(db, schema.generation, row)
                return [
                    _inserted(
                        db, schema.candidate, _candidate_values(search.id, generation, number, new)
                    )
                    for new in candidates
                ]
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
    ) -> None:
        """Write an evaluation as it lands; the first one of a purpose and stage stays.

        fitness: the candidate's, from now on; None leaves it as it is. copied_from: the candidate
        with the same recipe whose result this is, where it was not scored again.
        """
        scored = isinstance(evaluation, Scored)
        with self._db.write() as db:
            self._fence(db)
            inserted = db.execute(
                upsert(schema.evaluation)
                .values(
                    candidate_id=candidate,
                    purpose=purpose,
                    stage=stage,
                    epoch=self.search.epoch,
                    state="scored" if scored else "failed",
                    reason=None if isinstance(evaluation, Scored) else evaluation.reason,
                    merge_seconds=evaluation.merge_seconds
                    if isinstance(evaluation, Scored)
                    else 0.0,
                    seconds=evaluation.seconds,
                    recorded_at=now(),
                    copied_from=copied_from,
                )
                .on_conflict_do_nothing()
                .returning(schema.evaluation.c.id)
            ).scalar()
            if inserted is None:
                return
            if isinstance(evaluation, Scored):
                for task, scores in evaluation.tasks.items():
                    blob = codec.pack_scores(scores)
                    _inserted(
                        db,
                        schema.score,
                        {
                            "evaluation_id": inserted,
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
                        },
                    )
            values: dict[str, Any] = {} if fitness is None else {"fitness": fitness}
            if purpose in ("train", "full"):  # elsewhere a failure says nothing of these
                values["state"] = "scored" if scored else "failed"
                values["reason"] = None if isinstance(evaluation, Scored) else evaluation.reason
            if values:
                table = schema.candidate
                db.execute(update(table).where(table.c.id == candidate).values(values))

    def close_generation(
        self, number: int, told: Mapping[int, Outcome], review: Mapping[str, Any] | None
    ) -> None:
        """Write down what the optimizer is told, by candidate, and the guard's review."""
        table, generation = schema.candidate, schema.generation
        with self._db.write() as db:
            self._fence(db)
            for candidate, outcome in told.items():
                several = outcome.objectives
                values = {
                    "told": outcome.told,
                    "objectives": None if several is None else json.dumps(several),
                    "violation": outcome.violation,
                }
                db.execute(update(table).where(table.c.id == candidate).values(values))
            db.execute(
                update(generation)
                .where((generation.c.search_id == self.search.id) & (generation.c.number == number))
                .values(told_at=now(), review=None if review is None else json.dumps(review))
            )

    def rate(self, fitness: Mapping[int, float]) -> None:
        """Write down candidates' fitness that could not be told when they were scored."""
        table = schema.candidate
        with self._db.write() as db:
            self._fence(db)
            for candidate, value in fitness.items():
                db.execute(update(table).where(table.c.id == candidate).values(fitness=value))

    def look(self, content: str, candidate: int, allowed: int) -> None:
        """Reserve a use of validation for a candidate, before it happens.

        One candidate's look counts once, however often it is begun. Raises LooksSpent when none is
        left.
        """
        with self._db.write() as db:
            self._fence(db)
            ledger.look(db, self.search, content, candidate, allowed)

    def unseal(self, content: str, recipe_sha: str) -> tuple[Unsealed, str, int]:
        """Write down that a test split is read for a recipe, and give leave to read it.

        Gives (leave, time of this opening, how often this test content was opened before, by any
        search in the store). An opening that was begun and not finished is the same opening.
        """
        with self._db.write() as db:
            self._fence(db)
            opening = ledger.unseal(db, self.search, content, recipe_sha)
        return Unsealed(content), opening.at, opening.before

    def save_report(self, candidate: int, report: str) -> None:
        """Keep an export's report for ever; the first one stays."""
        with self._db.write() as db:
            self._fence(db)
            db.execute(
                upsert(schema.export)
                .values(search_id=self.search.id, candidate_id=candidate, report=report, at=now())
                .on_conflict_do_nothing()
            )

    def log(self, kind: str, text: str) -> None:
        """Note an event of the search."""
        with self._db.write() as db:
            self._fence(db)
            row = {"search_id": self.search.id, "at": now(), "kind": kind, "text": text}
            _inserted(db, schema.event, row)

    def change(self, job: Mapping[str, Any], text: str) -> None:
        """Go on under another job from here; `text` says what is different."""
        with self._db.write() as db:
            self._fence(db)
            table = schema.search
            row = {"search_id": self.search.id, "at": now(), "kind": "changed", "text": text}
            db.execute(
                update(table).where(table.c.id == self.search.id).values(job=json.dumps(job))
            )
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
            _inserted(db, schema.event, row)
        self.search = replace(self.search, job=dict(job))

    def stop(self, reason: str | None) -> None:
        """Write down why no further generation is opened, None if they are after all; the finals
        may still follow."""
        self._set(stop_reason=reason)
        self.search = replace(self.search, stop_reason=reason)

    def finish(self, state: str, verdict: Mapping[str, Any] | None) -> None:
        """The end. state: finished | failed; or open, when a failed search is taken up again."""
        self._set(state=state, verdict=None if verdict is None else json.dumps(verdict))

    def _set(self, **values: Any) -> None:
        with self._db.write() as db:
            self._fence(db)
            table = schema.search
            db.execute(update(table).where(table.c.id == self.search.id).values(**values))

    def _fence(self, db: Connection) -> None:
        """First in every transaction: refuse to write after someone else took over."""
        clock = time.monotonic()
        table = schema.search
        # An export, of a finished search, spends none of its hours.
        spent = 0.0 if self.search.state == "finished" else clock - self._clock
        result = db.execute(
            update(table)
            .where((table.c.id == self.search.id) & (table.c.epoch == self.search.epoch))
            .values(active_seconds=table.c.active_seconds + spent)
        )
        if result.rowcount != 1:
            raise StaleCoordinator(
                f"search '{self.search.name}' was taken over by another process: nothing more is "
                "written from here"
            )
        self._clock = clock


def _candidate_values(
    search: int, generation: int, number: int, new: NewCandidate
) -> dict[str, Any]:
    blob = None if new.genotype is None else codec.pack_genotype(new.genotype)
    return {
        "search_id": search,
        "generation_id": generation,
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


def _add_split(db: Connection, search: int, split: NewSplit) -> None:
    row = {
        "search_id": search,
        "task": split.task,
        "split": split.split,
        "content": split.content,
        "identity": split.identity,
        "n": len(split.items),
    }
    owner = _inserted(db, schema.split, row)
    db.execute(
        insert(schema.split_item),
        [
            {"split_id": owner, "position": position, "hash": item}
            for position, item in enumerate(split.items)
        ],
    )


def _inserted(db: Connection, table: Any, row: Mapping[str, Any]) -> int:
    result = db.execute(insert(table).returning(table.c.id), dict(row))
    return int(result.scalar_one())
