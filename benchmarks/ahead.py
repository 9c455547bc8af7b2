"""What merging ahead is worth: candidates a minute with it and without.

    python -m benchmarks.ahead [--device cpu] [--shape 95M] [--method task_arithmetic]

Candidates with other weights, each scored by teacher forcing on as many examples as make merging
the given share of scoring; with and without in turn, since no machine is equally fast all the time.
On a CPU scoring takes one thread, and the process first two cores, then one: where every core has
a worker of its own, there is none for merging beside it. Wall time; nothing else should run.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.engine import METHODS, recipe
from benchmarks.models import SHAPES, family
from benchmarks.report import ROOT, Report
from evomerge.engine.transformers import TransformersEngine
from evomerge.errors import EvomergeError, InputError
from evomerge.job import Engine as Section
from evomerge.merge.checkpoint import Checkpoint

SHARES = (0.05, 0.25, 0.5)  # of merging, in scoring


@dataclass(frozen=True)
class Candidate:
    """Seconds of one: until its model was live, and in all."""

    waited: float
    whole: float


@dataclass(frozen=True)
class Measured:
    """Medians over candidates. place: what the process had. share: of merging in scoring, as it
    came out."""

    place: str
    share: float
    examples: int
    in_turn: Candidate
    ahead: Candidate

    @property
    def hidden(self) -> float:
        """The share of the merge that scoring did not wait for. Where cores are short the scoring
        beside it takes longer: see gain."""
        return 1 - self.ahead.waited / self.in_turn.waited

    @property
    def gain(self) -> float:
        """In candidates per time."""
        return self.in_turn.whole / self.ahead.whole - 1


class Bench:
    """An engine over models of a shape, and candidates without end."""

    def __init__(
        self, models: Mapping[str, Checkpoint], device: torch.device, method: str, repeat: int
    ) -> None:
        section = Section(device=str(device), threads=1, merge_ahead=True)
        self.engine = TransformersEngine(section, models, "base")
        self._method = method
        self._step = 0
        self._repeat = repeat
        for _ in range(2):  # parents are read
            self.run(1, 4, ahead=False)

    def close(self) -> None:
        self.engine.close()

    def run(self, count: int, examples: int, ahead: bool) -> list[Candidate]:
        """So many candidates, one after the other; the first one comes unannounced."""
        pairs = [_pair(i) for i in range(examples)]
        recipes = [recipe(self._method, self._step + i) for i in range(count + 1)]
        self._step += count + 1
        found = []
        for now, upcoming in pairwise(recipes):
            started = time.perf_counter()
            self.engine.load(now)
            loaded = time.perf_counter()
            if ahead and not self.engine.prepare(upcoming):
                raise InputError("memory is too short for a second model: name a smaller --shape")
            self.engine.likelihoods(pairs)
            ended = time.perf_counter()
            found.append(Candidate(loaded - started, ended - started))
        return found

    def measure(self, place: str, share: float) -> Measured:
        """With as many examples as make merging this share of scoring."""
        trial = self.run(5, 16, ahead=False)
        merge = statistics.median(c.waited for c in trial)
        score = statistics.median(c.whole - c.waited for c in trial) / 16
        examples = max(1, round(merge / share / score))
        runs: dict[bool, list[Candidate]] = {False: [], True: []}
        for _ in range(self._repeat):
            for ahead, candidates in runs.items():
                candidates += self.run(4, examples, ahead)[1:]
        in_turn, ahead = (_median(candidates) for candidates in runs.values())
        found = in_turn.waited / (in_turn.whole - in_turn.waited)
        return Measured(place, found, examples, in_turn, ahead)


def _median(candidates: Sequence[Candidate]) -> Candidate:
    waited = statistics.median(c.waited for c in candidates)
    return Candidate(waited, statistics.median(c.whole for c in candidates))


def _pair(number: int) -> tuple[str, str]:
    """A prompt of 24 words, and an answer of 8."""
    words = [f"w{1 + (number + 7 * i) % 63}" for i in range(32)]
    return " ".join(words[:24]), " " + " ".join(words[24:])


def measure(
    models: Mapping[str, Checkpoint], device: torch.device, method: str, repeat: int
) -> list[Measured]:
    """For every share, wherever there is something to tell apart."""
    found = []
    places: dict[str, set[int] | None] = {"GPU": None}
    cores = sorted(os.sched_getaffinity(0))
    if device.type == "cpu":
        places = {"2 cores": set(cores[:2]), "1 core": set(cores[:1])}
    try:
        for place, own in places.items():
            if own is not None:
                os.sched_setaffinity(0, own)  # before the engine starts threads of its own
            print(f"measuring on {place}", file=sys.stderr, flush=True)
            with closing(Bench(models, device, method, repeat)) as bench:
                found += [bench.measure(place, share) for share in SHARES]
    finally:
        os.sched_setaffinity(0, cores)
    return found


def report(title: str, found: Sequence[Measured], repeat: int) -> Report:
    """The table."""
    rows = [
        [
            row.place,
            f"{100 * row.share:.0f} %",
            str(row.examples),
            f"{60 / row.in_turn.whole:.1f}",
            f"{60 / row.ahead.whole:.1f}",
            f"{100 * row.gain:+.0f} %",
            f"{100 * row.hidden:.0f} %",
        ]
        for row in found
    ]
    return Report(
        "bench-ahead-gpu" if found[0].place == "GPU" else "bench-ahead",
        "merging ahead",
        [
            "on",
            "merge / scoring",
            "examples",
            "in turn, per minute",
            "ahead, per minute",
            "gain",
            "hidden",
        ],
        rows,
        [f"{title}. Medians of {3 * repeat} candidates."],
        {"ahead": [asdict(row) for row in found]},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for; gives the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.ahead", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="95M", choices=[*SHAPES])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--method", default="task_arithmetic", choices=METHODS)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--repeat", type=int, default=3, help="rounds of three candidates")
    options = parser.parse_args(arguments)
    try:
        if options.device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"--device {options.device}: no CUDA device: use --device cpu")
        dtype = getattr(torch, options.dtype)
        folders = family(options.folder, options.shape, dtype, ("a", "b"))
        models = {name: Checkpoint.open(folder) for name, folder in folders.items()}
        device = torch.device(options.device)
        found = measure(models, device, options.method, options.repeat)
        title = f"{options.method} of three {options.shape} models in {options.dtype}"
        report(title, found, options.repeat).publish(options.folder, ())
    except EvomergeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
