"""Reading a store: searches, generations, candidates, evaluations, as frozen values."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Row, func, select

from evomerge.errors import StoreError, nearest
from evomerge.fitness.results import Scores
from evomerge.store import codec, lock, schema
from evomerge.store.database import Database


@dataclass(frozen=True)
class SearchRow:
    """One search. state: running | stopped (can be resumed) | finished | failed."""

    id: int
    name: str
    state: str
    epoch: int
    seed: int
    job: dict[str, Any]
    versions: dict[str, str]
    created_at: str
    active_seconds: float
    stop_reason: str | None
    verdict: dict[str, Any] | None


@dataclass(frozen=True)
class SplitRow:
    """One split of a task: n items; content and identity as of Task."""

    content: str
    identity: str
    n: int


@dataclass(frozen=True)
class GenerationRow:
    """kind: baselines | proposed | final. told: whether the optimizer was told its fitness.
    optimizer: the section of the job that proposed it; None where none did, or it is not known."""

    number: int
    kind: str
    step_size: float | None
    told: bool
    review: dict[str, Any] | None
    optimizer: dict[str, Any] | None


@dataclass(frozen=True)
class CandidateRow:
    """One candidate, without its recipe (see Store.recipe).

    state: open | scored | failed | infeasible. genotype: (d,), None for baselines. fitness: on
    the train examples it was scored on. told, objectives, violation: as of Outcome.
    """

    id: int
    generation: int
    slot: int
    label: str | None
    state: str
    reason: str | None
    genotype: NDArray[np.float64] | None
    recipe_sha: str | None
    fitness: float | None
    told: float | None
    objectives: tuple[float, ...] | None
    violation: float | None


@dataclass(frozen=True)
class EvaluationRow:
    """One recorded evaluation. scores: by task; None if it failed. copied_from: the candidate
    with the same recipe whose result it is."""

    candidate: int
    purpose: str
    stage: int
    reason: str | None
    merge_seconds: float
    seconds: float
    copied_from: int | None
    scores: dict[str, Scores] | None


@dataclass(frozen=True)
class MeanRow:
    """A candidate's scores on n examples of a task, put together.

    truncated: share of the examples whose reply the token limit cut off. tokens: of a reply, on
    average; 0 where nothing is generated. overlong, failed: examples whose prompt did not fit into
    the model's context, which score 0, and those with a reply that could not be graded.
    """

    mean: float
    n: int
    truncated: float
    tokens: float
    overlong: int
    failed: int


@dataclass(frozen=True)
class LedgerRow:
    """One use of a guarded split. kind: look | unseal."""

    search: int
    kind: str
    content: str
    subject: str
    entry: dict[str, Any]
    at: str


class Store:
    """An opened store. Every method is one consistent read."""

    def __init__(self, url: str, create: bool = False) -> None:
        """Open by URL, sqlite:///FILE; `create` makes it where there is none. Raises StoreError."""
        self.url = url
        self.database = Database(url, create)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.database.close()

    def searches(self) -> list[SearchRow]:
        """All of them, oldest first."""
        with self.database.read() as db:
            rows = db.execute(select(schema.search).order_by(schema.search.c.id)).all()
        return [self._search(row) for row in rows]

    def search(self, name: str) -> SearchRow:
        """Raises StoreError when there is no such search."""
        with self.database.read() as db:
            row = db.execute(select(schema.search).where(schema.search.c.name == name)).first()
            if row is None:
                names = db.execute(select(schema.search.c.name)).scalars().all()
                remedy = nearest(name, names) if names else "it holds none yet"
                raise StoreError(f"store '{self.url}' has no search '{name}': {remedy}")
        return self._search(row)

    def refuse_taken(self, name: str) -> None:
        """Raise StoreError when there is a search of this name."""
        if any(row.name == name for row in self.searches()):
            raise StoreError(
                f"the name '{name}' is taken in store '{self.url}': resume that search "
                f"(evomerge resume {name}), or choose another (name=...)"
            )

    def _search(self, row: Row[Any]) -> SearchRow:
        state = row.state
        if state == "open":
            state = "running" if lock.is_held(self.database.path, row.name) else "stopped"
        return SearchRow(
            row.id,
            row.name,
            state,
            row.epoch,
            row.seed,
            json.loads(row.job),
            json.loads(row.versions),
            row.created_at,
            row.active_seconds,
            row.stop_reason,
            _document(row.verdict),
        )

    def models(self, search: int) -> dict[str, dict[str, Any]]:
        """The models of a search by name: uri, revision, sha256, and first: whether it gives config
        and tokenizer."""
        with self.database.read() as db:
            table = schema.model
            rows = db.execute(select(table).where(table.c.search_id == search)).all()
        keys = ("uri", "revision", "sha256", "first")
        return {r.name: {key: getattr(r, key) for key in keys} for r in rows}

    def splits(self, search: int) -> dict[tuple[str, str], SplitRow]:
        """By (task, split), in the order of the job's tasks."""
        table = schema.split
        with self.database.read() as db:
            rows = db.execute(
                select(table).where(table.c.search_id == search).order_by(table.c.id)
            ).all()
        return {(r.task, r.split): SplitRow(r.content, r.identity, r.n) for r in rows}

    def generations(self, search: int) -> list[GenerationRow]:
        """In order."""
        with self.database.read() as db:
            table = schema.generation
            rows = db.execute(
                select(table).where(table.c.search_id == search).order_by(table.c.number)
            ).all()
        return [
            GenerationRow(
                r.number,
                r.kind,
                r.step_size,
                r.told_at is not None,
                _document(r.review),
                _document(r.optimizer),
            )
            for r in rows
        ]

    def candidates(self, search: int) -> list[CandidateRow]:
        """By generation, then slot. Raises StoreError for a genotype that is damaged."""
        table = schema.candidate
        wanted = [c for c in table.c if c.name != "recipe"]
        with self.database.read() as db:
            rows = db.execute(
                select(*wanted)
                .where(table.c.search_id == search)
                .order_by(table.c.generation, table.c.slot)
            ).all()
        return [_candidate(row) for row in rows]

    def recipe(self, candidate: int) -> dict[str, Any] | None:
        """A candidate's recipe as plain data; None if it is infeasible."""
        with self.database.read() as db:
            table = schema.candidate
            text = db.execute(select(table.c.recipe).where(table.c.id == candidate)).scalar()
        return _document(text)

    def evaluations(
        self, search: int, purposes: Sequence[str], with_scores: bool = True
    ) -> list[EvaluationRow]:
        """Those of these purposes, in the order of candidates and stages; of each, the tasks come
        as they were recorded: sums over them depend on it.

        with_scores False leaves per-example results out (`scores` is None). Raises StoreError for
        results that are damaged.
        """
        table, owner = schema.evaluation, schema.candidate
        condition = (owner.c.search_id == search) & table.c.purpose.in_(purposes)
        with self.database.read() as db:
            rows = db.execute(
                select(table)
                .join(owner, owner.c.id == table.c.candidate_id)
                .where(condition)
                .order_by(owner.c.generation, owner.c.slot, table.c.stage)
            ).all()
            packed: Sequence[Row[Any]] = ()
            if with_scores:
                packed = db.execute(
                    select(schema.score)
                    .join(table, table.c.id == schema.score.c.evaluation_id)
                    .join(owner, owner.c.id == table.c.candidate_id)
                    .where(condition)
                    .order_by(schema.score.c.id)
                ).all()
        scores: dict[int, dict[str, Scores]] = {}
        for r in packed:
            what = f"the scores of evaluation {r.evaluation_id} on task '{r.task}'"
            found = codec.unpack_scores(r.codec, r.blob, r.sha256, what)
            scores.setdefault(r.evaluation_id, {})[r.task] = found
        return [
            EvaluationRow(
                r.candidate_id,
                r.purpose,
                r.stage,
                r.reason,
                r.merge_seconds,
                r.seconds,
                r.copied_from,
                scores.get(r.id),
            )
            for r in rows
        ]

    def means(self, search: int, purpose: str) -> dict[int, dict[str, MeanRow]]:
        """By candidate and task, over all stages."""
        table, owner, score = schema.evaluation, schema.candidate, schema.score
        total = func.sum(score.c.n)
        with self.database.read() as db:
            rows = db.execute(
                select(
                    table.c.candidate_id,
                    score.c.task,
                    func.sum(score.c.mean * score.c.n) / total,
                    total,
                    1.0 * func.sum(score.c.truncated) / total,
                    1.0 * func.sum(score.c.tokens) / total,
                    func.sum(score.c.overlong),
                    func.sum(score.c.failed),
                )
                .join(table, table.c.id == score.c.evaluation_id)
                .join(owner, owner.c.id == table.c.candidate_id)
                .where((owner.c.search_id == search) & (table.c.purpose == purpose))
                .group_by(table.c.candidate_id, score.c.task)
            ).all()
        found: dict[int, dict[str, MeanRow]] = {}
        for candidate, task, *values in rows:
            found.setdefault(candidate, {})[task] = MeanRow(*values)
        return found

    def scored_on_train(self, recipe_sha: str) -> list[tuple[int, int]]:
        """(search, candidate) of those with this recipe that were scored on all of train, the
        latest first."""
        owner, table = schema.candidate, schema.evaluation
        scored = (table.c.purpose == "full") & (table.c.state == "scored")
        with self.database.read() as db:
            rows = db.execute(
                select(owner.c.search_id, owner.c.id)
                .join(table, table.c.candidate_id == owner.c.id)
                .where(scored & (owner.c.recipe_sha == recipe_sha))
                .order_by(owner.c.id.desc())
            ).all()
        return [(row.search_id, row.id) for row in rows]

    def example_evaluations(self, search: int) -> int:
        """How many examples proposed candidates were scored on, for train and monitor; results of
        equal candidates cost nothing."""
        table, owner, score = schema.evaluation, schema.candidate, schema.score
        counted = (
            owner.c.label.is_(None)
            & table.c.purpose.in_(("train", "monitor"))
            & table.c.copied_from.is_(None)
        )
        with self.database.read() as db:
            return int(
                db.execute(
                    select(func.coalesce(func.sum(score.c.n), 0))
                    .join(table, table.c.id == score.c.evaluation_id)
                    .join(owner, owner.c.id == table.c.candidate_id)
                    .where((owner.c.search_id == search) & counted)
                ).scalar_one()
            )

    def device_seconds(self, search: int) -> float:
        """How long devices have worked on the evaluations of a search, summed over them."""
        table, owner = schema.evaluation, schema.candidate
        with self.database.read() as db:
            return float(
                db.execute(
                    select(func.coalesce(func.sum(table.c.seconds), 0.0))
                    .join(owner, owner.c.id == table.c.candidate_id)
                    .where(owner.c.search_id == search)
                ).scalar_one()
            )

    def ledger(self) -> list[LedgerRow]:
        """Every use of a guarded split in this store, oldest first."""
        with self.database.read() as db:
            rows = db.execute(select(schema.ledger).order_by(schema.ledger.c.id)).all()
        return [
            LedgerRow(r.search_id, r.kind, r.content, r.subject, json.loads(r.entry), r.at)
            for r in rows
        ]

    def report(self, candidate: int) -> str | None:
        """The stored report of an exported candidate, byte for byte."""
        with self.database.read() as db:
            table = schema.export
            found: str | None = db.execute(
                select(table.c.report).where(table.c.candidate_id == candidate)
            ).scalar()
        return found

    def events(self, search: int) -> list[tuple[str, str, str]]:
        """(time, kind, text), oldest first."""
        with self.database.read() as db:
            table = schema.event
            rows = db.execute(
                select(table.c.at, table.c.kind, table.c.text)
                .where(table.c.search_id == search)
                .order_by(table.c.id)
            ).all()
        return [(r.at, r.kind, r.text) for r in rows]


def _candidate(row: Row[Any]) -> CandidateRow:
    genotype = None
    if row.genotype is not None:
        what = f"the coordinates of candidate {row.id}"
        genotype = codec.unpack_genotype(row.genotype, row.genotype_sha, what)
    return CandidateRow(
        row.id,
        row.generation,
        row.slot,
        row.label,
        row.state,
        row.reason,
        genotype,
        row.recipe_sha,
        row.fitness,
        row.told,
        None if row.objectives is None else tuple(json.loads(row.objectives)),
        row.violation,
    )


def _document(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    document: Mapping[str, Any] = json.loads(text)
    return dict(document)
