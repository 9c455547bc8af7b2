"""Sums over a search, and pages of its candidates, put together by the database: nobody reads ten
thousand rows to show fifty, or examples to show means.

Knows the tables, and nothing of what is made of the numbers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Select,
    Subquery,
    and_,
    case,
    func,
    literal,
    or_,
    select,
    tuple_,
)

from evomerge.store import codec, schema
from evomerge.store.store import Store

T = TypeVar("T")

Sort = Literal["standing", "generation", "fitness", "score", "examples", "violation", "seconds"]
Key = tuple[float, ...]  # what puts candidates in an order, the last of it the id

_NOTHING = 1e300  # a number that candidates do not have; they come last, either way

# Of candidates, what puts them in the order of their standing; SQLite has it all in an index.
_STANDING = ("id", "search_id", "generation", "slot", "label", "state", "fitness", "violation")

_candidate, _generation = schema.candidate, schema.generation
_evaluation, _score, _sample = schema.evaluation, schema.score, schema.sample


@dataclass(frozen=True)
class GenerationSums:
    """Of one generation. states: its candidates by state. examples: that its candidates cost the
    budget. means: of each task, over those that were scored to the end."""

    states: Mapping[str, int]
    examples: int
    means: Mapping[str, float]


@dataclass(frozen=True)
class FailureSums:
    """What went wrong for one reason. kind: failed, of evaluations; infeasible, of genotypes.
    candidates: the first few of `count`. first_at, last_at: UTC, ISO 8601."""

    kind: Literal["failed", "infeasible"]
    reason: str
    count: int
    candidates: tuple[int, ...]
    first_at: str
    last_at: str


@dataclass(frozen=True)
class SampleRow:
    """A reply to an example of train, at its position in the split."""

    candidate: int
    task: str
    position: int
    reply: str


@dataclass(frozen=True)
class TimeSums:
    """Of evaluations that were made, in seconds. each: of every proposed candidate that was
    evaluated, all that drove the search or watched it. waited: for a device, on average; None where
    nobody wrote it down."""

    each: Sequence[float]
    waited: float | None


class Sums:
    """Of one search, by its id. Every method is one consistent read."""

    def __init__(self, store: Store, search: int) -> None:
        self._store = store
        self._id = search
        self._own = _candidate.c.search_id == search

    def generations(self, last_stage: int) -> dict[int, GenerationSums]:
        """By number. last_stage: of a race, at which a candidate was scored to the end."""
        scores = _scores_of(
            _candidate.c.generation,
            _score.c.task,
            func.sum(case((_evaluation.c.copied_from.is_(None), _score.c.n), else_=0)),
            func.sum(case((_evaluation.c.purpose == "train", _score.c.n * _score.c.mean))),
            func.sum(case((_evaluation.c.purpose == "train", _score.c.n))),
        ).where(self._own & _candidate.c.label.is_(None))
        scores = scores.group_by(_candidate.c.generation, _score.c.task)
        counted = _evaluation.c.purpose.in_(("train", "monitor"))
        ended = _evaluation.alias()
        to_the_end = (
            select(literal(1))
            .where(ended.c.candidate_id == _candidate.c.id)
            .where((ended.c.purpose == "train") & (ended.c.stage == last_stage))
            .where(ended.c.state == "scored")
            .exists()
        )
        states = (
            select(_candidate.c.generation, _candidate.c.state, func.count())
            .where(self._own)
            .group_by(_candidate.c.generation, _candidate.c.state)
        )

        def read(db: Connection) -> dict[int, GenerationSums]:
            examples: dict[int, int] = {}
            means: dict[int, dict[str, float]] = {}
            by_state: dict[int, dict[str, int]] = {}
            all_ = db.execute(scores.where(counted)).all()
            of_ended = db.execute(scores.where(counted & to_the_end)).all() if last_stage else all_
            for number, _, n, _, _ in all_:
                examples[number] = examples.get(number, 0) + int(n)
            for number, task, _, summed, n in of_ended:
                if n:
                    means.setdefault(number, {})[task] = float(summed / n)
            for number, state, count in db.execute(states):
                by_state.setdefault(number, {})[state] = count
            return {
                number: GenerationSums(own, examples.get(number, 0), means.get(number, {}))
                for number, own in by_state.items()
            }

        return self._read(read)

    def keys(
        self,
        sort: Sort,
        descending: bool,
        weights: Mapping[str, float],
        limit: int | None,
        after: Key | None = None,
        state: str | None = None,
        generation: int | None = None,
    ) -> list[Key]:
        """Candidates in an order, each by what puts it there, its id at the end; those without such
        a number last. standing: whoever was scored, keeps the constraints, was scored on more
        examples, is fitter, in this order. weights: of tasks, for the score. after: the last of
        the page before. state, generation: of these alone."""
        ordered = self._ordered(sort, descending, weights, state, generation)
        columns = list(ordered.c)
        query = select(*columns).order_by(*columns).limit(limit)
        if after is not None:
            query = query.where(_beyond(columns, after))
        return self._read(lambda db: [tuple(row) for row in db.execute(query)])

    def count(self, state: str | None = None, generation: int | None = None) -> int:
        """Of candidates, baselines included."""
        query = select(func.count()).select_from(_candidate).where(self._own)
        for column, value in ((_candidate.c.state, state), (_candidate.c.generation, generation)):
            if value is not None:
                query = query.where(column == value)
        return self._read(lambda db: int(db.execute(query).scalar_one()))

    def place(self, candidate: int) -> int:
        """Of a candidate of this search by its standing, from 1."""
        other = self._ordered("standing", True, {}, None, None)
        own = select(other).where(other.c.id == candidate).scalar_subquery()
        query = select(func.count()).select_from(other).where(tuple_(*other.c) < own)
        return self._read(lambda db: 1 + int(db.execute(query).scalar_one()))

    def seconds(self, ids: Iterable[int] | None = None) -> dict[int, float]:
        """Of devices, on CPUs each counted as one: what each of these candidates took, by default
        of all."""
        chosen = self._own if ids is None else self._own & _candidate.c.id.in_(list(ids))
        query = (
            select(_evaluation.c.candidate_id, func.sum(_evaluation.c.seconds * _evaluation.c.gpus))
            .join(_candidate, _candidate.c.id == _evaluation.c.candidate_id)
            .where(chosen)
            .group_by(_evaluation.c.candidate_id)
        )
        return self._read(lambda db: dict(map(tuple, db.execute(query))))

    def time(self) -> TimeSums:
        """Where the evaluations' time went."""
        made = (
            select(_evaluation.c.candidate_id)
            .join(_candidate, _candidate.c.id == _evaluation.c.candidate_id)
            .where(self._own & _evaluation.c.copied_from.is_(None))
        )
        each = made.with_only_columns(func.sum(_evaluation.c.seconds)).where(
            _candidate.c.label.is_(None) & _evaluation.c.purpose.in_(("train", "monitor"))
        )
        waited = made.with_only_columns(func.avg(_evaluation.c.waited)).where(
            _evaluation.c.device.is_not(None)  # of older searches it is not known
        )

        def read(db: Connection) -> TimeSums:
            found = db.execute(each.group_by(_evaluation.c.candidate_id)).scalars().all()
            return TimeSums(found, db.execute(waited).scalar())

        return self._read(read)

    def failures(self, few: int) -> list[FailureSums]:
        """By kind and reason; what was copied from a twin counts. few: how many are named."""
        failed = (
            select(
                _candidate.c.id,
                _evaluation.c.reason,
                func.min(_evaluation.c.recorded_at).label("first"),
                func.max(_evaluation.c.recorded_at).label("last"),
            )
            .join(_candidate, _candidate.c.id == _evaluation.c.candidate_id)
            .where(self._own & (_evaluation.c.state == "failed"))
            .group_by(_candidate.c.id, _evaluation.c.reason)
        )
        # Apart, for SQLite has all that it asks for in an index.
        without_model = select(_candidate.c.id).where(
            self._own & (_candidate.c.state == "infeasible")
        )
        infeasible = (
            select(
                _candidate.c.id,
                _candidate.c.reason,
                _generation.c.opened_at.label("first"),
                _generation.c.opened_at.label("last"),
            )
            .join(_generation, _generation.c.id == _candidate.c.generation_id)
            .where(_candidate.c.id.in_(without_model))
        )

        def read(db: Connection) -> list[FailureSums]:
            return [
                *_failures(db, "failed", failed, few),
                *_failures(db, "infeasible", infeasible, few),
            ]

        return self._read(read)

    def twins(self, candidate: int, recipe_sha: str, few: int) -> tuple[int, ...]:
        """The first few other candidates with a recipe."""
        query = (
            select(_candidate.c.id)
            .where(self._own & (_candidate.c.recipe_sha == recipe_sha))
            .where(_candidate.c.id != candidate)
            .order_by(_candidate.c.id)
            .limit(few)
        )
        return self._read(lambda db: tuple(db.execute(query).scalars()))

    def samples(self, ids: Iterable[int]) -> list[SampleRow]:
        """What is kept of the replies of these candidates, by task and position; of whatever search
        they are, as copied results refer to others."""
        query = (
            select(_evaluation.c.candidate_id, _sample.c.task, _sample.c.position, _sample.c.reply)
            .join(_evaluation, _evaluation.c.id == _sample.c.evaluation_id)
            .where(_evaluation.c.candidate_id.in_(list(ids)))
            .order_by(_sample.c.task, _sample.c.position, _evaluation.c.id)
        )
        return self._read(lambda db: [SampleRow(*row) for row in db.execute(query)])

    def proposals(
        self, last_stage: int, most: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Genotypes, (n, d), and fitness, (n,), of at most so many candidates that were scored to
        the end and keep the constraints, spread evenly over the search. last_stage: of a race, at
        which a candidate was. Raises StoreError for a genotype that is damaged."""
        table = _candidate
        listed = (
            select(table.c.id)
            .join(_evaluation, _evaluation.c.candidate_id == table.c.id)
            .where(self._own & table.c.label.is_(None) & table.c.fitness.is_not(None))
            .where(func.coalesce(table.c.violation, 0.0) == 0.0)
            .where((_evaluation.c.purpose == "train") & (_evaluation.c.stage == last_stage))
            .where(_evaluation.c.state == "scored")
        ).subquery()
        place = func.row_number().over(order_by=listed.c.id) - 1
        count = func.count().over()
        placed = select(listed.c.id, place.label("place"), count.label("count")).subquery()
        apart = (placed.c["count"] + most - 1) // most
        chosen = (
            select(table.c.id, table.c.genotype, table.c.genotype_sha, table.c.fitness)
            .join(placed, placed.c.id == table.c.id)
            .where(placed.c.place % apart == 0)
            .order_by(table.c.id)
        )

        def read(db: Connection) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            genotypes, fitness = [], []
            for id, blob, sha, value in db.execute(chosen):
                what = f"the coordinates of candidate {id}"
                genotypes.append(codec.unpack_genotype(blob, sha, what))
                fitness.append(value)
            return np.array(genotypes), np.array(fitness, np.float64)

        return self._read(read)

    def _ordered(
        self,
        sort: Sort,
        descending: bool,
        weights: Mapping[str, float],
        state: str | None,
        generation: int | None,
    ) -> FromClause:
        """What puts candidates in an order, in columns that ascend, the last the id."""
        table: FromClause = _candidate
        sign = -1 if descending else 1
        keys: list[ColumnElement[Any]]
        source: Any = table
        if sort == "generation":
            keys = [sign * table.c.generation, sign * table.c.slot]
        elif sort in ("fitness", "violation"):
            keys = [_last(table.c[sort], sign)]
        elif sort == "seconds":
            spent = (
                select(
                    _evaluation.c.candidate_id,
                    func.sum(_evaluation.c.seconds * _evaluation.c.gpus).label("seconds"),
                )
                .group_by(_evaluation.c.candidate_id)
                .subquery()
            )
            source = table.outerjoin(spent, spent.c.candidate_id == table.c.id)
            keys = [_last(spent.c.seconds, sign)]
        elif sort == "score":
            found = self._means(weights)
            source = table.outerjoin(found, found.c.candidate == table.c.id)
            keys = [_last(found.c.score, sign)]
        elif sort == "examples":
            keys = [_last(_examples(table), sign)]
        else:
            columns = [table.c[name] for name in _STANDING]
            listed = select(*columns, _examples(table).label("n")).where(self._own).cte()
            table = source = listed
            of_proposed = select(func.max(listed.c.n)).where(listed.c.label.is_(None))
            most = of_proposed.scalar_subquery()  # baselines were scored on all of train
            n = func.coalesce(listed.c.n, 0)
            keys = [
                sign * case((table.c.state == "scored", 1), else_=0),
                -sign * func.coalesce(table.c.violation, 0.0),
                sign * case((n > most, most), else_=n),
                _last(table.c.fitness, sign),
                -sign * table.c.generation,
                -sign * table.c.slot,
            ]
        named = [key.label(f"key{i}") for i, key in enumerate(keys)]
        chosen = select(*named, table.c.id).select_from(source).where(table.c.search_id == self._id)
        if state is not None:
            chosen = chosen.where(table.c.state == state)
        if generation is not None:
            chosen = chosen.where(table.c.generation == generation)
        return chosen.cte()

    def _means(self, weights: Mapping[str, float]) -> Subquery:
        """The score of each candidate over the tasks, on the same examples."""
        total = func.sum(_score.c.n)
        by_task = (
            _scores_of(
                _candidate.c.id.label("candidate"),
                _evaluation.c.purpose,
                _score.c.task,
                (func.sum(_score.c.mean * _score.c.n) / total).label("mean"),
            )
            .where(self._own & _evaluation.c.purpose.in_(("train", "full")))
            .group_by(_candidate.c.id, _evaluation.c.purpose, _score.c.task)
        ).subquery()
        weight: Any = case(
            *((by_task.c.task == task, float(value)) for task, value in weights.items()),
            else_=0.0,
        )

        def of(purpose: str) -> ColumnElement[Any]:
            chosen = by_task.c.purpose == purpose
            summed = func.sum(case((chosen, weight * by_task.c.mean)))
            return summed / func.sum(case((chosen, weight)))

        score = func.coalesce(of("train"), of("full")).label("score")
        return select(by_task.c.candidate, score).group_by(by_task.c.candidate).subquery()

    def _read(self, read: Callable[[Connection], T]) -> T:
        def attempt() -> T:
            with self._store.database.read() as db:
                return read(db)

        return self._store.database.persist(attempt)


def _examples(candidate: FromClause) -> ColumnElement[Any]:
    """How many examples each candidate was scored on: the driving ones, of those that were never
    scored on these alone, all of train."""
    n = [
        func.sum(case((_evaluation.c.purpose == purpose, _score.c.n)))
        for purpose in ("train", "full")
    ]
    return (
        select(func.coalesce(*n))
        .join_from(_evaluation, _score, _score.c.evaluation_id == _evaluation.c.id)
        .where(_evaluation.c.candidate_id == candidate.c.id)
        .where(_evaluation.c.purpose.in_(("train", "full")))
        .scalar_subquery()
    )


def _scores_of(*columns: ColumnElement[Any]) -> Select[Any]:
    """Of scores, with the evaluation and the candidate that each is of."""
    return (
        select(*columns)
        .select_from(_score)
        .join(_evaluation, _evaluation.c.id == _score.c.evaluation_id)
        .join(_candidate, _candidate.c.id == _evaluation.c.candidate_id)
    )


def _failures(
    db: Connection, kind: Literal["failed", "infeasible"], rows: Select[Any], few: int
) -> list[FailureSums]:
    """rows: candidate, reason, first, last."""
    one = rows.subquery()
    number = func.row_number().over(partition_by=one.c.reason, order_by=one.c.id)
    summed = (func.count(), func.min(one.c.first), func.max(one.c.last))
    count, first, last = (value.over(partition_by=one.c.reason) for value in summed)
    numbered = select(
        one.c.reason,
        one.c.id,
        number.label("number"),
        count.label("count"),
        first.label("first"),
        last.label("last"),
    ).subquery()
    found: dict[str | None, list[Any]] = {}
    for row in db.execute(
        select(numbered).where(numbered.c.number <= few).order_by(numbered.c.number)
    ):
        found.setdefault(row.reason, []).append(row)
    return [
        FailureSums(
            kind,
            reason or "",
            own[0].count,
            tuple(row.id for row in own),
            own[0].first,
            own[0].last,
        )
        for reason, own in found.items()
    ]


def _last(column: ColumnElement[Any], sign: int) -> ColumnElement[Any]:
    """To ascend by, or to descend with the sign -1: what is not there comes last."""
    return func.coalesce(sign * column, _NOTHING)


def _beyond(columns: Sequence[ColumnElement[Any]], key: Key) -> ColumnElement[bool]:
    """Whether columns that ascend come after a key."""
    found = []
    for i, (column, value) in enumerate(zip(columns, key, strict=True)):
        same = [c == v for c, v in zip(columns[:i], key[:i], strict=True)]
        found.append(and_(*same, column > value))
    return or_(*found)
