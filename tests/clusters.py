"""A Ray cluster on this machine, of as many nodes as a test wants, and workers that misbehave."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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

    @contextlib.contextmanager
    def held(self, cpus: float) -> Iterator[None]:
        """By a program that knows nothing of ours."""
        stranger = self._ray.remote(Stranger).options(num_cpus=cpus).remote()
        self._ray.get(stranger.is_there.remote())
        try:
            yield
        finally:
            self._ray.kill(stranger)

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


class Head:
    """A cluster of one node, to which this process is not connected. keys: of Ray, for the node."""

    def __init__(self, **keys: Any) -> None:
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": OBJECTS}
        self._cluster = Cluster(initialize_head=True, head_node_args=node | keys)
        self.address: str = self._cluster.address
        _see_own_table()

    def lose(self) -> None:
        """It dies, and the workers on it."""
        started = self._cluster.head_node.all_processes.values()
        processes = [one.process for some in started for one in some]
        left = [worker for process in processes for worker in actors(process.pid)]
        for process in processes:
            process.kill()
        for worker in left:
            os.kill(worker, signal.SIGKILL)

    def close(self) -> None:
        """Stop everything."""
        self._cluster.shutdown()
        _see_own_table()


def _see_own_table() -> None:
    """A process has one table of keys, that of the head which it started last, and none after it
    stopped one. This gives it that of the cluster to which it is connected."""
    import ray
    from ray.experimental import internal_kv

    if ray.is_initialized():
        internal_kv._initialize_internal_kv(ray._private.worker.global_worker.gcs_client)


class Growing(Head):
    """A cluster whose head has no room, and an autoscaler that adds nodes of 2 CPUs where they are
    asked for, two at most: Ray's own, with nodes on this machine."""

    def __init__(self, folder: Path) -> None:
        from ray._private.services import get_node_ip_address
        from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

        port = free_port()
        empty: dict[str, Any] = {"auth": {}, "file_mounts": {}}
        for key in (
            "cluster_synced_files",
            "head_setup_commands",
            "head_start_ray_commands",
            "initialization_commands",
            "rsync_exclude",
            "setup_commands",
            "worker_setup_commands",
            "worker_start_ray_commands",
        ):
            empty[key] = []
        address = f"{get_node_ip_address()}:{port}"
        node = {"CPU": 2, "object_store_memory": OBJECTS}
        config = {
            "cluster_name": "growing",
            "provider": {
                "type": "fake_multinode",
                "gcs_address": address,
                "disable_launch_config_check": True,
                "disable_node_updaters": True,
            },
            "available_node_types": {
                "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
                "node": {"resources": node, "node_config": {}, "max_workers": 2},
            },
            "head_node_type": "ray.head.default",
            "max_workers": 2,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": 10,
            "file_mounts_sync_continuously": False,
        }
        file = folder / "autoscaler.json"
        file.write_text(json.dumps(config | empty))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_FAKE_CLUSTER", "1")
            patch.setenv("RAY_OVERRIDE_NODE_ID_FOR_TESTING", FAKE_HEAD_NODE_ID)
            patch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
            super().__init__(num_cpus=0, gcs_server_port=port, autoscaling_config=str(file))

    def close(self) -> None:
        """Stop everything, the nodes that were added first."""
        (monitor,) = self._cluster.head_node.all_processes["monitor"]
        for process in _processes():
            if process != monitor.process.pid and _descends(process, monitor.process.pid):
                os.kill(process, signal.SIGKILL)
        super().close()


class Stranger:
    """An actor that holds what it was given."""

    def is_there(self) -> bool:
        """It is."""
        return True


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


def free_port() -> int:
    """One on which nobody listens."""
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
    return port


def actors(of: int | None = None) -> list[int]:
    """The processes of our workers that descend from one, or else from this one."""
    found = []
    for process in _processes():
        try:
            is_actor = b"ray::Actor" in Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:
            continue
        if is_actor and _descends(process, of or os.getpid()):
            found.append(process)
    return found


def _processes() -> list[int]:
    return sorted(int(path.name) for path in Path("/proc").glob("[0-9]*"))


def _descends(process: int, of: int) -> bool:
    while process > 1:
        if process == of:
            return True
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return False
        process = int(fields[1])
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
