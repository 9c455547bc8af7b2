"""A process of a server's that works off one submission: a search, an export, or a push.

    EVOMERGE_STORE=URL python -m evomerge.service.child SUBMISSION --data FOLDER

It writes down itself how that ended, so that nothing is lost with the server; it goes when the
server goes, whose end closes its standard input, and its search is resumed by the next one. Knows
nothing of the queue's other submissions.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from evomerge.errors import (
    ClusterLost,
    EvomergeError,
    InputError,
    JobError,
    NotFound,
    SearchBusy,
    StaleCoordinator,
    StoreError,
    StoreUnavailable,
    Withdrawn,
)
from evomerge.service.folders import export_folder
from evomerge.service.redaction import redacted
from evomerge.store import LOCAL, Queue, SearchRow, Store, Submission, Tokens

if TYPE_CHECKING:
    from evomerge.fitness.results import Scored
    from evomerge.progress import Steps
    from evomerge.search import Status
    from evomerge.search.setting import Setting

# Exit codes beside those of the command line: somebody else conducts the search at the moment.
BUSY, INTERRUPTED = 75, 130

Result = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What is to be done: a submission of a store. roots: see confine. devices: how many a search
    may use, None for as many as it finds."""

    store: Store
    submission: Submission
    data: Path
    roots: tuple[Path, ...]
    devices: int | None
    asked_to_stop: Callable[[], bool]

    def search(self) -> Result:
        """Launch or resume a search and conduct it to its end. Raises Interrupted."""
        from evomerge import search
        from evomerge.job import Job
        from evomerge.service import confine

        one, store = self.submission, self.store
        queue, refused = Queue(store), None
        watcher = _Lines(store, one)
        if _stored(store, one.search) is None:
            document = limited(one.document, one.overrides, self.devices)
            job = Job.from_dict(document, f"search '{one.search}'")
            # As when it was submitted: links below a root may lead elsewhere by now.
            confine.job(job, self.roots, is_admin=_is_admin(store, one.by))
            from evomerge.search.pool import resolved  # loads torch: what is misspelt fails before
            from evomerge.search.setting import Setting

            setting = Setting.open(resolved(job, store.url, _steps()))
            search.launch(setting, store.url, watcher, self.asked_to_stop, one.id)
        else:
            if (state := queue.get(one.id).state) != "running":  # the search is another one's then
                raise Withdrawn(f"search '{one.search}' is {state} by now: it does not go on")
            try:
                cap = capped(store.search(one.search).job, one.overrides, self.devices)
                overrides = (*one.overrides, *cap)
                search.resume(one.search, store, watcher, self.asked_to_stop, overrides)
            except JobError as error:
                if not one.overrides:
                    raise
                refused = str(error)  # they came too late; that ends no search
                _say(f"going on without {', '.join(one.overrides)}: {refused}")
                queue.take_overrides(one.id, one.overrides)
                search.resume(one.search, store, watcher, self.asked_to_stop)
        return _outcome(store.search(one.search)) | {"refused": refused}

    def export(self) -> Result:
        """Write a candidate, by default the winner, to a folder of its own."""
        from evomerge.export.export import export, export_recipe

        name, recipe_only = self.submission.search, bool(self._asked("recipe_only"))
        candidate = self._candidate()
        out = export_folder(self.data, name, candidate, recipe_only)
        out.parent.mkdir(parents=True, exist_ok=True)
        if not self._is_done(out, candidate, recipe_only):
            if recipe_only:
                export_recipe(self.store, name, out, candidate)
            else:
                export(self.store, name, out, candidate, _steps())
        return {"candidate": candidate, "folder": str(out.resolve())}

    def push(self) -> Result:
        """Upload what was exported to a repository of the hub. Raises InputError without a token,
        or before the export."""
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        candidate, repository = self._candidate(), str(self._asked("repository"))
        folder = export_folder(self.data, self.submission.search, candidate)
        if not self._is_done(folder, candidate):
            raise InputError(
                f"candidate {candidate} is not exported to '{folder}': export it first"
            )
        token = get_token()
        if token is None:
            raise InputError(
                "the server has no token for the hub: set HF_TOKEN where it runs, or upload "
                f"'{folder}' yourself"
            )
        _say(f"uploading {folder} to {repository}")
        hub, private = HfApi(token=token), self._asked("private") is not False
        try:
            hub.create_repo(repository, private=private, exist_ok=True)
            done = hub.upload_folder(repo_id=repository, folder_path=folder)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise InputError(f"'{repository}' of the hub: not written: {_line(error)}") from None
        return {"candidate": candidate, "repository": repository, "commit": done.commit_url}

    def _is_done(self, folder: Path, candidate: int, recipe_only: bool = False) -> bool:
        """Whether a candidate was exported to a folder before. Raises InputError where what lies
        there is another one's: a folder of data may have served another store."""
        from evomerge.export.export import REPORT
        from evomerge.merge.disk import RECIPE
        from evomerge.recipe import Recipe

        file = folder / (RECIPE if recipe_only else REPORT)
        if not file.is_file():
            return False
        if recipe_only:
            document = self.store.recipe(candidate)
            expected = "" if document is None else Recipe.from_dict(document).to_yaml()
        else:
            expected = self.store.report(candidate) or ""
        if file.read_bytes() != expected.encode():
            raise InputError(
                f"'{folder}' holds the export of another store: move it away, or give each store a "
                "--data of its own"
            )
        return True

    def _asked(self, key: str) -> Any:
        return self.submission.document.get(key)

    def _candidate(self) -> int:
        if (candidate := self._asked("candidate")) is not None:
            return int(candidate)
        row = self.store.search(self.submission.search)
        if row.verdict is None:
            raise StoreError(f"search '{row.name}' is {row.state} and has no winner yet")
        return int(row.verdict["winner"])


def overridden(document: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A job with `key=value` overrides. Raises InputError for those that are none."""
    from evomerge.job.files import override

    job = deepcopy(dict(document))
    for assignment in overrides:
        override(job, assignment)
    return job


def capped(
    job: Mapping[str, Any], overrides: tuple[str, ...], devices: int | None
) -> tuple[str, ...]:
    """The override, if one is needed, under which a job with these takes no more devices than
    that."""
    asked, most = overridden(job, overrides), limited(job, overrides, devices)
    workers = (most.get("executor") or {}).get("workers")
    is_more = (asked.get("executor") or {}).get("workers") != workers
    return (f"executor.workers={workers}",) if is_more else ()


def limited(
    document: Mapping[str, Any], overrides: tuple[str, ...], devices: int | None
) -> dict[str, Any]:
    """A job with overrides, that takes no more devices than that."""
    job = overridden(document, overrides)
    executor = job.get("executor") or {}
    if devices is not None and executor.get("kind") == "ray":
        each = (job.get("engine") or {}).get("tensor_parallel", 1)
        workers = executor.get("workers", "auto")
        most = max(1, devices // each)
        job["executor"] = executor | {"workers": most if workers == "auto" else min(workers, most)}
    return job


def main() -> int:
    """Do what the arguments name. Gives 0 done, 1 failed, 2 wrong input, 130 interrupted, 75 when
    the search is conducted by somebody else."""
    parser = argparse.ArgumentParser(prog="evomerge.service.child")
    parser.add_argument("submission", type=int)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--root", type=Path, action="append", required=True)
    parser.add_argument("--devices", type=int)
    given = parser.parse_args()
    sys.stdout, sys.stderr = _Redacting(sys.stdout), _Redacting(sys.stderr)
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    threading.Thread(target=end_with_server, daemon=True, name="server").start()
    try:
        # Not for whoever is started from here: it may hold a password.
        with Store(os.environ.pop("EVOMERGE_STORE"), tell=_say) as store:
            one = Queue(store).get(given.submission)
            _say(f"{one.kind} of '{one.search}', submission {one.id}, process {os.getpid()}")
            if one.kind != "search":  # nothing of it is to land
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, signal.default_int_handler)
            if asked.is_set():
                return INTERRUPTED
            roots = tuple(given.root)
            return _worked_off(Work(store, one, given.data, roots, given.devices, asked.is_set))
    except KeyboardInterrupt:
        _say("cancelled; nothing of it is left")
        return INTERRUPTED
    except EvomergeError as error:  # of the store; nothing can be written down
        _say(str(error))
        return error.exit_code


def _worked_off(work: Work) -> int:
    """Do it, and write down how it ended. Where the end is not its own, it may be begun again."""
    from evomerge.search import Interrupted

    one, queue = work.submission, Queue(work.store)
    do = {"search": work.search, "export": work.export, "push": work.push}[one.kind]
    try:
        result = do()
    except Interrupted:
        _say("stopped; nothing is lost")
        return INTERRUPTED
    except Withdrawn as error:
        _say(str(error))
        return INTERRUPTED
    except (SearchBusy, StaleCoordinator) as error:
        _say(str(error))
        return BUSY
    except (StoreUnavailable, ClusterLost) as error:  # which may pass
        _say(str(error))
        return error.exit_code
    except EvomergeError as error:
        _say(f"failed: {error}")
        row = _stored(work.store, one.search)
        # A finished search that was to go on in a way that it cannot is finished all the same.
        if one.kind == "search" and row is not None and row.state == "finished":
            queue.end(one.id, "finished", one.overrides, redacted(str(error)), _outcome(row))
        else:
            queue.end(one.id, "failed", one.overrides, redacted(str(error)))
        return error.exit_code
    queue.end(one.id, "finished", one.overrides, None, result)
    _say("finished")
    return 0


def _is_admin(store: Store, name: str) -> bool:
    """Whether somebody may have what is left to few, see confine. What they asked for while their
    token was good outlives its time, but not its end."""
    of_admin = (t for t in Tokens(store).all() if "admin" in t.scopes and t.revoked_at is None)
    return name in {LOCAL, *(token.name for token in of_admin)}


def _outcome(row: SearchRow) -> Result:
    verdict = row.verdict or {}
    found = {key: verdict.get(key) for key in ("winner", "promoted")}
    return found | {"stop_reason": row.stop_reason}


def _stored(store: Store, search: str) -> SearchRow | None:
    try:
        return store.search(search)
    except NotFound:
        return None


def end_with_server(pipe: int = 0) -> None:
    """Wait until the server is gone, and go too: it holds the other end of a pipe, by default of
    standard input, and never writes."""
    while os.read(pipe, 1):
        pass
    # Whatever it is at, with all that it has started: that is what the store is made for.
    os.killpg(0, signal.SIGKILL)


class _Lines:
    """A Watcher that writes lines, and sees to it that the queue knows of the first success."""

    def __init__(self, store: Store, submission: Submission) -> None:
        self._store = store
        self._queue = Queue(store)
        self._submission = submission
        self._spent_before = 0.0
        self._has_news = False

    def opened(self, setting: "Setting") -> None:
        self._queue.take_overrides(self._submission.id, self._submission.overrides)
        self._spent_before = self._spent()
        many = len(setting.space.coordinates)
        _say(f"{many} coordinates, by {setting.job.optimizer.name}")

    def baseline(self, name: str, scored: "Scored") -> None:
        self._note_progress()
        means = (f"{task} {found.mean:.4f}" for task, found in scored.tasks.items())
        _say(f"baseline {name}: {', '.join(means)} of train")

    def progress(self, status: "Status") -> None:
        self._note_progress()

    def generation(self, status: "Status") -> None:
        found = {"mean": status.mean, "shrunk": status.shrunk, "gap": status.gap}
        figures = [f"{name} {value:.4f}" for name, value in found.items() if value is not None]
        _say(f"generation {status.generation}: {', '.join(figures) or 'no scores'}")

    def stopped(self, reason: str) -> None:
        _say(f"no further generation: {reason}")

    def note(self, text: str) -> None:
        _say(text)

    def finalist(self, name: str, done: int, of: int) -> None:
        self._note_progress()
        _say(f"finals: {name} ({done + 1} of {of})")

    def _note_progress(self) -> None:
        """Of what was in the store before, a search that goes on tells too."""
        if not self._has_news and self._spent() > self._spent_before:
            self._has_news = True
            self._queue.change(self._submission.id, attempts=0)

    def _spent(self) -> float:
        return self._store.device_seconds(self._store.search(self._submission.search).id)


class _Redacting:
    """A stream whose lines hold no secrets."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _steps() -> "Steps":
    from evomerge.progress import Steps

    return Steps(_say, lambda done, of: None)


def _say(text: str) -> None:
    at = datetime.now(UTC).isoformat(timespec="seconds")
    sys.stderr.write(f"{at} {_line(text)}\n")
    sys.stderr.flush()


def _line(text: object) -> str:
    return " ".join(str(text).split())


if __name__ == "__main__":
    sys.exit(main())
