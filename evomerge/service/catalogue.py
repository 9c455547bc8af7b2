"""What a job may name: tasks, suites, and presets of spaces. Reads their files, not their data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evomerge.errors import JobError
from evomerge.job import packaged, read_yaml
from evomerge.job.files import SUITE, TASK

_MOST = 500  # folders of a root that are looked into


@dataclass(frozen=True)
class TaskOrSuite:
    """task: what a job writes. name: in its file. tasks: of a suite, how many. about: where it
    comes from, if the file says so. shipped: with evomerge."""

    task: str
    kind: Literal["task", "suite"]
    name: str
    tasks: int
    about: str | None
    shipped: bool


@dataclass(frozen=True)
class Space:
    """A preset. about: what it is for. space: its keys, for the job's section 'space'."""

    preset: str
    about: str
    space: dict[str, Any]


def tasks(roots: Sequence[Path]) -> list[TaskOrSuite]:
    """Shipped ones first, then those in the folders of each root; what is no task is left out."""
    shipped = packaged("fitness")
    found = [_task(file, file.parent.name, True) for file in _files(shipped)]
    found += [_task(file, str(file.parent), False) for root in roots for file in _files(root)]
    return [one for one in found if one is not None]


def spaces() -> list[Space]:
    """By name."""
    return [
        Space(file.stem, _comment(file), read_yaml(file))
        for file in sorted(packaged("search_spaces").glob("*.yaml"))
    ]


def _files(root: Path) -> Iterator[Path]:
    """The task and suite files in the folders of a root that are not links, if it is there."""
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:  # it is gone, or not there yet: others may hold what is looked for
        return
    for folder in folders[:_MOST]:
        for name in (TASK, SUITE):
            file = folder / name
            if file.is_file() and not file.is_symlink():
                yield file


def _task(file: Path, written: str, shipped: bool) -> TaskOrSuite | None:
    try:
        data: Mapping[str, Any] = read_yaml(file)
    except JobError:
        return None
    is_suite = file.name == SUITE
    name, about, tasks = data.get("name", file.parent.name), data.get("about"), data.get("tasks")
    return TaskOrSuite(
        written,
        "suite" if is_suite else "task",
        str(name),
        len(tasks) if is_suite and isinstance(tasks, list) else 1,
        None if about is None else str(about),
        shipped,
    )


def _comment(file: Path) -> str:
    """What a file says before its first key, as one paragraph."""
    lines = file.read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end])
