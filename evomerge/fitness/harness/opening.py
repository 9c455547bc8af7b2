"""Where tasks of lm-eval are found, and what in a file of somebody's is not believed.

A task that comes with lm-eval may bring functions of its own, as it was installed with them. A file
from anywhere may not: it is data alone.
"""

import glob
import json
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from evomerge import yaml_text
from evomerge.errors import TaskError, nearest
from evomerge.fitness.harness.library import library
from evomerge.job.files import LM_EVAL
from evomerge.messages import one_line

_PYTHON = "no Python is run: "
_REFUSED = {
    "class": _PYTHON + "describe the task in YAML",
    "custom_dataset": _PYTHON + "write the records to a file",
    "process_docs": _PYTHON + "process the records beforehand",
    "process_results": _PYTHON + "name a metric in metric_list",
    "use_prompt": "no library of prompts is read: write doc_to_text",
    "task_list": "a list is no task: write a file for each",
}
_REQUIRED = ("task", "dataset_path", "doc_to_text", "doc_to_target")
_SPLITS = ("training_split", "validation_split", "test_split")
_NAME = re.compile(
    rb"^[\"']?(task|group)[\"']?:[ \t]*[\"']?([^\s\"'#\[{][^\n\"'#]*?)[\"']?[ \t]*(?:#.*)?\r?$",
    re.M,
)


def is_task(data: Any) -> bool:
    """Whether the plain data of a task file is lm-eval's rather than evomerge's own."""
    return isinstance(data, Mapping) and "task" in data and "name" not in data


def remedy(error: Exception) -> str | None:
    """Of a file that is not plain YAML because Python functions stand in it, as lm-eval allows."""
    return _PYTHON + "write Jinja in place of !function" if "!function" in str(error) else None


def described(path: Path) -> tuple[str | dict[str, Any], dict[str, Any]]:
    """What lm-eval loads a task by, its file or its data, and the plain data of the task, which is
    the same wherever lm-eval is installed.

    path: of a file of somebody's, or lm-eval:NAME. Raises TaskError.
    """
    name = str(path)
    return _shipped(name.removeprefix(LM_EVAL)) if name.startswith(LM_EVAL) else _local(path)


def loaded(what: str | dict[str, Any]) -> Any:
    """A task as an object of lm-eval's, without a look at any other. Raises TaskError."""
    manager = library().tasks.TaskManager(include_defaults=False)
    try:
        with TemporaryDirectory() as cache:
            what = what if isinstance(what, str) else _afresh(what, cache)
            (task,) = manager.load(what)["tasks"].values()
    except Exception as error:  # of lm-eval, of datasets, or of a task's own functions
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise TaskError(f"lm-eval cannot open it: {reason}") from None
    return task


def _afresh(data: dict[str, Any], cache: str) -> dict[str, Any]:
    """Local data are read whatever `datasets` has in its own cache, where it takes a folder for any
    other of the same name, and what stood there before for what stands there now."""
    options = data["dataset_kwargs"]
    local = "data_files" in options or Path(data["dataset_path"]).is_dir()
    if not local or "://" in str(options.get("data_files")):
        return data
    return {**data, "dataset_kwargs": {**options, "cache_dir": cache, "keep_in_memory": True}}


# --- that come with lm-eval ----------------------------------------------------------------------


def _shipped(name: str) -> tuple[str, dict[str, Any]]:
    tasks, groups = _catalogue()
    if name not in tasks:
        raise TaskError(_no_task(name, tasks, groups))
    # Of functions it names the files, which lie wherever lm-eval is installed.
    plain = json.dumps(_shipped_data(tasks[name]), default=str).replace(str(_root()), "")
    return str(tasks[name]), json.loads(plain)


def _root() -> Path:
    return Path(library().tasks.__file__).parent


@cache
def _catalogue() -> tuple[dict[str, Path], dict[str, Path]]:
    """The files of the tasks and of the groups, by name, in the order in which lm-eval prefers
    them. Read as text: to parse all of them takes many times as long."""
    found: dict[str, dict[str, Path]] = {"task": {}, "group": {}}
    for path in sorted(_root().rglob("*.yaml"), key=Path.as_posix):
        for kind, name in _NAME.findall(path.read_bytes()):
            found[kind.decode()].setdefault(name.decode(), path)
    return found["task"], found["group"]


def _no_task(name: str, tasks: Mapping[str, Path], groups: Mapping[str, Path]) -> str:
    """What to say of a name that is no task's."""
    if name in groups:
        listed = _shipped_data(groups[name]).get("task") or ()
        names = [m if isinstance(m, str) else m.get("task") or m.get("group") for m in listed]
        return f"'{name}' is a group of tasks: name one or more of {', '.join(filter(None, names))}"
    tagged = [task for task, path in tasks.items() if name.encode() in path.read_bytes()]
    tagged = [task for task in tagged if name in _tags(tasks[task])]
    if tagged:
        return f"'{name}' is a tag of tasks such as {', '.join(tagged)}: name them one by one"
    close = get_close_matches(name, tasks, n=3)
    known = f"did you mean {' or '.join(map(repr, close))}?" if close else "see `lm-eval ls tasks`"
    return f"lm-eval has no task '{name}': {known}"


def _tags(path: Path) -> list[str]:
    tags = _shipped_data(path).get("tag") or []
    return [tags] if isinstance(tags, str) else tags


def _shipped_data(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = library().tasks._yaml_loader.load_yaml(path, resolve_func=False)
    return data


# --- of somebody's -------------------------------------------------------------------------------


def _local(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    data = _plain(path)
    _check_keys(data)
    _check_metrics(data)
    data = _located(data, path.resolve().parent)
    _check_splits(data)
    task = deepcopy(data)  # lm-eval changes what it is given
    if not (data.get("validation_split") or data.get("test_split")):
        # lm-eval opens no task without a split to score.
        task["test_split"] = data.get("training_split")
    return task, data


def _plain(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The data of a file over those of the files that it includes. Raises TaskError."""
    if path in including:
        raise TaskError(f"include: '{path}' includes itself")
    try:
        data = yaml_text.load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TaskError(f"'{path}' cannot be read: {remedy(error) or one_line(error)}") from None
    if not isinstance(data, dict):
        raise TaskError(f"'{path}' holds no keys")
    included = data.pop("include", None) or []
    merged: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        merged |= _plain(path.parent / name, (*including, path))
    return merged | data


def _check_keys(data: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(library().config.task.TaskConfig)} | {"group"}
    for key in data:
        if key in _REFUSED:
            raise TaskError(f"{key}: {_REFUSED[key]}")
        if key not in known:
            raise TaskError(f"{key}: unknown key: {nearest(str(key), known - _REFUSED.keys())}")
    for key in _REQUIRED:
        if data.get(key) is None:
            raise TaskError(f"{key}: required, and missing")
    if data["dataset_path"] == "pandas":
        raise TaskError("dataset_path: 'pandas' reads pickles, which may run code: write .jsonl")


def _check_metrics(data: Mapping[str, Any]) -> None:
    """Metrics that lm-eval does not have itself it would fetch as code from the hub."""
    known = list(library().api.registry.metric_registry.keys())
    for entry in data.get("metric_list") or ():
        metric = str(entry.get("metric"))
        if metric not in known or entry.get("hf_evaluate"):
            raise TaskError(
                f"metric_list: '{metric}' is none of lm-eval's: {nearest(metric, known)}"
            )


def _located(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """With absolute paths where data lie beside the task file; lm-eval knows the working directory
    alone."""

    def beside(name: str) -> str:
        return str(folder / name) if glob.glob(str(folder / name)) else name

    options = dict(data.get("dataset_kwargs") or {})
    for key in ("data_files", "data_dir"):
        if key in options:
            options[key] = _mapped(options[key], beside)
    path = str(data["dataset_path"])
    path = str(folder / path) if (folder / path).is_dir() else path
    return {**data, "dataset_path": path, "dataset_kwargs": options}


def _mapped(files: Any, place: Callable[[str], str]) -> Any:
    if isinstance(files, Mapping):
        return {split: _mapped(inner, place) for split, inner in files.items()}
    return [place(str(file)) for file in files] if isinstance(files, list) else place(str(files))


def _check_splits(data: Mapping[str, Any]) -> None:
    if not any(data.get(key) for key in _SPLITS):
        raise TaskError(f"no split is named: give {', '.join(_SPLITS)}")
    files = data["dataset_kwargs"].get("data_files")
    if files is None:
        return
    known = list(files) if isinstance(files, Mapping) else ["train"]
    for key in (*_SPLITS, "fewshot_split"):
        name = str(data.get(key) or known[0])
        if name not in known:
            raise TaskError(f"{key}: '{name}' is none of data_files: {nearest(name, known)}")
