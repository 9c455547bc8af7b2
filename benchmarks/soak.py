"""Whether memory stays flat while candidates are swapped: `python -m benchmarks.soak`.

Every candidate is another recipe over the zoo, each fifth one a layer order of another depth; each
writes replies and is asked for likelihoods. The memory is that of this process and of all that it
has started, in RAM.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from benchmarks.chart import Curve, draw
from benchmarks.report import ROOT, machine
from evomerge.engine import Generation
from evomerge.engine.build import build
from evomerge.errors import EvomergeError
from evomerge.job import Engine as Section
from evomerge.merge.checkpoint import Checkpoint
from evomerge.recipe import Recipe

ZOO = ROOT / "examples" / "zoo"
MODELS = ("base", "ops", "ja")
DEPTH = 6
SETTLED = 0.2  # of the swaps: until then caches fill, and the slope says nothing


def candidate(step: int) -> Recipe:
    """No two steps give the same one: what comes back may be kept, and that takes memory."""
    weights = {"ops": 0.2 + 0.001 * step, "ja": 0.9 - 0.001 * step}
    if step % 5 == 4:
        places = [(step // 5 * (i + 1) + i) % DEPTH for i in range(2 + step % 7)]
        slices = [
            {
                "sources": [
                    {"model": m, "layer_range": [at, at + 1], "parameters": {"weight": w}}
                    for m, w in weights.items()
                ]
            }
            for at in places
        ]
        return Recipe.from_dict({"merge_method": "linear", "slices": slices})
    entries = [{"model": m, "parameters": {"weight": w}} for m, w in weights.items()]
    made = {"merge_method": "task_arithmetic", "base_model": "base", "models": entries}
    return Recipe.from_dict(made)


def resident_bytes() -> int:
    """In RAM, of this process and its descendants."""
    parents, sizes = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            text = (folder / "status").read_text(encoding="utf-8")
        except OSError:  # it has ended
            continue
        fields = dict(line.split(":", 1) for line in text.splitlines())
        parents[int(folder.name)] = int(fields["PPid"])
        sizes[int(folder.name)] = 1024 * int(fields.get("VmRSS", "0 kB").split()[0])
    own = {int(Path("/proc/self").resolve().name)}
    while more := {pid for pid, parent in parents.items() if parent in own} - own:
        own |= more
    return sum(sizes[pid] for pid in own)


def soak(engine: str, swaps: int) -> list[float]:
    """Megabytes before the first swap and after each."""
    text = (ROOT / "fitness" / "ja_list_ops" / "data" / "train.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()[:16]]
    pairs = [(record["prompt"], record["answer"]) for record in records]
    models = {name: Checkpoint.open(ZOO / name) for name in MODELS}
    found = []
    with closing(build(Section(kind=engine, device="cpu", threads=1), models, "base")) as live:
        found.append(resident_bytes() / 1e6)
        for step in range(swaps):
            live.load(candidate(step))
            live.generate([prompt for prompt, _ in pairs], Generation(8))
            live.likelihoods(pairs)
            found.append(resident_bytes() / 1e6)
    return found


def slope(megabytes: Sequence[float]) -> float:
    """Of the line through what comes after memory has settled, in kB per swap."""
    first = int(SETTLED * len(megabytes))
    settled = np.array(megabytes[first:])
    return 1000 * float(np.polyfit(np.arange(len(settled)), settled, 1)[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for; gives the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--swaps", type=int, default=500)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="of the chart")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        megabytes = soak(options.engine, options.swaps)
    except EvomergeError as error:
        print(error, file=sys.stderr)
        return 2
    grown = slope(megabytes)
    title = f"{options.engine}: {grown:+.1f} kB per swap after the first {100 * SETTLED:.0f} %"
    reach = 200.0 * np.ceil(max(megabytes) / 180)
    points = [(float(step), value / reach) for step, value in enumerate(megabytes)]
    options.folder.mkdir(parents=True, exist_ok=True)
    chart = options.folder / f"soak-{options.engine}.svg"
    text = draw([Curve(title, [points])], "memory, MB", "swaps", reach)
    chart.write_text(text, encoding="utf-8")
    figures = {
        "engine": options.engine,
        "swaps": options.swaps,
        "kilobytes_per_swap": grown,
        "megabytes": {"start": megabytes[0], "end": megabytes[-1], "most": max(megabytes)},
        "seconds": time.perf_counter() - started,
        "machine": machine(),
    }
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
