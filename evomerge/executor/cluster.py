"""The Ray cluster that workers run on: joined or started, kept quiet; what it has, and what of it a
worker asks for. Knows nothing of what workers do.
"""

import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from evomerge.errors import EvomergeError, JobError
from evomerge.executor.actor import Actor, Sender
from evomerge.executor.shares import Amounts, Node
from evomerge.executor.spec import WorkerSpec
from evomerge.job import Engine as EngineSection
from evomerge.job import Executor as ExecutorSection
from evomerge.messages import one_line

_OBJECTS = 100_000_000  # bytes for Ray's object store: recipes and scores are all that travels
_PROBE = 10.0  # seconds for a connection
_BEAT = 2.0  # seconds between two connections to the head
# Seconds until a head that does not answer is lost. Ray ends this process after 60, without a word
# on what to do.
_HEAD = 20.0
_READERS = 4  # pieces of models that are read at once for other nodes

# What a worker sees of this process's environment. Not by way of Ray's runtime environments, which
# are logged and shown by its dashboard: there is a token among them.
_FOLDERS = ("EVOMERGE_CACHE", "EVOMERGE_DATA")
_PASSED_ON = (
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "OMP_NUM_THREADS",
    "VLLM_LOGGING_LEVEL",
)

_POSTS = b"evomerge searches 1"  # a namespace; what is put there in another form has another number


class Cluster:
    """A connection to Ray, which is left alone where this process has one already.

    ray: the module.
    """

    def __init__(self, address: str | None) -> None:
        """address: see the job's executor section. Raises JobError where no cluster answers."""
        self.ray = _imported()
        self._lost = False  # the head, and with it everything
        self._joined = not self.ray.is_initialized()
        if self._joined:
            if address in (None, "auto"):  # as Ray does it
                address = os.environ.get("RAY_ADDRESS") or address
            self._join(address or "local")
        self._head: str = "" if self._is_client else self.ray.get_runtime_context().gcs_address
        self._asked = self._answered = time.monotonic()

    def _join(self, address: str) -> None:
        starting: dict[str, Any] = {}
        if address == "local":
            starting = {"include_dashboard": False, "object_store_memory": _OBJECTS}
        else:
            _probe(address, self._nearby() if address == "auto" else address)
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

    def _nearby(self) -> str:
        """The address of a cluster that runs on this machine, or did when one was started last."""
        try:
            found: str = self.ray._private.services.canonicalize_bootstrap_address_or_die("auto")
        except ConnectionError:
            raise _unreachable("auto", "this machine is no node of one: give HOST:PORT") from None
        return found

    def check(self) -> None:
        """To be called often. Raises EvomergeError once the head is lost; then there is nothing to
        be ended, and nobody to disconnect from."""
        if self._head and time.monotonic() - self._asked >= _BEAT:
            self._answers()

    def _answers(self) -> bool:
        """Whether the head does; raises as `check` does."""
        self._asked = now = time.monotonic()
        host, _, port = self._head.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _BEAT).close()
            self._answered = now
            return True
        except OSError as error:
            if now - self._answered < _HEAD:
                return False
            self._lost = True
            raise EvomergeError(
                f"executor: the head of the Ray cluster, {self._head}, is lost: {one_line(error)}: "
                "bring it back, or start another, and resume the search"
            ) from None

    def leave(self) -> None:
        """Disconnect, and stop a cluster that was started here."""
        if self._joined and not self._lost:
            self.ray.shutdown()

    @property
    def _is_client(self) -> bool:
        """Whether this process is on none of its nodes: `ray://`."""
        connected: bool = self.ray.util.client.ray.is_connected()
        return connected

    @property
    def has(self) -> Amounts:
        """What its nodes have in all."""
        return _shown(self.ray.cluster_resources())

    @property
    def free(self) -> Amounts:
        """What nobody has taken."""
        return _shown(self.ray.available_resources())

    def nodes(self, asked: Collection[str]) -> list[Node]:
        """Those that workers may be started on: not one that is being drained, which `ray://` does
        not see. asked: resources that are told of even where Ray counts them for itself, such as a
        node's own name or its type of GPU."""
        alive = [node for node in self.ray.nodes() if node["Alive"]]
        leaving = {}
        if not self._is_client:
            leaving = self.ray._private.state.state.get_draining_nodes()
        return [
            Node(node["NodeID"], _shown(node["Resources"], asked))
            for node in alive
            if node["NodeID"] not in leaving
        ]

    def is_alive(self, node: str) -> bool:
        """Whether a node still belongs to it, as far as is known. Raises as `check` does: to ask
        Ray while the head is away is to wait until it ends this process."""
        while self._head and not self._answers():
            time.sleep(_BEAT)
        return any(known["NodeID"] == node and known["Alive"] for known in self.ray.nodes())

    def start(self, demand: Amounts, environment: Mapping[str, str], node: str) -> Any:
        """The handle of an actor that starts on this node as soon as there is room for it, and is
        never started again: who does that wants to know why it ended."""
        scheduling = self.ray.util.scheduling_strategies
        options = {
            "num_cpus": demand.get("CPU", 0),
            "num_gpus": demand.get("GPU", 0),
            "resources": {k: v for k, v in demand.items() if k not in ("CPU", "GPU")},
            "max_restarts": 0,
            "scheduling_strategy": scheduling.NodeAffinitySchedulingStrategy(node, soft=False),
        }
        return self.ray.remote(Actor).options(**options).remote(dict(environment))

    def sender(self, spec: WorkerSpec, environment: Mapping[str, str]) -> Any:
        """The handle of an actor on this process's node, of what other nodes lack. Raises JobError
        where this process is on none."""
        if self._is_client:
            raise JobError(
                "nothing can be sent by ray://: start the search on a node of the cluster, or use "
                "a path that all nodes share"
            )
        here = self.ray.get_runtime_context().get_node_id()
        scheduling = self.ray.util.scheduling_strategies
        options = {
            "num_cpus": 0,
            "max_concurrency": _READERS,
            "max_restarts": -1,
            "max_task_retries": -1,
            "scheduling_strategy": scheduling.NodeAffinitySchedulingStrategy(here, soft=False),
        }
        return self.ray.remote(Sender).options(**options).remote(dict(environment), spec)

    def post(self, name: str, text: bytes) -> None:
        """Put something up for all who are connected, in place of what has that name."""
        self._kept._internal_kv_put(name, text, namespace=_POSTS)

    def posts(self) -> dict[str, bytes]:
        """What is up, by name."""
        names = self._kept._internal_kv_list("", namespace=_POSTS)
        found = {
            name.decode(): self._kept._internal_kv_get(name, namespace=_POSTS) for name in names
        }
        return {name: text for name, text in found.items() if text is not None}

    def take_down(self, name: str) -> None:
        """Without effect where nothing has that name, or the cluster is lost."""
        if self._lost:
            return
        with suppress(self.ray.exceptions.RayError):
            self._kept._internal_kv_del(name, namespace=_POSTS)

    @property
    def _kept(self) -> Any:
        """The head's table of keys and values, for which Ray has no public name."""
        return self.ray.experimental.internal_kv

    def kill(self, actor: Any) -> None:
        """End an actor's process at once, whatever it does."""
        if self._lost:
            return
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
    """What a worker's process is given of this one's environment. Folders are absolute: it works in
    another one."""
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    folders = {
        name: os.path.abspath(os.path.expanduser(os.environ[name]))
        for name in _FOLDERS
        if os.environ.get(name)
    }
    return {"OMP_NUM_THREADS": str(engine.threads)} | passed | folders


def _probe(address: str, found: str) -> None:
    """Whether anybody listens where an address was found: Ray asks for minutes. Raises JobError."""
    host, _, port = found.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise _unreachable(address, "give HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PROBE).close()
    except (OSError, OverflowError) as error:
        where = f"{found}: " if found != address else ""
        raise _unreachable(address, f"{where}{one_line(error)}") from None


def _unreachable(address: str, why: str) -> JobError:
    return JobError(f"executor.address: '{address}': no Ray cluster can be reached: {why}")


def _shown(resources: Mapping[str, float], asked: Collection[str] = ()) -> Amounts:
    """Without what Ray counts for itself and nobody asks for."""
    own = ("node:", "memory", "object_store_memory", "accelerator_type:")
    return {
        name: amount
        for name, amount in resources.items()
        if name in asked or not name.startswith(own)
    }


def _imported() -> Any:
    """Ray, quiet. Raises JobError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
        import ray.experimental.internal_kv
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise JobError(
            f"executor.kind: ray: Ray cannot be loaded: {one_line(error)}: "
            "pip install 'evomerge[ray]'"
        ) from None
    return ray
