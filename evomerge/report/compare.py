"""Two recipes, or several searches, side by side. Reads the store alone."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from evomerge.fitness.results import Scores
from evomerge.guard.estimates import paired_gain
from evomerge.recipe import Recipe
from evomerge.report.questions import groups_of
from evomerge.search import summary
from evomerge.seeds import generator
from evomerge.store import SearchRow, Store, consistent

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A score and its interval at level 0.95, where there is one."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Compared:
    """One search beside others. estimates: of its best candidate, by the names of
    summary.ESTIMATES but test; None what there is not (yet). gain: of the winner over the best
    parent on validation, with its p-value. hours: by the clock; gpu_hours: of devices."""

    search: str
    state: str
    optimizer: str
    space: str
    objective: str
    tasks: tuple[str, ...]
    candidates: int
    generations: int
    example_evaluations: int
    hours: float
    gpu_hours: float
    best: int | None
    estimates: dict[str, Estimate | None]
    best_parent: str | None
    gain: Estimate | None
    p_value: float | None
    promoted: bool | None
    stop_reason: str | None


@dataclass(frozen=True)
class Difference:
    """Of two searches' winners on the same n examples of validation: ours less theirs, the weighted
    mean over the tasks by the weights of ours. p_value: two-sided, of no difference, one of as many
    as there are pairs; both winners were chosen by these examples."""

    ours: str
    theirs: str
    n: int
    gain: float
    interval: Interval
    p_value: float


@dataclass(frozen=True)
class SideBySide:
    """Searches side by side, in the order they were asked for. same_questions: whether all ask the
    same of train and validation, so that their scores may be compared. differences: of each pair of
    winners that looked at the same validation split."""

    searches: tuple[Compared, ...]
    same_questions: bool
    differences: tuple[Difference, ...]


def recipes(ours: str, theirs: str, names: tuple[str, str] = ("ours", "theirs")) -> str:
    """What two recipes, as YAML, differ by: a unified diff, empty where they are alike. Spelling
    alone is no difference. Raises RecipeError, naming the one that is none."""
    first, second = (
        Recipe.from_yaml(text, name).to_yaml().splitlines()
        for text, name in zip((ours, theirs), names, strict=True)
    )
    return "\n".join(difflib.unified_diff(first, second, *names, lineterm=""))


@consistent
def searches(store: Store, names: Sequence[str]) -> SideBySide:
    """Raises StoreError for an unknown search, and for scores that are damaged."""
    rows = [store.search(name) for name in names]
    asked = [_asked(store, row, "train", "validation") for row in rows]
    pairs = combinations(range(len(rows)), 2)
    found = [_difference(store, rows[i], rows[j]) for i, j in pairs]
    return SideBySide(
        tuple(_compared(store, row) for row in rows),
        all(one == asked[0] for one in asked),
        tuple(one for one in found if one is not None),
    )


def _asked(store: Store, row: SearchRow, *splits: str) -> dict[tuple[str, str], str]:
    """The content of these splits of all tasks."""
    found = store.splits(row.id)
    return {key: split.content for key, split in found.items() if key[1] in splits}


def _compared(store: Store, row: SearchRow) -> Compared:
    shown = summary.show(store, row.name)
    best, used, gain = shown["best"], shown["budget"], shown["validation_gain"]
    estimates = dict.fromkeys(key for key in summary.ESTIMATES if key != "test")
    given = shown["estimates"] or {}
    return Compared(
        row.name,
        row.state,
        shown["optimizer"],
        row.job["space"]["kind"],
        row.job["objective"],
        tuple(shown["tasks"]),
        shown["candidates_tried"],
        shown["generations"],
        used["example_evaluations"]["used"],
        used["hours"]["used"],
        used["gpu_hours"]["used"],
        None if best is None else best["candidate"],
        {key: _estimate(given.get(key)) for key in estimates},
        _name(shown, shown["best_parent"]),
        _estimate(gain),
        None if gain is None else gain["p_value"],
        shown["promoted"],
        row.stop_reason,
    )


def _estimate(found: dict[str, Any] | None) -> Estimate | None:
    if found is None:
        return None
    interval = found["interval"]
    return Estimate(found["value"], None if interval is None else (interval[0], interval[1]))


def _name(shown: dict[str, Any], candidate: int | None) -> str | None:
    parents = shown["parents"].items()
    return next((name for name, one in parents if one["candidate"] == candidate), None)


def _difference(store: Store, ours: SearchRow, theirs: SearchRow) -> Difference | None:
    first, second = _looked(store, ours), _looked(store, theirs)
    asked = [_asked(store, row, "validation") for row in (ours, theirs)]
    if first is None or second is None or asked[0] != asked[1]:
        return None
    try:
        same = {task: second[task].only(scores.examples) for task, scores in first.items()}
    except KeyError:
        return None  # beside other tasks other items are left out
    random = generator(ours.seed, f"comparison with the winner of {theirs.name}")
    groups = groups_of(store, ours, "validation", first)
    gain = paired_gain(first, same, summary.task_weights(store, ours), random, groups)
    estimate = gain.estimate
    return Difference(
        ours.name, theirs.name, gain.n, estimate.value, estimate.interval, gain.p_value
    )


def _looked(store: Store, row: SearchRow) -> dict[str, Scores] | None:
    """What the winner scored on validation."""
    if row.verdict is None:
        return None
    (looked,) = store.evaluations(row.id, ("validation",), ids=[row.verdict["winner"]])
    return looked.scores
