"""How recipes and jobs name models: MODEL or MODEL+ADAPTER, each of them a folder or a hub id.

A folder that exists is never taken for a hub id, `org/name` or `org/name@revision`. Knows nothing
of what folders hold, and asks no hub.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^@]+))?", re.ASCII)


@dataclass(frozen=True)
class HubId:
    """A repository of models, and a branch, tag or commit of it; None for the newest commit."""

    repository: str
    revision: str | None


def hub_id(name: str) -> HubId | None:
    """What a name means on the hub; None where it cannot be a hub id."""
    match = _HUB_ID.fullmatch(name)
    return HubId(match["repository"], match["revision"]) if match else None


def halves(reference: str, is_folder: Callable[[str], bool]) -> tuple[str, str | None]:
    """The model and the adapter that a reference names, None without one.

    A plus may be part of a folder's name. is_folder: whether a name is that of a folder.
    """
    if is_folder(reference):
        return reference, None

    def likeness(name: str) -> int:
        return 2 if is_folder(name) else 1 if hub_id(name) else 0

    pluses = [match.start() for match in re.finditer(r"\+", reference)]
    pairs = [(reference[:at], reference[at + 1 :]) for at in reversed(pluses)]
    alike = [sum(map(likeness, pair)) for pair in pairs]
    return pairs[alike.index(max(alike))] if any(alike) else (reference, None)


def model_name(value: Any) -> str:
    """A model written as a mapping, {model: {path, revision}, lora: ...}, in the one form that
    everything else knows: path@revision+lora@revision. Raises ValueError."""
    if isinstance(value, Mapping) and "model" in value and value.keys() <= {"model", "lora"}:
        halves = [value["model"], *([value["lora"]] if value.get("lora") is not None else [])]
        paths = [_as_path(half) for half in halves]
        if all(isinstance(path, str) for path in paths):
            return "+".join(paths)
    if not isinstance(value, str):
        raise ValueError(
            f"{value!r} names no model: give a folder or hub id as path@revision+adapter@revision, "
            "or {model: {path, revision}, lora: {path, revision}}"
        )
    return value


def _as_path(value: Any) -> Any:
    if isinstance(value, Mapping) and "path" in value and value.keys() <= {"path", "revision"}:
        revision = value.get("revision")
        return value["path"] if revision is None else f"{value['path']}@{revision}"
    return value
