"""Where the searches on one cluster see each other: each posts what it asks for, reads what the
others do, and works out its own share by the rule that all of them go by. Nobody is asked, so
there is nobody to be lost; whoever falls silent is forgotten. Knows nothing of workers.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from evomerge.executor.cluster import Cluster
from evomerge.executor.shares import Claim, Node, Places, allot
from evomerge.messages import one_line

_log = logging.getLogger(__name__)

_BEAT = 2.0  # seconds between two looks
_SILENT = 15.0  # seconds without a beat after which a search is no more
_PATIENCE = 5.0  # seconds to wait for a look under way, at the end


class Board:
    """A search's place among the others. share: what it may have at present, another object after
    each look. others: whether there are other searches."""

    share: Places
    others: bool

    def __init__(self, cluster: Cluster, claim: Callable[[], Claim]) -> None:
        """Returns after the first look. claim: what the search asks for and has at present, always
        under the same name; called in a thread of the board's own."""
        self._cluster = cluster
        self._claim = claim
        self._name = claim().name
        self._beats = 0
        self._heard: dict[str, tuple[bytes, float]] = {}  # of others: what, and when it was new
        self._known: tuple[Sequence[Node], Sequence[Claim]] | None = None
        self._closed = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._stay, name="board", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let the others have what this search had."""
        self._closed.set()
        self._thread.join(_PATIENCE)
        self._cluster.take_down(self._name)

    def _stay(self) -> None:
        lost = False
        while not self._closed.wait(_BEAT):
            try:
                self._look()
                lost = False
            except Exception as error:  # of many kinds: Ray's, gRPC's, a post that is none
                if not lost:
                    text = "executor: other searches cannot be seen, this one keeps what it has: %s"
                    _log.warning(text, one_line(error))
                lost = True

    def _look(self) -> None:
        own = self._claim()
        self._beats += 1
        post = asdict(own) | {"beats": self._beats}
        self._cluster.post(self._name, json.dumps(post).encode())
        others = [_read(post) for post in self._present()]
        self.others = bool(others)
        claims = sorted([own, *others], key=lambda claim: claim.name)
        asked = {kind for claim in claims for kind in claim.demand}
        known = self._cluster.nodes(asked), claims
        if known != self._known:
            shares = allot(*known)
            self._known, self._mine = known, shares[self._name]
        self.share = dict(self._mine)

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
    del fields["beats"]
    lists = {name: tuple(fields[name]) for name in ("held", "broken")}
    return Claim(**fields | lists)
