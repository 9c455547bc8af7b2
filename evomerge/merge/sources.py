"""Where parents come from: a reference in a recipe becomes an opened checkpoint.

A reference is a folder, a hub id `org/name` or `org/name@revision`, and may end in `+adapter`,
itself a folder or a hub id. A folder that exists is never looked for on the hub. Knows how
references are written and how the hub is asked; what folders hold is for others.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from evomerge.errors import ModelError
from evomerge.merge import adapters
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.shards import ADAPTER_CONFIG, is_adapter, read_json

_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^@]+))?", re.ASCII)
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md")
_PICKLED = ("*.bin",)


@dataclass(frozen=True)
class _Folder:
    """Where a reference leads, and its durable name."""

    path: Path
    uri: str
    revision: str | None


def open_model(reference: str, *, allow_pickle: bool = False) -> Checkpoint:
    """Open what a recipe names as a model. Raises ModelError.

    An adapter named alone is applied to the base that its config names. allow_pickle: read pickled
    weights where there are no others, by torch's weights-only loader.
    """
    named, adapter_named = _halves(reference)
    folder = _locate(named, allow_pickle)
    if adapter_named is not None:
        adapter = _locate(adapter_named, allow_pickle)
        if not (adapter.path / ADAPTER_CONFIG).is_file():
            raise ModelError(f"adapter '{adapter_named}': {ADAPTER_CONFIG} is missing")
    elif is_adapter(folder.path):
        adapter, folder = folder, _base_of(folder, allow_pickle)
    else:
        return _open(folder, allow_pickle)
    base = _open(folder, allow_pickle)
    return adapters.apply(base, adapter.path, adapter.uri, allow_pickle=allow_pickle)


def _open(folder: _Folder, allow_pickle: bool) -> Checkpoint:
    checkpoint = Checkpoint.open(folder.path, allow_pickle=allow_pickle)
    return replace(checkpoint, uri=folder.uri, revision=folder.revision)


def _halves(reference: str) -> tuple[str, str | None]:
    """A model and its adapter. A plus may be part of a folder's name."""
    if _is_folder(reference):
        return reference, None
    pluses = [match.start() for match in re.finditer(r"\+", reference)]
    pairs = [(reference[:at], reference[at + 1 :]) for at in reversed(pluses)]
    likeness = [sum(_likeness(half) for half in pair) for pair in pairs]
    return pairs[likeness.index(max(likeness))] if any(likeness) else (reference, None)


def _likeness(name: str) -> int:
    """How much a text looks like the name of a model: an existing folder most, then a hub id."""
    return 2 if _is_folder(name) else 1 if _HUB_ID.fullmatch(name) else 0


def _is_folder(name: str) -> bool:
    return bool(name) and Path(name).is_dir()


def _base_of(adapter: _Folder, allow_pickle: bool) -> _Folder:
    config = read_json(adapter.path / ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ModelError(f"adapter '{adapter.uri}' names no base: name it as BASE+{adapter.uri}")
    beside = adapter.path / name
    if beside.is_dir():
        return _Folder(beside, str(beside.resolve()), None)
    revision = config.get("revision")
    try:
        on_hub = revision and not _is_folder(name)
        return _locate(f"{name}@{revision}" if on_hub else name, allow_pickle)
    except ModelError as error:
        raise ModelError(f"base of adapter '{adapter.uri}': {error}") from None


def _locate(name: str, allow_pickle: bool) -> _Folder:
    if _is_folder(name):
        return _Folder(Path(name), str(Path(name).resolve()), None)
    match = _HUB_ID.fullmatch(name)
    if match is None:
        folder = name.rpartition("@")[0]
        if _is_folder(folder):
            raise ModelError(f"model '{name}': '{folder}' is a folder and has no revisions")
        raise ModelError(
            f"model '{name}': no such folder: give that of a saved model, or a hub id ORG/NAME"
        )
    return _fetch(name, match["id"], match["revision"], allow_pickle)


def _fetch(name: str, hub_id: str, revision: str | None, allow_pickle: bool) -> _Folder:
    """A snapshot of a repository on the hub, in the hub's cache."""
    path = _download(name, hub_id, revision, _WANTED)
    commit = path.name
    if not any(path.rglob("*.safetensors")):
        if not allow_pickle:
            raise ModelError(
                f"model '{name}': no safetensors file on the hub: pass --allow-pickle if its "
                "weights are pickled, or name another revision"
            )
        path = _download(name, hub_id, commit, (*_WANTED, *_PICKLED))
    return _Folder(path, f"{hub_id}@{commit}", commit)


def _download(name: str, hub_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download  # reads HF_* variables as it loads

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError:
        reason = "gated on the hub: accept its terms there and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = (
            "no such folder, and no such repository on the hub: mend the name, or log in with "
            "`hf auth login` if it is private"
        )
    except errors.RevisionNotFoundError:
        reason = f"the hub has no revision '{revision}' of it: name a branch, tag or commit"
    except errors.LocalEntryNotFoundError:
        reason = (
            "no such folder, not whole in the hub's cache, and the hub cannot be reached: mend the "
            "name, go online (HF_HUB_OFFLINE, HF_ENDPOINT), or name a folder"
        )
    except (
        OSError,
        ValueError,
        errors.HTTPError,  # type: ignore[attr-defined]  # of its HTTP client, not re-exported
    ) as error:
        reason = f"the hub could not give it: {' '.join(str(error).split())}: try again"
    raise ModelError(f"model '{name}': {reason}")
