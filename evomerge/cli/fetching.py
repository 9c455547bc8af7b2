"""Exports at a server: have one made, wait for it, fetch it.

What is fetched is there whole or not at all, and no name that a server gives leads out of its
folder. Knows nothing of how exports are made or of how answers are shown.
"""

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.cli.following import interrupted
from evomerge.cli.places import plain, tell
from evomerge.errors import EvomergeError, InputError
from evomerge.merge.place import check_free, whole

if TYPE_CHECKING:
    from evomerge.cli.remote import Remote
    from evomerge.service.exports import Export

_TICK = 1.0  # seconds between looks at an export
_UNDER_WAY = ("queued", "running")


def recipe(server: str, name: str, out: Path, candidate: int | None) -> Path:
    """Fetch the recipe of the winner, or of a candidate, see write_recipe; gives its file."""
    from evomerge.cli.remote import Remote
    from evomerge.export.export import write_recipe

    with Remote(server, tell) as remote:
        return write_recipe(out, lambda: remote.recipe(name, _chosen(remote, name, candidate)))


def model(server: str, name: str, out: Path, candidate: int | None) -> dict[str, Any]:
    """Have the winner, or a candidate, exported at a server, unless it was before, and fetch that
    into the folder `out`; gives its report.

    Exits 130 when it is interrupted, which ends no export. Raises what check_free raises,
    InputError where the server refuses it, EvomergeError where that or the server fails.
    """
    from evomerge.cli.remote import Remote

    check_free(out)
    with Remote(server, tell) as remote:
        chosen = _chosen(remote, name, candidate)
        found = _known(remote, name, chosen) or remote.submit_export(name, chosen)
        try:
            _wait(remote, found)
            return _fetched(remote, found, out)
        except KeyboardInterrupt:
            which = "" if candidate is None else f" --candidate {candidate}"
            again = f"evomerge export {shlex.quote(name)} -o {shlex.quote(str(out))}{which}"
            interrupted(f"{_called(found)} is the server's; fetch it with: {again}{remote.option}")


def _chosen(remote: "Remote", name: str, candidate: int | None) -> int:
    return remote.winner(name) if candidate is None else candidate


def _known(remote: "Remote", name: str, candidate: int) -> "Export | None":
    """The latest export of a candidate's model that is under way, or whose files are there."""
    for one in remote.exports(name):
        asked = one.submission
        if asked.kind != "export" or one.recipe_only or one.candidate != candidate:
            continue
        if asked.state in _UNDER_WAY:
            return one
        if asked.state == "finished" and remote.files(name, asked.id):
            return one
    return None


def _wait(remote: "Remote", found: "Export") -> None:
    """Until an export has finished. Raises EvomergeError where it does not."""
    from evomerge.cli import live

    asked, told = found.submission, None
    with live.waiting("waiting for the export"):
        while True:
            if asked.state != told:
                tell(f"export   {asked.search}, candidate {found.candidate}: {asked.state}")
                told = asked.state
            if asked.state not in _UNDER_WAY:
                break
            time.sleep(_TICK)
            asked = remote.export(asked.search, asked.id).submission
    if asked.state == "cancelled":
        raise EvomergeError(f"{_called(found)} was cancelled")
    if asked.state != "finished":
        see = f"evomerge logs {shlex.quote(asked.search)}{remote.option}"
        raise EvomergeError(
            f"{_called(found)} has {asked.state}: {plain(str(asked.error))}: see {see}"
        )


def _fetched(remote: "Remote", found: "Export", out: Path) -> dict[str, Any]:
    """Fetch the files of an export; gives its report."""
    from evomerge.cli import live
    from evomerge.export.export import REPORT

    asked = found.submission
    files = remote.files(asked.search, asked.id)
    _check_names(remote, [file.name for file in files], REPORT)
    size, done = sum(file.size for file in files), 0
    try:
        with live.steps(doing="fetching") as steps, whole(out) as folder:
            steps.step(f"fetching {len(files)} files into {out}")
            for file in files:
                path = folder / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as sink:
                    for at in remote.fetch(asked.search, asked.id, file, sink):
                        steps.written(done + at, size)
                done += file.size
            return _report(remote, folder / REPORT)
    except OSError as error:
        raise InputError(f"output '{out}' cannot be written: {error.strerror or error}") from None


def _report(remote: "Remote", file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise EvomergeError(
            f"server {remote.url}: its export's {file.name} is damaged: nothing was written; "
            "remove the folder there, and export again"
        ) from None
    return found


def _check_names(remote: "Remote", names: Sequence[str], report: str) -> None:
    """Raises EvomergeError for names that are none of files in one folder, report among them."""
    for name in names:
        is_plain = plain(name) == name and "\\" not in name
        if not is_plain or any(part in ("", ".", "..") for part in name.split("/")):
            raise EvomergeError(
                f"server {remote.url}: it lists a file '{plain(name)}', which does not lie in the "
                "export's folder: nothing was fetched"
            )
    if report not in names:
        raise EvomergeError(
            f"server {remote.url}: its export has no {report}: nothing was fetched; remove the "
            "folder there, and export again"
        )


def _called(found: "Export") -> str:
    return f"export {found.submission.id} of search '{found.submission.search}'"
