"""What the store costs at 10,000 candidates of 500 examples: `make bench-store`.

Each figure stands beside its limit: reading and hashing the same bytes, writing and flushing them,
and Optuna's RDB storage holding the same search. Everything is read by a new process; of SQLite,
the file is dropped from the operating system's cache first.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import insert, make_url, update

from benchmarks.report import Report, check_place
from evomerge.fitness.results import Scored, Scores
from evomerge.recipe import Recipe
from evomerge.store import Coordinator, NewCandidate, Store, codec, schema
from evomerge.store.backend import backend_of

EXAMPLES = 500
POPULATION = 20
LAYERS = 30  # of the models: with base and two parents 64 coordinates
NAME = "large"
FIRST = 1000  # the id of the first candidate that was proposed
TASK = "ja_list_ops"
SAMPLES, REPLY = 8, "word " * 60  # that are kept of each candidate
CALLS = 5  # of which the median is taken
READERS, HERTZ = 3, 5
REVIEW = {
    "incumbent": FIRST,
    "train": 0.41,
    "monitor": 0.4,
    "gap": 0.01,
    "standard_error": 0.02,
    "shrunk": 0.4,
    "shrunk_interval": [0.35, 0.45],
}
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Spent:
    """Seconds of one call: by the clock, and of this process's CPU."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:.2f} s ({self.cpu:.2f})"


@dataclass(frozen=True)
class Latency:
    """Of one kind of call, in milliseconds."""

    calls: int
    median: float
    p99: float
    most: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Latency":
        ordered = np.sort(1000 * np.array(seconds))
        p99 = float(ordered[int(0.99 * (len(ordered) - 1))])
        return cls(len(ordered), float(np.median(ordered)), p99, float(ordered[-1]))

    def __str__(self) -> str:
        return f"{self.median:.1f} / {self.p99:.1f} / {self.most:.1f} ms"


def setting(folder: Path) -> Any:
    """An opened job over random models of 30 tiny layers."""
    from benchmarks.bench import ROOT, llama
    from evomerge.job import Job
    from evomerge.search.setting import Setting

    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 32}
    names = ("base", "a", "b")
    for seed, name in enumerate(names):
        if not (folder / name).exists():
            llama(folder, name, seed, num_hidden_layers=LAYERS, **sizes)
    base, a, b = (str(folder / name) for name in names)
    job = {
        "name": NAME,
        "parents": {"a": {"model": a}, "b": {"model": b}},
        "base": {"model": base},
        "space": {"preset": "per_layer_task_arithmetic"},
        "tasks": [{"task": str(ROOT / "fitness" / TASK / "task.yaml")}],
        "optimizer": {"name": "cma-es", "population": POPULATION},
        "engine": {"device": "cpu", "threads": 1},
        "budget": {"candidates": 1_000_000},
    }
    return Setting.open(Job.from_dict(job, "benchmark"))


def results(random: np.random.Generator) -> Scores:
    """Of one candidate."""
    return Scores(
        np.arange(EXAMPLES, dtype=np.uint32),
        (random.random(EXAMPLES) < 0.4).astype(np.float32),
        -random.random(EXAMPLES, dtype=np.float32),
        random.random(EXAMPLES) < 0.02,
        random.integers(1, 90, EXAMPLES, dtype=np.uint32),
        np.zeros(EXAMPLES, np.bool_),
    )


def fill(url: str, opened: Any, count: int) -> None:
    """A search of `count` candidates, every one scored and told, written in bulk."""
    random = np.random.Generator(np.random.PCG64(0))
    with (
        Store(url, create=True) as store,
        Coordinator.launch(
            store,
            NAME,
            0,
            opened.document(),
            {},
            opened.new_models(),
            opened.new_splits(),
            opened.space.coordinates,
        ) as coordinator,
    ):
        search = coordinator.search.id
        baselines = [
            NewCandidate(slot, name, None, recipe.to_dict(), opened.recipe_sha(recipe))
            for slot, (name, recipe) in enumerate(opened.baselines().items())
        ]
        for id in coordinator.open_generation(0, "baselines", None, baselines):
            scored = Scored({TASK: results(random)}, 0.0, 1.0)
            coordinator.record(id, "full", 0, scored, fitness=scored.tasks[TASK].mean)
        coordinator.close_generation(0, {}, None)
        recipe = opened.space.decode(np.full(len(opened.space.coordinates), 0.5))
        for first in range(0, count, 100 * POPULATION):
            _fill(store, search, recipe, len(opened.space.coordinates), random, first, count)
        first_one = schema.candidate.c.id == FIRST  # whose recipe is asked for: its hash is right
        sha = opened.recipe_sha(recipe)
        with store.database.write() as db:
            db.execute(update(schema.candidate).where(first_one).values(recipe_sha=sha))
        brought = [schema.generation, schema.candidate, schema.evaluation, schema.score]
        with store.database.write() as db:  # rows that brought their ids along
            backend_of(db).continue_ids(db, brought)


def _fill(
    store: Store,
    search: int,
    recipe: Recipe,
    dimensions: int,
    random: np.random.Generator,
    first: int,
    count: int,
) -> None:
    """Some of the candidates, in one transaction."""

    text, at = json.dumps(recipe.to_dict()), "2026-01-01T00:00:00.000+00:00"
    rows: dict[str, list[dict[str, Any]]] = {"generation": [], "candidate": []}
    rows |= {"evaluation": [], "score": [], "sample": []}
    for i in range(first, min(count, first + 100 * POPULATION)):
        generation, slot, id = 1 + i // POPULATION, i % POPULATION, FIRST + i
        if slot == 0:
            rows["generation"].append(
                {
                    "id": 10 + generation,
                    "search_id": search,
                    "number": generation,
                    "kind": "proposed",
                    "step_size": 0.1,
                    "opened_at": at,
                    "told_at": at,
                    "review": json.dumps(REVIEW),
                    "optimizer": json.dumps({"name": "cma-es", "population": POPULATION}),
                }
            )
        genotype = codec.pack_genotype(random.random(dimensions))
        scores = results(random)
        blob = codec.pack_scores(scores)
        rows["candidate"].append(
            {
                "id": id,
                "search_id": search,
                "generation_id": 10 + generation,
                "generation": generation,
                "slot": slot,
                "state": "scored",
                "genotype": genotype,
                "genotype_sha": codec.sha256(genotype),
                "recipe": text,
                "recipe_sha": hashlib.sha256(genotype).hexdigest(),
                "fitness": scores.fitness(0.01),
                "told": scores.fitness(0.01),
                "violation": 0.0,
            }
        )
        rows["evaluation"].append(
            {
                "id": id,
                "candidate_id": id,
                "purpose": "train",
                "stage": 0,
                "epoch": 1,
                "state": "scored",
                "merge_seconds": 0.1,
                "seconds": 1.0,
                "recorded_at": at,
            }
        )
        rows["score"].append(
            {
                "id": id,
                "evaluation_id": id,
                "task": TASK,
                "n": EXAMPLES,
                "mean": scores.mean,
                "truncated": int(scores.truncated.sum()),
                "tokens": int(scores.tokens.sum()),
                "codec": codec.SCORES_CODEC,
                "blob": blob,
                "sha256": codec.sha256(blob),
            }
        )
        for position in range(SAMPLES):
            rows["sample"].append(
                {"evaluation_id": id, "task": TASK, "position": position, "reply": REPLY}
            )
    with store.database.write() as db:
        for table, values in rows.items():
            if values:
                db.execute(insert(schema.metadata.tables[table]), values)


def fresh(measure: Callable[..., Any], *arguments: Any) -> Any:
    """What a call gives in a process of its own."""
    with ProcessPoolExecutor(1, _SPAWN) as pool:
        return pool.submit(measure, *arguments).result()


def drop_cached(url: str) -> None:
    """Let the operating system forget an SQLite file."""
    path = make_url(url).database or ""
    if url.startswith("sqlite"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(call: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def spent(call: Callable[[], object]) -> Spent:
    """What a call takes."""
    cpu, wall = time.process_time(), timed(call)
    return Spent(wall, time.process_time() - cpu)


def load_record(url: str, folder: Path) -> Spent:
    """What `resume` reads before it goes on, models left out."""
    from evomerge.search.record import Record

    opened = setting(folder)

    def load() -> None:
        with Store(url) as store:
            Record(opened, _Held(store))  # reads of a coordinator alone

    return spent(load)


class _Held:
    """What a Record reads of a coordinator."""

    def __init__(self, store: Store) -> None:
        self.store, self.search = store, store.search(NAME)


def load_tables(url: str) -> Spent:
    """evomerge.load, with the tables of candidates and genotypes."""
    import evomerge

    def load() -> None:
        tables = evomerge.load(url, NAME)
        _ = tables.candidates, tables.genotypes

    return spent(load)


def summed_up(url: str, command: str) -> Spent:
    """What a command shows, without starting it."""
    from evomerge.search import summary

    calls = {
        "ls": summary.ls,
        "show": lambda store: summary.show(store, NAME),
        "top": lambda store: summary.top(store, NAME, 10),
    }

    def load() -> None:
        with Store(url) as store:
            calls[command](store)

    return spent(load)


def reported(url: str) -> dict[str, dict[str, float]]:
    """What pages are made of, each call from a store that is open, as a server has it."""
    from evomerge.report import candidate, compare, failures, history, population

    calls: dict[str, Callable[[Store], object]] = {
        "history": lambda store: history.history(store, NAME),
        "population": lambda store: population.population(store, NAME),
        "population, by standing": lambda store: population.population(
            store, NAME, sort="standing"
        ),
        "population, by score": lambda store: population.population(store, NAME, sort="score"),
        "candidate": lambda store: candidate.candidate(store, NAME, FIRST),
        "samples": lambda store: candidate.samples(store, NAME, FIRST),
        "importance": lambda store: population.importance(store, NAME),
        "lineage": lambda store: population.lineage(store, NAME),
        "failures": lambda store: failures.failures(store, NAME),
        "comparison of searches": lambda store: compare.searches(store, [NAME, NAME]),
    }
    found = {}
    with Store(url) as store:
        for name, call in calls.items():
            several = [spent(lambda: call(store)) for _ in range(1 + CALLS)][1:]  # noqa: B023
            found[name] = asdict(sorted(several, key=lambda one: one.wall)[CALLS // 2])
    return found


def load_raw(url: str) -> Spent:
    """The limit of loading: read the same bytes of scores, and hash them."""
    text = "SELECT blob, sha256 FROM score"

    def load() -> None:
        if url.startswith("sqlite"):
            connection: Any = sqlite3.connect(make_url(url).database or "")
        else:
            import psycopg

            connection = psycopg.connect(url.replace("+psycopg", ""))
        rows = connection.execute(text).fetchall()
        assert_whole(rows)
        connection.close()

    return spent(load)


def assert_whole(rows: Sequence[tuple[bytes, str]]) -> None:
    """Raise ValueError unless all bytes match their hashes."""
    if any(hashlib.sha256(blob).hexdigest() != sha for blob, sha in rows):
        raise ValueError("a blob does not match its hash")


def load_study(url: str) -> Spent:
    """All trials of the same search in Optuna's storage."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return spent(lambda: optuna.load_study(study_name=NAME, storage=url).get_trials(deepcopy=False))


def commits(store: Store, coordinator: Coordinator, count: int) -> Latency:
    """Of results of 500 examples each, each of which lands alone."""
    random = np.random.Generator(np.random.PCG64(1))
    start = max(g.number for g in store.generations(coordinator.search.id))
    seconds: list[float] = []

    def commit(candidate: int, found: Scored) -> None:
        fitness = found.tasks[TASK].mean
        coordinator.record(candidate, "train", 0, found, fitness)
        coordinator.flush()

    for number in itertools.count(start + 1):
        new = [
            NewCandidate(slot, None, random.random(64), {"recipe": "x" * 3000}, f"{number}-{slot}")
            for slot in range(POPULATION)
        ]
        for id in coordinator.open_generation(number, "proposed", 0.1, new):
            replies = {TASK: dict.fromkeys(range(SAMPLES), REPLY)}
            found = Scored({TASK: results(random)}, 0.1, 1.0, replies)
            seconds.append(timed(lambda: commit(id, found)))  # noqa: B023
            time.sleep(0.005)  # scoring takes longer than writing; nothing is ever in a queue
        if len(seconds) >= count:
            return Latency.of(seconds)
    raise AssertionError("unreachable")


def flushes(folder: Path, count: int) -> Latency:
    """The limit of a commit: append a result's bytes to a file and flush it."""
    data, seconds = bytes(4 + 17 * EXAMPLES), []
    with (folder / "flushed").open("wb", buffering=0) as file:

        def flush() -> None:
            file.write(data)
            os.fsync(file.fileno())

        for _ in range(count):
            seconds.append(timed(flush))
            time.sleep(0.005)
    return Latency.of(seconds)


def look_on(url: str, number: int, stop: Event, ready: Any, found: Any) -> None:
    """Read the search HERTZ times a second until told to stop; hand over times and errors."""
    from evomerge.search import summary

    seconds, errors = [], []
    with Store(url) as store:
        ready.release()
        while not stop.is_set():
            started = time.perf_counter()
            try:
                if number % 2:
                    summary.top(store, NAME, 10)
                else:
                    summary.show(store, NAME)
            except Exception as error:  # what kind it is, is the figure
                errors.append(f"{type(error).__name__}: {error}")
            seconds.append(time.perf_counter() - started)
            number += 1
            time.sleep(max(0.0, 1 / HERTZ - seconds[-1]))
    found.put((seconds, errors))


@contextmanager
def readers(url: str) -> Iterator[list[tuple[list[float], list[str]]]]:
    """Processes that look on meanwhile; at the end the list holds what each found."""
    stop, ready, found = _SPAWN.Event(), _SPAWN.Semaphore(0), _SPAWN.Queue()
    processes = [
        _SPAWN.Process(target=look_on, args=(url, number, stop, ready, found))
        for number in range(READERS)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    seen: list[tuple[list[float], list[str]]] = []
    try:
        yield seen
    finally:
        stop.set()
        seen += [found.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()


def measure(url: str, folder: Path, count: int, written: int, repeat: int) -> dict[str, Any]:
    """Every figure of one database."""
    fill(url, setting(folder), count)

    def cold(call: Callable[..., Spent], *arguments: Any) -> dict[str, float]:
        several = []
        for _ in range(repeat):
            drop_cached(url)
            several.append(fresh(call, url, *arguments))
        return asdict(sorted(several, key=lambda one: one.wall)[repeat // 2])

    found: dict[str, Any] = {
        "limit": cold(load_raw),
        "resume": cold(load_record, folder),
        "load": cold(load_tables),
    }
    found |= {command: cold(summed_up, command) for command in ("ls", "show", "top")}
    found["pages"] = fresh(reported, url)
    with Store(url) as store, Coordinator.take_over(store, NAME) as coordinator:
        found["flush"] = asdict(flushes(folder, written))
        found["commit"] = asdict(commits(store, coordinator, written))
        with readers(url) as seen:
            found["commit with readers"] = asdict(commits(store, coordinator, written))
    found["reading meanwhile"] = asdict(Latency.of([s for seconds, _ in seen for s in seconds]))
    found["errors"] = [error for _, errors in seen for error in errors]
    return found


def peer(url: str, folder: Path) -> dict[str, Any]:
    """Optuna's storage with the same search in it."""
    from evomerge.export.study import export_study

    theirs = f"sqlite:///{folder}/optuna.db"
    with Store(url) as store:
        written = timed(lambda: export_study(store, NAME, theirs, lambda done, of: None))
    drop_cached(theirs)
    return {"written": written, "read": asdict(fresh(load_study, theirs))}


def report(found: dict[str, dict[str, Any]], peers: dict[str, Any], count: int) -> Report:
    """The table."""
    rows = []
    for database, figures in found.items():
        limit = str(Spent(**figures["limit"]))
        for key, what in (
            ("resume", "what resume reads first"),
            ("load", "evomerge.load"),
            ("show", "show"),
            ("top", "top"),
            ("ls", "ls"),
        ):
            bound = limit if key in ("resume", "load") else ""
            rows.append((database, what, str(Spent(**figures[key])), bound, "1 s"))
        for what, taken in figures["pages"].items():
            wall, cpu = 1000 * taken["wall"], 1000 * taken["cpu"]
            rows.append((database, f"page: {what}", f"{wall:.0f} ms ({cpu:.0f})", "", "100 ms"))
        flush = str(Latency(**figures["flush"]))
        for key in ("commit", "commit with readers"):
            rows.append((database, key, str(Latency(**figures[key])), flush, "p99 50 ms"))
        meanwhile = Latency(**figures["reading meanwhile"])
        errors = len(figures["errors"])
        text = f"{meanwhile}, {errors} errors of {meanwhile.calls}"
        rows.append((database, "reading meanwhile", text, "", "no error"))
    rows.append(("Optuna, SQLite", "all trials", str(Spent(**peers["read"])), "", ""))
    return Report(
        "bench-store",
        f"the store at {count:,} candidates of {EXAMPLES} examples",
        ("database", "what", "measured", "limit", "goal"),
        rows,
        (
            f"{count:,} candidates of {EXAMPLES} examples each, 64 coordinates.",
            "Reading: by a new process, SQLite's file not in memory; in brackets the process's CPU "
            "seconds. The limit is to read the same scores and hash them, without any evomerge.",
            f"Pages: what is read for one, by a process that has the store open; the median of "
            f"{CALLS} calls.",
            "Commits: median / 99th percentile / most; the limit is to append the same bytes to a "
            "file and flush it.",
            f"Readers: {READERS} processes, {HERTZ} times a second `show` or `top`.",
        ),
        {"found": found, "peer": peers, "candidates": count},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks.store")
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--commits", type=int, default=1_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--postgres", metavar="URL", help="an empty database, measured as well")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary one")
    parser.add_argument("--update-docs", action="store_true")
    options = parser.parse_args(arguments)
    documents = ["docs/performance.md"] if options.update_docs else []
    check_place("bench-store", documents)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        sqlite = f"sqlite:///{folder}/store.db"
        sizes = (options.candidates, options.commits, options.repeat)
        found = {"SQLite": measure(sqlite, folder, *sizes)}
        if options.postgres:
            found["PostgreSQL"] = measure(options.postgres, folder, *sizes)
        table = report(found, peer(sqlite, folder), options.candidates)
        table.publish(options.folder or folder, documents)
    return 0


if __name__ == "__main__":
    sys.exit(main())
