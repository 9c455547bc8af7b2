"""Where the paths of a job file lead, its presets and overrides, and what ships with evomerge.

Works on plain data and paths; knows nothing of what the keys mean.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from evomerge import yaml_text
from evomerge.errors import JobError, nearest
from evomerge.messages import one_line
from evomerge.reference import halves, hub_id

TASK, SUITE = "task.yaml", "suite.yaml"
LM_EVAL = "lm-eval:"  # before the name of one of its tasks


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises JobError."""
    try:
        data = yaml_text.load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"'{path}' cannot be read: {one_line(error)}") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is the latter
        raise JobError(f"'{path}' is not YAML: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise JobError(f"'{path}' holds no keys: see `evomerge check --schema`")
    return data


def packaged(kind: Literal["search_spaces", "fitness"]) -> Path:
    """The folder of what ships with evomerge, in an installed package or in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "packaged" / kind
    return inside if inside.is_dir() else package.parent / kind


def find(name: str, folder: Path | None = None) -> Path:
    """The task.yaml or suite.yaml that `name` means: a folder or file, or the name of a packaged
    one; a task of lm-eval, lm-eval:NAME, as it is.

    Looked up from `folder` (default: the working directory) first. Raises JobError.
    """
    if name.startswith(LM_EVAL):
        return Path(name)
    for root in (folder or Path.cwd(), packaged("fitness")):
        path = root / name
        for candidate in (path, path / TASK, path / SUITE):
            if candidate.is_file():
                return candidate.resolve()
    known = {p.parent.name for file in (TASK, SUITE) for p in packaged("fitness").glob(f"*/{file}")}
    raise JobError(f"task '{name}' is neither a file nor a packaged task: {nearest(name, known)}")


def find_task(name: str, folder: Path | None = None) -> Path:
    """As `find`, of a single task. Raises JobError for a suite too."""
    path = find(name, folder)
    if path.name == SUITE:
        raise JobError(
            f"task '{name}' is a suite, which only a job may name: name one of its tasks"
        )
    return path


def located(folder: Path, name: str, where: str) -> str:
    """A reference to a model with absolute paths."""

    def is_folder(half: str) -> bool:
        return bool(half) and (folder / os.path.expanduser(half)).is_dir()

    located = []
    for half in filter(None, halves(name, is_folder)):
        path = folder / os.path.expanduser(half)
        if not is_folder(half) and hub_id(half) is None:
            raise JobError(
                f"{where}.model: no folder '{path}': give the folder of a saved model, or a hub id "
                "ORG/NAME"
            )
        located.append(os.path.normpath(path) if is_folder(half) else half)
    return "+".join(located)


def written_out(space: Any, folder: Path, where: str) -> Any:
    """A space's plain data over that of the preset it names. Raises JobError.

    The two halves of a space of kind 'both' are each laid over the preset's, key by key, and may
    name presets of their own, which then replace it.
    """
    if not isinstance(space, Mapping):
        return space
    under = _preset(space, folder, where)
    written = {**under, **space}
    if written.get("kind") == "both":
        for half in ("weight", "layers"):
            own = written.get(half)
            if isinstance(own, Mapping):
                beneath = under.get(half)
                if "preset" not in own and isinstance(beneath, Mapping):
                    own = {**beneath, **own}
                own = {**_preset(own, folder, where), **own}
                written[half] = {key: value for key, value in own.items() if key != "preset"}
    return written


def _preset(space: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """The plain data of the preset that a space names, empty without one."""
    preset = space.get("preset")
    if preset is None:
        return {}
    if not isinstance(preset, str):
        raise JobError(f"{where}: space.preset: {preset!r}: give a preset's name, or a path")
    for path in (folder / preset, packaged("search_spaces") / f"{preset}.yaml"):
        if path.is_file():
            return read_yaml(path)
    known = {p.stem for p in packaged("search_spaces").glob("*.yaml")}
    raise JobError(f"{where}: space.preset: '{preset}' is unknown: {nearest(preset, known)}")


def override(data: dict[str, Any], assignment: str) -> None:
    """Set one key of plain data, key.sub=value with the value in YAML. Raises JobError."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise JobError(f"override '{assignment}': write key=value, such as budget.candidates=100")
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise JobError(f"override '{assignment}': '{parent}' holds no keys")
    try:
        node[last] = yaml_text.load(text)
    except (yaml.YAMLError, ValueError):
        raise JobError(f"override '{assignment}': '{text}' is not YAML") from None


def series(folder: Path, pattern: str, where: str) -> dict[str, str]:
    """The folders that a pattern names, by their last number, in its order. Raises JobError."""
    whole = os.path.expanduser(pattern)
    root, rest = (Path("/"), whole[1:]) if whole.startswith("/") else (folder, whole)
    found: dict[str, str] = {}
    try:
        matches = list(root.glob(rest))
    except ValueError as error:  # it is empty, or has '**' beside other letters
        raise JobError(f"{where}.series: '{pattern}' is no pattern: {one_line(error)}") from None
    for path in matches:
        if path.is_dir():
            numbers = re.findall(r"\d+", path.name)
            if not numbers or numbers[-1] in found:
                raise JobError(
                    f"{where}.series: '{path}' has no number of its own in its name to be ordered "
                    "by, as in checkpoint-200: rename it or narrow the pattern"
                )
            found[numbers[-1]] = os.path.normpath(path)
    if len(found) < 2:
        raise JobError(
            f"{where}.series: '{pattern}' names {len(found)} folders in '{root}': give 2 or more"
        )
    return dict(sorted(found.items(), key=lambda item: int(item[0])))
