"""What has to hold within a search, however it was interrupted: each rule, and how it is broken.

Values come as they are in the database; a damaged one may be anything.
"""

import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sqlalchemy import Connection, Row, func, select
from sqlalchemy.exc import DBAPIError

from evomerge.devices import ADDED
from evomerge.messages import one_line
from evomerge.recipe import sha_of
from evomerge.store import codec, schema
from evomerge.store.rows import log_places

RESTORE = "restore a backup of the store"
_BATCH = 500  # rows with blobs that are in memory at once
_PURPOSES = {"train": "train", "monitor": "train", "full": "train", "validation": "validation"}
_OF_EVALUATION = ("merge_seconds", "seconds", "gpus", "waited")  # never negative
_OF_DEVICE = ("gpus", *ADDED)  # the same
_JSON = ("job", "versions", "verdict", "contamination", "coordinates", "holder")


@dataclass(frozen=True)
class Violation:
    """Something that does not hold. search: by name; None of what belongs to no search. where: what
    of it. what: is wrong with it."""

    search: str | None
    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        whose = "" if self.search is None else f"search '{self.search}': "
        return f"{whose}{self.where}: {self.what}: {self.remedy}"


class Judge:
    """Collects what is found. notes: what is no damage and worth knowing."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self.notes: list[str] = []

    def wrong(self, search: str | None, where: str, what: str, remedy: str = RESTORE) -> None:
        """Name a violation."""
        self.violations.append(Violation(search, where, what, remedy))

    @contextmanager
    def judging(self, search: str | None, where: str) -> Iterator[None]:
        """Whatever a damaged value leads to inside is a violation, and hides nothing else."""
        try:
            yield
        except Exception as error:
            if isinstance(error, DBAPIError) and error.connection_invalidated:
                raise  # of the connection, not of what is stored
            self.wrong(search, where, f"cannot be read: {_reason(error)}")


def _reason(error: Exception) -> str:
    """In a line, without the remedy: that of a violation follows."""
    if isinstance(error, DBAPIError) and error.orig is not None:  # not the SQL around it
        return one_line(error.orig)
    text = one_line(error) or type(error).__name__
    return text.removeprefix("the store is damaged: ").removesuffix(": restore a copy")


@dataclass
class _Candidate:
    """What the rules ask of a candidate. results: state by evaluation id, on train."""

    id: int
    generation: int
    state: str
    has_recipe: bool
    recipe_sha: str | None
    told: float | None
    results: dict[int, str] = field(default_factory=dict)
    stages: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    @property
    def where(self) -> str:
        return f"generation {self.generation}, candidate {self.id}"


class SearchCheck:
    """The rules for one search, given its row.

    looks: when each was reserved, by its subject in the ledger. advance: is told how many
    candidates and scores were looked at. Nothing is raised for what is damaged.
    """

    def __init__(
        self,
        db: Connection,
        judge: Judge,
        row: Row[Any],
        looks: Mapping[str, str],
        advance: Callable[[int], None],
    ) -> None:
        self._db = db
        self._judge = judge
        self._row = row
        self._looks = looks
        self._advance = advance
        self._verdict: Any = None
        self._content: dict[str, str] = {}  # hashes of models by where they are
        self._sizes: dict[tuple[str, str], int] = {}
        self._generations: dict[int, Row[Any]] = {}
        self._candidates: dict[int, _Candidate] = {}
        self._evaluations: dict[int, Row[Any]] = {}
        self._scored: dict[int, list[str]] = defaultdict(list)  # tasks by evaluation

    def run(self) -> None:
        """Look at everything, what the later parts need first."""
        for part, where in (
            (self._search, "its row"),
            (self._models, "its models"),
            (self._splits, "its splits"),
            (self._shared_items, "items of its splits"),
            (self._read_generations, "its generations"),
            (self._read_candidates, "its candidates"),
            (self._read_evaluations, "its evaluations"),
            (self._read_scores, "its scores"),
            (self._results, "its evaluations"),
            (self._copies, "its copied evaluations"),
            (self._states, "its candidates"),
            (self._told, "its generations"),
            (self._log, "its log of asks and tells"),
            (self._devices, "its devices"),
            (self._wishes, "what was asked of it"),
            (self._samples, "its samples"),
            (self._final_verdict, "its verdict"),
        ):
            with self._judge.judging(self._row.name, where):
                part()

    def _wrong(self, where: str, what: str, remedy: str = RESTORE) -> None:
        self._judge.wrong(self._row.name, where, what, remedy)

    def _search(self) -> None:
        if self._row.state not in ("open", "finished", "failed"):
            self._wrong("its row", f"the state is '{self._row.state}'")
        if self._row.epoch < 1:
            self._wrong("its row", f"the epoch is {self._row.epoch}")
        for column in _JSON:
            text = getattr(self._row, column)
            if text is not None:
                with self._judge.judging(self._row.name, f"column '{column}'"):
                    document = json.loads(text)
                    if column == "verdict":
                        self._verdict = document

    def _models(self) -> None:
        table = schema.model
        for row in self._db.execute(select(table).where(table.c.search_id == self._row.id)).all():
            self._content[row.uri] = row.sha256
            with self._judge.judging(self._row.name, f"model '{row.name}'"):
                files = json.dumps(json.loads(row.files), sort_keys=True).encode()
                if codec.sha256(files) != row.sha256:
                    self._wrong(f"model '{row.name}'", "its files do not match its hash")

    def _splits(self) -> None:
        table, item = schema.split, schema.split_item
        counted = (
            select(
                table,
                func.count(item.c.position).label("items"),
                func.min(item.c.position).label("first"),
                func.max(item.c.position).label("last"),
            )
            .outerjoin(item, item.c.split_id == table.c.id)
            .where(table.c.search_id == self._row.id)
            .group_by(table.c.id)
        )
        for row in self._db.execute(counted).all():
            self._sizes[row.task, row.split] = row.n
            with self._judge.judging(self._row.name, f"{row.split} of task '{row.task}'"):
                if row.items != row.n or (row.n and (row.first, row.last) != (0, row.n - 1)):
                    self._wrong(
                        f"{row.split} of task '{row.task}'",
                        f"has {row.n} items, and hashes of {row.items}",
                    )

    def _shared_items(self) -> None:
        table, item = schema.split, schema.split_item
        joined = item.join(table, table.c.id == item.c.split_id)
        own = table.c.search_id == self._row.id
        shared = (
            select(item.c.hash)
            .select_from(joined)
            .where(own)
            .group_by(item.c.hash)
            .having(func.count(table.c.split.distinct()) > 1)
        )
        met: dict[str, tuple[str, str]] = {}
        for row in self._db.execute(
            select(item.c.hash, item.c.position, table.c.split, table.c.task)
            .select_from(joined)
            .where(own & item.c.hash.in_(shared))
            .order_by(table.c.id, item.c.position)
        ):
            where = f"item {row.position + 1} of {row.split} of task '{row.task}'"
            first, split = met.setdefault(row.hash, (where, row.split))
            if split != row.split:
                self._wrong(where, f"is {first}", "launch a new search with splits that differ")

    def _read_generations(self) -> None:
        table = schema.generation
        own = select(table).where(table.c.search_id == self._row.id).order_by(table.c.number)
        for number, row in enumerate(self._db.execute(own).all()):
            self._generations[row.id] = row
            where = f"generation {row.number}"
            with self._judge.judging(self._row.name, where):
                if row.number != number:
                    self._wrong(where, f"follows upon generation {number - 1}")
                if (row.number == 0) != (row.kind == "baselines"):
                    self._wrong(where, f"is of kind '{row.kind}'")
                for text in (row.review, row.optimizer):
                    json.loads(text or "null")

    def _read_candidates(self) -> None:
        table = schema.candidate
        own = select(table).where(table.c.search_id == self._row.id)
        slots: dict[int, list[int]] = defaultdict(list)
        dimensions: set[int] = set()
        for row in self._db.execute(own, execution_options={"yield_per": _BATCH}):
            self._advance(1)
            found = _Candidate(
                row.id, row.generation, row.state, row.recipe is not None, row.recipe_sha, row.told
            )
            self._candidates[row.id] = found
            with self._judge.judging(self._row.name, found.where):
                slots[row.generation_id].append(row.slot)
                generation = self._generations.get(row.generation_id)
                if generation is None or generation.number != row.generation:
                    self._wrong(found.where, "is of another generation than it says")
            with self._judge.judging(self._row.name, f"{found.where}, its genotype"):
                if row.genotype is not None or row.genotype_sha is not None:
                    genotype = codec.unpack_genotype(row.genotype, row.genotype_sha, "its bytes")
                    dimensions.add(len(genotype))
                    if not ((genotype >= 0) & (genotype <= 1)).all():
                        self._wrong(found.where, "its genotype is not in the unit cube")
            with self._judge.judging(self._row.name, f"{found.where}, its recipe"):
                if row.recipe is not None:
                    sha = sha_of(json.loads(row.recipe), self._content)
                    if sha != row.recipe_sha:
                        self._wrong(found.where, "its recipe does not match its hash")
        if len(dimensions) > 1:
            self._wrong("its genotypes", f"have {sorted(dimensions)} coordinates")
        for id, generation in self._generations.items():
            where = f"generation {generation.number}"
            with self._judge.judging(self._row.name, where):
                taken = sorted(slots[id])
                if taken != list(range(max(1, len(taken)))):
                    self._wrong(where, f"has slots {taken}")

    def _read_evaluations(self) -> None:
        table, owner = schema.evaluation, schema.candidate
        rows = self._db.execute(
            select(table)
            .join(owner, owner.c.id == table.c.candidate_id)
            .where(owner.c.search_id == self._row.id)
        ).all()
        epoch = 1
        for row in sorted(rows, key=lambda row: row.id):
            self._evaluations[row.id] = row
            where = self._evaluation(row)
            with self._judge.judging(self._row.name, where):
                if row.purpose not in _PURPOSES or row.state not in ("scored", "failed"):
                    self._wrong(where, f"is '{row.state}' for '{row.purpose}'")
                if not 1 <= row.epoch <= self._row.epoch:
                    self._wrong(where, f"is of epoch {row.epoch}, the search of {self._row.epoch}")
                elif row.epoch < epoch:
                    self._wrong(where, f"is of epoch {row.epoch}, after one of epoch {epoch}")
                else:
                    epoch = row.epoch
                owner_row = self._candidates[row.candidate_id]
                owner_row.stages[row.purpose].append(row.stage)
                if row.purpose in ("train", "full"):
                    owner_row.results[row.id] = row.state
                self._amounts(row, _OF_EVALUATION, where)

    def _amounts(self, row: Row[Any], columns: Iterable[str], where: str) -> None:
        for column in columns:
            value = row._mapping[column]
            if not 0 <= value < math.inf:
                self._wrong(where, f"its {column} is {value}")

    def _evaluation(self, row: Row[Any]) -> str:
        found = self._candidates.get(row.candidate_id)
        stage = f", stage {row.stage}" if row.stage else ""
        return f"{found.where if found else 'a candidate'}, {row.purpose}{stage}"

    def _read_scores(self) -> None:
        table, evaluation, owner = schema.score, schema.evaluation, schema.candidate
        own = (
            select(table)
            .join(evaluation, evaluation.c.id == table.c.evaluation_id)
            .join(owner, owner.c.id == evaluation.c.candidate_id)
            .where(owner.c.search_id == self._row.id)
        )
        for row in self._db.execute(own, execution_options={"yield_per": _BATCH}):
            self._advance(1)
            self._scored[row.evaluation_id].append(row.task)
            evaluated = self._evaluations[row.evaluation_id]
            where = f"{self._evaluation(evaluated)}, scores of task '{row.task}'"
            with self._judge.judging(self._row.name, where):
                size = self._sizes.get((row.task, _PURPOSES.get(evaluated.purpose, "")))
                for what in score_faults(row, size):
                    self._wrong(where, what)

    def _results(self) -> None:
        tasks = sorted({task for task, _ in self._sizes})
        for id, row in self._evaluations.items():
            where = self._evaluation(row)
            with self._judge.judging(self._row.name, where):
                found = sorted(self._scored[id])
                if row.state == "scored" and found != tasks:
                    self._wrong(
                        where, f"has scores of {found or 'no task'}, the search has {tasks}"
                    )
                if row.state == "failed" and found:
                    self._wrong(where, f"has failed, and has scores of {found}")
                if (row.state == "failed") != (row.reason is not None):
                    self._wrong(where, f"is '{row.state}' for the reason '{row.reason}'")
                if row.purpose == "validation":
                    self._look(row, where)

    def _look(self, row: Row[Any], where: str) -> None:
        reserved = self._looks.get(f"{self._row.name}/{row.candidate_id}")
        if reserved is None:
            self._wrong(where, "no look was reserved for it", "do not trust what the search claims")
        elif reserved > row.recorded_at:
            self._judge.notes.append(
                f"search '{self._row.name}': {where}: its look is of {reserved}, after the result "
                f"of {row.recorded_at}: a clock went wrong, or the ledger was written by hand"
            )

    def _copies(self) -> None:
        table, owner = schema.evaluation, schema.candidate
        other, first = owner.alias(), table.alias()
        recorded = (
            (first.c.candidate_id == table.c.copied_from)
            & (first.c.state == table.c.state)
            & (first.c.id < table.c.id)
        )
        rows = self._db.execute(
            select(table, other.c.recipe_sha.label("other_sha"), owner.c.recipe_sha)
            .join(owner, owner.c.id == table.c.candidate_id)
            .outerjoin(other, other.c.id == table.c.copied_from)
            .where((owner.c.search_id == self._row.id) & table.c.copied_from.is_not(None))
            .where(
                (other.c.recipe_sha.is_distinct_from(owner.c.recipe_sha))
                | ~select(first.c.id).where(recorded).exists()
            )
        ).all()
        for row in rows:
            what = f"is a copy of candidate {row.copied_from}, which "
            if row.other_sha != row.recipe_sha:
                what += "does not have its recipe"
            else:
                what += f"was not {row.state} before"
            self._wrong(self._evaluation(row), what)

    def _states(self) -> None:
        for found in self._candidates.values():
            with self._judge.judging(self._row.name, found.where):
                expected = "open" if found.has_recipe else "infeasible"
                if found.results:
                    expected = found.results[max(found.results)]
                if found.state != expected:
                    self._wrong(
                        found.where, f"is '{found.state}'; by its evaluations it is '{expected}'"
                    )
                if found.has_recipe != (found.recipe_sha is not None):
                    self._wrong(found.where, "has a recipe or the hash of one, not both")
                for purpose, stages in found.stages.items():
                    if sorted(stages) != list(range(len(stages))):
                        self._wrong(found.where, f"has stages {sorted(stages)} of {purpose}")

    def _told(self) -> None:
        members: dict[int, list[_Candidate]] = defaultdict(list)
        for found in self._candidates.values():
            members[found.generation].append(found)
        rows = list(self._generations.values())
        over = self._row.state == "finished" or any(row.kind == "final" for row in rows)
        for row, following in itertools.zip_longest(rows, rows[1:]):
            where = f"generation {row.number}"
            if row.told_at is None:
                # Proposed generations may overlap where asks and tells have their places in a log.
                in_turn = row.kind == "baselines" or (following and following.ask is None)
                if row.kind != "final" and (over or (following and in_turn)):
                    self._wrong(where, "was never told, and the search went on")
                continue
            purpose = "full" if row.kind == "baselines" else "train"
            for found in members[row.number]:
                if found.has_recipe and not found.stages.get(purpose):
                    self._wrong(found.where, f"was told of without a result on {purpose}")
                if row.kind == "proposed" and found.told is None:
                    self._wrong(found.where, "its generation was told; what of it, is not there")

    def _log(self) -> None:
        """Asks and tells are counted together from 1 on, see log_places."""
        places: Counter[int] = Counter()
        last = 0
        for row in self._generations.values():
            where = f"generation {row.number}"
            with self._judge.judging(self._row.name, where):
                if row.kind != "proposed":
                    if (row.ask, row.tell) != (None, None):
                        self._wrong(where, f"is of kind '{row.kind}', and in the log")
                    continue
                told = row.told_at is not None
                ask, tell = log_places(row.number, told, row.ask, row.tell)
                if (tell is not None) != told:
                    self._wrong(where, f"was told at {row.told_at}; its place in the log is {tell}")
                if ask <= last:
                    self._wrong(
                        where, f"was asked for as {ask} of the log, the one before as {last}"
                    )
                if tell is not None and tell <= ask:
                    self._wrong(where, f"was asked for as {ask} of the log, and told as {tell}")
                places.update(place for place in (ask, tell) if place is not None)
                last = ask
        for place in range(1, places.total() + 1):
            if places[place] != 1:
                self._wrong("its log of asks and tells", f"has {places[place]} entries {place}")

    def _devices(self) -> None:
        """What is written down of them comes after the evaluations that they made, and may be
        missing where a process was killed between the two."""
        table = schema.device
        names: dict[int, set[str]] = defaultdict(set)  # by epoch
        seen: dict[int, str] = {}
        for row in self._db.execute(select(table).where(table.c.search_id == self._row.id)).all():
            where = f"device '{row.name}' in epoch {row.epoch}"
            with self._judge.judging(self._row.name, where):
                if not 1 <= row.epoch <= self._row.epoch:
                    self._wrong(where, f"the search is of epoch {self._row.epoch}")
                self._amounts(row, _OF_DEVICE, where)
                names[row.epoch].add(row.name)
                seen[row.epoch] = max(row.seen_at, seen.get(row.epoch, ""))
        for evaluated in self._evaluations.values():
            where = self._evaluation(evaluated)
            with self._judge.judging(self._row.name, where):
                device, epoch = evaluated.device, evaluated.epoch
                if device is None or device in names[epoch]:
                    continue
                if evaluated.recorded_at < seen.get(epoch, ""):
                    self._wrong(where, f"ran on '{device}', which is no device of epoch {epoch}")

    def _wishes(self) -> None:
        table = schema.wish
        for row in self._db.execute(select(table).where(table.c.search_id == self._row.id)):
            if row.kind not in ("pause", "stop", "none"):
                self._wrong(f"wish {row.id}", f"is of kind '{row.kind}'")

    def _samples(self) -> None:
        """Replies are kept to items of train alone, as people read them."""
        table, evaluation, owner = schema.sample, schema.evaluation, schema.candidate
        own = (
            select(table.c.evaluation_id, table.c.task, table.c.position)
            .join(evaluation, evaluation.c.id == table.c.evaluation_id)
            .join(owner, owner.c.id == evaluation.c.candidate_id)
            .where(owner.c.search_id == self._row.id)
        )
        for row in self._db.execute(own):
            evaluated = self._evaluations[row.evaluation_id]
            where = f"{self._evaluation(evaluated)}, reply to item {row.position + 1}"
            with self._judge.judging(self._row.name, where):
                if _PURPOSES.get(evaluated.purpose) != "train":
                    self._wrong(where, f"is of {evaluated.purpose}", "remove it")
                elif not 0 <= row.position < self._sizes[row.task, "train"]:
                    self._wrong(where, f"task '{row.task}' has no such item of train")

    def _final_verdict(self) -> None:
        if self._row.state != "finished":
            return
        verdict = self._verdict
        if verdict is None:
            self._wrong("its verdict", "is missing, and the search is finished")
            return
        for role in ("winner", "best_parent"):
            found = self._candidates.get(verdict[role])
            if found is None:
                self._wrong("its verdict", f"the {role} {verdict[role]} is none of its candidates")
            elif "validation" not in found.stages:
                self._wrong(found.where, f"is the {role}, and was never scored on validation")
        for id in verdict["finalists"]:
            if id not in self._candidates:
                self._wrong("its verdict", f"the finalist {id} is none of its candidates")
        if verdict["winner"] not in verdict["finalists"]:
            self._wrong("its verdict", f"the winner {verdict['winner']} is no finalist")


def score_faults(row: Row[Any], size: int | None) -> Iterator[str]:
    """What is wrong with packed scores, given how many items the split has. Raises StoreError
    where they cannot be unpacked."""
    scores = codec.unpack_scores(row.codec, row.blob, row.sha256, "its bytes")
    if len(scores) != row.n or not len(scores):
        yield f"are of {len(scores)} examples, not of {row.n}"
        return
    counts = {"mean": scores.mean}
    if row.codec >= codec.COUNTED_SINCE:  # older rows say nothing of the rest
        counts |= {
            "tokens": int(scores.tokens.sum(dtype=np.int64)),
            "overlong": int(scores.overlong.sum()),
            "failed": len(scores.failures),
        }
    counts["truncated"] = int(scores.truncated.sum())
    for column, value in counts.items():
        stored = row._mapping.get(column, value)  # a reading has none of them
        if not math.isclose(stored, value, rel_tol=0, abs_tol=1e-9):
            yield f"the {column} is {value}, not {stored}"
    if len(np.unique(scores.examples)) != len(scores):
        yield "an example is scored twice"
    if size is not None and scores.examples.max() >= size:
        yield f"example {scores.examples.max() + 1} of {size} is scored"
