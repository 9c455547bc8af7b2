"""What was exported of a search: which folders there are, and the files in them.

Only what stands in a listing can be had, so no name leads elsewhere. Knows nothing of requests.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import NotFound
from evomerge.service.folders import export_folder
from evomerge.service.overview import Asked
from evomerge.store import Queue, Submission


@dataclass(frozen=True)
class Export:
    """An export, or a push of one to a repository of the hub. recipe_only: nothing was merged and
    nothing unsealed."""

    submission: Asked
    candidate: int
    recipe_only: bool
    repository: str | None

    @classmethod
    def of(cls, one: Submission) -> "Export":
        """Of a submission of one of these kinds."""
        asked = one.document
        repository = asked.get("repository")
        return cls(Asked.of(one), asked["candidate"], bool(asked.get("recipe_only")), repository)


@dataclass(frozen=True)
class File:
    """name: below the export's folder, with '/' between folders. size: in bytes."""

    name: str
    size: int


def exports(queue: Queue, search: str | None = None) -> list[Export]:
    """Of a search, by default of all, the latest first."""
    return [Export.of(one) for one in queue.exports(search)]


def export(queue: Queue, search: str, id: int) -> Export:
    """The one of this number. Raises NotFound."""
    found = queue.some([id]).get(id)
    if found is None or found.search != search or found.kind == "search":
        raise NotFound(f"search '{search}' has no export {id}")
    return Export.of(found)


def files(data: Path, found: Export) -> list[File]:
    """What was written, by name. Raises NotFound before that."""
    return [File(name, path.stat().st_size) for name, path in sorted(_paths(data, found).items())]


def file(data: Path, found: Export, name: str) -> Path:
    """Where the file of this name is. Raises NotFound where none is listed."""
    path = _paths(data, found).get(name)
    if path is None:
        raise NotFound(f"export {found.submission.id} has no such file: see the list of its files")
    return path


def _paths(data: Path, found: Export) -> dict[str, Path]:
    one = found.submission
    if one.kind != "export" or one.state != "finished":
        raise NotFound(f"export {one.id} is {one.state} and has no files")
    folder = export_folder(data, one.search, found.candidate, found.recipe_only)
    paths = (
        Path(root) / name
        for root, _, names in os.walk(folder)  # which follows no links to folders
        for name in names
    )
    return {
        path.relative_to(folder).as_posix(): path
        for path in paths
        if path.is_file() and not path.is_symlink()
    }
