"""Merging into a live model, as a search does it: against copying the same bytes.

    python -m benchmarks.live [--device cpu] [--shape 95M] [--dtypes float32,bfloat16]

The first candidate reads the parents and finds out what is known of them as a whole; the next ones
only change weights, densities or t. Times are those of whole candidates, the plan included.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import SHAPES, family
from benchmarks.report import Report, arguments, published
from evomerge.errors import InputError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.live import Resident
from evomerge.merge.planner import make_plan
from evomerge.recipe import Recipe

SHARE = 0.7  # of the bandwidth of a copy, that a GPU has to reach
HELD = ("task_arithmetic", "ties")  # by these methods
METHODS = (*HELD, "slerp", "dare_ties")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DOCUMENTS = ("docs/merging.md",)


@dataclass(frozen=True)
class Measured:
    """Seconds of one method's candidates, and what they had to move.

    first: the first one; weights: one with other weights, else t; sparsity: one with other
    densities, None where the method has none. moved: bytes of the inputs read and the output
    written. copy_seconds: for copying the output, which moves copied bytes.
    """

    method: str
    dtype: str
    streamed: bool
    first: float
    weights: float
    sparsity: float | None
    moved: int
    copy_seconds: float
    copied: int

    def share(self, seconds: float) -> float:
        """The bandwidth reached, as a share of the copy's."""
        return (self.moved / seconds) / (self.copied / self.copy_seconds)


class Live:
    """Live parameters on a device, and the models that are merged into them."""

    def __init__(self, models: Mapping[str, Path], device: torch.device, repeat: int) -> None:
        self.opened = {str(path): Checkpoint.open(path) for path in models.values()}
        self.base, self.a, self.b = (str(models[name]) for name in ("base", "a", "b"))
        self.device = device
        self.repeat = repeat
        headers = self.opened[self.base].headers
        self.parameters = {
            name: torch.empty(header.shape, dtype=header.dtype, device=device)
            for name, header in headers.items()
        }
        self.bytes = sum(x.nbytes for x in self.parameters.values())

    def copy_seconds(self) -> float:
        """Of copying all parameters."""
        origin = {name: value.clone() for name, value in self.parameters.items()}

        def copy(_: int) -> None:
            for name, value in origin.items():
                self.parameters[name].copy_(value)

        return self._median(copy)

    def candidates(self, method: str, room: int | None, copy_seconds: float) -> Measured:
        """One method. room: bytes for holding parents, by default most of what is free."""
        resident = Resident(self.opened, self.device, room)

        def merge(step: int, sparsity: int) -> None:
            recipe = Recipe.from_dict(self._recipe(method, step, sparsity))
            resident.write(make_plan(recipe, self.opened), self.parameters)

        first = self._seconds(merge, 0, 0)
        weights = self._median(lambda i: merge(i, 0))
        sparse = method in ("ties", "dare_ties")
        sparsity = self._median(lambda i: merge(0, i)) if sparse else None
        inputs = 2 if method == "slerp" else 3
        dtype = str(next(iter(self.parameters.values())).dtype).removeprefix("torch.")
        moved, copied = (inputs + 1) * self.bytes, 2 * self.bytes
        streamed = room == 0
        return Measured(
            method, dtype, streamed, first, weights, sparsity, moved, copy_seconds, copied
        )

    def _recipe(self, method: str, step: int, sparsity: int) -> dict[str, Any]:
        """A candidate; no two steps have the same weights or t, no two sparsities densities."""
        recipe: dict[str, Any] = {"merge_method": method, "base_model": self.base}
        if method == "slerp":
            models = [{"model": self.base}, {"model": self.a}]
            return {**recipe, "models": models, "parameters": {"t": 0.3 + 0.01 * step}}
        weights = (0.6 - 0.01 * step, 0.4 + 0.01 * step)
        entries = [
            {"model": model, "parameters": {"weight": weight}}
            for model, weight in zip((self.a, self.b), weights, strict=True)
        ]
        density = {} if method == "task_arithmetic" else {"density": 0.5 + 0.01 * sparsity}
        return {**recipe, "models": entries, "parameters": density}

    def _median(self, run: Callable[[int], object]) -> float:
        """Median seconds of run(1), run(2), ..., after one that does not count."""
        run(1)
        return statistics.median(self._seconds(run, i) for i in range(2, self.repeat + 2))

    def _seconds(self, run: Callable[..., object], *arguments: int) -> float:
        self._finish()
        started = time.perf_counter()
        run(*arguments)
        self._finish()
        return time.perf_counter() - started

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(
    folder: Path, shape: str, dtypes: Sequence[str], device: torch.device, repeat: int
) -> Report:
    """The table of all methods and dtypes."""
    rows, data, notes = [], [], []
    for dtype in dtypes:
        live = Live(family(folder, shape, DTYPES[dtype], ("a", "b")), device, repeat)
        copy_seconds = live.copy_seconds()
        notes.append(
            f"copy_ of the same {live.bytes / 1e6:.0f} MB in {dtype}: "
            f"{1000 * copy_seconds:.2f} ms, {2 * live.bytes / copy_seconds / 1e9:.0f} GB/s."
        )
        for method, room in [*((method, None) for method in METHODS), ("task_arithmetic", 0)]:
            print(f"merging {dtype} by {method}", file=sys.stderr, flush=True)
            found = live.candidates(method, room, copy_seconds)
            data.append(asdict(found))
            rows.append(_row(found, device))
    columns = ["dtype", "method", "first", "weights", "densities", "x copy_", "bandwidth (goal)"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    where = f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name
    title = f"merging into a live model ({where})"
    kind = f"{SHAPES[shape].parameters / 1e6:.0f}M parameters of a {shape} Llama's shapes"
    notes = [
        f"{where}: {kind}, two parents and a base (slerp: two models), in memory but for the rows "
        "that say streamed, where every candidate reads its parents' files (page cache). First is "
        "the first candidate; then one with other weights (slerp: another t), and one with other "
        f"densities, medians of {repeat}. Bandwidth is a share of that of copy_, with each input "
        "read once and the output written once.",
        *notes,
    ]
    return Report(_name(device), title, columns, rows, notes, {"methods": data})


def _name(device: torch.device) -> str:
    return "bench-gpu" if device.type == "cuda" else "bench-live"


def _row(found: Measured, device: torch.device) -> list[str]:
    held = device.type == "cuda" and found.method in HELD and not found.streamed
    goal = f" ({100 * SHARE:.0f} %)" if held else ""
    slowest = max(found.weights, found.sparsity or 0)
    return [
        found.dtype,
        f"{found.method}, streamed" if found.streamed else found.method,
        f"{1000 * found.first:.0f} ms",
        f"{1000 * found.weights:.2f} ms",
        "-" if found.sparsity is None else f"{1000 * found.sparsity:.2f} ms",
        f"{slowest / found.copy_seconds:.1f}",
        f"{100 * found.share(slowest):.0f} %{goal}",
    ]


def main(given: Sequence[str] | None = None) -> int:
    """Measure what is asked for; gives the exit code."""
    parser = arguments("benchmarks.live", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="95M", help="of the models")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="one or both of the default")
    parser.add_argument("--repeat", type=int, default=7, help="candidates of each kind")
    options = parser.parse_args(given)
    device, dtypes = torch.device(options.device), options.dtypes.split(",")

    def measured() -> Report:
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"--device {options.device}: no CUDA device: use --device cpu")
        unknown = [name for name in dtypes if name not in DTYPES]
        if unknown:
            raise InputError(f"--dtypes: '{unknown[0]}' is none of {', '.join(DTYPES)}")
        return measure(options.folder, options.shape, dtypes, device, options.repeat)

    return published(options, _name(device), DOCUMENTS, measured)


if __name__ == "__main__":
    sys.exit(main())
