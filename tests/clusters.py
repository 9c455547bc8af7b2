"""A Ray cluster on this machine, of as many nodes as a test wants, and workers that misbehave."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.errors import OutOfMemory, TaskError
from evomerge.executor import Landed, Request, Take
from evomerge.executor.parcel import Step
from evomerge.executor.spec import Opening, WorkerSpec
from evomerge.executor.worker import Worker
from evomerge.fitness.results import Evaluation, Scored, Scores
from evomerge.job import Engine, Executor
from evomerge.recipe import Recipe

OBJECTS = 80_000_000  # bytes of each node's object store, the least that Ray takes
PATIENCE = 60  # seconds until something that should happen has not


class Nodes:
    """A cluster to which this process is connected. Its head, which is never lost, has 4 CPUs."""

    def __init__(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        from ray.cluster_utils import Cluster

        head: dict[str, Any] = {
            "num_cpus": 4,
            "include_dashboard": False,
            "object_store_memory": OBJECTS,
            # So that a node that is lost is known to be after two seconds, not half a minute.
            "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 4},
        }
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self._ray = ray
        self.address: str = self.cluster.address
        self.connect()

    def connect(self) -> None:
        """Connect this process."""
        self._ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR)

    @contextlib.contextmanager
    def another(self, **resources: float) -> Iterator[Any]:
        """One more node with these resources of its own; call what is given to lose it."""
        node = self.cluster.add_node(num_cpus=4, resources=resources, object_store_memory=OBJECTS)
        lost = []

        def lose() -> None:
            lost.append(node)
            self.cluster.remove_node(node, allow_graceful=False)

        try:
            yield lose
        finally:
            if not lost:
                self.cluster.remove_node(node)

    def drain(self, resource: str) -> None:
        """Have Ray take away the node that has this, as who operates a cluster would."""
        (node,) = self._nodes(resource)
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "service"]
        ray = Path(sys.executable).with_name("ray")
        command = [ray, "drain-node", "--address", self.address, "--node-id", node, *reason]
        subprocess.run(command, check=True)

    def has(self, resource: str) -> bool:
        """Whether a node that has this belongs to it."""
        return bool(self._nodes(resource))

    def _nodes(self, resource: str) -> list[str]:
        nodes = self._ray.nodes()
        return [n["NodeID"] for n in nodes if n["Alive"] and resource in n["Resources"]]

    def remove(self) -> None:
        """Stop everything."""
        self._ray.shutdown()
        self.cluster.shutdown()


def section(**keys: Any) -> Executor:
    """For two workers that ask for little."""
    return Executor.model_validate({"kind": "ray", "workers": 2, "cpus": 0.5} | keys)


@dataclass(frozen=True)
class Misbehaving(WorkerSpec):
    """A spec whose workers have no engine: they answer at once, or do to a candidate what
    `faults` says, (what, how often), and write both down in a folder, the latter with the candidate
    that they were told is upcoming. ahead: they say that they merge ahead. steps: of a second each,
    in which they open."""

    folder: str = ""
    faults: Mapping[int, tuple[str, int]] = field(default_factory=dict)
    seconds: float = 0.0
    ahead: bool = False
    steps: int = 0

    def opening(self) -> Opening[Worker]:
        """As its faults say; candidate -1 stands for opening."""
        for _ in range(self.steps):
            time.sleep(1)
            yield Step()
        worker = _Worker(self)
        worker.misbehave(-1)
        (Path(self.folder) / f"{time.time():.6f}-{os.getpid()}.opened").touch()
        return worker


class _Worker(Worker):
    def __init__(self, spec: Misbehaving) -> None:
        self._spec = spec

    @property
    def merges_ahead(self) -> bool:
        return self._spec.ahead

    def evaluate(self, request: Request, upcoming: Request | None = None) -> Evaluation:
        name = f"{time.time():.6f}-{os.getpid()}.{request.candidate}"
        told = "" if upcoming is None else str(upcoming.candidate)
        (Path(self._spec.folder) / name).write_text(told)
        time.sleep(self._spec.seconds)
        self.misbehave(request.candidate)
        return answer(request)

    def misbehave(self, candidate: int) -> None:
        what, times = self._spec.faults.get(candidate, ("", 0))
        met = Path(self._spec.folder) / f"met-{candidate}.json"
        before = json.loads(met.read_text()) if met.exists() else 0
        if before >= times:
            return
        met.write_text(json.dumps(before + 1))
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang":
            time.sleep(1e6)
        if what == "memory":
            raise OutOfMemory("9 tokens do not fit")
        if what == "refuse":
            raise TaskError("task 'task': train is not what it is where the search was started")
        raise RuntimeError(f"CUDA error: {what}")


def answer(request: Request) -> Scored:
    """What a worker that behaves says."""
    tasks = {}
    for task, examples in request.examples.items():
        n = len(examples)
        scores = ((examples + request.candidate) % 3 == 0).astype(np.float32)
        none, never = np.zeros(n, np.uint32), np.zeros(n, np.bool_)
        tasks[task] = Scores(examples, scores, -scores, never, none, never)
    return Scored(tasks, 0.25, 0.5)


def misbehaving(
    folder: Path, seconds: float = 0.0, ahead: bool = False, **faults: tuple[str, int]
) -> Misbehaving:
    """A spec; faults of candidate 3: `_3=("kill", 1)`, of opening: `opening=...`."""
    numbered = {-1 if name == "opening" else int(name[1:]): fault for name, fault in faults.items()}
    engine = Engine(threads=1)
    return Misbehaving(engine, {}, "", (), False, str(folder), numbered, seconds, ahead)


def requests(count: int) -> list[Request]:
    """Of candidates 0, 1, ..."""
    recipe = Recipe.from_dict({"merge_method": "linear", "models": [{"model": "a"}]})
    examples = np.arange(5, dtype=np.uint32)
    return [Request(i, recipe, "train", {"task": examples}) for i in range(count)]


def notes(folder: Path, kind: str) -> list[int]:
    """The processes that opened a worker ('opened'), or met a candidate (its number)."""
    found = sorted(folder.glob(f"*.{kind}"))
    return [int(path.name.split("-")[1].split(".")[0]) for path in found]


def eventually(happens: Callable[[], bool]) -> bool:
    """Whether it does before patience ends."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if happens():
            return True
        time.sleep(0.05)
    return False


def is_running(process: int) -> bool:
    """Whether there is such a process, and not only what is left of it."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def giving(requests: Iterable[Request]) -> Take:
    """Takes them one after the other, then none."""
    iterator = iter(requests)
    return lambda: next(iterator, None)


def by_candidate(found: Sequence[Landed]) -> dict[int, Evaluation]:
    """Each is there once."""
    evaluations = {landed.request.candidate: landed.evaluation for landed in found}
    assert len(evaluations) == len(found)
    return evaluations
