"""Stores as earlier versions of evomerge left them, see tests/store/make_golden.py."""

import tarfile
from dataclasses import dataclass
from pathlib import Path

from evomerge.store import upgrade
from tests.running import url

SCHEMAS = ("001", "002", "003", "004", "005")

_FOLDER = Path(__file__).parent / "store" / "golden"


@dataclass(frozen=True)
class Golden:
    """A store with the searches `finished`, `stopped` and `failed`; and what that version gave of
    the winner of the first: its recipe, and the report that it stored."""

    store: Path
    recipe: str
    report: str

    @property
    def url(self) -> str:
        """Of the store."""
        return url(self.store)


def golden(schema: str, folder: Path) -> Golden:
    """Unpack one into a folder."""
    with tarfile.open(_FOLDER / f"{schema}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    recipe, report = ((folder / name).read_text() for name in ("recipe.yml", "report.json"))
    return Golden(folder / "store.db", recipe, report)


def upgraded(folder: Path) -> Golden:
    """The youngest of them, brought up to date."""
    found = golden(SCHEMAS[-1], folder)
    upgrade(found.url, quiet)
    return found


def quiet(done: int, of: int) -> None:
    """Progress that nobody looks at."""
