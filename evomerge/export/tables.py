"""A stored search as tables, and these tables as files. Reads the store alone, loads no models.

What the sealed test split said is not among them: it stands in an export's report.
"""

import csv
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.coordinates import Coordinate
from evomerge.devices import Device
from evomerge.errors import InputError
from evomerge.merge.place import check_free
from evomerge.messages import one_line
from evomerge.store import (
    CandidateRow,
    EvaluationRow,
    GenerationRow,
    SearchRow,
    Store,
    uncollected,
)

Column = NDArray[Any] | list[Any]
Table = Mapping[str, Column]

_PURPOSES = ("train", "monitor", "full", "validation")
_ROWS_AT_ONCE = 65536  # of millions; as objects of Python a row takes half a kilobyte
_FOR_A_CANDIDATE = ("train", "full", "validation")  # what its own row sums up
_NAMES = ("candidates", "genotypes", "scores", "evaluations", "generations", "devices", "recipes")


@dataclass(frozen=True)
class Rows:
    """A search as it stood when it was read, without its recipes; of its evaluations all but those
    on test.

    url: of the store. coordinates: what each value of a genotype is; of searches that did not write
    it down, continuous and named x0, x1, ...
    """

    url: str
    search: SearchRow
    coordinates: tuple[Coordinate, ...]
    tasks: tuple[str, ...]
    generations: Sequence[GenerationRow]
    candidates: Sequence[CandidateRow]
    evaluations: Sequence[EvaluationRow]
    devices: Sequence[Device]

    @classmethod
    def of(cls, store: Store, search: str) -> "Rows":
        """Raises StoreError for an unknown search, and for genotypes or scores that are damaged,
        naming them."""
        row = store.search(search)
        generations = store.generations(row.id)
        with uncollected():
            candidates = store.candidates(row.id)
            known = {c.id for c in candidates}
            # A search that runs goes on between two reads.
            evaluations = [e for e in store.evaluations(row.id, _PURPOSES) if e.candidate in known]
        width = next((len(c.genotype) for c in candidates if c.genotype is not None), 0)
        named = store.coordinates(row.id) or tuple(Coordinate(f"x{i}", 0.5) for i in range(width))
        tasks = tuple(dict.fromkeys(task for task, _ in store.splits(row.id)))
        devices = store.devices(row.id)
        return cls(store.url, row, named, tasks, generations, candidates, evaluations, devices)


@dataclass(frozen=True)
class Tables:
    """Each table maps columns to arrays or lists of one length, so that
    `pandas.DataFrame(tables.candidates)` is a data frame; what is missing is NaN or None.

    A table is put together when it is first asked for. Recipes, which are long and never change,
    are not even read before.
    """

    rows: Rows

    @cached_property
    def candidates(self) -> Table:
        """One row each, by generation and slot.

        For purposes train (the driving examples), full (all of train) and validation, where anyone
        was scored for it, and each task T: `train_T`, the mean, `train_T_n`, the number of
        examples, `train_T_se`, the mean's standard error. merge_seconds, score_seconds and
        gpu_seconds, which are the time of both times the GPUs: of all its evaluations together.
        """
        rows = self.rows.candidates
        at = {c.id: i for i, c in enumerate(rows)}
        table: dict[str, Column] = {
            "id": np.array([c.id for c in rows], np.int64),
            "generation": np.array([c.generation for c in rows], np.int64),
            "slot": np.array([c.slot for c in rows], np.int64),
            "label": [c.label for c in rows],
            "state": [c.state for c in rows],
            "fitness": _numbers(c.fitness for c in rows),
            "told": _numbers(c.told for c in rows),
            "violation": _numbers(c.violation for c in rows),
        }
        for i, name in enumerate(self.rows.search.job.get("objectives") or ()):
            table[f"objective_{name}"] = _numbers(
                None if c.objectives is None else c.objectives[i] for c in rows
            )
        table["recipe_sha"] = [c.recipe_sha for c in rows]
        table["reason"] = [c.reason for c in rows]
        merging, seconds, charged = np.zeros((3, len(rows)))
        for e in self.rows.evaluations:
            merging[at[e.candidate]] += e.merge_seconds
            seconds[at[e.candidate]] += e.seconds
            charged[at[e.candidate]] += e.seconds * e.gpus
        table["merge_seconds"], table["score_seconds"] = merging, seconds - merging
        table["gpu_seconds"] = charged
        for purpose in _FOR_A_CANDIDATE:
            for task in self.rows.tasks:
                parts = [
                    (at[e.candidate], e.scores[task].scores)
                    for e in self.rows.evaluations
                    if e.purpose == purpose and e.scores
                ]
                if parts:
                    mean, n, error = _summed_up(parts, len(rows))
                    name = f"{purpose}_{task}"
                    table |= {name: mean, f"{name}_n": n, f"{name}_se": error}
        return table

    @cached_property
    def genotypes(self) -> Table:
        """`candidate`, then a column in [0, 1] for each coordinate; of proposed candidates."""
        having = [c for c in self.rows.candidates if c.genotype is not None]
        matrix = np.array([c.genotype for c in having]).reshape(
            len(having), len(self.rows.coordinates)
        )
        ids = {"candidate": np.array([c.id for c in having], np.int64)}
        return ids | {c.name: matrix[:, i] for i, c in enumerate(self.rows.coordinates)}

    @cached_property
    def scores(self) -> Table:
        """One row for each example of each evaluation; example: its position in the split."""
        rows = self.rows.evaluations
        found = [(e, task, s) for e in rows for task, s in (e.scores or {}).items()]
        lengths = np.array([len(s) for *_, s in found], np.int64)

        def repeated(values: Iterator[Any], dtype: Any) -> NDArray[Any]:
            return np.repeat(np.array(list(values), dtype), lengths)

        def joined(parts: Iterator[NDArray[Any]], dtype: Any) -> NDArray[Any]:
            return np.concatenate([np.empty(0, dtype), *parts])

        return {
            "candidate": repeated((e.candidate for e, *_ in found), np.int64),
            "task": repeated((task for _, task, _ in found), object),
            "purpose": repeated((e.purpose for e, *_ in found), object),
            "stage": repeated((e.stage for e, *_ in found), np.int64),
            "example": joined((s.examples for *_, s in found), np.uint32),
            "score": joined((s.scores for *_, s in found), np.float32),
            "truncated": joined((s.truncated for *_, s in found), np.bool_),
            "tokens": joined((s.tokens for *_, s in found), np.uint32),
        }

    @cached_property
    def evaluations(self) -> Table:
        """One row each. reason: why it failed. copied_from: the candidate with the same recipe
        whose result it is. recorded_at: UTC. device: where it was made; gpus: that were held for
        it, a CPU counted as one; waited: seconds for a free device."""
        rows = self.rows.evaluations
        return {
            "candidate": np.array([e.candidate for e in rows], np.int64),
            "purpose": [e.purpose for e in rows],
            "stage": np.array([e.stage for e in rows], np.int64),
            "state": ["failed" if e.scores is None else "scored" for e in rows],
            "reason": [e.reason for e in rows],
            "merge_seconds": np.array([e.merge_seconds for e in rows], np.float64),
            "seconds": np.array([e.seconds for e in rows], np.float64),
            "copied_from": [e.copied_from for e in rows],
            "recorded_at": [e.recorded_at for e in rows],
            "device": [e.device for e in rows],
            "gpus": np.array([e.gpus for e in rows], np.float64),
            "waited": np.array([e.waited for e in rows], np.float64),
        }

    @cached_property
    def generations(self) -> Table:
        """One row each. incumbent, shrunk, gap with its standard error, hypervolume: of the review
        at its end. optimizer: who proposed it. ask, tell: when it was asked for and told of,
        counted in the search's asks and tells together."""
        rows = self.rows.generations
        reviews = [g.review or {} for g in rows]
        return {
            "number": np.array([g.number for g in rows], np.int64),
            "kind": [g.kind for g in rows],
            "step_size": _numbers(g.step_size for g in rows),
            "told": np.array([g.told for g in rows], np.bool_),
            "incumbent": [review.get("incumbent") for review in reviews],
            "shrunk": _numbers(review.get("shrunk") for review in reviews),
            "gap": _numbers(review.get("gap") for review in reviews),
            "gap_se": _numbers(review.get("standard_error") for review in reviews),
            "hypervolume": _numbers(review.get("hypervolume") for review in reviews),
            "optimizer": [(g.optimizer or {}).get("name") for g in rows],
            "opened_at": [g.opened_at for g in rows],
            "told_at": [g.told_at for g in rows],
            "ask": _numbers(g.ask for g in rows),
            "tell": _numbers(g.tell for g in rows),
        }

    @cached_property
    def devices(self) -> Table:
        """One row each. Where the time went, in seconds, while this search held it; `held` is all
        of it. evaluations: how many it made. None of searches that did not write it down."""
        rows = self.rows.devices
        times = ("gpus", "held", "opening", "merging", "scoring", "lost")
        return {
            "name": [d.name for d in rows],
            **{key: np.array([getattr(d, key) for d in rows], np.float64) for key in times},
            "evaluations": np.array([d.evaluations for d in rows], np.int64),
        }

    @cached_property
    def recipes(self) -> Table:
        """The recipe of each feasible candidate, as JSON, which is YAML too. Raises StoreError, as
        `load` does."""
        with Store(self.rows.url) as store:
            recipes = store.recipes(store.search(self.rows.search.name).id)
        having = [c for c in self.rows.candidates if c.id in recipes]
        return {
            "candidate": np.array([c.id for c in having], np.int64),
            "recipe_sha": [c.recipe_sha for c in having],
            "recipe": [recipes[c.id] for c in having],
        }


def load(store: str | os.PathLike[str], search: str) -> Tables:
    """A search as tables, while it runs or after; nothing is locked, nothing unsealed.

    store: a URL, or the path of an SQLite file. Raises StoreError for what cannot be opened, for
    an unknown search, and for genotypes or scores that are damaged, naming them.
    """
    url = os.fspath(store)
    with Store(url) as opened:
        return Tables(Rows.of(opened, search))


def write_csv(tables: Tables, out: Path, step: Callable[[str], None]) -> list[Path]:
    """A file of comma-separated values for each table, in a new folder. Gives the files.

    step: is told each file. Raises what check_free raises, and InputError where nothing can be
    written.
    """

    def write(table: Table, path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(table)
            for first in range(0, len(next(iter(table.values()))), _ROWS_AT_ONCE):
                pieces = [column[first : first + _ROWS_AT_ONCE] for column in table.values()]
                writer.writerows(zip(*map(_cells, pieces), strict=True))

    return _written(tables, out, "csv", write, step)


def write_parquet(tables: Tables, out: Path, step: Callable[[str], None]) -> list[Path]:
    """`write_csv`, as Parquet. Raises InputError where pyarrow is missing, too."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            "--parquet: Parquet is written by pyarrow: pip install 'evomerge[tasks]', or --csv"
        ) from None

    def write(table: Table, path: Path) -> None:
        parquet.write_table(pyarrow.table(dict(table)), path)

    return _written(tables, out, "parquet", write, step)


def _written(
    tables: Tables,
    out: Path,
    suffix: str,
    write: Callable[[Table, Path], None],
    step: Callable[[str], None],
) -> list[Path]:
    """All tables in a folder that is there whole or not at all."""
    place = check_free(out)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    except OSError as error:
        raise InputError(f"output '{out}' cannot be written: {one_line(error)}") from None
    try:
        for name in _NAMES:
            step(f"writing {name}.{suffix}")
            write(getattr(tables, name), building / f"{name}.{suffix}")
        building.chmod(0o755)
        building.rename(place)
    except OSError as error:
        raise InputError(f"output '{out}' cannot be written: {one_line(error)}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return [place / f"{name}.{suffix}" for name in _NAMES]


def _cells(column: Column) -> list[Any]:
    """For a CSV file, in which what is missing is an empty cell."""
    if not isinstance(column, np.ndarray):
        return column
    values: list[Any] = column.tolist()
    if column.dtype.kind == "f" and np.isnan(column).any():
        return [None if math.isnan(value) else value for value in values]
    return values


def _numbers(values: Iterator[float | None]) -> NDArray[np.float64]:
    """NaN where there is none."""
    return np.array([np.nan if v is None else v for v in values], np.float64)


def _summed_up(
    parts: Sequence[tuple[int, NDArray[np.float32]]], rows: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Mean, number and standard error of the mean, (rows,) each, of scores that belong to the row
    beside them, at least one; NaN where there are none, and no error of a single one."""
    owners = np.array([row for row, _ in parts])
    lengths = np.array([len(scores) for _, scores in parts])
    starts = np.cumsum(lengths) - lengths
    scores = np.concatenate([scores for _, scores in parts]).astype(np.float64)

    def summed(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(owners, np.add.reduceat(values, starts), rows).astype(np.float64)

    n = np.bincount(owners, lengths, rows).astype(np.int64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = summed(scores) / n
        scores -= np.repeat(mean[owners], lengths)
        error = np.sqrt(summed(np.square(scores, out=scores)) / (n - 1) / n)
    return mean, n, np.where(n > 1, error, np.nan)
