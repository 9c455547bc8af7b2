"""The scheduler: takes submissions out of the store's queue and has each worked off by a process of
its own, see child.

One scheduler leads on a store; another one stands by. Nothing that it knows is lost with it: the
queue says what is to be done, and the next scheduler goes on with what was under way. A process
that ends without a word is started again, as often as the search gets on in between. Knows nothing
of how a search is conducted.
"""

import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError, InputError, NotFound
from evomerge.messages import one_line
from evomerge.service import webhook
from evomerge.service.child import BUSY, INTERRUPTED, overridden
from evomerge.service.folders import log_file
from evomerge.service.settings import Settings
from evomerge.store import Queue, Store, Submission
from evomerge.store.leadership import Leadership
from evomerge.store.queue import Kind

_TICK = 1.0  # seconds between looks at the queue
_ATTEMPTS = 3  # without any progress
_BUSY_PAUSE, _RETRY_PAUSE = 10.0, 5.0  # seconds; the latter times the attempts so far
_GRACE = 30.0  # seconds in which what was cancelled may put its things away
_CALLERS = 4  # webhooks that are called at once
_LOG_BYTES = 20_000_000  # a log that is longer goes on as a new one; the one before is kept

_log = logging.getLogger(__name__)


@dataclass
class _Child:
    """A process at work. submission: as it was when it was begun."""

    submission: Submission
    process: "subprocess.Popen[bytes]"
    log: Path
    devices: int
    interrupted_at: float | None = field(default=None)  # monotonic

    def interrupt(self) -> None:
        """Have a search end as soon as what is under way has landed. An export or a push leaves
        what it is at and puts it away."""
        if self.interrupted_at is None:
            self.interrupted_at = time.monotonic()
            self.process.send_signal(signal.SIGTERM)

    @property
    def is_overdue(self) -> bool:
        """Whether what was interrupted should have put its things away by now."""
        return self.interrupted_at is not None and time.monotonic() > self.interrupted_at + _GRACE

    def kill(self) -> None:
        """End it at once, with all that it has started; what it was at is done again."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.close()

    def close(self) -> None:
        """Nothing is said to it any more."""
        if self.process.stdin is not None:
            self.process.stdin.close()


class Scheduler:
    """Works off the queue of a store, in a thread from `start` until `stop`."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._queue = Queue(store)
        self._leadership: Leadership | None = None
        self._children: dict[int, _Child] = {}  # by submission
        self._not_before: dict[int, float] = {}  # when one may be begun again, monotonic
        self._woken, self._stopping = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._untold: queue.SimpleQueue[Submission | None] = queue.SimpleQueue()  # None: the last
        self._troubles: dict[str, str] = {}  # those that were told last, by what they are with

    @property
    def leads(self) -> bool:
        """Whether this scheduler works off the queue, and not another one of the same store."""
        return self._leadership is not None

    @property
    def running(self) -> dict[int, int]:
        """The ids of the processes at work, by submission."""
        return {id: child.process.pid for id, child in list(self._children.items())}

    def start(self) -> None:
        """Begin to work."""
        for _ in range(_CALLERS):  # none of which holds the end of this process
            threading.Thread(target=self._tell, name="webhook", daemon=True).start()
        self._thread = threading.Thread(target=self._run, name="scheduler")
        self._thread.start()

    def wake(self) -> None:
        """Something may be to do: look at once."""
        self._woken.set()

    def stop(self, timeout: float = 30.0) -> None:
        """Let what is under way land, for so many seconds at most, and end. The searches go on
        with the next server."""
        self._stopping.set()
        self.wake()
        if self._thread is None:
            return
        self._thread.join()
        for child in self._children.values():
            if child.submission.kind == "search":  # others end by themselves, or are done again
                child.interrupt()
        deadline = time.monotonic() + timeout
        for child in self._children.values():
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
        self._reap()
        for _ in range(_CALLERS):
            self._untold.put(None)
        if self._leadership is not None:
            self._leadership.release()
            self._leadership = None

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._guarded("the queue", self._tick)
            self._woken.wait(_TICK)
            self._woken.clear()

    def _guarded(self, what: str, work: Callable[[], None]) -> None:
        """The store may be away, the disk full: it is told once, and tried again. So is whatever
        nobody has foreseen: searches under way need their scheduler. What one of them is in
        trouble with keeps no other waiting."""
        try:
            work()
        except Exception as error:
            if (told := one_line(error) or type(error).__name__) != self._troubles.get(what):
                foreseen = isinstance(error, (EvomergeError, OSError))
                unforeseen = None if foreseen else error
                _log.error("the scheduler waits, %s: %s", what, told, exc_info=unforeseen)
                self._troubles[what] = told
        else:
            self._troubles.pop(what, None)

    def _tick(self) -> None:
        """One look at everything."""
        if not self._take_the_lead():
            return
        self._reap()
        running = {one.id: one for one in self._queue.all("running")}
        for id, child in self._children.items():
            if id not in running:
                self._let_go(child)
            self._guarded(f"the log of submission {id}", partial(_bound, child.log))
        for id, one in running.items():
            if id not in self._children:
                again = partial(self._again, one, "the server ended")
                self._guarded(f"submission {id}", again)
        self._begin_next()

    def _let_go(self, child: _Child) -> None:
        """Of one that runs no longer, by what was asked for or because it has just ended."""
        if child.submission.kind == "search":
            child.interrupt()  # it was paused
        elif self._queue.get(child.submission.id).state == "cancelled":
            child.interrupt()
            if child.is_overdue:
                child.kill()

    def _take_the_lead(self) -> bool:
        had = self._leadership
        if had is not None:
            if had.is_held():
                return True
            had.release()
        self._leadership = self._queue.lead()
        if self._leadership is None:
            if had is not None:
                _log.warning("another server has taken over: the processes of this one end")
            for child in self._children.values():
                child.kill()
            self._children.clear()
            return False
        if had is None:
            for one in self._queue.all():
                self._notify(one)
        return True

    def _reap(self) -> None:
        for id, child in list(self._children.items()):
            if (code := child.process.poll()) is not None:
                self._guarded(f"submission {id}", partial(self._ended, id, child, code))

    def _ended(self, id: int, child: _Child, code: int) -> None:
        child.close()
        one = self._queue.get(id)
        if one.state == "running":
            self._unfinished(one, code)
        elif one.state in ("finished", "failed"):
            self._notify(one)
        elif one.state == "cancelled":
            _log.info("%s of '%s' is cancelled", one.kind, one.search)
        del self._children[id]

    def _unfinished(self, one: Submission, code: int) -> None:
        """A process has ended before its work has."""
        if self._stopping.is_set():  # it goes on with the next server
            self._queue.change(one.id, attempts=max(0, one.attempts - 1))
        elif code == INTERRUPTED and one.overrides:  # to go on with them
            self._queue.change(one.id, state="queued", was="running")
        elif code == INTERRUPTED and one.kind == "search":
            self._queue.change(one.id, state="paused", was="running")
            _log.info("%s of '%s' is paused", one.kind, one.search)
        elif code == BUSY:
            self._not_before[one.id] = time.monotonic() + _BUSY_PAUSE
            attempts = max(0, one.attempts - 1)
            self._queue.change(one.id, state="queued", attempts=attempts, was="running")
        else:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._again(one, f"its process ended by {how}")

    def _again(self, one: Submission, why: str) -> None:
        """Put it back into the queue, unless it was begun too often without any progress."""
        if one.attempts < _ATTEMPTS:
            self._not_before[one.id] = time.monotonic() + _RETRY_PAUSE * (one.attempts - 1)
            self._queue.change(one.id, state="queued", was="running")
            _log.warning("%s of '%s' is taken up again: %s", one.kind, one.search, why)
            return
        error = f"begun {one.attempts} times without getting anywhere: {why}: see its log"
        failed = self._queue.change(
            one.id, state="failed", error=error, overrides=(), was="running"
        )
        _log.error("%s of '%s' has failed: %s", one.kind, one.search, error)
        self._notify(failed)

    def _begin_next(self) -> None:
        """Begin what there is room for, in the order of the queue; what finds no room is not
        overtaken."""
        full: set[str] = set()
        at = time.monotonic()
        self._not_before = {id: then for id, then in self._not_before.items() if then > at}
        for one in self._queue.waiting():
            lane = "searches" if one.kind == "search" else "exports"
            if lane in full or one.id in self._not_before or one.id in self._children:
                continue
            if not self._has_room(one):
                full.add(lane)
            elif (begun := self._queue.begin(one.id)) is not None:
                self._guarded(f"submission {one.id}", partial(self._begin, begun))

    def _has_room(self, one: Submission) -> bool:
        at_work = self._children.values()
        alike = sum((c.submission.kind == "search") == (one.kind == "search") for c in at_work)
        if alike >= (self._settings.searches if one.kind == "search" else 1):
            return False
        limit, used = self._settings.devices, sum(child.devices for child in at_work)
        return limit is None or not used or used + self._devices(one) <= limit

    def _devices(self, one: Submission) -> int:
        """How many it will use, under all that was changed since it was submitted."""
        job: Mapping[str, Any] = one.document
        with suppress(NotFound):  # of a search that was not begun before
            job = self._store.search(one.search).job if one.kind == "search" else job
        with suppress(InputError):  # which its process finds, and says in words
            job = overridden(job, one.overrides)
        return devices(one.kind, job, self._settings.devices)

    def _begin(self, one: Submission) -> None:
        try:
            log = log_file(self._settings.data, one.search)
            process = self._started(one, log)
        except (InputError, OSError) as error:
            self._again(one, f"its process cannot be started: {one_line(error)}")
            return
        self._children[one.id] = _Child(one, process, log, self._devices(one))
        _log.info("%s of '%s' is begun, process %d", one.kind, one.search, process.pid)

    def _started(self, one: Submission, log: Path) -> "subprocess.Popen[bytes]":
        settings = self._settings
        log.parent.mkdir(parents=True, exist_ok=True)
        _bound(log)
        # -P: nothing that lies in the folder of the server is taken for a library.
        command = [sys.executable, "-P", "-m", "evomerge.service.child", str(one.id)]
        command += ["--data", str(settings.data)]
        command += [part for root in settings.roots for part in ("--root", str(root))]
        if settings.devices is not None:
            command += ["--devices", str(settings.devices)]
        with log.open("ab") as lines:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # closed by the end of this process, see child
                stdout=lines,
                stderr=lines,
                env={**os.environ, "EVOMERGE_STORE": settings.store},
                start_new_session=True,  # Ctrl-C is for the server, which lets them land
            )

    def _notify(self, one: Submission) -> None:
        """Call the webhook of one that has ended, if that was not done, without waiting for it."""
        due = one.state in ("finished", "failed") and _NOTIFIED not in (one.result or {})
        if due and one.webhook:
            self._untold.put(one)

    def _tell(self) -> None:
        for one in iter(self._untold.get, None):
            if one.webhook is not None and not self._stopping.is_set():
                self._call(one, one.webhook)

    def _call(self, one: Submission, url: str) -> None:
        try:
            hosts = self._settings.webhook_hosts
            said = webhook.post(url, announcement(one), self._stopping.wait, hosts)
            if said is not None:
                _log.warning("webhook of '%s' was not taken: %s", one.search, said)
            if not self._stopping.is_set():
                self._queue.add_result(one, {_NOTIFIED: said or "taken"})
        except Exception as error:  # whatever it was, others are to be told too
            foreseen = isinstance(error, EvomergeError)
            unforeseen = None if foreseen else error
            _log.error("webhook of '%s': %s", one.search, one_line(error), exc_info=unforeseen)


_NOTIFIED = "webhook"  # in the result: what became of it


def announcement(one: Submission) -> dict[str, Any]:
    """What a webhook is told: how it ended, and nothing that only an opened test split says."""
    return {
        "submission": one.id,
        "kind": one.kind,
        "search": one.search,
        "state": one.state,
        "error": one.error,
        "result": one.result,
        "ended_at": one.ended_at,
    }


def devices(kind: Kind, document: Mapping[str, Any], limit: int | None) -> int:
    """How many devices a submission of this document uses: workers, times those of each engine. A
    search that takes what there is takes the whole limit."""
    if kind == "push":
        return 0
    each: int = (document.get("engine") or {}).get("tensor_parallel", 1)
    executor = document.get("executor") or {}
    if kind == "export" or executor.get("kind") != "ray":
        return each
    workers = executor.get("workers", "auto")
    return (limit or each) if workers == "auto" else workers * each


def _bound(log: Path) -> None:
    """Go on with an empty file once a log has become too long. Whoever writes it appends; what
    comes while it is copied is lost, and so is all of it where there is no room for a copy."""
    if log.exists() and log.stat().st_size > _LOG_BYTES:
        try:
            shutil.copyfile(log, log.with_suffix(".log.1"))
        finally:  # or it would go on to fill the disk
            os.truncate(log, 0)
