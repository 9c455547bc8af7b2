"""Where a server keeps what is no row of the store: logs of searches, and what it exported."""

from pathlib import Path

from evomerge.errors import InputError
from evomerge.job import NAME


def log_file(data: Path, search: str) -> Path:
    """What the processes that work on a search say; there may be none yet. Raises InputError for
    what cannot be a search's name."""
    return data / "logs" / f"{_name(search)}.log"


def export_folder(data: Path, search: str, candidate: int, recipe_only: bool = False) -> Path:
    """Where a candidate is exported to; it is there when that is done. Raises InputError."""
    suffix = "-recipe" if recipe_only else ""
    return data / "exports" / f"{_name(search)}-{candidate}{suffix}"


def _name(search: str) -> str:
    if not NAME.match(search):
        raise InputError(f"'{search}' is no name of a search: see evomerge ls")
    return search
