"""The processes that this one has started, and those that they have."""

import os
from pathlib import Path


def descendants(of: int) -> set[int]:
    """All that a process has started, directly or not, and that still run."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(") ")[2].split()[:2]
        except OSError:  # it has just ended
            continue
        if state != "Z":
            parents[int(path.parent.name)] = int(parent)
    found, new = set[int](), {of}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new}
        found |= new
    return found


def called(name: str) -> list[int]:
    """Those of ours whose command line has this in it, the first ones first."""
    return sorted(pid for pid in descendants(os.getpid()) if name.encode() in _command_line(pid))


def _command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""
