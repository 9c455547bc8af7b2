"""Where evomerge keeps what it can make or fetch again: EVOMERGE_CACHE, else ~/.cache/evomerge."""

import os
from pathlib import Path


def folder(kind: str) -> Path:
    """That of one kind of things; it need not be there yet."""
    given = os.environ.get("EVOMERGE_CACHE")
    return (Path(given).expanduser() if given else Path.home() / ".cache" / "evomerge") / kind
