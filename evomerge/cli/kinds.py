"""What the files are that commands are given, so that one meant for another command is sent there.
Knows files by their keys and folders by what is in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from evomerge.errors import InputError, JobError

Kind = Literal["job", "recipe", "task", "model"]

_WORDS: dict[Kind, tuple[str, str]] = {
    "job": ("a job", "launch it with: evomerge run {}"),
    "recipe": ("a merge recipe", "merge it with: evomerge merge {} OUT"),
    "task": ("a task", "look at it with: evomerge check {}"),
    "model": ("a model folder", "score it with: evomerge eval {} --task TASK"),
}


@contextmanager
def expecting(kind: Kind, path: str | Path) -> Iterator[None]:
    """Where what is at a path is refused because it is of another kind, say so instead. Raises
    InputError."""
    try:
        yield
    except InputError:
        found = _kind(Path(path))
        if found not in (None, kind):
            what, remedy = _WORDS[found]
            raise InputError(f"'{path}' is {what}: {remedy.format(path)}") from None
        raise


def _kind(path: Path) -> Kind | None:
    from evomerge.job import read_yaml
    from evomerge.job.files import TASK

    if path.is_dir():
        files: dict[str, Kind] = {"config.json": "model", TASK: "task"}
        return next((kind for name, kind in files.items() if (path / name).is_file()), None)
    if path.suffix not in (".yaml", ".yml"):
        return None
    try:
        keys = read_yaml(path).keys()
    except JobError:
        return None
    if keys & {"merge_method", "modules"}:
        return "recipe"
    if keys & {"parents", "genome"}:
        return "job"
    return "task" if keys & {"data", "dataset_path"} else None
