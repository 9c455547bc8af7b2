"""The licence of a merge, worked out from what the models' cards state."""

from collections.abc import Iterable

import yaml

from evomerge.merge.checkpoint import Checkpoint

UNKNOWN = "unknown"


def licence(models: Iterable[Checkpoint]) -> str:
    """That of all models if they agree, 'other' if they differ, 'unknown' if one states none."""
    found = {_stated(model) for model in models}
    if UNKNOWN in found:
        return UNKNOWN
    return found.pop() if len(found) == 1 else "other"


def _stated(model: Checkpoint) -> str:
    """`license` in the front matter of the model's README.md."""
    card = model.path / "README.md"
    if not card.is_file():
        return UNKNOWN
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n")
    if len(parts) < 3 or parts[0].strip():
        return UNKNOWN
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return UNKNOWN
    stated = front.get("license") if isinstance(front, dict) else None
    return str(stated) if stated else UNKNOWN
