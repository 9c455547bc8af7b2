"""Where the searches on one cluster see each other: each posts what it asks for, reads what the
others do, and works out its own share by the rule that all of them go by. Nobody is asked, so
there is nobody to be lost; whoever falls silent is forgotten. What strangers hold for long is no
part of what there is to share. Knows nothing of workers.
"""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from evomerge.errors import ClusterLost
from evomerge.executor.cluster import Cluster
from evomerge.executor.shares import Amounts, Claim, Node, Places, allot, taken, without
from evomerge.messages import one_line

_log = logging.getLogger(__name__)

_BEAT = 2.0  # seconds between two looks
_SILENT = 15.0  # seconds without a beat after which a search is no more
# Seconds for which something has to be held by nobody known until it is a stranger's. A worker that
# starts or ends is nobody's for a moment, too.
_STRANGE = 30.0
_PATIENCE = 5.0  # seconds to wait for a look under way, at the end


@dataclass(frozen=True)
class Look:
    """A search's place among the others. claim: its own, when it looked. share: what it may have.
    others: whether there are other searches. nodes: with what all of them share."""

    claim: Claim
    share: Places
    others: bool
    nodes: Sequence[Node]


class Board:
    """last: what was seen last; there is always a next one, soon."""

    last: Look

    def __init__(self, cluster: Cluster, claim: Callable[[], Claim]) -> None:
        """Returns after the first look. claim: what the search asks for and has at present, always
        under the same name; called in a thread of the board's own."""
        self._cluster = cluster
        self._claim = claim
        self._name = claim().name
        self._looks = 0
        self._heard: dict[str, tuple[bytes, float]] = {}  # of others: what, and when it was new
        self._taken: deque[tuple[float, Mapping[str, Amounts]]] = deque()  # when, and by node
        self._known: tuple[Sequence[Node], Sequence[Claim]] | None = None
        self._closed = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._stay, name="board", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let the others have what this search had."""
        self._closed.set()
        self._thread.join(_PATIENCE)
        with suppress(ClusterLost):
            self._cluster.want({}, 0)
        self._cluster.take_down(self._name)

    def _stay(self) -> None:
        lost = False
        while not self._closed.wait(_BEAT):
            try:
                self._look()
                lost = False
            except ClusterLost:  # whoever has workers there is told
                return
            except Exception as error:  # of many kinds: Ray's, gRPC's, a post that is none
                if not lost:
                    text = "executor: other searches cannot be seen, this one keeps what it has: %s"
                    _log.warning(text, one_line(error))
                lost = True

    def _look(self) -> None:
        own = self._claim()
        self._looks += 1
        post = asdict(own) | {"looks": self._looks}
        self._cluster.post(self._name, json.dumps(post).encode())
        others = [_read(post) for post in self._present()]
        claims = sorted([own, *others], key=lambda claim: claim.name)
        asked = {kind for claim in claims for kind in claim.demand}
        nodes = self._common(self._cluster.nodes(asked), claims)
        known = nodes, claims
        if known != self._known:
            shares = allot(*known)
            self._known, self._mine = known, shares[self._name]
        self._cluster.want(own.demand, (own.workers or 1) - sum(self._mine.values()))
        self.last = Look(own, self._mine, bool(others), nodes)

    def _common(self, nodes: Sequence[Node], claims: Sequence[Claim]) -> Sequence[Node]:
        """Nodes without what strangers have held for long."""
        now, looks = time.monotonic(), self._taken
        looks.append((now, taken(nodes, self._cluster.free_on_nodes(), claims)))
        while len(looks) > 1 and now - looks[1][0] >= _STRANGE:
            looks.popleft()
        if now - looks[0][0] < _STRANGE:
            return nodes
        return without(nodes, [found for _, found in looks])

    def _present(self) -> list[bytes]:
        """The posts of others who are not silent."""
        now = time.monotonic()
        posts = self._cluster.posts()
        posts.pop(self._name, None)
        for name, post in posts.items():
            if name not in self._heard or self._heard[name][0] != post:
                self._heard[name] = post, now
        self._heard = {name: heard for name, heard in self._heard.items() if name in posts}
        silent = [name for name, (_, since) in self._heard.items() if now - since > _SILENT]
        for name in silent:
            self._cluster.take_down(name)
            del self._heard[name]
        return [post for post, _ in self._heard.values()]


def _read(post: bytes) -> Claim:
    fields: dict[str, Any] = json.loads(post)
    del fields["looks"]
    return Claim(**fields | {"held": tuple(fields["held"])})
