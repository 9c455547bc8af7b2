"""Reading a store: searches, generations, candidates, evaluations, as frozen values."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from operator import itemgetter
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import ColumnElement, Connection, Row, Select, func, null, select

from evomerge.coordinates import Coordinate
from evomerge.devices import ADDED, Device
from evomerge.errors import NameTaken, NotFound, StoreError, nearest
from evomerge.fitness.results import Scores
from evomerge.store import codec, lease, ledger, schema
from evomerge.store.database import Database
from evomerge.store.rows import (
    NOT_BEGUN,
    CandidateRow,
    EvaluationRow,
    GenerationRow,
    LedgerRow,
    MeanRow,
    ProgressRow,
    SearchRow,
    SplitRow,
    log_places,
)

P = ParamSpec("P")
T = TypeVar("T")


def _persistent(
    read: Callable[Concatenate["Store", P], T],
) -> Callable[Concatenate["Store", P], T]:
    """A method that reads, and does so again while the database is away, see Database.persist. In a
    consistent view the same is read once, unless it is asked for by a list: nobody may change what
    it gives. Raises StoreError for a document that is damaged."""

    @wraps(read)
    def attempts(store: "Store", /, *args: P.args, **kwargs: P.kwargs) -> T:
        plain = all(isinstance(one, int | str | None) for one in (*args, *kwargs.values()))
        known = store.database.known if plain else None
        asked = (read, args, tuple(kwargs.items()))
        if known is not None and asked in known:
            remembered: T = known[asked]
            return remembered
        try:
            found = store.database.persist(lambda: read(store, *args, **kwargs))
        except json.JSONDecodeError as error:
            raise StoreError(
                f"store '{store.database.shown}' is damaged: a document in it is no JSON: {error}: "
                "evomerge db check names it; restore a backup"
            ) from error
        if known is not None:
            known[asked] = found
        return found

    return attempts


def consistent(
    read: Callable[Concatenate["Store", P], T],
) -> Callable[Concatenate["Store", P], T]:
    """A function of a store for which all its reads are one consistent view, whatever is written
    meanwhile; those of another such function that it calls too. It makes no promise of reads in
    other threads."""

    @wraps(read)
    def at_once(store: "Store", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return store.database.consistent(lambda: read(store, *args, **kwargs))

    return at_once


class Store:
    """An opened store. Every method is one consistent read."""

    def __init__(
        self, url: str, create: bool = False, tell: Callable[[str], None] | None = None
    ) -> None:
        """Open by URL; `create` makes it where there is none. tell: wait for a database that is
        away, from the opening on; `tell` hears of it. Raises StoreError, StoreUnavailable."""
        self.url = url
        self.database = Database(url, create, tell)
        self.warnings = self.database.warnings

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.database.close()

    @_persistent
    def searches(self) -> list[SearchRow]:
        """All of them, oldest first."""
        with self.database.read() as db:
            rows = db.execute(self._searches().order_by(schema.search.c.id)).all()
        return [self._search(row) for row in rows]

    @_persistent
    def search(self, name: str) -> SearchRow:
        """Raises NotFound when there is no such search."""
        with self.database.read() as db:
            row = db.execute(self._searches().where(schema.search.c.name == name)).first()
            if row is None:
                names = db.execute(select(schema.search.c.name)).scalars().all()
                remedy = nearest(name, names) if names else "it holds none yet"
                raise NotFound(f"store '{self.database.shown}' has no search '{name}': {remedy}")
        return self._search(row)

    def refuse_taken(self, name: str) -> None:
        """Raise NameTaken when there is a search of this name, or one is about to be."""
        taken = f"the name '{name}' is taken in store '{self.database.shown}'"
        if any(row.name == name for row in self.searches()):
            raise NameTaken(
                f"{taken}: resume that search (evomerge resume {name}), or choose another "
                "(name=...)"
            )
        if self._is_queued(name):
            raise NameTaken(f"{taken}, by a search in its queue: choose another (name=...)")

    @_persistent
    def _is_queued(self, name: str) -> bool:
        with self.database.read() as db:
            return held_in_queue(db, name)

    def _searches(self) -> Select[Any]:
        return select(schema.search, self.database.clock.label("clock"))

    def _search(self, row: Row[Any]) -> SearchRow:
        state = row.state
        if state == "open":
            free = lease.held(row).is_taken(self.database.lock_folder()) is False
            state = "stopped" if free else "running"
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

    @_persistent
    def models(self, search: int) -> dict[str, dict[str, Any]]:
        """The models of a search by name: uri, revision, sha256, and first: whether it gives config
        and tokenizer."""
        with self.database.read() as db:
            table = schema.model
            rows = db.execute(select(table).where(table.c.search_id == search)).all()
        keys = ("uri", "revision", "sha256", "first")
        return {r.name: {key: getattr(r, key) for key in keys} for r in rows}

    @_persistent
    def contamination(self, search: int) -> dict[str, Any] | None:
        """What was found at launch of splits that share items; None of older searches."""
        table = schema.search
        with self.database.read() as db:
            found = db.execute(select(table.c.contamination).where(table.c.id == search)).scalar()
        return _document(found)

    @_persistent
    def splits(self, search: int) -> dict[tuple[str, str], SplitRow]:
        """By (task, split), in the order of the job's tasks."""
        table = schema.split
        with self.database.read() as db:
            rows = db.execute(
                select(table).where(table.c.search_id == search).order_by(table.c.id)
            ).all()
        return {(r.task, r.split): SplitRow(r.content, r.identity, r.n) for r in rows}

    @_persistent
    def generations(self, search: int, number: int | None = None) -> list[GenerationRow]:
        """In order; with a number that one alone."""
        table = schema.generation
        condition = table.c.search_id == search
        if number is not None:
            condition &= table.c.number == number
        with self.database.read() as db:
            rows = db.execute(select(table).where(condition).order_by(table.c.number)).all()
        return [_generation(row) for row in rows]

    @_persistent
    def latest_review(self, search: int) -> dict[str, Any]:
        """Of the last generation that has one; empty before there is any."""
        table = schema.generation
        with self.database.read() as db:
            found = db.execute(
                select(table.c.review)
                .where((table.c.search_id == search) & table.c.review.is_not(None))
                .order_by(table.c.number.desc())
                .limit(1)
            ).scalar()
        return _document(found) or {}

    @_persistent
    def coordinates(self, search: int) -> tuple[Coordinate, ...]:
        """What each value of a genotype is; empty where that was not written down."""
        with self.database.read() as db:
            table = schema.search
            text = db.execute(select(table.c.coordinates).where(table.c.id == search)).scalar()
        return codec.unpack_coordinates(text)

    @_persistent
    def progress(self) -> dict[int, ProgressRow]:
        """How far each search that has proposed a candidate has come, by id."""
        table, generation = schema.candidate, schema.generation
        with self.database.read() as db:
            counts = db.execute(
                select(table.c.search_id, table.c.state, func.count())
                .where(table.c.label.is_(None))
                .group_by(table.c.search_id, table.c.state)
            ).all()
            told = db.execute(
                select(generation.c.search_id, func.count().label("generations"))
                .where((generation.c.kind == "proposed") & generation.c.told_at.is_not(None))
                .group_by(generation.c.search_id)
            ).all()
        generations = {row.search_id: row.generations for row in told}
        found: dict[int, ProgressRow] = {}
        for search, state, count in counts:
            candidates = found.get(search, NOT_BEGUN).candidates | {state: count}
            found[search] = ProgressRow(generations.get(search, 0), candidates)
        return found

    @_persistent
    def fittest(self, search: int) -> int | None:
        """The proposed candidate of the highest fitness, the earliest of equals; None before one
        is scored."""
        table = schema.candidate
        with self.database.read() as db:
            found: int | None = db.execute(
                select(table.c.id)
                .where((table.c.search_id == search) & table.c.label.is_(None))
                .where(table.c.fitness.is_not(None))
                .order_by(table.c.fitness.desc(), table.c.generation, table.c.slot)
                .limit(1)
            ).scalar()
        return found

    @_persistent
    def candidates(
        self,
        search: int,
        ids: Iterable[int] | None = None,
        generation: int | None = None,
        with_genotypes: bool = True,
    ) -> list[CandidateRow]:
        """Those with these ids, or of this generation, by default all, by generation, then slot.

        Raises StoreError for a genotype that is asked for and damaged.
        """
        table = schema.candidate
        packed = [table.c.genotype, table.c.genotype_sha] if with_genotypes else [null(), null()]
        condition = table.c.search_id == search
        if ids is not None:
            condition &= table.c.id.in_(list(ids))
        if generation is not None:
            condition &= table.c.generation == generation
        with self.database.read() as db:
            rows: Sequence[Any] = db.execute(
                select(
                    table.c.id,
                    table.c.generation,
                    table.c.slot,
                    table.c.label,
                    table.c.state,
                    table.c.reason,
                    table.c.recipe_sha,
                    table.c.fitness,
                    table.c.told,
                    table.c.objectives,
                    table.c.violation,
                    *packed,
                )
                .where(condition)
                .order_by(table.c.generation, table.c.slot)
            ).all()
        return [_candidate(*row) for row in rows]

    @_persistent
    def recipe(self, candidate: int) -> dict[str, Any] | None:
        """A candidate's recipe as plain data; None if it is infeasible. Raises StoreError for one
        that is damaged."""
        table = schema.candidate
        with self.database.read() as db:
            row = db.execute(
                select(table.c.search_id, table.c.recipe, table.c.recipe_sha).where(
                    table.c.id == candidate
                )
            ).first()
            if row is None or row.recipe is None:
                return None
            content = _content(db, row.search_id)
        return codec.unpack_recipe(
            row.recipe, content, row.recipe_sha, f"the recipe of candidate {candidate}"
        )

    @_persistent
    def recipes(self, search: int) -> dict[int, str]:
        """The recipes of feasible candidates, as they are stored: JSON, by candidate. Raises
        StoreError where one is damaged."""
        table = schema.candidate
        with self.database.read() as db:
            content = _content(db, search)
            rows = db.execute(
                select(table.c.id, table.c.recipe, table.c.recipe_sha).where(
                    (table.c.search_id == search) & table.c.recipe.is_not(None)
                )
            ).all()
        for id, text, sha in rows:
            codec.unpack_recipe(text, content, sha, f"the recipe of candidate {id}")
        return {row.id: row.recipe for row in rows}

    @_persistent
    def evaluations(
        self,
        search: int,
        purposes: Sequence[str],
        with_scores: bool = True,
        ids: Iterable[int] | None = None,
    ) -> list[EvaluationRow]:
        """Those of these purposes, in the order of candidates and stages; of each, the tasks come
        as they were recorded: sums over them depend on it.

        ids: of candidates, by default all. with_scores False leaves per-example results out
        (`scores` is None). Raises StoreError for results that are damaged.
        """
        table, owner = schema.evaluation, schema.candidate
        condition = (owner.c.search_id == search) & table.c.purpose.in_(purposes)
        if ids is not None:
            condition &= owner.c.id.in_(list(ids))
        with self.database.read() as db:
            rows: Sequence[Any] = db.execute(
                select(
                    table.c.id,
                    table.c.candidate_id,
                    table.c.purpose,
                    table.c.stage,
                    table.c.reason,
                    table.c.merge_seconds,
                    table.c.seconds,
                    table.c.copied_from,
                    table.c.recorded_at,
                    table.c.device,
                    table.c.gpus,
                    table.c.waited,
                )
                .join(owner, owner.c.id == table.c.candidate_id)
                .where(condition)
                .order_by(owner.c.generation, owner.c.slot, table.c.stage, table.c.id)
            ).all()
            scores = _scores(db, condition) if with_scores else {}
        return [EvaluationRow(*(*values, scores.get(id))) for id, *values in rows]

    @_persistent
    def means(
        self, search: int, purpose: str, ids: Iterable[int] | None = None
    ) -> dict[int, dict[str, MeanRow]]:
        """By candidate and task, over all stages; of the candidates with these ids, by default of
        all."""
        table, owner, score = schema.evaluation, schema.candidate, schema.score
        total = func.sum(score.c.n)
        condition = (owner.c.search_id == search) & (table.c.purpose == purpose)
        if ids is not None:
            condition &= owner.c.id.in_(list(ids))
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
                .where(condition)
                .group_by(table.c.candidate_id, score.c.task)
            ).all()
        found: dict[int, dict[str, MeanRow]] = {}
        for candidate, task, *values in rows:
            found.setdefault(candidate, {})[task] = MeanRow(*values)
        return found

    @_persistent
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

    @_persistent
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

    @_persistent
    def device_seconds(self, search: int) -> float:
        """GPU seconds that the evaluations of a search took: of each how long it took times the
        GPUs that were held for it, a CPU counted as one."""
        table, owner = schema.evaluation, schema.candidate
        with self.database.read() as db:
            return float(
                db.execute(
                    select(func.coalesce(func.sum(table.c.seconds * table.c.gpus), 0.0))
                    .join(owner, owner.c.id == table.c.candidate_id)
                    .where(owner.c.search_id == search)
                ).scalar_one()
            )

    @_persistent
    def latest_evaluation(self, search: int) -> tuple[str | None, float]:
        """When something was evaluated last, UTC, ISO 8601; and the longest that took, in
        seconds. None and 0 before there is anything."""
        table, owner = schema.evaluation, schema.candidate
        with self.database.read() as db:
            row = db.execute(
                select(func.max(table.c.recorded_at), func.max(table.c.seconds))
                .join(owner, owner.c.id == table.c.candidate_id)
                .where(owner.c.search_id == search)
            ).one()
        return row[0], row[1] or 0.0

    @_persistent
    def devices(self, search: int) -> list[Device]:
        """In the order in which they were held, one of a name, the time of all epochs added up;
        none of searches that did not write it down."""
        table = schema.device
        with self.database.read() as db:
            rows = db.execute(
                select(
                    table.c.name,
                    func.max(table.c.gpus).label("gpus"),
                    *(func.sum(table.c[column]).label(column) for column in ADDED),
                )
                .where(table.c.search_id == search)
                .group_by(table.c.name)
                .order_by(func.min(table.c.id))
            ).all()
        return [Device(**row._mapping) for row in rows]

    @_persistent
    def ledger(self) -> list[LedgerRow]:
        """Every use of a guarded split in this store, oldest first. Raises StoreError where one is
        damaged."""
        with self.database.read() as db:
            rows = ledger.rows(db)
        return [
            LedgerRow(r.search_id, r.kind, r.content, r.subject, json.loads(r.entry), r.at)
            for r in rows
        ]

    @_persistent
    def reading(self, asked: str, subject: str) -> Scores | None:
        """What an opened test split said of a model, see ledger.NewReading; None if it was not
        read. Raises StoreError for results that are damaged."""
        table = schema.reading
        same = (table.c.asked == asked) & (table.c.subject == subject)
        with self.database.read() as db:
            row = db.execute(select(table).where(same)).first()
        if row is None:
            return None
        what = f"the scores of model {subject[:16]} on the test split of task '{row.task}'"
        return codec.unpack_scores(row.codec, row.blob, row.sha256, what)

    @_persistent
    def items(self, content: str, search: int | None = None) -> set[str]:
        """The hashes of the questions that are asked of a split, by its identity, in one search or
        in all."""
        table, owner = schema.split_item, schema.split
        condition = owner.c.identity == content
        if search is not None:
            condition &= owner.c.search_id == search
        with self.database.read() as db:
            return set(
                db.execute(
                    select(table.c.hash)
                    .join(owner, owner.c.id == table.c.split_id)
                    .where(condition)
                ).scalars()
            )

    @_persistent
    def report(self, candidate: int) -> str | None:
        """The stored report of an exported candidate, byte for byte."""
        with self.database.read() as db:
            table = schema.export
            found: str | None = db.execute(
                select(table.c.report).where(table.c.candidate_id == candidate)
            ).scalar()
        return found

    @_persistent
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


def held_in_queue(db: Connection, name: str) -> bool:
    """Whether a search of this name waits in the queue, or is about to be begun from it."""
    table = schema.submission
    alive = table.c.state.in_(("queued", "running", "paused"))
    own = (table.c.search == name) & (table.c.kind == "search") & alive
    return db.execute(select(table.c.id).where(own)).first() is not None


def _content(db: Connection, search: int) -> dict[str, str]:
    """The hashes of a search's models by where they are: what hashes of recipes are made with."""
    model = schema.model
    own = select(model.c.uri, model.c.sha256).where(model.c.search_id == search)
    return {row.uri: row.sha256 for row in db.execute(own)}


def _scores(db: Connection, condition: ColumnElement[bool]) -> dict[int, dict[str, Scores]]:
    """By evaluation and task, in the order they were recorded in."""
    table, owner, score = schema.evaluation, schema.candidate, schema.score
    rows = db.execute(
        select(
            score.c.id,
            score.c.evaluation_id,
            score.c.task,
            score.c.codec,
            score.c.blob,
            score.c.sha256,
        )
        .join(table, table.c.id == score.c.evaluation_id)
        .join(owner, owner.c.id == table.c.candidate_id)
        .where(condition)
    ).all()  # at once is faster, and the arrays below keep the blobs anyway
    unpacked = []
    for id, owner_id, task, number, blob, sha in rows:
        what = f"the scores of evaluation {owner_id} on task '{task}'"
        unpacked.append((id, owner_id, task, codec.unpack_scores(number, blob, sha, what)))
    # Put in order here: a database would carry every blob through its sort.
    found: dict[int, dict[str, Scores]] = {}
    for _, owner_id, task, scores in sorted(unpacked, key=itemgetter(0)):
        found.setdefault(owner_id, {})[task] = scores
    return found


def _generation(row: Row[Any]) -> GenerationRow:
    told, ask, tell = row.told_at is not None, row.ask, row.tell
    if row.kind == "proposed":
        ask, tell = log_places(row.number, told, ask, tell)
    return GenerationRow(
        row.number,
        row.kind,
        row.step_size,
        told,
        _document(row.review),
        _document(row.optimizer),
        row.opened_at,
        row.told_at,
        ask,
        tell,
    )


def _candidate(
    id: int,
    generation: int,
    slot: int,
    label: str | None,
    state: str,
    reason: str | None,
    recipe_sha: str | None,
    fitness: float | None,
    told: float | None,
    objectives: str | None,
    violation: float | None,
    blob: bytes | None,
    sha: str,
) -> CandidateRow:
    what = f"the coordinates of candidate {id}"
    return CandidateRow(
        id,
        generation,
        slot,
        label,
        state,
        reason,
        None if blob is None else codec.unpack_genotype(blob, sha, what),
        recipe_sha,
        fitness,
        told,
        None if objectives is None else tuple(json.loads(objectives)),
        violation,
    )


def _document(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    document: Mapping[str, Any] = json.loads(text)
    return dict(document)
