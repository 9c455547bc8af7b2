"""The writes of one coordinator, in their order: what may wait for a moment shares a transaction
with what comes after it.

A transaction costs far more than what is in it. Knows nothing of what is written.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection

from evomerge.errors import StaleCoordinator, StoreUnavailable
from evomerge.store.lease import Lease

TOGETHER = 0.1  # seconds that anything waits at most, and a killed process loses

T = TypeVar("T")


class Writes:
    """Everything that is written under a lease.

    What waits goes first into the next transaction, whoever has it made: the coordinator, or a
    timer. So nothing is ever in the store without what was written before it.
    """

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._turn = threading.RLock()  # the timer has a thread of its own
        self._waiting: list[Callable[[Connection], object]] = []
        self._timer: threading.Timer | None = None
        self._last = -TOGETHER  # when something was written, on the monotonic clock
        self._error: Exception | None = None  # after which nothing is written any more

    def write(
        self,
        work: Callable[[Connection], T],
        committed: Callable[[Connection], T | None] | None = None,
    ) -> T:
        """What waits, and then this, see Lease.write; raises also what the timer met."""
        with self._turn:
            if self._error is not None:
                raise self._error
            waiting = tuple(self._waiting)

            def in_order(db: Connection) -> T:
                for before in waiting:
                    before(db)
                return work(db)

            try:
                found = self._lease.write(in_order, committed)
            except (StaleCoordinator, StoreUnavailable) as error:
                self._error = error
                raise
            self._waiting.clear()
            self._last = time.monotonic()
            return found

    def soon(self, work: Callable[[Connection], object]) -> None:
        """Write something that does no harm when done twice: now, if nothing was written for
        TOGETHER, or else within it. Raises as `write` does, of what waited before too."""
        with self._turn:
            self._waiting.append(work)
            pause = self._last + TOGETHER - time.monotonic()
            if pause <= 0 or self._error is not None:
                self.flush()
            elif self._timer is None:
                self._timer = threading.Timer(pause, self._late)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        """Write what waits. Raises as `write` does."""
        with self._turn:
            if self._waiting:
                self.write(lambda db: None)

    def _late(self) -> None:
        """Nobody else has come by."""
        with self._turn:
            self._timer = None
            try:
                self.flush()
            except Exception as error:  # for whoever writes next
                self._error = error

    def close(self) -> None:
        """Write what waits, if anything still may be written. Raises as `write` does."""
        with self._turn:
            if self._timer is not None:
                self._timer.cancel()
            if self._error is None:
                self.flush()
