"""What a submitted job may read: models and tasks below the server's roots, and hubs.

Whoever may submit a job is not thereby whoever may read this machine's files. So every path in a
job, and in the files that it leads to, has to lie below a root once all links are followed; what
ships with evomerge may be named as well. Before anything is opened, names are checked as they were
written: an error about a file elsewhere would say that it is there, or what is in it.

No job can bring code of its own: task files run none, weights are not unpickled, and models with
code of their own are not opened. What would come close is left to those with the scope 'admin': a
Ray cluster of the submitter's choice, which sends pickles back, and addresses on the network that
a task of lm-eval fetches records from.

A search is checked when it is submitted, and again when it is begun. A file that is exchanged
after that is not noticed: whoever can write below a root decides what is read there.
"""

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from evomerge import yaml_text
from evomerge.errors import InputError, JobError, TaskError
from evomerge.fitness.data import FOLDER
from evomerge.fitness.task_file import Source, TaskFile
from evomerge.job import Job, packaged, read_yaml
from evomerge.job.files import LM_EVAL, SUITE, TASK, override
from evomerge.job.mergekit_evolve import is_mergekit_evolve, translated
from evomerge.messages import explain, one_line
from evomerge.reference import halves, hub_id, model_name

_LONGEST = 50_000  # characters of a job file; hostile ones take seconds to parse
_NODES, _DEPTH = 100_000, 50  # of its data, aliases written out
_NAMED = 1000  # parents, and tasks: each is looked up
_SHOWN = 200  # characters of a name in a message
_PATH_BYTES, _NAME_BYTES, _PARTS = 2000, 255, 100  # beyond, file systems and libraries give up
_ENTRIES = 10_000  # of a model's folder
_WILD = re.compile(r"[*?\[]")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*)*")
_REPOSITORY = re.compile(r"[A-Za-z0-9_-][\w.-]*(/[A-Za-z0-9_-][\w.-]*)?", re.ASCII)
_SUBMITTED = "submitted.yaml"


def submitted(
    document: Mapping[str, Any] | str, roots: Sequence[Path], *, is_admin: bool = False
) -> Job:
    """The job that a document asks for, plain data or the YAML of a job file, mergekit-evolve's
    included, as `Job.from_file` gives it. Relative paths are looked up from the first root.

    Raises InputError for what is no job, and for one that leads out of the roots.
    """
    data = loaded(document) if isinstance(document, str) else dict(document)
    _check_plain(data, is_loaded=isinstance(document, str))
    folder = Path(os.path.realpath(roots[0]))
    if is_mergekit_evolve(data):
        _check_genome(data, roots)
        data = translated(data, folder / _SUBMITTED, ()).job
    if "store" in data:
        raise JobError("store: a server has its own: leave it out")
    _check_written(data, roots)
    try:
        found = Job.located(data, "the job", folder)
    except OSError as error:  # a folder that may not be looked into
        raise InputError(f"the job: '{error.filename}': {one_line(error)}") from None
    job(found, roots, is_admin=is_admin)
    return found


def job(job: Job, roots: Sequence[Path], *, is_admin: bool = False) -> None:
    """Raise InputError for a job, its paths absolute, that leads out of the roots, or is not for
    everybody."""
    _check_executor(job.executor.address, is_admin)
    models = {
        parent.model: f"parents.{name}" for name, parent in job.parents.items() if parent.model
    }
    if job.base is not None and job.base.model is not None:
        models.setdefault(job.base.model, "base")
    for model, where in models.items():
        _check_model(model, roots, where)
    for task in dict.fromkeys(entry.task for entry in job.tasks):
        _check_task(task, roots, is_admin)


def overrides(assignments: Iterable[str], *, is_admin: bool = False) -> None:
    """Raise InputError for overrides, `key=value`, of a search under way that are not for
    everybody. They lead to no file: see search.resume."""
    data: dict[str, Any] = {}
    for assignment in assignments:
        override(data, assignment)
    executor = data.get("executor")
    if isinstance(executor, Mapping):
        _check_executor(executor.get("address"), is_admin)


def path(name: str | Path, roots: Sequence[Path]) -> Path:
    """Where a name leads once all links are followed; a relative one from the first root. Raises
    InputError where that is below no root."""
    text = os.path.expanduser(name)
    if not _is_path(text):
        raise InputError(f"{_shown(name)} is no path: correct it")
    real = [Path(os.path.realpath(root)) for root in roots]
    found = Path(os.path.realpath(real[0] / text))
    if not any(found.is_relative_to(root) for root in real):
        listed = ", ".join(map(str, roots))
        raise InputError(
            f"{_shown(name)} leads out of the folders that this server reads ({listed}): put it "
            "there, or have the server started with another --root"
        )
    return found


# --- as it is written, before anything is opened -------------------------------------------------


def loaded(text: str) -> dict[str, Any]:
    """The keys of a job's YAML, which may be hostile. Raises JobError."""
    _check_length(len(text))
    try:
        _check_nodes(yaml.compose(text, yaml.SafeLoader))
        data = yaml_text.load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise JobError(f"the job is not YAML: {one_line(error)}") from None
    except RecursionError:
        raise JobError("the job is nested too deeply: no job is") from None
    if not isinstance(data, dict):
        raise JobError("the job holds no keys: see `evomerge check --schema`")
    return data


def _check_length(characters: int) -> None:
    if characters > _LONGEST:
        raise JobError(f"the job has {characters:,} characters: {_LONGEST:,} are enough for any")


def _check_nodes(root: yaml.Node | None) -> None:
    """Raise JobError for YAML that grows beyond measure when its aliases are written out."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _NODES  # of a node that contains itself
            sizes[id(node)] = 1 + sum(map(size, _children(node)))
        return sizes[id(node)]

    if root is not None and size(root) > _NODES:
        raise JobError("the job's aliases (*name) write out to too much: write less")


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _check_plain(data: Any, is_loaded: bool) -> None:
    """Raise JobError for plain data that is larger or nested deeper than any job, or with text that
    is none. is_loaded: from YAML, whose length was looked at before its aliases were written out.
    """
    if not is_loaded:
        _check_length(sum(len(text) + 1 for text in _plain_texts(data)))
    for text in _plain_texts(data):
        if not _is_text(text):
            raise JobError(f"the job: {_shown(text)} is no text: half a character is missing")


def _plain_texts(data: Any, depth: int = 0) -> Iterator[str]:
    """What each key and value is written as, without brackets and commas."""
    if depth > _DEPTH:
        raise JobError("the job is nested too deeply: no job is")
    if isinstance(data, Mapping | list):
        yield ""
        for value in itertools.chain(data, data.values() if isinstance(data, Mapping) else ()):
            yield from _plain_texts(value, depth + 1)
    else:
        yield str(data)


def _check_number(named: Any, what: str) -> None:
    if isinstance(named, Mapping | list) and len(named) > _NAMED:
        raise JobError(f"the job names {len(named):,} {what}: {_NAMED:,} are enough for any")


def _names(entries: Iterable[Any], key: str) -> Iterator[str]:
    """What stands there under a key, once."""
    found = (entry.get(key) for entry in entries if isinstance(entry, Mapping))
    yield from dict.fromkeys(name for name in found if isinstance(name, str))


def _check_written(data: Mapping[str, Any], roots: Sequence[Path]) -> None:
    """The names in a job's plain data, which may be anything."""
    named, tasks = data.get("parents"), data.get("tasks")
    _check_number(named, "parents")
    _check_number(tasks, "tasks")
    parents = [*(named.values() if isinstance(named, Mapping) else ()), data.get("base")]
    for name in _names(parents, "model"):
        _check_reference(name, roots)
    for name in _names(parents, "series"):
        _check_pattern(name, roots)
    for name in _names(tasks if isinstance(tasks, list) else (), "task"):
        _check_task_name(name, roots)
    space = data.get("space")
    if isinstance(space, Mapping):
        for part in (space, space.get("weight"), space.get("layers")):
            if isinstance(part, Mapping):
                _check_preset(part.get("preset"), roots)


def _check_genome(data: Mapping[str, Any], roots: Sequence[Path]) -> None:
    """The same of a file of mergekit-evolve."""
    genome, tasks = data.get("genome"), data.get("tasks")
    models = genome.get("models") if isinstance(genome, Mapping) else None
    _check_number(models, "models")
    _check_number(tasks, "tasks")
    for model in models if isinstance(models, list) else ():
        _check_genome_model(model, roots)
    if isinstance(genome, Mapping):
        _check_genome_model(genome.get("base_model"), roots)
    for entry in tasks if isinstance(tasks, list) else ():
        name = entry.get("name") if isinstance(entry, Mapping) else entry
        if isinstance(name, str):
            _check_task_name(name, roots)


def _check_genome_model(model: Any, roots: Sequence[Path]) -> None:
    with suppress(ValueError):  # of what names no model, which is found soon enough
        _check_reference(model_name(model), roots)


def _check_reference(name: str, roots: Sequence[Path]) -> None:
    """Wherever a model's name may be divided into model and adapter, see reference.halves."""
    path(name, roots)
    for plus in re.finditer(r"\+", name):
        for half in (name[: plus.start()], name[plus.end() :]):
            if half:
                path(half, roots)


def _check_pattern(pattern: str, roots: Sequence[Path]) -> None:
    if not _is_path(pattern) or ".." in Path(pattern).parts:
        raise InputError(f"series {_shown(pattern)}: write FOLDER/NAME-*, without any '..'")
    path(_fixed(pattern), roots)


def _check_task_name(name: str, roots: Sequence[Path]) -> None:
    if not name.startswith(LM_EVAL):
        for file in (name, f"{name}/{TASK}", f"{name}/{SUITE}"):
            path(file, roots)
            path(packaged("fitness") / file, (*roots, packaged("fitness")))


def _check_preset(name: Any, roots: Sequence[Path]) -> None:
    if isinstance(name, str):
        path(name, roots)
        presets = packaged("search_spaces")
        path(presets / f"{name}.yaml", (*roots, presets))


# --- where it leads ------------------------------------------------------------------------------


def _check_executor(address: Any, is_admin: bool) -> None:
    if address not in (None, "auto", os.environ.get("RAY_ADDRESS")) and not is_admin:
        raise InputError(
            f"executor.address: {_shown(address)}: whoever runs a Ray cluster runs code here: "
            "leave it out, or submit with a token that has the scope 'admin'"
        )


def _check_model(reference: str, roots: Sequence[Path], where: str) -> None:
    try:
        model, adapter = halves(reference, _is_folder)
        _check_half(model, roots, is_alone=adapter is None)
        if adapter is not None:
            _check_half(adapter, roots, is_alone=False)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _check_half(name: str, roots: Sequence[Path], is_alone: bool) -> None:
    """A model's or an adapter's name, which is a folder wherever there is one. Alone, an adapter is
    applied to the base that it names."""
    on_hub = hub_id(name)
    if on_hub is None or _is_folder(name):
        _check_folder(path(Path(name).absolute(), roots), roots, is_alone)
    elif on_hub.revision is not None:
        _check_revision(on_hub.revision)


def _check_folder(folder: Path, roots: Sequence[Path], is_alone: bool) -> None:
    """The files of a model, and those in the folders of its parts."""
    entries = _entries(folder)
    inner = [_entries(Path(e.path)) for e in entries if e.is_dir(follow_symlinks=False)]
    for entry in itertools.chain(entries, *inner):
        if entry.is_symlink():
            path(entry.path, roots)
    config = path(folder / "adapter_config.json", roots)
    if is_alone and config.is_file():
        _check_base(config, roots)


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as found:
            entries = list(itertools.islice(found, _ENTRIES + 1))
    except OSError:  # it is gone, no folder, or not readable, which is found soon enough
        return []
    if len(entries) > _ENTRIES:
        raise InputError(f"'{folder}' holds more than {_ENTRIES:,} files: it is no model's")
    return entries


def _check_base(config: Path, roots: Sequence[Path]) -> None:
    """The base that an adapter names, see merge.sources."""
    try:
        base = read_yaml(config).get("base_model_name_or_path")  # JSON is YAML
    except JobError:
        return  # it is no adapter, which is found soon enough
    if isinstance(base, str):
        for place in (config.parent / base, Path(base)):
            if _is_folder(str(place)):
                _check_folder(path(place.absolute(), roots), roots, is_alone=False)


def _check_task(name: str, roots: Sequence[Path], is_admin: bool) -> None:
    if name.startswith(LM_EVAL):
        return
    shipped = packaged("fitness")
    file = path(name, (*roots, shipped))
    # Shipped tasks may leave their data to the folder of the environment, as others may.
    data = [Path(folder).expanduser() for folder in [os.environ.get(FOLDER)] if folder]
    allowed = (*roots, shipped, *data)
    try:
        for beside in (file.with_name("manifest.json"), file.with_suffix(".sealed.json")):
            path(beside, allowed)
        content = _task_data(file)
        if "task" in content and "name" not in content:
            _check_lm_eval(file, allowed, is_admin, ())
        else:
            _check_sources(content, file, (file.parent, *data), allowed)
    except InputError as error:
        raise TaskError(f"task '{name}': {error}") from None


def _task_data(file: Path) -> dict[str, Any]:
    try:
        return read_yaml(file)
    except JobError as error:
        raise TaskError(str(error)) from None


def _check_sources(
    content: Mapping[str, Any], file: Path, folders: Sequence[Path], allowed: Sequence[Path]
) -> None:
    """The records of a task of evomerge's own."""
    try:
        data = TaskFile.model_validate(content).data
    except ValidationError as error:
        raise TaskError(f"{file}: {explain(error, TaskFile)}") from None
    for source in _sources(data):
        if source.file is not None:
            for folder in folders:
                path(folder / source.file, allowed)
        if source.hub is not None:
            _check_data_set(source.hub, file.parent, allowed)
        if source.revision is not None:
            _check_revision(source.revision)


def _sources(data: BaseModel) -> Iterator[Source]:
    for name in type(data).model_fields:
        if isinstance(value := getattr(data, name), Source):
            yield value


def _check_lm_eval(
    file: Path, allowed: Sequence[Path], is_admin: bool, including: tuple[Path, ...]
) -> None:
    """A task file in lm-eval's format, and those that it includes."""
    data = _task_data(file)
    included = data.get("include") or []
    for name in [included] if isinstance(included, str) else included:
        other = path(file.parent / str(name), allowed)
        if other not in including:
            _check_lm_eval(other, allowed, is_admin, (*including, file))
    if isinstance(data_set := data.get("dataset_path"), str):
        _check_data_set(data_set, file.parent, allowed)
    options = data.get("dataset_kwargs")
    if isinstance(options, Mapping):
        for name in _texts([options.get("data_files"), options.get("data_dir")]):
            _check_data_files(name, file.parent, allowed, is_admin)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _check_data_files(name: str, folder: Path, allowed: Sequence[Path], is_admin: bool) -> None:
    if "::" in name or "://" in name:
        if not is_admin:
            raise InputError(
                f"data_files {_shown(name)}: addresses are fetched for the scope 'admin' alone: "
                "put the file beside the task"
            )
        return
    path(folder / _fixed(name), allowed)
    # lm-eval looks beside the task, `datasets` in the working directory.
    for place in (folder, Path.cwd()):
        for found in glob.iglob(str(place / name), recursive=True):
            path(found, allowed)


def _check_data_set(name: str, folder: Path, allowed: Sequence[Path]) -> None:
    """A folder, a format, or a data set of the hub, which `datasets` tells apart by looking."""
    is_local = False
    for place in (folder, Path.cwd()):
        if (place / name).exists():
            path(place / name, allowed)
            is_local = True
    if not is_local and not _REPOSITORY.fullmatch(name):
        path(folder / name, allowed)


def _check_revision(revision: str) -> None:
    """It becomes a part of a path in the hub's cache."""
    if not _REVISION.fullmatch(revision):
        raise InputError(f"revision {_shown(revision)}: name a branch, a tag or a commit")


def _is_folder(name: str) -> bool:
    return bool(name) and Path(name).is_dir()


def _fixed(pattern: str) -> str:
    """The part of a pattern before the first part that stands for several names."""
    parts = Path(os.path.expanduser(pattern)).parts
    wild = next((i for i, part in enumerate(parts) if _WILD.search(part)), len(parts))
    return str(Path(*parts[:wild]))


def _is_path(text: str) -> bool:
    if not text or "\0" in text or not _is_text(text) or len(os.fsencode(text)) > _PATH_BYTES:
        return False
    parts = Path(text).parts
    return len(parts) <= _PARTS and all(len(os.fsencode(part)) <= _NAME_BYTES for part in parts)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True


def _shown(name: Any) -> str:
    """In one line, whatever is in it."""
    text = repr(str(name))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…'"
