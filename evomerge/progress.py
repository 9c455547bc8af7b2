"""Who is told how long work goes on. Knows nothing of the work or of how it is shown."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Steps:
    """step: a line for each step. written: bytes done, of all bytes. scored: examples done, of all
    examples."""

    step: Callable[[str], None]
    written: Callable[[int, int], None]
    scored: Callable[[int, int], None] = lambda done, total: None
