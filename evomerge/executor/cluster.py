"""The Ray cluster that workers run on: joined or started, kept quiet; what it has, and what of it a
worker asks for. Knows nothing of what workers do.
"""

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from evomerge.errors import JobError
from evomerge.executor.actor import Actor
from evomerge.job import Engine as EngineSection
from evomerge.job import Executor as ExecutorSection
from evomerge.messages import one_line

_OBJECTS = 100_000_000  # bytes for Ray's object store: recipes and scores are all that travels
_PROBE = 10.0  # seconds for a connection

# What a worker sees of this process's environment. Not by way of Ray's runtime environments, which
# are logged and shown by its dashboard: there is a token among them.
_PASSED_ON = (
    "EVOMERGE_CACHE",
    "EVOMERGE_DATA",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "OMP_NUM_THREADS",
    "VLLM_LOGGING_LEVEL",
)

Amounts = Mapping[str, float]  # of resources, by Ray's names


class Cluster:
    """A connection to Ray, which is left alone where this process has one already.

    ray: the module.
    """

    def __init__(self, address: str | None) -> None:
        """address: see the job's executor section. Raises JobError where no cluster answers."""
        self.ray = _imported()
        self._joined = not self.ray.is_initialized()
        if self._joined:
            self._join(address or os.environ.get("RAY_ADDRESS") or "local")

    def _join(self, address: str) -> None:
        starting: dict[str, Any] = {}
        if address == "local":
            starting = {"include_dashboard": False, "object_store_memory": _OBJECTS}
        elif address != "auto":
            _probe(address)
        # Ray writes of workers that die to stdout, where an answer in JSON may have to stand alone;
        # who lost a worker says so.
        self.ray._private.worker._worker_logs_enabled = False
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is wrong is raised, too
                self.ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **starting)
        except Exception as error:  # of many kinds, by what is wrong
            self.leave()
            raise _unreachable(address, one_line(error)) from None
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # which Ray takes without asking

    def leave(self) -> None:
        """Disconnect, and stop a cluster that was started here."""
        if self._joined:
            self.ray.shutdown()

    @property
    def has(self) -> Amounts:
        """What its nodes have in all."""
        return _shown(self.ray.cluster_resources())

    @property
    def free(self) -> Amounts:
        """What nobody has taken."""
        return _shown(self.ray.available_resources())

    def room(self, demand: Amounts) -> int:
        """How many workers its nodes could hold if they had no others: what somebody has taken may
        be given back, and what a search that was killed had is so in a moment. Raises JobError for
        workers that ask for nothing."""
        if not demand:
            raise JobError("executor.workers: auto: they ask for nothing: say how many")
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return sum(
            min(int(node.get(name, 0) / amount) for name, amount in demand.items())
            for node in nodes
        )

    def is_alive(self, node: str) -> bool:
        """Whether a node still belongs to it, as far as is known."""
        return any(known["NodeID"] == node and known["Alive"] for known in self.ray.nodes())

    def start(self, demand: Amounts, environment: Mapping[str, str]) -> Any:
        """The handle of an actor that starts as soon as there is room for it, and is never started
        again: who does that wants to know why it ended."""
        options = {
            "num_cpus": demand.get("CPU", 0),
            "num_gpus": demand.get("GPU", 0),
            "resources": {k: v for k, v in demand.items() if k not in ("CPU", "GPU")},
            "max_restarts": 0,
            "scheduling_strategy": "SPREAD",
        }
        return self.ray.remote(Actor).options(**options).remote(dict(environment))

    def kill(self, actor: Any) -> None:
        """End an actor's process at once, whatever it does."""
        with suppress(self.ray.exceptions.RayError):
            self.ray.kill(actor)


def demanded(section: ExecutorSection, engine: EngineSection, has: Amounts) -> Amounts:
    """What each worker asks for, in a cluster that has this. Raises JobError for a device that is
    not the worker's to choose."""
    if engine.device not in ("auto", "cpu", "cuda"):
        raise JobError(
            f"engine.device: '{engine.device}': on Ray each worker is given its GPUs: give cuda, "
            "cpu or auto"
        )
    gpus = section.gpus
    if gpus == "auto":
        wanted = engine.device == "cuda" or (engine.device == "auto" and has.get("GPU", 0) > 0)
        gpus = engine.tensor_parallel if wanted else 0
    cpus = section.cpus
    if cpus == "auto":
        cpus = 1 if gpus or engine.threads == "auto" else engine.threads
    amounts = {"CPU": cpus, "GPU": gpus, **section.resources}
    return {name: amount for name, amount in amounts.items() if amount}


def settled(engine: EngineSection, demand: Amounts) -> EngineSection:
    """The engine section of a worker that asks for this: device auto is a GPU where it is given
    one, and never one that it only happens to see."""
    if engine.device != "auto":
        return engine
    return engine.model_copy(update={"device": "cuda" if "GPU" in demand else "cpu"})


def spelt(amounts: Amounts) -> str:
    """For people: '2 CPU, 0.5 GPU'."""
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items()) or "nothing"


def environment(engine: EngineSection) -> dict[str, str]:
    """What a worker's process is given of this one's environment."""
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {"OMP_NUM_THREADS": str(engine.threads)} | passed


def _probe(address: str) -> None:
    """Whether anybody listens at an address: Ray asks for minutes. Raises JobError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise _unreachable(address, "give HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PROBE).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, one_line(error)) from None


def _unreachable(address: str, why: str) -> JobError:
    return JobError(f"executor.address: '{address}': no Ray cluster can be reached: {why}")


def _shown(resources: Mapping[str, float]) -> Amounts:
    """Without what Ray counts for itself."""
    own = ("node:", "memory", "object_store_memory", "accelerator_type:")
    return {name: amount for name, amount in resources.items() if not name.startswith(own)}


def _imported() -> Any:
    """Ray, quiet. Raises JobError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise JobError(
            f"executor.kind: ray: Ray cannot be loaded: {one_line(error)}: "
            "pip install 'evomerge[ray]'"
        ) from None
    return ray
