"""Where parents come from: a reference in a recipe becomes an opened checkpoint.

A folder that exists is never looked for on the hub. Knows how the hub is asked; how references are
written and what folders hold is for others.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from evomerge.errors import ModelError
from evomerge.merge import adapters
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.shards import ADAPTER_CONFIG, is_adapter, read_json
from evomerge.reference import HubId, halves, hub_id

_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md")
_PICKLED = ("*.bin",)


@dataclass(frozen=True)
class _Folder:
    """Where a reference leads, and its durable name."""

    path: Path
    uri: str
    revision: str | None


def open_model(reference: str, *, allow_pickle: bool = False) -> Checkpoint:
    """Open what a recipe names as a model, see reference. Raises ModelError.

    An adapter named alone is applied to the base that its config names. allow_pickle: read pickled
    weights where there are no others, by torch's weights-only loader.
    """
    named, adapter_named = halves(reference, _is_folder)
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


def _is_folder(name: str) -> bool:
    return bool(name) and Path(name).is_dir()


def _base_of(adapter: _Folder, allow_pickle: bool) -> _Folder:
    config = read_json(adapter.path / ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ModelError(f"adapter '{adapter.uri}' names no base: name it as BASE+{adapter.uri}")
    if adapter.revision is not None and hub_id(name) is None:
        # Whoever wrote it meant a folder of his own; that there is one here says nothing.
        raise ModelError(
            f"adapter '{adapter.uri}' of the hub names a folder, '{name}', as its base: name it as "
            f"BASE+{adapter.uri}"
        )
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
    on_hub = hub_id(name)
    if on_hub is None:
        folder = name.rpartition("@")[0]
        if _is_folder(folder):
            raise ModelError(f"model '{name}': '{folder}' is a folder and has no revisions")
        raise ModelError(
            f"model '{name}': no such folder: give that of a saved model, or a hub id ORG/NAME"
        )
    return _fetch(name, on_hub, allow_pickle)


def _fetch(name: str, on_hub: HubId, allow_pickle: bool) -> _Folder:
    """A snapshot of a repository on the hub, in the hub's cache. `name`: for messages."""
    path = _download(name, on_hub, _WANTED)
    commit = path.name
    if not any(path.rglob("*.safetensors")):
        if not allow_pickle:
            raise ModelError(
                f"model '{name}': no safetensors file on the hub: name another revision; pickled "
                "weights are read by `evomerge merge --allow-pickle`"
            )
        path = _download(name, replace(on_hub, revision=commit), (*_WANTED, *_PICKLED))
    return _Folder(path, f"{on_hub.repository}@{commit}", commit)


def _download(name: str, on_hub: HubId, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download  # reads HF_* variables as it loads

    repository, revision = on_hub.repository, on_hub.revision
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
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
