"""A cluster that is nowhere: what its actors answer, and in which order, is up to a test."""

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import ray.exceptions

import evomerge
from evomerge.executor.actor import Place, Ready
from evomerge.executor.shares import Amounts, Node
from tests.clusters import answer

NEVER = object()  # in place of an answer
# What an actor answers, by its node, the method that is called, and the arguments; or what Ray or
# the method raises.
Answers = Callable[..., Any]


def behaves(node: str, method: str, *arguments: Any) -> Any:
    """As an actor that nothing happens to."""
    if method == "place":
        return Place(node, node, (), evomerge.__version__)
    if method == "open":
        return Ready(merges_ahead=False)
    return None if method == "begin" else answer(arguments[0])


class FakeCluster:
    """See Cluster. calls: how often each method was called, by node and method. posts: of other
    searches. lost: nodes that are. chance: one call ends at each `check`, by chance or, without it,
    the oldest."""

    def __init__(
        self, answers: Answers, chance: random.Random | None = None, **nodes: float
    ) -> None:
        """nodes: how many CPUs each has."""
        self.answers, self.chance = answers, chance
        self.calls = Counter[tuple[str, str]]()
        self.others: Callable[[], dict[str, bytes]] = dict
        self.lost: set[str] = set()
        self.is_client = False
        self.ray = SimpleNamespace(exceptions=ray.exceptions, get=lambda ref, timeout: ref.result())
        self._nodes = [Node(name, {"CPU": cpus}) for name, cpus in nodes.items()]
        self._pending: list[tuple[Future[Any], Any]] = []

    def called(self, node: str, method: str, *arguments: Any) -> SimpleNamespace:
        """Ray's reference to what comes of a call."""
        self.calls[node, method] += 1
        found, value = Future[Any](), self.answers(node, method, *arguments)
        if method == "begin":
            _end(found, value)
        elif value is not NEVER:
            self._pending.append((found, value))
        return SimpleNamespace(future=lambda: found, result=found.result)

    def check(self) -> None:
        """Let one call end."""
        if self._pending:
            place = self.chance.randrange(len(self._pending)) if self.chance else 0
            _end(*self._pending.pop(place))

    def start(self, kind: type, arguments: Sequence[Any], demand: Amounts, node: str) -> Any:
        """See Cluster."""

        def method(name: str) -> SimpleNamespace:
            return SimpleNamespace(remote=lambda *given: self.called(node, name, *given))

        return SimpleNamespace(**{m: method(m) for m in ("place", "open", "begin", "evaluate")})

    @property
    def has(self) -> Mapping[str, float]:
        """See Cluster."""
        return {"CPU": sum(node.has["CPU"] for node in self._nodes)}

    free = has

    def nodes(self, asked: Collection[str]) -> list[Node]:
        """See Cluster."""
        return [node for node in self._nodes if node.name not in self.lost]

    def is_alive(self, node: str) -> bool:
        """See Cluster."""
        return node not in self.lost

    def posts(self) -> dict[str, bytes]:
        """See Cluster."""
        return self.others()

    def free_on_nodes(self) -> dict[str, Amounts]:
        """See Cluster."""
        return {}

    def post(self, *_: Any) -> None:
        """See Cluster; as what follows, without effect."""

    want = take_down = kill = leave = post


def _end(found: Future[Any], value: Any) -> None:
    if isinstance(value, ray.exceptions.RayError):
        found.set_exception(value)
    elif isinstance(value, Exception):
        found.set_exception(ray.exceptions.RayTaskError("method", "", value))
    else:
        found.set_result(value)
