"""Requests that are sent twice and served once.

A client that has heard no answer sends its request again under the same `Idempotency-Key`, and is
given the answer of the first. What is submitted to the queue is remembered there, see Queue.submit;
everything else here, in memory, for minutes. After that it is asked for anew, which does no harm:
what is paused or resumed already is refused as such, a search is asked to stop once more, and one
that goes on under its new limits is left alone. Knows nothing of what is asked for.
"""

import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

from evomerge.errors import KeyReused
from evomerge.service.problems import Busy

T = TypeVar("T")

_REMEMBERED = 1000  # answers; the oldest are forgotten
_KEPT = 600.0  # seconds, longer than anybody tries again; an answer may be the secret of a token
_WAIT = 5.0  # seconds for an answer that is being found
_WAITING = 7  # requests that do, of the few that are at work at the same time


@dataclass(frozen=True)
class _Given:
    asked: object
    answer: "Future[Any]" = field(default_factory=Future)
    at: float = field(default_factory=time.monotonic)


class Answers:
    """The latest answers to requests with a key. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given: dict[tuple[str, str], _Given] = {}  # the oldest first
        self._waiting = threading.BoundedSemaphore(_WAITING)

    def once(self, who: str, key: str | None, asked: object, act: Callable[[], T]) -> T:
        """What `act` gives, or gave when the same was asked for under this key; what failed is done
        again. Raises KeyReused where something else was asked for under it, Busy where that is
        still being done, and what `act` does."""
        if key is None:
            return act()
        with self._lock:
            self._forget()
            before = self._given.get((who, key))
            if before is None:
                given = self._given[who, key] = _Given(asked)
        if before is not None:
            if before.asked != asked:
                raise KeyReused(
                    f"idempotency key '{key}' came with another request before: use a new one"
                )
            repeated: T = self._waited_for(key, before.answer)
            return repeated
        try:
            found = act()
        except BaseException as error:
            with self._lock:
                self._given.pop((who, key), None)
            given.answer.set_exception(error)
            raise
        given.answer.set_result(found)
        return found

    def _waited_for(self, key: str, answer: "Future[Any]") -> Any:
        if not answer.done() and self._waiting.acquire(blocking=False):
            try:
                wait([answer], _WAIT)
            finally:
                self._waiting.release()
        if not answer.done():
            raise Busy(f"the first request with the key '{key}' is being served: try again later")
        return answer.result()

    def _forget(self) -> None:
        """What is old, and the oldest of too many; never what is still being found."""
        done = [key for key, given in self._given.items() if given.answer.done()]
        oldest = time.monotonic() - _KEPT
        surplus = len(self._given) - _REMEMBERED
        for i, key in enumerate(done):
            if i < surplus or self._given[key].at < oldest:
                del self._given[key]


def of_queue(who: str, key: str | None) -> str | None:
    """The key under which the queue remembers a request: nobody is given another's answer."""
    return None if key is None else hashlib.sha256(f"{who}\n{key}".encode()).hexdigest()
