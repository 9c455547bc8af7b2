"""A stored search as a study of Optuna's. Reads the store alone, and nothing of test splits."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from evomerge.coordinates import Genotype
from evomerge.errors import InputError, StoreError, StoreUnavailable
from evomerge.export.tables import Rows
from evomerge.fitness.results import Scores
from evomerge.messages import without_password
from evomerge.optimizer.optuna_study import Point, write_study
from evomerge.store import CandidateRow, EvaluationRow, GenerationRow, Store, exists


def export_study(
    store: Store, name: str, url: str, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Write every candidate that the optimizer was told of as a trial of a study `name` in Optuna's
    database at `url`; gives how many, by state, and the URL without its password.

    Values are what was told, or those of each objective. progress: trials written, of all. Raises
    StoreError for an unknown or damaged search, and InputError for a study that is there already
    and where nothing can be written.
    """
    _check_apart(url)
    rows = Rows.of(store, name)
    points = _points(rows)
    search, job = rows.search, rows.search.job
    write_study(
        url,
        name,
        rows.coordinates,
        job.get("objectives") or ["told"],
        points,
        {
            "evomerge": search.versions.get("evomerge"),
            "seed": search.seed,
            "optimizer": job["optimizer"]["name"],
            "state": search.state,
        },
        progress,
    )
    failed = sum(point.values is None for point in points)
    shown = without_password(url)
    return {"study": name, "url": shown, "complete": len(points) - failed, "failed": failed}


def _check_apart(url: str) -> None:
    """A store is no place for Optuna's tables, and a bare path no address of a database."""
    if "://" not in url:
        raise InputError(f"--optuna '{url}': give a database's URL, such as sqlite:///{url}")
    try:
        taken = exists(url)  # of whatever schema
    except (StoreError, StoreUnavailable):  # no place for a store: Optuna says what it finds there
        return
    if taken:
        raise InputError(
            f"--optuna '{without_password(url)}' is a store of evomerge: name a database of its own"
        )


def _points(rows: Rows) -> list[Point]:
    """What the optimizer was told of, by generation and slot."""
    told = {g.number: g for g in rows.generations if g.kind == "proposed" and g.told_at}
    evaluations: dict[int, list[EvaluationRow]] = {}
    for e in rows.evaluations:
        if e.purpose == "train":
            evaluations.setdefault(e.candidate, []).append(e)
    return [
        _point(c, c.genotype, told[c.generation], evaluations.get(c.id, []))
        for c in rows.candidates
        if c.generation in told and c.genotype is not None
    ]


def _point(
    candidate: CandidateRow,
    genotype: Genotype,
    generation: GenerationRow,
    train: Sequence[EvaluationRow],
) -> Point:
    """train: its evaluations on the driving examples; of an infeasible one, none."""
    ends = [datetime.fromisoformat(e.recorded_at) for e in train]
    starts = [end - timedelta(seconds=e.seconds) for end, e in zip(ends, train, strict=True)]
    opened = datetime.fromisoformat(generation.opened_at)
    scores: dict[str, list[Scores]] = {}
    for e in train:
        for task, part in (e.scores or {}).items():
            scores.setdefault(task, []).append(part)
    notes = {
        "candidate": candidate.id,
        "generation": candidate.generation,
        "slot": candidate.slot,
        "fitness": candidate.fitness,
        "violation": candidate.violation,
        "recipe_sha": candidate.recipe_sha,
        "reason": candidate.reason,
        **{f"train_{task}": Scores.joined(parts).mean for task, parts in scores.items()},
    }
    single = None if candidate.told is None else (candidate.told,)
    return Point(
        genotype,
        (candidate.objectives or single) if candidate.state == "scored" else None,
        min(starts, default=opened),
        max(ends, default=opened),
        {key: value for key, value in notes.items() if value is not None},
    )
