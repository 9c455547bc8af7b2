"""How busy devices are, and what the coordinator costs: `python -m benchmarks.busy`.

Whole searches over the zoo's job with eight devices: loop, optimizer, space, race and store are
real. Imagined is what a device does: it sleeps as long as the evaluation would take, which is drawn
for each candidate and number of examples, so that every mode meets the same trace. Devices are
timers in this process, where the coordinator's own cost is seen alone, or actors of the real Ray
executor. The peer is a plain map over each generation, its results told when the last one is there.
"""

import cProfile
import heapq
import itertools
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.report import ROOT, Report, arguments, published
from evomerge.devices import Device
from evomerge.executor import Executor, Landed, Request, Stopped, Take, Workers
from evomerge.executor.account import Account
from evomerge.executor.ray import RayExecutor
from evomerge.executor.spec import Opening, WorkerSpec
from evomerge.executor.worker import Worker
from evomerge.fitness.results import Evaluation, Scored, Scores
from evomerge.job import Job
from evomerge.recipe import Recipe
from evomerge.search import Interrupted, Silent, launch, race
from evomerge.search.setting import Setting
from evomerge.seeds import generator

NAME = "bench-busy"
DOCUMENTS = ("docs/operations.md",)
ZOO = ROOT / "examples" / "zoo"
DEVICES = 8
SIGMA = 0.6  # of the logarithm of an evaluation's time
SEED = 7
MERGE = 10  # examples that one merge takes as long as
POPULATION = 14
MODES = ("barrier", "synchronous", "asynchronous")
EXECUTORS = ("timers", "ray")


@dataclass(frozen=True)
class Shape:
    """What is searched. stages, keep: as in a job's staging; none: on all driving examples."""

    title: str
    optimizer: str
    stages: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()


SHAPES = {
    "staged": Shape("LRA-CMA-ES, staged 10, 20, 40", "lra-cma-es", (10, 20, 40), (10, 7)),
    "whole": Shape("CMA-ES, all examples", "cma-es"),
}


@dataclass(frozen=True)
class Trace:
    """How long evaluations take: the same whoever asks, and whenever.

    example: seconds, the median.
    """

    example: float

    def seconds(self, request: Request) -> float:
        """Of one evaluation."""
        count = sum(len(examples) for examples in request.examples.values())
        drawn = generator(SEED, f"seconds of {count}", request.candidate).standard_normal()
        return float(self.example * (MERGE + count) * np.exp(SIGMA * drawn))

    def answer(self, request: Request, seconds: float) -> Scored:
        """What is found: luck, and the later a candidate comes the more of it, so that incumbents
        follow each other as in a search that finds something."""
        tasks = {}
        chance = 0.2 + 0.6 * (1 - np.exp(-request.candidate / 1000))
        for task, examples in request.examples.items():
            n = len(examples)
            random = generator(SEED, f"answers of {n}", request.candidate)
            right = (random.random(n) < chance).astype(np.float32)
            never, none = np.zeros(n, np.bool_), np.zeros(n, np.uint32)
            tasks[task] = Scores(examples, right, right - 1, never, none, never)
        merging = seconds * MERGE / (MERGE + sum(map(len, request.examples.values())))
        return Scored(tasks, merging, seconds)


class Timers:
    """An executor whose devices only let time pass. spent: CPU seconds of imagining, which are
    not the coordinator's."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._accounts = [Account(f"timer {number}", 0.0) for number in range(DEVICES)]
        for account in self._accounts:
            account.hold(time.monotonic())
        self.spent = 0.0

    def evaluate(self, take: Take) -> Iterator[Landed]:
        """See Executor."""
        idle, order = list(self._accounts), itertools.count()
        working: list[tuple[float, int, Account, Landed]] = []
        while True:
            with suppress(Stopped):
                while idle and (request := take()) is not None:
                    began = time.thread_time()
                    account, seconds = idle.pop(), self._trace.seconds(request)
                    answer = self._trace.answer(request, seconds)
                    landed = Landed(request, answer, account.name, account.charge)
                    self.spent += time.thread_time() - began
                    due = time.monotonic() + seconds
                    heapq.heappush(working, (due, next(order), account, landed))
            if not working:
                return
            due, _, account, landed = heapq.heappop(working)
            time.sleep(max(0.0, due - time.monotonic()))
            account.landed(landed.evaluation)
            idle.append(account)
            yield landed

    def workers(self) -> Workers:
        """See Executor."""
        return Workers(DEVICES, 0.0, merge_ahead=False)

    def devices(self) -> tuple[Device, ...]:
        """See Executor."""
        return tuple(account.device() for account in self._accounts)

    def close(self) -> None:
        """See Executor."""


@dataclass(frozen=True)
class SleepingSpec(WorkerSpec):
    """Of workers on Ray that only let time pass."""

    trace: Trace = field(kw_only=True)

    def opening(self) -> Opening[Worker]:
        """Loads nothing."""
        yield from ()
        return SleepingWorker(self.trace)


class SleepingWorker(Worker):
    """See Worker."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    @property
    def merges_ahead(self) -> bool:
        """What there is to wait for is drawn as a whole."""
        return False

    def evaluate(self, request: Request, upcoming: Request | None = None) -> Evaluation:
        """See Worker."""
        seconds = self._trace.seconds(request)
        answer = self._trace.answer(request, seconds)
        time.sleep(seconds)
        return answer


@dataclass
class Meter:
    """What an executor was asked after the baselines, and what that took.

    began, ended: wall and CPU seconds of this process, when the first request was taken and after
    the last one landed. busy: seconds of devices. results: how many landed. candidates: seen.
    """

    baselines: int
    began: tuple[float, float] | None = None
    ended: tuple[float, float] = (0.0, 0.0)
    busy: float = 0.0
    results: int = 0
    candidates: set[int] = field(default_factory=set)

    def taken(self, request: Request, cpu: float) -> None:
        """A device begins."""
        if self.began is None and request.candidate > self.baselines:
            self.began = time.monotonic(), cpu
        if self.began is not None:
            self.candidates.add(request.candidate)

    def landed(self, evaluation: Evaluation, cpu: float) -> None:
        """A device has come to an end."""
        if self.began is not None:
            self.ended = time.monotonic(), cpu
            self.busy += evaluation.seconds
            self.results += 1


class Metered:
    """An executor that is watched."""

    def __init__(self, executor: Executor, meter: Meter) -> None:
        self._executor = executor
        self._meter = meter

    def evaluate(self, take: Take) -> Iterator[Landed]:
        """See Executor."""

        def taken() -> Request | None:
            request = take()
            if request is not None:
                self._meter.taken(request, self._cpu)
            return request

        for landed in self._executor.evaluate(taken):
            yield landed
            self._meter.landed(landed.evaluation, self._cpu)  # and been seen to

    @property
    def _cpu(self) -> float:
        imagining = self._executor.spent if isinstance(self._executor, Timers) else 0.0
        return time.process_time() - imagining

    def workers(self) -> Workers:
        """See Executor."""
        return self._executor.workers()

    def devices(self) -> tuple[Device, ...]:
        """See Executor."""
        return self._executor.devices()

    def close(self) -> None:
        """See Executor."""
        self._executor.close()


@dataclass(frozen=True)
class Imagined(Setting):
    """A setting whose devices are imagined."""

    trace: Trace = Trace(0.0)
    meter: Meter = field(default_factory=lambda: Meter(0))

    def executor(self) -> Executor:
        """See Setting."""
        if self.job.executor.kind == "inline":
            return Metered(Timers(self.trace), self.meter)
        spec = self.worker_spec()
        sleeping = SleepingSpec(**vars(spec), trace=self.trace)
        return Metered(RayExecutor(self.job.executor, sleeping), self.meter)


@dataclass(frozen=True)
class Run:
    """One search. median: seconds of an evaluation, over those of its shape; seconds: about how
    long it goes on."""

    executor: str
    shape: Shape
    mode: str
    median: float
    seconds: float

    def setting(self) -> Imagined:
        """Opened, with a trace and a new meter."""
        setting = Imagined.open(Job.from_dict(self._job(), "benchmark"))
        meter = Meter(len(setting.baselines()))
        return replace(setting, trace=Trace(self._example(setting)), meter=meter)

    def _example(self, setting: Setting) -> float:
        """Seconds of an example: so that an evaluation takes the median on average."""
        staging = setting.staging
        if staging is None:
            return self.median / (MERGE + sum(map(len, setting.driving.values())))
        added = np.diff(staging.stages, prepend=0)
        racing = np.array([POPULATION, *staging.keep])
        return float(self.median * racing.sum() / ((MERGE + added) @ racing))

    def _job(self) -> dict[str, Any]:
        shape = self.shape
        rate = DEVICES / (self.median * np.exp(SIGMA**2 / 2))  # results a second, all devices busy
        evaluations = (POPULATION + sum(shape.keep)) / POPULATION  # of a candidate
        staging = {"stages": list(shape.stages), "keep": list(shape.keep)}
        return {
            "name": "busy",
            "seed": SEED,
            "parents": {name: {"model": str(ZOO / name)} for name in ("ops", "ja")},
            "base": {"model": str(ZOO / "base")},
            "space": {"preset": "per_module_task_arithmetic"},
            "tasks": [{"task": str(ROOT / "fitness" / "ja_list_ops" / "task.yaml")}],
            "optimizer": {"name": shape.optimizer, "population": POPULATION},
            "mode": "asynchronous" if self.mode == "asynchronous" else "synchronous",
            "budget": {"candidates": max(POPULATION, round(self.seconds * rate / evaluations))},
            "staging": staging if shape.stages else None,
            "engine": {"device": "cpu", "threads": 1},
            "executor": (
                {"kind": "ray", "workers": DEVICES, "cpus": 0.1}
                if self.executor == "ray"
                else {"kind": "inline"}
            ),
        }


class UntilStopped(Silent):
    """Ends a search before its finals."""

    def stopped(self, reason: str) -> None:
        """See Watcher."""
        raise Interrupted


def searched(run: Run) -> Meter:
    """A search by evomerge's own loop, in a store of its own."""
    setting = run.setting()
    with tempfile.TemporaryDirectory() as folder:
        try:
            launch(setting, f"sqlite:///{folder}/store.db", UntilStopped(), lambda: False)
        except Interrupted:
            return setting.meter
    raise RuntimeError("the search ended without being stopped")


def mapped(run: Run) -> Meter:
    """The peer: ask, a map over the generation in each stage, tell. Keeps nothing."""
    setting = run.setting()
    optimizer, budget = setting.optimizer(), setting.job.budget.candidates or 0
    numbers = itertools.count(setting.meter.baselines + 1)
    with closing(setting.executor()) as executor:
        for generation in itertools.count(1):
            if len(setting.meter.candidates) >= budget:
                return setting.meter
            genotypes = optimizer.ask()
            recipes = [setting.space.decode(genotype) for genotype in genotypes]
            fitness = _raced(setting, executor, recipes, numbers, generation)
            optimizer.tell(genotypes, fitness)
    raise RuntimeError("generations never end")


def _raced(
    setting: Setting,
    executor: Executor,
    recipes: Sequence[Any],
    numbers: Iterator[int],
    generation: int,
) -> race.Values:
    """Their fitness, in the order of the race."""
    staging = setting.staging
    stages, keep = [setting.driving], tuple[int, ...]()
    if staging is not None:
        stages = race.draw(setting.driving, staging.stages, SEED, generation)
        keep = staging.keep
    candidates = [next(numbers) for _ in recipes]
    right, asked, reached = (np.zeros(len(recipes), int) for _ in range(3))
    racing = [slot for slot, recipe in enumerate(recipes) if isinstance(recipe, Recipe)]
    for stage, examples in enumerate(stages):
        requests = {candidates[i]: i for i in racing}
        waiting = (Request(id, recipes[i], "train", examples) for id, i in requests.items())
        for landed in executor.evaluate(partial(next, waiting, None)):
            slot, found = requests[landed.request.candidate], landed.evaluation
            if isinstance(found, Scored):
                for scores in found.tasks.values():
                    right[slot] += int(scores.scores.sum())
                    asked[slot] += len(scores)
            reached[slot] = stage
        if stage < len(keep):
            best = race.order(right[racing] / asked[racing])[: keep[stage]]
            racing = sorted(racing[i] for i in best)
    return race.told(reached, right / np.maximum(1, asked))


@dataclass(frozen=True)
class Figures:
    """Of one run. busy: share of the devices' time. cpu: share of one core that the coordinator
    takes; milliseconds: of CPU for each result."""

    busy: float
    candidates_per_minute: float
    results_per_second: float
    cpu: float
    milliseconds: float

    @classmethod
    def of(cls, meter: Meter) -> "Figures":
        """From the first proposal to the last result."""
        began = meter.began or (0.0, 0.0)
        wall, cpu = (after - before for before, after in zip(began, meter.ended, strict=True))
        return cls(
            meter.busy / (DEVICES * wall),
            60 * len(meter.candidates) / wall,
            meter.results / wall,
            cpu / wall,
            1000 * cpu / meter.results,
        )


def measured(run: Run) -> Figures:
    """Conduct it."""
    meter = mapped(run) if run.mode == "barrier" else searched(run)
    return Figures.of(meter)


def profiled(run: Run, lines: int = 40) -> None:
    """Print where the coordinator's CPU time goes."""
    profile = cProfile.Profile(time.thread_time)
    profile.enable()
    meter = searched(run)
    profile.disable()
    print(f"{run.shape.title}, {run.mode}: {meter.results} results after the baselines")
    statistics = pstats.Stats(profile)
    for order in ("cumulative", "tottime"):
        statistics.sort_stats(order).print_stats(lines)


def tabulated(runs: Sequence[Run], repeats: int, tell: Callable[[str], None]) -> Report:
    """Every run, the median of its repeats."""
    columns = [
        "devices, median time",
        "search",
        "mode",
        "busy",
        "candidates a minute",
        "results a second",
        "coordinator, of one core",
        "CPU a result",
    ]
    rows, data = [], []
    for run in runs:
        all_of_it = [measured(run) for _ in range(repeats)]
        found = Figures(
            *(
                statistics.median(getattr(one, name) for one in all_of_it)
                for name in Figures.__dataclass_fields__
            )
        )
        rows.append(
            [
                f"{run.executor}, {run.median:g} s",
                run.shape.title,
                "a map over each generation" if run.mode == "barrier" else run.mode,
                f"{found.busy:.1%}",
                f"{found.candidates_per_minute:,.0f}",
                f"{found.results_per_second:.1f}",
                f"{found.cpu:.1%}",
                f"{found.milliseconds:.2f} ms",
            ]
        )
        tell(" | ".join(rows[-1]))
        data.append(
            {**vars(found), "executor": run.executor, "mode": run.mode, "median": run.median}
            | {"search": run.shape.title, "runs": [vars(one) for one in all_of_it]}
        )
    notes = [
        f"{DEVICES} devices, log-normal times (sigma {SIGMA}) in proportion to the examples of an "
        f"evaluation and a merge that takes as long as {MERGE} of them; generations of "
        f"{POPULATION}.",
        "Busy: the share of the devices' time, from the first proposal to the last result, that "
        "they were evaluating. Of a map over each generation the coordinator only asks, decodes "
        "and tells: it keeps nothing.",
    ]
    return Report(NAME, "busy devices", columns, rows, notes, {"runs": data})


def main(given: Sequence[str] | None = None) -> int:
    """Measure what is asked for; gives the exit code."""
    parser = arguments("benchmarks.busy", __doc__)
    parser.add_argument("--executors", default=",".join(EXECUTORS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--medians", default="0.13,1", help="seconds of an evaluation")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a run, about")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="of timers alone, no table")
    options = parser.parse_args(given)
    runs = [
        Run(executor, SHAPES[shape], mode, median, options.seconds)
        for executor in options.executors.split(",")
        for median in map(float, options.medians.split(","))
        for shape in options.shapes.split(",")
        for mode in options.modes.split(",")
    ]
    if options.profile:
        for run in runs:
            if run.executor == "timers" and run.mode != "barrier":
                profiled(run)
        return 0

    def tell(text: str) -> None:
        print(text, file=sys.stderr)

    return published(options, NAME, DOCUMENTS, lambda: tabulated(runs, options.repeat, tell))


if __name__ == "__main__":
    sys.exit(main())
