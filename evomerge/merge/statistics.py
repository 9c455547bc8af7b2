"""What is known of a model from running calibration text through it: the one place for it.

Statistics are measured once per model and kept in a folder of the user's, named by the content that
they follow from: another recipe, or another candidate of a search, measures nothing again. The
folder is `statistics` in evomerge's cache.

Knows nothing of text, of how statistics are measured, or of the methods that use them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from evomerge import cache
from evomerge.errors import InputError

# The mean magnitude of each input channel of the linear layer that a matrix belongs to, float32,
# shaped to broadcast against the matrix: (inputs,) where inputs are columns, (inputs, 1) where
# they are rows.
ACTIVATION_MEAN = "activation_mean"

_FORMAT = "1"  # another number: what older versions kept is measured again


@dataclass(frozen=True)
class Origin:
    """What statistics follow from.

    kind: of statistics. model, calibration: SHA-256 of the content. blocks, tokens: how many
    blocks of how many tokens are read at most.
    """

    kind: str
    model: str
    calibration: str
    blocks: int
    tokens: int

    @property
    def labels(self) -> dict[str, str]:
        """All of it, and the format that it is kept in."""
        return {"format": _FORMAT} | {key: str(value) for key, value in asdict(self).items()}


@dataclass(frozen=True, eq=False)
class Statistics:
    """Values by (kind, tensor name in the model's files)."""

    values: Mapping[tuple[str, str], Tensor]

    def get(self, kind: str, name: str) -> Tensor | None:
        """The values of a tensor; None where it has none of that kind."""
        return self.values.get((kind, name))


def recall(origin: Origin, measure: Callable[[], Statistics]) -> Statistics:
    """The statistics that were kept for this origin, else those that `measure` gives, kept now.

    Raises InputError for a file that is damaged, and where nothing can be kept.
    """
    text = json.dumps(origin.labels, sort_keys=True)
    path = cache.folder("statistics") / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
    if path.is_file():
        return _read(path, origin)
    _prepare(path.parent)
    found = measure()
    _write(path, origin, found)
    return found


def _read(path: Path, origin: Origin) -> Statistics:
    try:
        with safe_open(path, framework="pt") as file:
            labels = file.metadata()
            values = {_key(stored): file.get_tensor(stored) for stored in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        labels, values = None, {}
    if labels != origin.labels:
        raise InputError(
            f"statistics '{path}' are damaged: delete the file, and they are measured again"
        )
    return Statistics(values)


def _key(stored: str) -> tuple[str, str]:
    kind, name = stored.split(" ", 1)
    return kind, name


def _prepare(folder: Path) -> None:
    """Find out before measuring whether anything can be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(folder, PermissionError(0, "it does not let you write"))


def _write(path: Path, origin: Origin, statistics: Statistics) -> None:
    tensors = {f"{kind} {name}": value for (kind, name), value in statistics.values.items()}
    try:
        with NamedTemporaryFile(dir=path.parent, prefix=".partial-", delete=False) as file:
            try:
                file.write(save(tensors, origin.labels))
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise _unwritable(path.parent, error) from None


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"statistics cannot be kept in '{folder}': {error.strerror}: "
        "set EVOMERGE_CACHE to a folder that can be written"
    )
