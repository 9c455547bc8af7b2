"""Whether a long search on Ray survives that its workers are killed all the time, and whether
memory stays flat meanwhile: `python -m benchmarks.cluster_soak`.

A search over the zoo on four workers; every so many seconds one of them is killed. In the
synchronous mode it has to end with the winner of the same search in this process that nothing
happens to; in both the store has to be sound. Memory is that in RAM, of this process and of Ray's
raylet.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import ROOT, machine
from evomerge.errors import EvomergeError
from evomerge.job import Job
from evomerge.search import Silent, launch
from evomerge.search.setting import Setting
from evomerge.seeds import generator
from evomerge.store import Store
from evomerge.store.integrity import check

ZOO = ROOT / "examples" / "zoo"
SEED = 7
WORKERS = 4
SETTLED = 0.2  # of the time: until then caches fill, and the slope says nothing
OPENED = ("ray::Actor", "ray::Actor.evaluate")  # what Ray calls processes that wait, or evaluate
SAMPLE = 1.0  # seconds between readings of memory
POINTS = 10  # of the run, evenly spread, at which memory is said


@dataclass(eq=False)
class Disturbance(threading.Thread):
    """Kills a worker of this process's every so many seconds, one that is open, and reads its
    memory. Only the descendants of this process are anybody's workers here.

    memory: (seconds, megabytes of the driver, of the raylet).
    """

    every: float
    killed: int = 0
    memory: list[tuple[float, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()

    def run(self) -> None:
        """Until `end` is called."""
        random, started = generator(SEED, "soak"), time.monotonic()
        due = started + self.every
        while not self._over.wait(SAMPLE):
            own = descendants()
            raylets = [pid for pid, name in own.items() if "raylet/raylet" in name]
            if raylets:
                sizes = megabytes(os.getpid()), megabytes(raylets[0])
                self.memory.append((time.monotonic() - started, *sizes))
            # Whoever is killed three times while it opens its models is given up, and rightly.
            opened = sorted(pid for pid, name in own.items() if name.strip(" \0") in OPENED)
            if time.monotonic() > due and opened:
                os.kill(opened[random.integers(len(opened))], signal.SIGKILL)
                self.killed += 1
                due = time.monotonic() + self.every

    def end(self) -> None:
        """Disturb no more."""
        self._over.set()
        self.join()


def descendants() -> dict[int, str]:
    """The command lines of this process's children, and theirs, by process."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            names[int(folder.name)] = (folder / "cmdline").read_bytes().decode("utf-8", "replace")
        except OSError:  # it has ended
            continue
        parents[int(folder.name)] = int(fields[1])
    own = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in own} - own:
        own |= more
    return {pid: names[pid] for pid in own if pid in names}


def megabytes(process: int) -> float:
    """In RAM; NaN of one that has ended."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except OSError:
        return float("nan")
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def conducted(folder: Path, mode: str, candidates: int, on_ray: bool) -> dict[str, Any]:
    """A search, and what came of it. Raises EvomergeError."""
    ray = {"kind": "ray", "workers": WORKERS, "cpus": 0.5}
    job = {
        "name": "soak",
        "seed": SEED,
        "parents": {name: {"model": str(ZOO / name)} for name in ("ops", "ja")},
        "base": {"model": str(ZOO / "base")},
        "space": {"preset": "per_module_task_arithmetic"},
        "tasks": [{"task": str(ROOT / "fitness" / "ja_list_ops" / "task.yaml")}],
        "optimizer": {"name": "lra-cma-es", "population": 14, "sigma0": 0.1},
        "mode": mode,
        "budget": {"candidates": candidates},
        "staging": {"stages": [4, 8, 16], "keep": [10, 7]},
        "engine": {"device": "cpu", "threads": 1},
        "executor": ray if on_ray else {"kind": "inline"},
    }
    url = f"sqlite:///{folder}/{'ray' if on_ray else 'inline'}.db"
    launch(Setting.open(Job.from_dict(job, "benchmark")), url, Silent(), lambda: False)
    violations = check(url, lambda done, of: None).violations
    with Store(url) as store:
        search = store.search("soak")
        proposed = [c for c in store.candidates(search.id) if c.label is None]
        rows = [row for row in store.generations(search.id) if row.kind == "proposed"]
        places = sorted(place for row in rows for place in (row.ask, row.tell) if place is not None)
        (winner,) = [c for c in store.candidates(search.id) if c.id == search.verdict["winner"]]
        failed = sum(e.reason is not None for e in store.evaluations(search.id, ("train",)))
    return {
        "state": search.state,
        "winner": winner.recipe_sha,
        "violations": [str(violation) for violation in violations],
        "candidates": len(proposed),
        "told_once": places == [*range(1, 2 * len(rows) + 1)]
        and all(candidate.told is not None for candidate in proposed),
        "failed": failed,
    }


def slope(times: Sequence[float], sizes: Sequence[float]) -> float:
    """Of the line through what comes after memory has settled, in MB an hour."""
    first = int(SETTLED * len(times))
    return 3600 * float(np.polyfit(times[first:], sizes[first:], 1)[0])


def readings(memory: Sequence[tuple[float, float, float]]) -> list[dict[str, float]]:
    """Some of them, from the first to the last."""
    at = np.linspace(0, len(memory) - 1, POINTS + 1).round().astype(int)
    names = ("seconds", "driver", "raylet")
    return [dict(zip(names, np.round(memory[i], 1).tolist(), strict=True)) for i in at]


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak in one mode; gives the exit code: 1 where something was lost."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.cluster_soak", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--mode", choices=["synchronous", "asynchronous"], default="synchronous")
    parser.add_argument("--candidates", type=int, default=2000)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between kills")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        disturbance = Disturbance(options.every)
        disturbance.start()
        try:
            found = conducted(folder, options.mode, options.candidates, on_ray=True)
        except EvomergeError as error:
            print(error, file=sys.stderr)
            return 2
        finally:
            disturbance.end()
        seconds = time.monotonic() - started
        right = not found["violations"] and found["told_once"] and not found["failed"]
        if options.mode == "synchronous":
            undisturbed = conducted(folder, options.mode, options.candidates, on_ray=False)
            found["same_winner"] = found["winner"] == undisturbed["winner"]
            right = right and found["same_winner"]
    times, driver, raylet = zip(*disturbance.memory, strict=True)
    figures = {
        "mode": options.mode,
        "seconds": seconds,
        "killed": disturbance.killed,
        "candidates_a_minute": 60 * found["candidates"] / seconds,
        **found,
        "megabytes": {
            who: {"start": sizes[0], "end": sizes[-1], "most": max(sizes)}
            for who, sizes in (("driver", driver), ("raylet", raylet))
        },
        "megabytes_at": readings(disturbance.memory),
        "megabytes_an_hour": {"driver": slope(times, driver), "raylet": slope(times, raylet)},
        "machine": machine(),
    }
    print(json.dumps(figures, indent=2))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
