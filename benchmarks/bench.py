"""What evomerge itself costs, beside merging and scoring: `make bench`.

Each row gives a measured figure, the limit it is held against, and what it was measured on. Where
a physical limit exists (copying the same bytes) it is measured in the same run.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from evomerge.coordinates import start_of
from evomerge.devices import Device
from evomerge.executor import Landed, Take
from evomerge.fitness.results import Scored, Scores
from evomerge.job import Job, WeightSpace
from evomerge.merge.checkpoint import Checkpoint, dtype_name
from evomerge.merge.live import Resident
from evomerge.merge.planner import make_plan
from evomerge.recipe import Recipe
from evomerge.search import Silent
from evomerge.search.loop import Run
from evomerge.search.setting import Setting, versions
from evomerge.space import Models, build
from evomerge.store import Coordinator, NewCandidate, Store

ROOT = Path(__file__).parent.parent
REPEATS = 7


def median_seconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median wall time of a call, after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


class Instant:
    """An executor that scores at once, so that only the loop is timed."""

    def evaluate(self, take: Take) -> Iterator[Landed]:
        while (request := take()) is not None:
            tasks = {}
            for task, examples in request.examples.items():
                n = len(examples)
                right = (examples + request.candidate) % 3 == 0
                tasks[task] = Scores(
                    examples,
                    right.astype(np.float32),
                    np.full(n, -1.0, np.float32),
                    np.zeros(n, np.bool_),
                    np.zeros(n, np.uint32),
                    np.zeros(n, np.bool_),
                )
            yield Landed(request, Scored(tasks, 0.0, 0.0), "none", 1)

    def devices(self) -> tuple[Device, ...]:
        return ()

    def close(self) -> None:
        pass


def llama(folder: Path, name: str, seed: int, **sizes: int) -> str:
    """A random Llama on disk; gives its folder."""
    torch.manual_seed(seed)  # transformers initialises from the global generator
    config = LlamaConfig(tie_word_embeddings=False, num_attention_heads=4, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / name)
    return str(folder / name)


def loop_overhead(folder: Path) -> tuple[str, float]:
    """Milliseconds per candidate of ask, decode, store and tell, at 64 dimensions."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 30, "vocab_size": 32}
    paths = [llama(folder, name, seed, **sizes) for seed, name in enumerate(("base", "a", "b"))]
    candidates = 280
    job = Job.from_dict(
        {
            "name": "overhead",
            "parents": {"a": {"model": paths[1]}, "b": {"model": paths[2]}},
            "base": {"model": paths[0]},
            "space": {
                "kind": "weight",
                "method": "task_arithmetic",
                "per": "layer",
                "weight": [-0.5, 1.5],
            },
            "tasks": [{"task": str(ROOT / "fitness" / "ja_list_ops" / "task.yaml")}],
            "optimizer": {"name": "cma-es"},
            "budget": {"candidates": candidates},
        },
        "benchmark",
    )
    setting = Setting.open(job)
    with Store(f"sqlite:///{folder}/overhead.db", create=True) as store:
        coordinator = Coordinator.launch(
            store,
            job.name,
            0,
            setting.document(),
            versions(),
            setting.new_models(),
            setting.new_splits(),
        )
        with coordinator:
            run = Run(setting, coordinator, Instant(), Silent(), lambda: False)
            run.score_baselines()
            started = time.perf_counter()
            run.optimize()
            seconds = time.perf_counter() - started
    where = f"{len(setting.space.coordinates)} dimensions, {candidates} candidates"
    return where, 1000 * seconds / candidates


def swap(folders: Sequence[str], repeats: int = REPEATS) -> tuple[str, float, float]:
    """(what, seconds to merge into the live model, seconds to copy the same bytes)."""
    opened = {path: Checkpoint.open(path) for path in folders}
    base, *parents = folders
    named = Models(
        {Path(p).name: p for p in parents},
        base,
        {path: model.layout for path, model in opened.items()},
        dtype_name(opened[base].dtype),
        {path: model.config for path, model in opened.items()},
        {path: {n: h.numel for n, h in m.headers.items()} for path, m in opened.items()},
    )
    section = WeightSpace.model_validate(
        {"kind": "weight", "method": "task_arithmetic", "per": "layer", "weight": [-0.5, 1.5]}
    )
    space = build(section, named)
    recipe = space.decode(start_of(space.coordinates))
    assert isinstance(recipe, Recipe)
    model = LlamaForCausalLM.from_pretrained(base)
    live = dict(model.named_parameters())
    resident = Resident(opened, torch.device("cpu"))

    def merge() -> None:
        resident.write(make_plan(recipe, opened), live)

    copies = {name: value.detach().clone() for name, value in live.items()}

    def copy() -> None:
        for name, value in copies.items():
            live[name].data.copy_(value)

    count = sum(value.numel() for value in live.values())
    what = f"{count / 1e6:.1f}M parameters, {len(parents)} parents and base, float32"
    return what, median_seconds(merge, repeats), median_seconds(copy, repeats)


def command(*arguments: str) -> float:
    """Seconds of a command, start-up included."""
    call = [sys.executable, "-m", "evomerge", *arguments]
    return median_seconds(lambda: subprocess.run(call, check=True, capture_output=True), 5)


def ls_loads_torch(store: str) -> bool:
    """Whether `evomerge ls` imports torch."""
    code = (
        "import sys\nfrom evomerge.cli.app import app\n"
        f"app(['ls', '--store', {store!r}], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip().endswith("True")


def read_back(folder: Path, count: int = 10_000) -> tuple[str, float]:
    """Seconds to read the candidates of a search back: genotypes, fitness, states."""
    url = f"sqlite:///{folder}/large.db"
    random = np.random.Generator(np.random.PCG64(0))
    with Store(url, create=True) as store:
        coordinator = Coordinator.launch(store, "large", 0, {"parents": {}}, {}, [], [])
        with coordinator:
            for number in range(1, count // 100 + 1):
                coordinator.open_generation(
                    number,
                    "proposed",
                    0.1,
                    [
                        NewCandidate(
                            slot, None, random.random(64), {"recipe": "x" * 3000}, "0" * 64
                        )
                        for slot in range(100)
                    ],
                )
        seconds = median_seconds(lambda: store.candidates(coordinator.search.id))
    return f"{count:,} candidates of 64 dimensions", seconds


def main() -> None:
    table = Table("what", "on", "measured", "limit", title="evomerge's own cost", min_width=98)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        what, milliseconds = loop_overhead(folder)
        table.add_row("loop, per candidate", what, f"{milliseconds:.2f} ms", "5 ms")
        zoo = ROOT / "examples" / "zoo"
        what, merged, _ = swap([str(zoo / m) for m in ("base", "ops", "ja")])
        table.add_row("swap into the live zoo model", what, f"{1000 * merged:.2f} ms", "10 ms")
        sizes = {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 10,
            "vocab_size": 16000,
        }
        large = [llama(folder, f"large-{i}", i, **sizes) for i in range(3)]
        what, merged, copied = swap(large)
        table.add_row(
            "swap into a larger model",
            what,
            f"{1000 * merged:.0f} ms, {merged / copied:.1f} x copy_",
            "3 x copy_",
        )
        table.add_row("evomerge --help", "start-up included", f"{command('--help'):.2f} s", "0.5 s")
        store = f"sqlite:///{folder}/overhead.db"
        loads = "torch loaded" if ls_loads_torch(store) else "torch not loaded"
        table.add_row(
            "evomerge ls",
            "start-up included",
            f"{command('ls', '--store', store):.2f} s, {loads}",
            "no torch",
        )
        what, seconds = read_back(folder)
        table.add_row("reading candidates back", what, f"{seconds:.2f} s", "1 s")
    Console(width=120).print(table)
    print(json.dumps({"threads": torch.get_num_threads(), "versions": versions()}))


if __name__ == "__main__":
    main()
