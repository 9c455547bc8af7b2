"""The logs of searches, part by part, for whoever follows them. Knows files alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from evomerge.service.redaction import redacted

_LINE = 2**16  # bytes beyond a limit that a line is read to its end
_CUT = "***\n"  # what is shown of a longer one


@dataclass(frozen=True)
class LogPart:
    """Whole lines of a log. offset: in bytes, where they begin; next: where what follows begins;
    size: of the log. One that has become too long begins anew, and is then shorter than that."""

    text: str
    offset: int
    next: int
    size: int


def log_part(path: Path, offset: int | None, limit: int) -> LogPart:
    """The whole lines from an offset on, `limit` bytes at most, or one that is longer; of one that
    is far longer, only that it is there. An offset within a line means the next one, since a secret
    that is cut in two is not found in either half.
    None: the last lines. Of a log that is shorter than that, from its beginning; of one that is not
    there yet, nothing."""
    try:
        size = path.stat().st_size
        with path.open("rb") as lines:
            asked = max(0, size - limit) if offset is None else offset
            begin = _line_start(lines, asked if asked <= size else 0)
            if begin is None:
                return LogPart("", asked, asked, size)
            found = lines.read(limit)
            if b"\n" not in found:
                found += lines.readline(_LINE)
                if len(found) == limit + _LINE and b"\n" not in found:
                    return LogPart(_CUT, begin, begin + len(found), size)
    except FileNotFoundError:
        return LogPart("", 0, 0, 0)
    found = found[: found.rfind(b"\n") + 1]  # the rest of its line is still being written
    text = redacted(found.decode("utf-8", "replace"))
    return LogPart(text, begin, begin + len(found), size)


def _line_start(lines: BinaryIO, offset: int) -> int | None:
    """Go to where a line starts, at the offset or after it; None where none does yet."""
    if offset == 0:
        return 0
    lines.seek(offset - 1)
    while part := lines.readline(_LINE):
        if part.endswith(b"\n"):
            return lines.tell()
    return None
