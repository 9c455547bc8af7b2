"""What the transformers engine costs: scoring, generating, swapping.

    python -m benchmarks.engine [--device cpu] [--shapes zoo,95M]

On the CPU all figures are CPU seconds of one thread, whatever else the machine does; on a GPU they
are wall seconds. Overhead is what engine.generate takes beyond the calls of the model's own
`generate` that it makes, on the same batches without anything of ours.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import SHAPES, family
from benchmarks.report import ROOT, Report, check_place
from evomerge.engine import Generation
from evomerge.engine.transformers import TransformersEngine
from evomerge.errors import EvomergeError, InputError
from evomerge.job import Engine as Section
from evomerge.merge.checkpoint import Checkpoint
from evomerge.recipe import Recipe

ZOO = "zoo"
SCORED = 0.3  # CPU seconds for 256 examples of the zoo
OVERHEAD = 0.1  # of what the model's own generate takes
METHODS = ("task_arithmetic", "ties", "slerp")
DOCUMENTS = ("docs/performance.md",)
HOOKS = ("logits_processor", "stopping_criteria")  # what the engine adds to generate


@dataclass(frozen=True)
class Workload:
    """Models, and what is asked of them. names: of base, and two fine-tunes."""

    title: str
    models: Mapping[str, Path]
    pairs: Sequence[tuple[str, str]]
    new_tokens: int


@dataclass(frozen=True)
class Scoring:
    """Seconds of one candidate's scoring. bare: of the model's own generate."""

    on: str
    examples: int
    forced: float
    generated: float
    bare: float
    tokens: int
    batches: int

    @property
    def overhead(self) -> float:
        """As a share of the bare calls."""
        return self.generated / self.bare - 1


@dataclass(frozen=True)
class Swap:
    """Seconds of merging another candidate of a method, and of loading one that was kept."""

    on: str
    method: str
    merged: float
    returned: float


def zoo() -> Workload:
    """256 examples of the zoo's target task."""
    text = (ROOT / "fitness" / "ja_list_ops" / "data" / "train.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()[:256]]
    names = {"base": "base", "a": "ops", "b": "ja"}
    models = {name: ROOT / "examples" / "zoo" / folder for name, folder in names.items()}
    return Workload("zoo", models, [(r["prompt"], r["answer"]) for r in records], 8)


def random_words(folder: Path, shape: str, dtype: torch.dtype) -> Workload:
    """16 prompts of 32 to 62 words, answers of 16."""

    def words(start: int, count: int) -> str:
        return " ".join(f"w{1 + (start + 7 * i) % 63}" for i in range(count))

    models = family(folder, shape, dtype, ("a", "b"))
    pairs = [(words(i, 32 + 2 * i), " " + words(3 * i, 16)) for i in range(16)]
    title = f"{shape}, {str(dtype).removeprefix('torch.')}"
    return Workload(title, models, pairs, 16)


class Bench:
    """An engine over a workload's models."""

    def __init__(self, work: Workload, device: torch.device, repeat: int) -> None:
        self.work = work
        self.repeat = repeat
        self.device = device
        section = Section(device=str(device), threads=1)
        models = {name: Checkpoint.open(path) for name, path in work.models.items()}
        self.engine = TransformersEngine(section, models, "base")

    def close(self) -> None:
        self.engine.close()

    def scoring(self) -> Scoring:
        """Both ways of scoring, and the bare calls."""
        self.engine.load(recipe("task_arithmetic", 0))
        how = Generation(self.work.new_tokens)
        prompts = [prompt for prompt, _ in self.work.pairs]
        replies = self.engine.generate(prompts, how)
        calls = self._calls(lambda: self.engine.generate(prompts, how))
        run = self.engine._live.run.generate

        def bare() -> None:
            with torch.inference_mode():
                for call in calls:
                    run(**{key: value for key, value in call.items() if key not in HOOKS})

        forced = self._seconds(lambda: self.engine.likelihoods(self.work.pairs))
        generated, alone = self._both(lambda: self.engine.generate(prompts, how), bare)
        return Scoring(
            self.work.title,
            len(prompts),
            forced,
            generated,
            alone,
            sum(reply.tokens + (not reply.truncated) for (reply,) in replies),
            len(calls),
        )

    def swaps(self) -> list[Swap]:
        """By method."""
        found = []
        for method in METHODS:
            for step in (0, 1):
                self.engine.load(recipe(method, step))
            steps = iter(range(2, 1000))
            merged = self._seconds(lambda: self.engine.load(recipe(method, next(steps))))  # noqa: B023
            for _ in range(2):  # kept from the first return on
                self.engine.load(recipe(method, 0))
            other = recipe("slerp" if method != "slerp" else "ties", 999)
            back = recipe(method, 0)

            def turn() -> float:
                self.engine.load(other)  # noqa: B023
                return self._once(lambda: self.engine.load(back))  # noqa: B023

            returned = statistics.median(turn() for _ in range(self.repeat))
            found.append(Swap(self.work.title, method, merged, returned))
        return found

    def _calls(self, run: Callable[[], object]) -> list[dict[str, Any]]:
        """What is asked of the model's generate."""
        model = self.engine._live.run
        own, calls = model.generate, []

        def generate(**call: Any) -> Any:
            calls.append(call)
            return own(**call)

        model.generate = generate
        try:
            run()
        finally:
            del model.generate
        return calls

    def _once(self, run: Callable[[], object]) -> float:
        self._finish()
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        started = clock()
        run()
        self._finish()
        return clock() - started

    def _seconds(self, run: Callable[[], object]) -> float:
        run()
        return statistics.median(self._once(run) for _ in range(self.repeat))

    def _both(self, one: Callable[[], object], other: Callable[[], object]) -> tuple[float, float]:
        """Seconds of two runs, measured in turn: the machine is not equally fast all the time."""
        one(), other()
        times = [(self._once(one), self._once(other)) for _ in range(2 * self.repeat)]
        return statistics.median(a for a, _ in times), statistics.median(b for _, b in times)

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def recipe(method: str, step: int) -> Recipe:
    """A candidate; no two steps have the same weights or t."""
    share = 0.3 + 0.0004 * step
    made: dict[str, Any] = {"merge_method": method, "base_model": "base"}
    if method == "slerp":
        made |= {"models": [{"model": "base"}, {"model": "a"}], "parameters": {"t": share}}
        return Recipe.from_dict(made)
    weights = {"a": share, "b": 1 - share}
    entries = [{"model": m, "parameters": {"weight": w}} for m, w in weights.items()]
    density = {} if method == "task_arithmetic" else {"density": 0.5}
    return Recipe.from_dict({**made, "models": entries, "parameters": density})


def measure(works: Sequence[Workload], device: torch.device, repeat: int) -> list[Report]:
    """The tables of scoring and of swaps."""
    scorings, swaps = [], []
    for work in works:
        print(f"measuring on {work.title}", file=sys.stderr, flush=True)
        with closing(Bench(work, device, repeat)) as bench:
            scorings.append(bench.scoring())
            swaps += bench.swaps()
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, wall seconds."
    else:
        where = "CPU seconds of one thread."
    scored = Report(
        _name("engine", device),
        "scoring one candidate",
        ["models", "examples", "teacher-forced", "generated", "tokens/s", "bare", "overhead"],
        [_scored(row) for row in scorings],
        [
            f"{where} Medians of {repeat}. Tokens/s: written ones, the prompts' own time included. "
            "Bare: the model's own generate on the same batches. In brackets: the goals."
        ],
        {"scoring": [asdict(row) for row in scorings]},
    )
    swapped = Report(
        _name("swap", device),
        "swapping candidates",
        ["models", "method", "merged", "came back"],
        [
            [s.on, s.method, f"{1000 * s.merged:.1f} ms", f"{1000 * s.returned:.1f} ms"]
            for s in swaps
        ],
        [
            f"{where} Merged: a candidate with other weights, parents in memory, the plan "
            "included. Came back: after another one; kept, or merged again where that is as cheap."
        ],
        {"swaps": [asdict(row) for row in swaps]},
    )
    return [scored, swapped]


def _scored(row: Scoring) -> list[str]:
    goal = f" ({SCORED} s)" if row.on == ZOO else ""
    return [
        row.on,
        str(row.examples),
        f"{row.forced:.3f} s{goal}",
        f"{row.generated:.3f} s{goal}",
        f"{row.tokens / row.generated:,.0f}",
        f"{row.bare:.3f} s in {row.batches}",
        f"{100 * row.overhead:.1f} % ({100 * OVERHEAD:.0f} %)",
    ]


def _name(table: str, device: torch.device) -> str:
    return f"bench-{table}-gpu" if device.type == "cuda" else f"bench-{table}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for; gives the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.engine", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default=f"{ZOO},95M", help=f"{ZOO}, {', '.join(SHAPES)}")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--repeat", type=int, default=7, help="measurements of each kind")
    parser.add_argument("--update-docs", action="store_true", help="write the tables into them")
    options = parser.parse_args(arguments)
    documents = DOCUMENTS if options.update_docs else ()
    try:
        if options.device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"--device {options.device}: no CUDA device: use --device cpu")
        device = torch.device(options.device)
        for table in ("engine", "swap"):
            check_place(_name(table, device), documents)
        names = options.shapes.split(",")
        unknown = [name for name in names if name != ZOO and name not in SHAPES]
        if unknown:
            raise InputError(f"--shapes: '{unknown[0]}' is none of {ZOO}, {', '.join(SHAPES)}")
        dtype = getattr(torch, options.dtype)
        options.folder.mkdir(parents=True, exist_ok=True)
        works = [
            zoo() if name == ZOO else random_words(options.folder, name, dtype) for name in names
        ]
        for report in measure(works, device, options.repeat):
            report.publish(options.folder, documents)
    except EvomergeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
