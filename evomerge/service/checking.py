"""What a job would be and take, found out in a process of its own.

    EVOMERGE_STORE=URL python -m evomerge.service.checking check|plan PIPE

The job comes on standard input, as JSON; PIPE is a file descriptor that is open as long as the
server is there. Models that are opened there are gone when it has answered; what takes too long is
ended, and so is what the server would leave behind. One of a kind is at work at a time: a check
holds models, beside those of the searches. Knows nothing of requests.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal

from evomerge.errors import EvomergeError, InputError
from evomerge.service.child import end_with_server
from evomerge.service.problems import Busy

_SECONDS = {"check": 600.0, "plan": 60.0}
_WAIT = 5.0  # seconds for the one before

_turns = {"check": threading.Lock(), "plan": threading.Lock()}
_at_work: "dict[str, subprocess.Popen[bytes]]" = {}  # by what they find out
# Those at work and one that waits: requests of other kinds need threads too.
_asked = threading.BoundedSemaphore(3)


def find_out(
    what: Literal["check", "plan"], document: Mapping[str, Any], store: str
) -> dict[str, Any]:
    """What search.check says of a job that may be read, see confine; of those parents that are
    winners of earlier searches, check merges what is not merged yet. Blocks. Raises InputError for
    a job that cannot be run, or not looked at in time; Busy; EvomergeError."""
    with _turn(what):
        ended = _run(what, document, store)
    return _said(what, ended)


def end_all() -> None:
    """End whatever is being found out, with all that it has started: the server ends."""
    for process in list(_at_work.values()):
        _kill(process)


@contextmanager
def _turn(what: str) -> Iterator[None]:
    """Raises Busy where it does not come soon."""
    busy = Busy(f"{what}: another job is being looked at: try again in a minute")
    if not _asked.acquire(blocking=False):
        raise busy
    try:
        if not _turns[what].acquire(timeout=_WAIT):
            raise busy
        try:
            yield
        finally:
            _turns[what].release()
    finally:
        _asked.release()


def _run(
    what: str, document: Mapping[str, Any], store: str
) -> "subprocess.CompletedProcess[bytes]":
    theirs, ours = os.pipe()  # closed by the end of this process
    # -P: nothing that lies in the folder of the server is taken for a library.
    command = [sys.executable, "-P", "-m", "evomerge.service.checking", what, str(theirs)]
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "EVOMERGE_STORE": store},
            pass_fds=(theirs,),
            start_new_session=True,  # Ctrl-C is for the server
        ) as process:
            _at_work[what] = process
            try:
                out, err = process.communicate(json.dumps(document).encode(), _SECONDS[what])
            except subprocess.TimeoutExpired:
                raise InputError(
                    f"{what}: it took longer than {_SECONDS[what]:.0f} seconds and was ended: run "
                    "evomerge check where the models are"
                ) from None
            finally:
                _kill(process)
                del _at_work[what]
            return subprocess.CompletedProcess(command, process.returncode, out, err)
    finally:
        os.close(theirs)
        os.close(ours)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):  # just now
            os.killpg(process.pid, signal.SIGKILL)


def _said(what: str, ended: "subprocess.CompletedProcess[bytes]") -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(ended.stdout)
    except ValueError:
        lines = ended.stderr.decode("utf-8", "replace").strip().splitlines()
        how = lines[-1] if lines else f"exit code {ended.returncode}"
        raise EvomergeError(
            f"{what} of a job ended unexpectedly: {how}: see evomerge check"
        ) from None
    if ended.returncode == 0:
        return answer
    if ended.returncode == InputError.exit_code:
        raise InputError(answer["error"])
    raise EvomergeError(answer["error"])


def main() -> int:
    """Write what was found out to stdout, or what is wrong."""
    pipe = int(sys.argv[2])
    threading.Thread(target=end_with_server, args=(pipe,), daemon=True, name="server").start()
    from evomerge.job import Job
    from evomerge.progress import Steps
    from evomerge.search.check import check_job, plan_job
    from evomerge.search.pool import resolved

    # Out of the environment: nothing that is run from here needs its password.
    what, store = sys.argv[1], os.environ.pop("EVOMERGE_STORE")
    answer, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is no part of it
    try:
        job = Job.from_dict(json.load(sys.stdin), "the job")
        if what == "check":
            job = resolved(job, store, Steps(lambda step: None, lambda done, of: None))
        found = (check_job if what == "check" else plan_job)(job, store)
    except EvomergeError as error:
        json.dump({"error": " ".join(str(error).split())}, answer)
        return error.exit_code
    json.dump(found, answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
