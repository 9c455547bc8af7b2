"""A model on disk: config, tensor headers, tensors on demand, and what its files hash to.

Opens a folder: a language model as transformers saves it, a pipeline or a component as diffusers
does, or bare safetensors files. Knows nothing of merging, of adapters, or of where folders come
from.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import ModelError
from evomerge.layout import Layout, Place, infer, split
from evomerge.merge.shards import (
    Header,
    Read,
    Shards,
    check_inside,
    is_adapter,
    open_shards,
    read_json,
    weight_files,
)

__all__ = ["TOKENIZER_FILES", "Checkpoint", "Header", "Read", "dtype_name"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_PIPELINE = "model_index.json"
# The words of tokenizers that are none of TOKENIZER_FILES, the shards' index, ends of replies.
_BESIDE = ("generation_config.json", "*.safetensors.index.json", "*.model", "vocab.*")
_COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True)
class Checkpoint:
    """An opened model. Values are read by `values` or `tensor`, memory-mapped, on demand.

    path: its folder. config: config.json (model_index.json of a pipeline; empty without either).
    plain: a state dict that is no language model: its layout has no layers. uri: a name that will
    lead to the same content: the folder, or hub id and commit. revision: that commit (40 hex
    digits), None for a folder. sources: every file that makes the model what it is, by its name
    in `files`. read: gives the reader of a tensor that is among the headers.
    """

    path: Path
    config: Mapping[str, Any]
    headers: Mapping[str, Header]
    plain: bool
    uri: str
    revision: str | None
    sources: Mapping[str, Path] = field(repr=False)
    read: Callable[[str], Read] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path, *, allow_pickle: bool = False) -> "Checkpoint":
        """Open a model folder. Raises ModelError for what is missing, truncated or malformed."""
        path = Path(path)
        if not path.is_dir():
            raise ModelError(f"model '{path}': no such folder: give the folder of a saved model")
        if is_adapter(path):
            raise ModelError(f"model '{path}' is an adapter without its base: name BASE+{path}")
        if (path / _PIPELINE).is_file():
            config = read_json(path / _PIPELINE)
            return _plain(path, config, _listed_components(path, config), allow_pickle)
        if not (path / "config.json").is_file():
            return _bare(path, allow_pickle)
        config = read_json(path / "config.json")
        if "_class_name" in config:  # how diffusers marks the config of a component
            return _plain(path, config, [""], allow_pickle)
        shards = open_shards(path, allow_pickle=allow_pickle)
        headers = dict(shards.headers)
        if config.get("quantization_config"):
            headers = {name: _as_packed(header) for name, header in headers.items()}
        names = ("config.json", *_present(path, TOKENIZER_FILES), *shards.files)
        sources = {name: path / name for name in names}
        return cls(path, config, headers, False, _uri(path), None, sources, shards.values)

    def values(self, name: str) -> Read:
        """What reads spans of a tensor, backed by its file where nothing is computed.

        Raises ModelError where the model has no tensor of that name.
        """
        if name not in self.headers:
            raise ModelError(f"model '{self.path}' has no tensor '{name}'")
        return self.read(name)

    def tensor(self, name: str) -> torch.Tensor:
        """All values of a tensor, on the CPU; not to be written to. Raises ModelError."""
        read = self.values(name)
        header = self.headers[name]
        return read(0, header.numel).view(header.shape)

    @cached_property
    def parts(self) -> dict[str, Layout]:
        """Where each tensor stands, by part of the model: one, 'default', of most and of any plain
        one; see `layout.split`."""
        if self.plain:
            places = {name: Place(None, "mlp", name) for name in self.headers}
            return {"default": Layout(0, "", places)}
        return split(self.headers)

    @cached_property
    def layout(self) -> Layout:
        """Where each tensor stands in the model as a whole. Raises ModelError where the names do
        not tell the layers."""
        layout = self.parts["default"] if self.plain else infer(self.headers)
        if layout.unclear:
            raise ModelError(f"model '{self.path}': {layout.unclear}")
        return layout

    @cached_property
    def dtype(self) -> torch.dtype:
        """What most of its values are stored as."""
        sizes: dict[torch.dtype, int] = {}
        for header in self.headers.values():
            sizes[header.dtype] = sizes.get(header.dtype, 0) + header.bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @cached_property
    def companions(self) -> tuple[str, ...]:
        """Files beside the weights that a merge copies, relative to the folder.

        The tokenizer's of a language model; of a plain one every text file in its folder and the
        folders of its parts: configs, schedulers, tokenizers.
        """
        if not self.plain:
            return _present(self.path, TOKENIZER_FILES)
        listed = {name for name, kind in self.config.items() if isinstance(kind, list)}
        folders = {Path(header.file).parent.as_posix() for header in self.headers.values()}
        found = (p for name in {".", *listed, *folders} for p in (self.path / name).glob("*"))
        return tuple(sorted(p.relative_to(self.path).as_posix() for p in found if _is_text(p)))

    @cached_property
    def beside(self) -> dict[str, Path]:
        """What else is read when it is opened or run, by name: of a pipeline nothing. Its values
        are the same without: its files may not be found, and its replies not end where they did."""
        if self.plain:
            return {}
        found = (path for pattern in _BESIDE for path in self.path.glob(pattern))
        return {p.name: p for p in found if p.is_file() and p.name not in self.sources}

    @cached_property
    def files(self) -> dict[str, str]:
        """SHA-256 of each file that makes the model what it is, by name."""
        return {name: _sha256(self.sources[name]) for name in sorted(self.sources)}

    @cached_property
    def sha(self) -> str:
        """One SHA-256 for the whole content: the same files anywhere give the same."""
        text = json.dumps(self.files, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """Such as 'bfloat16', as recipes spell it."""
    return str(dtype).removeprefix("torch.")


def _plain(
    path: Path, config: Mapping[str, Any], components: list[str], allow_pickle: bool
) -> Checkpoint:
    """A plain checkpoint of components, each a folder; '' is the folder itself."""
    opened = {name: open_shards(path / name, allow_pickle=allow_pickle) for name in components}
    owner: dict[str, tuple[Shards, str]] = {}
    headers: dict[str, Header] = {}
    for component, shards in opened.items():
        prefix = f"{component}/" if component else ""
        for name, header in shards.headers.items():
            headers[prefix + name] = replace(header, file=prefix + header.file)
            owner[prefix + name] = (shards, name)

    def read(name: str) -> Read:
        shards, own_name = owner[name]
        return shards.values(own_name)

    weights = {header.file for header in headers.values()}
    unhashed = Checkpoint(path, config, headers, True, _uri(path), None, {}, read)
    names = (*weights, *unhashed.companions)
    return replace(unhashed, sources={name: path / name for name in names})


def _listed_components(path: Path, index: Mapping[str, Any]) -> list[str]:
    """The components of a pipeline that have weights. Its index lists each as [library, class]."""
    check_inside(path / _PIPELINE, (name for name, kind in index.items() if isinstance(kind, list)))
    components = []
    for name, kind in index.items():
        if name.startswith("_") or not isinstance(kind, list) or None in kind:
            continue  # a setting of the pipeline, or a component that it does without
        folder = path / name
        if not folder.is_dir():
            raise ModelError(f"model '{path}': folder '{name}' of its {_PIPELINE} is missing")
        if (folder / "config.json").is_file() or weight_files(folder):
            components.append(name)
    if not components:
        raise ModelError(f"model '{path}': its {_PIPELINE} lists no component with weights")
    return components


def _bare(path: Path, allow_pickle: bool) -> Checkpoint:
    """A folder without a config: a state dict, unless something of a language model is there."""
    if _present(path, TOKENIZER_FILES):
        raise ModelError(f"model '{path}': config.json is missing")
    if weight_files(path):
        return _plain(path, {}, [""], allow_pickle)
    components = sorted(p.name for p in path.iterdir() if p.is_dir() and weight_files(p))
    if not components:
        raise ModelError(f"model '{path}': config.json is missing, and so is any safetensors file")
    return _plain(path, {}, components, allow_pickle)


def _as_packed(header: Header) -> Header:
    """In a quantised model, integers are packed weights, their scales or their places."""
    return replace(header, packed=header.packed or not header.dtype.is_floating_point)


def _present(path: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if (path / name).is_file())


def _is_text(path: Path) -> bool:
    """Whether a file says something that a merged model needs as well; an index it writes anew."""
    is_index = ".index." in path.name
    return path.suffix in _COMPANION_SUFFIXES and not is_index and path.is_file()


def _uri(path: Path) -> str:
    return str(path.resolve())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
