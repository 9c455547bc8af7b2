"""Merging on disk, against mergekit and against loading and saving the same bytes.

    python -m benchmarks.merge [--only slerp,ties] [--skip-mergekit] [--update-docs]
    python -m benchmarks.merge --memory

Every program merges the same random models by the same YAML, one after the other in one run. Before
each, all that was written is on the disk and all that is read is in the page cache. Times are those
of whole processes, start-up included; memory is what they held beyond the page cache. mergekit is
in an environment of its own; EVOMERGE_MERGEKIT names its `mergekit-yaml`.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

from benchmarks.models import SHAPES, WEIGHTS, family
from benchmarks.report import ROOT, Report, check_place
from evomerge.errors import EvomergeError, InputError, nearest

MERGEKIT = Path(os.environ.get("EVOMERGE_MERGEKIT", ROOT / ".venv-mergekit/bin/mergekit-yaml"))
DOCUMENTS = {
    "bench-merge": ("README.md", "docs/merging.md"),
    "bench-memory": ("docs/merging.md",),
}
MEMORY_LIMIT = 600  # MB beyond the page cache
_SAMPLING = 0.01  # seconds between two looks at a process's memory
_STRIDE = 7  # every 7th tensor is compared: all kinds of a layer's 9, in other layers
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Case:
    """One merge to measure.

    models: in the recipe's order; weights: theirs, if the method takes any; base: whether there is
    a base_model. faster: how many times as fast as mergekit it has to be; floors: how many times
    the floor it may take. random: mergekit's masks cannot be reproduced.
    """

    models: Sequence[str]
    weights: Sequence[float] = ()
    base: bool = False
    parameters: Mapping[str, float] = field(default_factory=dict)
    faster: float | None = None
    floors: float | None = None
    random: bool = False

    def recipe(
        self, method: str, folders: Mapping[str, Path], out_dtype: str = "bfloat16"
    ) -> dict[str, Any]:
        """The merge in mergekit's dialect."""
        entries: list[dict[str, Any]] = [{"model": str(folders[name])} for name in self.models]
        for entry, weight in zip(entries, self.weights, strict=False):
            entry["parameters"] = {"weight": weight}
        recipe: dict[str, Any] = {"merge_method": method, "models": entries, "dtype": "bfloat16"}
        if self.base:
            recipe["base_model"] = str(folders["base"])
        if self.parameters:
            recipe["parameters"] = dict(self.parameters)
        return {**recipe, "out_dtype": out_dtype}

    @property
    def inputs(self) -> list[str]:
        """The models that are read, each once."""
        return list(dict.fromkeys([*self.models, *(["base"] if self.base else [])]))


HALF = {"density": 0.5}
CASES = {
    "linear": Case("ab", (0.6, 0.4), faster=7, floors=3),
    "slerp": Case(("base", "a"), base=True, parameters={"t": 0.4}, faster=10),
    "ties": Case("ab", (0.6, 0.4), True, HALF, faster=10),
    "dare_ties": Case("ab", (0.6, 0.4), True, HALF, faster=10, random=True),
    "task_arithmetic": Case("abc", (0.5, 0.3, 0.2), True, faster=7, floors=3),
    "model_stock": Case("abc", base=True, faster=10),
    "passthrough": Case("a"),
    "nuslerp": Case("ab", (0.6, 0.4)),
    "multislerp": Case("ab", (0.6, 0.4)),
    "karcher": Case("ab"),
    "dare_linear": Case("ab", (0.6, 0.4), True, HALF, random=True),
    "breadcrumbs": Case("ab", (0.6, 0.4), True, HALF),
    "breadcrumbs_ties": Case("ab", (0.6, 0.4), True, HALF),
    "della": Case("ab", (0.6, 0.4), True, HALF, random=True),
    "della_linear": Case("ab", (0.6, 0.4), True, HALF, random=True),
    "sce": Case("abc", base=True, parameters={"select_topk": 0.5}),
    "nearswap": Case(("base", "a"), base=True, parameters={"t": 0.001}),
    "arcee_fusion": Case(("base", "a"), base=True),
    "ram": Case("ab", base=True),
    "ramplus_tl": Case("ab", base=True),
}
USUAL = tuple(CASES)[:7]


@dataclass(frozen=True)
class Cost:
    """What a process took: seconds of wall time, of processor time with its children's, and the
    most bytes that it and they held beyond the page cache."""

    seconds: float
    cpu_seconds: float
    anonymous: int


def run(command: Sequence[str | Path]) -> Cost:
    """Run a command to its end. Raises InputError with what it said where it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=ROOT, env=environment)
        done = threading.Event()
        peaks = [0]
        sampler = threading.Thread(target=_sample, args=(process.pid, done, peaks))
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        done.set()
        sampler.join()
        if process.returncode:
            said.seek(0)
            words = " ".join(map(str, command))
            raise InputError(f"'{words}' ended with {process.returncode}:\n{said.read()[-2000:]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, peaks[0])


def _sample(pid: int, done: threading.Event, peaks: list[int]) -> None:
    while not done.wait(_SAMPLING):
        peaks[0] = max(peaks[0], _anonymous(pid))


def _anonymous(pid: int) -> int:
    """Bytes that a process and its descendants hold and no file backs."""
    held = 0
    with suppress(OSError):  # it has ended
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                held += 1024 * int(line.split()[1])
        for task in Path(f"/proc/{pid}/task").iterdir():
            children = (task / "children").read_text().split()
            held += sum(_anonymous(int(child)) for child in children)
    return held


def settle(files: Sequence[Path]) -> None:
    """All that was written to the disk, all that will be read to the page cache."""
    os.sync()
    buffer = bytearray(1 << 24)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# Every input read once, into a buffer that is reused; the first one saved.
_FLOOR = """
import sys
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
out, first, *others = sys.argv[1:]
buffer = torch.empty(0)
for path in others:
    with safe_open(path, "pt") as file:
        for name in file.keys():
            values = file.get_tensor(name).view(-1)
            if len(buffer) < len(values):
                buffer = torch.empty_like(values)
            buffer[: len(values)].copy_(values)
save_file(load_file(first), out, metadata={"format": "pt"})
"""


def agreement(ours: Path, theirs: Path, base: Path | None) -> str:
    """How far the tensors of two merged models are apart, in words.

    base: given where masks are random, and only the mean change from it can be compared. Raises
    InputError where names, shapes or dtypes differ.
    """
    left, right = _holders(ours), _holders(theirs)
    if left.keys() != right.keys():
        raise InputError(f"{len(left.keys() ^ right.keys())} tensors are in one output only")
    different = total = furthest = 0
    changes = torch.zeros(2, dtype=torch.float64)
    for name in sorted(left)[::_STRIDE]:
        a, b = _tensor(left[name], name), _tensor(right[name], name)
        if a.shape != b.shape or a.dtype != b.dtype:
            raise InputError(f"'{name}': {a.dtype} {[*a.shape]} and {b.dtype} {[*b.shape]}")
        if base is None:
            apart = (_ordered(a) - _ordered(b)).abs()
            different += int(apart.count_nonzero())
            furthest = max(furthest, int(apart.max()))
            total += a.numel()
        else:
            origin = _tensor(base / WEIGHTS, name).double()
            changes += torch.stack([(x.double() - origin).abs().sum() for x in (a, b)])
    if base is not None:
        return f"mean change {100 * float(changes[0] / changes[1] - 1):+.2f} %"
    return f"{different:,} of {total:,}, {furthest} ulp" if different else "none"


def _holders(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    holders: dict[str, Path] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            holders |= dict.fromkeys(file.keys(), path)
    return holders


def _tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        values: torch.Tensor = file.get_tensor(name)
        return values


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """Whole numbers in the order of the values, neighbours one apart."""
    kind = _BITS[values.dtype]
    bits = values.view(kind).to(torch.int64)
    return torch.where(bits < 0, torch.iinfo(kind).min - bits, bits)


@dataclass(frozen=True)
class Measured:
    """What the programs took for one method."""

    method: str
    floor: Cost
    evomerge: Cost
    mergekit: Cost | None
    agreement: str | None


class Bench:
    """Runs programs one after the other over models of one shape.

    Costs are medians of `repeat` runs, memory the most of them; of mergekit there is one run.
    """

    def __init__(self, shape: str, folder: Path, repeat: int) -> None:
        spare = 3 * SHAPES[shape].parameters * torch.float32.itemsize
        self.models = family(folder, shape, torch.bfloat16, ("a", "b", "c"), spare)
        self.scratch = folder / "out"
        self.repeat = repeat

    def compare(self, method: str, with_mergekit: bool) -> Measured:
        """One method through all programs."""
        recipe, inputs = self._prepared(method, "bfloat16")
        plain, ours, theirs = (self.scratch / name for name in ("plain", "ours", "theirs"))
        floor = self._cost([sys.executable, "-c", _FLOOR, plain, *inputs], inputs, plain)
        _remove(plain)
        evomerge = self._cost(_merging(recipe, ours), inputs, ours)
        mergekit, agreed = None, None
        if with_mergekit:
            mergekit = self._cost([MERGEKIT, recipe, theirs], inputs, theirs, repeat=1)
            base = self.models["base"] if CASES[method].random else None
            agreed = agreement(ours, theirs, base)
        _remove(self.scratch)
        return Measured(method, floor, evomerge, mergekit, agreed)

    def widened(self, method: str) -> tuple[Cost, int]:
        """What merging to a float32 model takes, and that model's bytes."""
        recipe, inputs = self._prepared(method, "float32")
        out = self.scratch / "ours"
        cost = self._cost(_merging(recipe, out), inputs, out, repeat=1)
        size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        _remove(self.scratch)
        return cost, size

    def _prepared(self, method: str, out_dtype: str) -> tuple[Path, list[Path]]:
        """The recipe's file, and the files that are read."""
        _remove(self.scratch)
        self.scratch.mkdir()
        path = self.scratch / "recipe.yaml"
        path.write_text(yaml.safe_dump(CASES[method].recipe(method, self.models, out_dtype)))
        return path, [self.models[name] / WEIGHTS for name in CASES[method].inputs]

    def _cost(
        self,
        command: Sequence[str | Path],
        inputs: Sequence[Path],
        out: Path,
        repeat: int | None = None,
    ) -> Cost:
        costs = []
        for _ in range(repeat or self.repeat):
            _remove(out)
            settle(inputs)
            costs.append(run(command))
        return Cost(
            statistics.median(cost.seconds for cost in costs),
            statistics.median(cost.cpu_seconds for cost in costs),
            max(cost.anonymous for cost in costs),
        )


def _merging(recipe: Path, out: Path) -> list[str | Path]:
    return [str(Path(sys.executable).with_name("evomerge")), "merge", recipe, out]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def comparison(bench: Bench, shape: str, methods: Sequence[str], with_mergekit: bool) -> Report:
    """The table of all programs."""
    rows, data = [], []
    for method in methods:
        print(f"merging by {method}", file=sys.stderr, flush=True)
        found = bench.compare(method, with_mergekit)
        data.append(asdict(found))
        rows.append(_row(found))
    columns = ["method", "evomerge", "mergekit", "faster (goal)", "CPU, s", "memory, MB"]
    columns += ["x floor (goal)", "differing values"]
    notes = [
        f"A {shape} bfloat16 Llama on {os.cpu_count()} cores, page cache warm; evomerge's figures "
        f"beside mergekit's. Wall time of the whole command, median of {bench.repeat} (mergekit: "
        "one run); memory beyond the page cache; floor: a process that loads the same inputs and "
        f"saves an output of the same size. Differing values are those of every {_STRIDE}th tensor "
        "of both outputs; where masks are random, how far mean changes of the base are apart."
    ]
    return Report("bench-merge", "merging on disk", columns, rows, notes, {"methods": data})


def _row(found: Measured) -> list[str]:
    case, own, other = CASES[found.method], found.evomerge, found.mergekit
    faster, goal = "-", "" if case.faster is None else f" ({case.faster:g})"
    times = [f"{own.seconds:.1f} s", "-", f"{own.cpu_seconds:.1f}", _megabytes(own)]
    if other is not None:
        faster = f"{other.seconds / own.seconds:.1f} x{goal}"
        times[1] = f"{other.seconds:.1f} s"
        times[2] = f"{own.cpu_seconds:.1f} / {other.cpu_seconds:.1f}"
        times[3] = f"{_megabytes(own)} / {_megabytes(other)}"
    limit = "" if case.floors is None else f" ({case.floors:g})"
    floors = f"{own.seconds / found.floor.seconds:.1f} x{limit}"
    return [found.method, *times[:2], faster, *times[2:], floors, found.agreement or "-"]


def _megabytes(cost: Cost) -> str:
    return f"{cost.anonymous / 1e6:.0f}"


def memory(bench: Bench, shape: str, methods: Sequence[str]) -> Report:
    """The table of what evomerge holds while it writes a model far larger than that."""
    rows, data = [], []
    for method in methods:
        print(f"merging by {method}", file=sys.stderr, flush=True)
        cost, size = bench.widened(method)
        data.append({"method": method, "output": size, **asdict(cost)})
        rows.append(
            [
                method,
                f"{size / 1e9:.1f} GB",
                f"{_megabytes(cost)} MB",
                f"{MEMORY_LIMIT} MB",
                f"{size / cost.anonymous:.1f} x",
                f"{cost.seconds:.1f} s",
            ]
        )
    columns = ["method", "output", "memory", "limit", "output / memory", "time"]
    notes = [
        f"Memory of `evomerge merge` beyond the page cache, at its highest: {shape} bfloat16 "
        "parents, a float32 output."
    ]
    return Report("bench-memory", "memory of a merge", columns, rows, notes, {"methods": data})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for; gives the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.merge", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.1B", help="of the models")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--only", default=",".join(USUAL), help=f"of {', '.join(CASES)}")
    parser.add_argument("--repeat", type=int, default=3, help="runs of evomerge and of the floor")
    parser.add_argument("--skip-mergekit", action="store_true")
    parser.add_argument("--memory", action="store_true", help="of float32 outputs, nothing else")
    parser.add_argument("--update-docs", action="store_true", help="write the table into them")
    options = parser.parse_args(arguments)
    try:
        _measure(options)
    except EvomergeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _measure(options: argparse.Namespace) -> None:
    methods = options.only.split(",")
    for method in methods:
        if method not in CASES:
            raise InputError(f"--only: '{method}' is unknown: {nearest(method, CASES)}")
    name = "bench-memory" if options.memory else "bench-merge"
    documents = DOCUMENTS[name] if options.update_docs else ()
    check_place(name, documents)
    with_mergekit = not (options.memory or options.skip_mergekit)
    if with_mergekit and not MERGEKIT.is_file():
        raise InputError(
            f"'{MERGEKIT}' is missing: make it by tests/merge/mergekit_reference.sh, let "
            "EVOMERGE_MERGEKIT name another, or --skip-mergekit"
        )
    bench = Bench(options.shape, options.folder.resolve(), options.repeat)
    if options.memory:
        report = memory(bench, options.shape, methods)
    else:
        report = comparison(bench, options.shape, methods, with_mergekit)
    report.publish(options.folder, documents)


if __name__ == "__main__":
    sys.exit(main())
