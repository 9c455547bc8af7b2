"""Where an output folder may stand, found out before any work, and how it takes its place whole;
not what goes into it."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evomerge.errors import InputError, OutputExists


def check_free(out: Path, renamed: bool = True) -> Path:
    """Where an output folder will stand, links followed; nothing is written.

    renamed: a finished folder is to take this place, which a mount point and the current directory
    do not allow. Raises OutputExists unless `out` is absent or an empty folder, and InputError
    where no folder can be made.
    """
    try:
        place = out.resolve()
        if place.is_dir():
            if any(place.iterdir()):
                raise OutputExists(f"output folder '{out}' is not empty: name another, or empty it")
        elif place.exists():
            raise OutputExists(f"output '{out}' is a file: name a folder")
        obstacle = _obstacle(place, renamed)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"output '{out}' cannot be written: {reason}") from None
    if obstacle:
        raise InputError(f"output '{out}' cannot be written: {obstacle}: name another folder")
    return place


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """An empty folder under a temporary name beside `out`, which takes its place at the end, or is
    removed with what is in it. Raises what check_free raises, OSError where it cannot be made or
    renamed."""
    place = check_free(out)
    partial = place.parent / f".{place.name}.{os.getpid()}.partial"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(place)
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
        if place.is_dir():
            place.rmdir()
        os.replace(partial, place)
    finally:
        with suppress(OSError):
            shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(place: Path) -> None:
    """What was killed on its way to the same place; what is still under way is kept."""
    for folder in place.parent.glob(f".{glob.escape(place.name)}.*.partial"):
        process = folder.name.split(".")[-2]
        if process.isdigit() and not _runs(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    """Whether there is another process of this number."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _obstacle(place: Path, renamed: bool) -> str | None:
    """Why no folder can be made at `place`, or take its name when `renamed`; None if one can."""
    if renamed and os.path.ismount(place):
        return "it is a mount point, which cannot be replaced"
    if renamed and place == Path.cwd():
        return "it is the current directory, which would be replaced"
    if place.is_symlink():
        return "it is a link in a circle"
    inside = place.is_dir() and not renamed  # files go into the folder that is there
    ground = place if inside else next(p for p in place.parents if p.exists())
    if not ground.is_dir():
        return f"'{ground}' is a file"
    if not os.access(ground, os.W_OK | os.X_OK):
        return f"'{ground}' does not let you write"
    return None
