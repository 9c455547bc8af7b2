"""Who is logged in to the pages, and who tries too often.

Both are kept in memory alone: after a restart everybody logs in again. Knows nothing of requests
or cookies.
"""

import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

_IDLE = 12 * 3600.0  # seconds: a night between two looks
_MINUTE = 60.0
_ABSOLUTE = 7 * 86400.0
_PER_TOKEN = 20  # sessions; of more, the one longest unused ends

_TRIES = 10  # failures in a row; after that, one more every
_RECOVERY = 30.0  # seconds
_ADDRESSES = 4096  # remembered; of more, the one longest silent is forgotten


@dataclass(frozen=True)
class Session:
    """One login. token: the number of the token that it was opened with, and that it ends with.
    csrf: what forms of its pages carry."""

    id: str
    token: int
    csrf: str
    opened: float = field(repr=False)  # on the monotonic clock


class Sessions:
    """The open sessions. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, tuple[Session, float]] = OrderedDict()  # longest unused first

    def open(self, token: int) -> Session:
        """A new one, with an id that nobody has seen before."""
        at = time.monotonic()
        session = Session(secrets.token_urlsafe(32), token, secrets.token_urlsafe(32), at)
        with self._lock:
            self._open = OrderedDict(
                (id, entry) for id, entry in self._open.items() if not _is_over(*entry, at)
            )
            same = [id for id, (other, _) in self._open.items() if other.token == token]
            for id in same[: max(len(same) + 1 - _PER_TOKEN, 0)]:
                del self._open[id]
            self._open[session.id] = session, at
        return session

    def use(self, id: str) -> Session | None:
        """The session of this id, which is not idle any more; None if it has ended."""
        at = time.monotonic()
        with self._lock:
            entry = self._open.pop(id, None)
            if entry is None or _is_over(*entry, at):
                return None
            self._open[id] = entry[0], at
            return entry[0]

    def close(self, id: str) -> None:
        """End it; one that has ended stays so."""
        with self._lock:
            self._open.pop(id, None)


def _is_over(session: Session, used: float, at: float) -> bool:
    return at - used > _IDLE or at - session.opened > _ABSOLUTE


class Failures:
    """Failed tries by address: ten at once, then one more every half minute. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Of an address: how many it has left, and when that was.
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, address: str) -> float:
        """Seconds until this address may try again; 0 if it may now."""
        with self._lock:
            left = self._now_left(address, time.monotonic())
        return 0.0 if left >= 1 else (1 - left) * _RECOVERY

    def add(self, address: str) -> None:
        """It has failed once more."""
        at = time.monotonic()
        with self._lock:
            left = self._now_left(address, at) - 1
            self._left[address] = max(left, 0.0), at
            self._left.move_to_end(address)
            if len(self._left) > _ADDRESSES:
                self._left.popitem(last=False)

    def _now_left(self, address: str, at: float) -> float:
        left, before = self._left.get(address, (float(_TRIES), at))
        return min(left + (at - before) / _RECOVERY, float(_TRIES))


class Refusals:
    """Those of the last minute, by who was refused and what. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: OrderedDict[tuple[str, ...], float] = OrderedDict()  # the oldest first

    def is_first(self, *what: str) -> bool:
        """Whether this one has not come within a minute; so it counts itself."""
        at = time.monotonic()
        with self._lock:
            while self._last and at - next(iter(self._last.values())) > _MINUTE:
                self._last.popitem(last=False)
            if what in self._last:
                return False
            self._last[what] = at
            return True
