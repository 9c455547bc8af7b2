"""What evomerge's claims and estimates are worth, over many searches whose truth is known:
`python -m benchmarks.claims`.

Every figure is a difference between what a search said and what is so, in points (hundredths).
Knows nothing of models: see benchmarks/imagined.py for what is real and what is not.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.imagined import (
    PARENTS,
    ImaginedSetting,
    World,
    exported,
    imagined,
    searched,
    train_scores,
)
from benchmarks.landscape import Landscape
from benchmarks.report import Report, arguments, published
from evomerge.recipe import Recipe
from evomerge.store import SearchRow, Store

NAME = "bench-claims"
DOCUMENTS = ("docs/guard.md",)
FIRST = 1001  # seed; nothing was chosen on these
WORKERS = 2
NAMES = {
    "raw_train": "winner, raw train",
    "shrunk": "winner, shrunk",
    "bbc_cv": "BBC-CV",
    "validation": "winner, validation, the best of the finalists",
    "validation_bbc": "BBC-CV among the finalists on validation",
}
STAGES = {"stages": [10, 20, 40], "keep": [9, 7]}

Found = TypeVar("Found")


@dataclass(frozen=True)
class Nothing:
    """A search where every merge is as good as the best parent. naive: what the best train score
    would claim over that of the best parent."""

    promoted: bool
    naive: float


@dataclass(frozen=True)
class Something:
    """A search where better merges exist. claimed, interval: of the report; true: the gain of the
    winner over the best parent."""

    promoted: bool
    claimed: float
    interval: tuple[float, float]
    true: float

    @property
    def covered(self) -> bool:
        """Whether the interval holds the true gain."""
        return self.interval[0] <= self.true <= self.interval[1]


@dataclass(frozen=True)
class Overfitted:
    """A long search on few examples. naive: the incumbent's train score less its true one;
    shrunk: its last shrunk score less that. errors: of the verdict's estimates of the winner, by
    name; covered: whether their intervals hold its true score."""

    naive: float
    shrunk: float
    errors: Mapping[str, float]
    covered: Mapping[str, bool]
    mean: bool


def nothing(candidates: int, seed: int) -> Nothing:
    """200 examples in each split."""
    world = World(seed, None, {"train": 250, "validation": 250, "test": 10})
    with _conducted(world, budget={"candidates": candidates}) as (store, row, _):
        verdict = row.verdict or {}
        best = max(scores.mean for scores in train_scores(store, row.id).values())
        (parent,) = store.means(row.id, "full")[verdict["best_parent"]].values()
        return Nothing(verdict["promoted"], best - parent.mean)


def something(candidates: int, seed: int) -> Something:
    """250 examples to search on and to choose by, 1,000 to claim on."""
    sizes = {"train": 250, "validation": 250, "test": 1000}
    world = World(seed, Landscape.draw(seed), sizes)
    with _conducted(world, budget={"candidates": candidates}) as (store, row, setting):
        folder = Path(setting.job.parents[PARENTS[0]].model or "").parent
        report = exported(setting, store.url, folder / "out")
        true = _truth(store, world, report["candidate"])
        true -= _truth(store, world, (row.verdict or {})["best_parent"])
        low, high = report["claim"]["interval"]
        return Something(report["promoted"], report["claim"]["gain"], (low, high), true)


def overfitted(candidates: int, examples: int, staged: bool, seed: int) -> Overfitted:
    """examples: that drive the search, and in validation."""
    sizes = {"train": examples * 5 // 4, "validation": examples, "test": 10}
    world = World(seed, Landscape.draw(seed), sizes)
    changes: dict[str, Any] = {"budget": {"candidates": candidates}}
    if staged:
        changes |= {"staging": STAGES, "optimizer": {"name": "lra-cma-es"}}
    with _conducted(world, **changes) as (store, row, _):
        verdict = row.verdict or {}
        reviews = [g.review for g in store.generations(row.id) if g.review]
        incumbent = _truth(store, world, reviews[-1]["incumbent"])
        winner = _truth(store, world, verdict["winner"])
        said = verdict["estimates"]
        labels = {c.id: c.label for c in store.candidates(row.id)}
        return Overfitted(
            reviews[-1]["train"] - incumbent,
            reviews[-1]["shrunk"] - incumbent,
            {name: said[name]["value"] - winner for name in NAMES},
            {
                name: said[name]["interval"][0] <= winner <= said[name]["interval"][1]
                for name in NAMES
            },
            labels[verdict["winner"]] == "mean",
        )


@contextmanager
def _conducted(world: World, **changes: Any) -> Iterator[tuple[Store, SearchRow, ImaginedSetting]]:
    """A search in a folder of its own, brought to its end."""
    with tempfile.TemporaryDirectory() as name:
        setting = imagined(Path(name), world, **changes)
        url = f"sqlite:///{name}/store.db"
        searched(setting, url)
        with Store(url) as store:
            yield store, store.search(setting.job.name), setting


def _truth(store: Store, world: World, candidate: int) -> float:
    return world.truth(Recipe.from_dict(store.recipe(candidate) or {}))


def over_seeds(measure: Callable[[int], Found], seeds: int) -> list[Found]:
    """One search for each seed."""
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        return list(pool.map(measure, range(FIRST, FIRST + seeds)))


@dataclass(frozen=True)
class Measured:
    """All figures: `searches` of the first, seeds of the second and the third."""

    nothing: Sequence[Nothing]
    something: Sequence[Something]
    overfitted: Mapping[tuple[int, bool], Sequence[Overfitted]]  # by examples, and whether staged


def measure(size: "Size") -> Measured:
    """Conduct all searches."""
    return Measured(
        over_seeds(partial(nothing, size.candidates), size.nothing),
        over_seeds(partial(something, size.candidates), size.something),
        {
            (examples, staged): over_seeds(
                partial(overfitted, size.long, examples, staged), size.overfitted
            )
            for examples in (100, 500)
            for staged in (False, True)
        },
    )


@dataclass(frozen=True)
class Size:
    """How much is measured: searches of each kind; candidates of a short search, and of a long
    one."""

    nothing: int = 100
    something: int = 30
    overfitted: int = 8
    candidates: int = 130
    long: int = 2000


SMALL = Size(nothing=12, something=6, overfitted=4, long=500)


def reported(found: Measured, size: Size) -> Report:
    """As a table; what is of staged searches says so."""
    promoted = sum(f.promoted for f in found.nothing)
    claims = [f.claimed - f.true for f in found.something]
    rows = [
        ["nothing to find", "promoted", f"{promoted} of {len(found.nothing)}", ""],
        ["", "best train score over the best parent's", *_points([f.naive for f in found.nothing])],
        [
            "something to find",
            "claimed gain less the true one",
            *_points(claims),
        ],
        [
            "",
            "intervals that hold it",
            f"{sum(f.covered for f in found.something)} of {len(found.something)}",
            "",
        ],
    ]
    for (examples, staged), searches in found.overfitted.items():
        title = f"{examples} examples" + (", staged" if staged else "")
        rows.append([title, "incumbent, raw train", *_points([f.naive for f in searches])])
        rows.append(["", "incumbent, shrunk", *_points([f.shrunk for f in searches])])
        for name, text in NAMES.items():
            rows.append(["", text, *_points([f.errors[name] for f in searches])])
    notes = [
        f"Points. First two searches: {size.candidates} candidates, 250 examples of train, 200 of "
        "which drive the search, 250 of validation, 1,000 of test. "
        f"The others: {size.long:,} candidates, {size.overfitted} seeds each.",
        "What is estimated is compared with the truth about the same model; the winner is chosen "
        "on as many examples of validation as drive the search.",
    ]
    columns = ["search", "figure", "mean", "standard deviation"]
    data = {
        "nothing": [asdict(f) for f in found.nothing],
        "something": [asdict(f) for f in found.something],
        "overfitted": {
            f"{examples}{' staged' if staged else ''}": [asdict(f) for f in searches]
            for (examples, staged), searches in found.overfitted.items()
        },
    }
    return Report(NAME, "claims held against the truth", columns, rows, notes, data)


def _points(values: Sequence[float]) -> list[str]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return [f"{100 * statistics.mean(values):+.1f}", f"{100 * spread:.1f}"]


def main(given: Sequence[str] | None = None) -> int:
    """Measure everything; gives the exit code."""
    parser = arguments("benchmarks.claims", __doc__)
    parser.add_argument("--small", action="store_true", help="a tenth of the searches")
    options = parser.parse_args(given)
    size = SMALL if options.small else Size()
    return published(options, NAME, DOCUMENTS, lambda: reported(measure(size), size))


if __name__ == "__main__":
    sys.exit(main())
