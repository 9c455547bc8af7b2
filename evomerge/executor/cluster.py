"""The Ray cluster that workers run on: joined or started, kept quiet; what it has, and actors on
its nodes. Knows nothing of what actors do.
"""

import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, TypeVar

from evomerge.errors import ClusterLost, JobError
from evomerge.executor.shares import Amounts, Node
from evomerge.messages import one_line

_OBJECTS = 100_000_000  # bytes for Ray's object store: recipes and scores are all that travels
_PROBE = 10.0  # seconds for a connection
_BEAT = 2.0  # seconds between two connections to the head
_HEAD = 15.0  # seconds until a head that does not answer is lost
# Seconds after which Ray ends a process whose head does not answer, in the middle of whatever it is
# at; longer than anything that keeps a search from looking after its head. Ray's own are 60.
_ABORT = "900"
_WANTED = 16  # places at most that an autoscaler is shown to be missing

_T = TypeVar("_T")

_POSTS = b"evomerge searches 2"  # a namespace; what is put there in another form has another number


class Cluster:
    """A connection to Ray, which is left alone where this process has one already.

    ray: the module. Whatever waits for the head is asked in a thread of its own, as Ray would wait
    for a lost one until it ends the process; all that asks Ray raises ClusterLost instead.
    """

    def __init__(self, address: str | None) -> None:
        """address: see the job's executor section. Raises JobError where no cluster answers."""
        self.ray = _imported()
        self._head = ""  # where somebody listens as long as there is a cluster; not always known
        self._lost: str | None = None  # what is wrong with it
        self._wanted: list[Any] = []  # placement groups that are for an autoscaler to see
        self._joined = not self.ray.is_initialized()
        if self._joined:
            if address in (None, "auto"):  # as Ray does it
                address = os.environ.get("RAY_ADDRESS") or address
            self._join(address or "local")
        if not self.is_client:
            self._head = self.ray.get_runtime_context().gcs_address
        self._answered = self._asked = time.monotonic()

    def _join(self, address: str) -> None:
        starting: dict[str, Any] = {}
        if address == "local":
            starting = {"include_dashboard": False, "object_store_memory": _OBJECTS}
        else:
            self._head = _probe(address, self._nearby() if address == "auto" else address)
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
        """To be called often. Raises ClusterLost once the head has not answered for too long."""
        now = time.monotonic()
        if self._head and not self._lost and now - self._asked >= _BEAT:
            self._asked = now
            try:
                _connect(self._head, _BEAT)
                self._answered = now
            except OSError as error:
                if now - self._answered >= _HEAD:
                    self._lost = one_line(error)
        if self._lost:
            raise ClusterLost(
                f"executor: the head of the Ray cluster, {self._head}, is lost ({self._lost}); "
                "what was recorded is kept: start another one, and resume the search"
            )

    def _ask(self, question: Callable[[], _T]) -> _T:
        """What Ray says. Raises what it raises, and as `check` does."""
        answer: Future[_T] = Future()

        def ask() -> None:
            try:
                answer.set_result(question())
            except Exception as error:
                answer.set_exception(error)

        self.check()
        threading.Thread(target=ask, name="ask", daemon=True).start()
        while not wait([answer], _BEAT).done:
            self.check()
        return answer.result()

    def leave(self) -> None:
        """Disconnect, and stop a cluster that was started here."""
        if self._joined and self._lost:  # Ray takes 20 s to find out that there is nobody
            threading.Thread(target=self.ray.shutdown, name="leave").start()
        elif self._joined:
            self.ray.shutdown()

    @property
    def is_client(self) -> bool:
        """Whether this process is on none of its nodes: `ray://`."""
        connected: bool = self.ray.util.client.ray.is_connected()
        return connected

    @property
    def has(self) -> Amounts:
        """What its nodes have in all."""
        return _shown(self._ask(self.ray.cluster_resources))

    @property
    def free(self) -> Amounts:
        """What nobody has taken."""
        return _shown(self._ask(self.ray.available_resources))

    def nodes(self, asked: Collection[str]) -> list[Node]:
        """Those that workers may be started on: not one that is being drained, which `ray://` does
        not see. asked: resources that are told of even where Ray counts them for itself, such as a
        node's own name or its type of GPU."""
        alive = [node for node in self._ask(self.ray.nodes) if node["Alive"]]
        leaving = {}
        if not self.is_client:
            leaving = self._ask(self.ray._private.state.state.get_draining_nodes)
        return [
            Node(node["NodeID"], _shown(node["Resources"], asked))
            for node in alive
            if node["NodeID"] not in leaving
        ]

    def free_on_nodes(self) -> dict[str, Amounts]:
        """What nobody has taken, by node; of none by `ray://`, which does not see it."""
        if self.is_client:
            return {}
        free = self._ask(self.ray._private.state.available_resources_per_node)
        return dict(free)

    def want(self, demand: Amounts, count: int) -> None:
        """To be called now and then, with the same demand. Lets an autoscaler see that there should
        be room for so many more workers: it makes nothing of actors that wait for a certain node.
        Room that is found is left again, for whoever may have it."""
        count = min(count, _WANTED) if demand else 0
        util = self.ray.util

        def adjust() -> None:
            stay = [group for group in self._wanted if not group.wait(0)]
            del stay[max(0, count) :]
            more = count - len(stay) if len(stay) == len(self._wanted) else 0
            for group in {*self._wanted} - {*stay}:
                util.remove_placement_group(group)
            self._wanted = stay + [util.placement_group([dict(demand)]) for _ in range(more)]

        if self._wanted or count > 0:
            self._ask(adjust)

    def is_alive(self, node: str) -> bool:
        """Whether a node still belongs to it, as far as is known."""
        nodes = self._ask(self.ray.nodes)
        return any(known["NodeID"] == node and known["Alive"] for known in nodes)

    def start(self, kind: type, arguments: Sequence[Any], demand: Amounts, node: str) -> Any:
        """The handle of an actor that starts on this node as soon as there is room for it, and is
        never started again: who does that wants to know why it ended."""
        options = {
            "num_cpus": demand.get("CPU", 0),
            "num_gpus": demand.get("GPU", 0),
            "resources": {k: v for k, v in demand.items() if k not in ("CPU", "GPU")},
            "max_restarts": 0,
        }
        return self._started(kind, arguments, options, node)

    def start_here(self, kind: type, arguments: Sequence[Any], threads: int) -> Any:
        """The handle of an actor on this process's node, not by `ray://`. It takes no room, answers
        so many at once, and is started again where it dies."""
        options = {
            "num_cpus": 0,
            "max_concurrency": threads,
            "max_restarts": -1,
            "max_task_retries": -1,
        }
        here = self.ray.get_runtime_context().get_node_id()
        return self._started(kind, arguments, options, here)

    def _started(
        self, kind: type, arguments: Sequence[Any], options: Mapping[str, Any], node: str
    ) -> Any:
        scheduling = self.ray.util.scheduling_strategies
        strategy = scheduling.NodeAffinitySchedulingStrategy(node, soft=False)
        actor = self.ray.remote(kind).options(**options, scheduling_strategy=strategy)
        return self._ask(lambda: actor.remote(*arguments))

    def post(self, name: str, text: bytes) -> None:
        """Put something up for all who are connected, in place of what has that name."""
        self._ask(lambda: self._kept._internal_kv_put(name, text, namespace=_POSTS))

    def posts(self) -> dict[str, bytes]:
        """What is up, by name."""
        kept = self._kept

        def found() -> dict[str, bytes | None]:
            names = kept._internal_kv_list("", namespace=_POSTS)
            return {name.decode(): kept._internal_kv_get(name, namespace=_POSTS) for name in names}

        return {name: text for name, text in self._ask(found).items() if text is not None}

    def take_down(self, name: str) -> None:
        """Without effect where nothing has that name, or the cluster is lost."""
        with suppress(self.ray.exceptions.RayError, ClusterLost):
            self._ask(lambda: self._kept._internal_kv_del(name, namespace=_POSTS))

    @property
    def _kept(self) -> Any:
        """The head's table of keys and values, for which Ray has no public name."""
        return self.ray.experimental.internal_kv

    def kill(self, actor: Any) -> None:
        """End an actor's process at once, whatever it does."""
        if self._lost:  # there is nobody to do it; `ray://` would wait
            return
        with suppress(self.ray.exceptions.RayError):
            self.ray.kill(actor)


def _probe(address: str, found: str) -> str:
    """Whether anybody listens where an address was found: Ray asks for minutes. Gives where that
    is, as HOST:PORT. Raises JobError."""
    where = found.removeprefix("ray://")
    host, _, port = where.rpartition(":")
    if not host or not port.isdigit():
        raise _unreachable(address, "give HOST:PORT, ray://HOST:PORT or auto")
    try:
        _connect(where, _PROBE)
    except (OSError, OverflowError) as error:
        prefix = f"{found}: " if found != address else ""
        raise _unreachable(address, f"{prefix}{one_line(error)}") from None
    return where


def _connect(where: str, patience: float) -> None:
    """To HOST:PORT and away again. Raises OSError, OverflowError."""
    host, _, port = where.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), patience).close()


def _unreachable(address: str, why: str) -> JobError:
    if why == "ray client connection timeout":  # Ray's answer to one who shows no token
        why += ": set RAY_AUTH_MODE=token where the cluster asks for a token"
    elif why.startswith("Initialization failure from server"):  # and a page that says no more
        why = (
            "its head does not start a process for this search: start the head with "
            "GRPC_ENABLE_FORK_SUPPORT=0, or the search on a node of the cluster"
        )
    return JobError(f"executor.address: '{address}': no Ray cluster can be reached: {why}")


def _shown(resources: Mapping[str, float], asked: Collection[str] = ()) -> Amounts:
    """Without what Ray counts for itself and nobody asks for."""
    own = ("node:", "memory", "object_store_memory", "accelerator_type:")
    return {
        name: amount
        for name, amount in resources.items()
        if name in asked or not (name.startswith(own) or "_group_" in name)
    }


def _imported() -> Any:
    """Ray, quiet. Raises JobError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", _ABORT)
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
