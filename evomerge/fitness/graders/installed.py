"""Graders of other packages: Python entry points of the group `evomerge.graders`.

Only what is installed can be named: a task file, which may come from anywhere, runs no code.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import entry_points
from numbers import Real
from typing import Any, Literal

from pydantic import Field

from evomerge.errors import TaskError, nearest
from evomerge.fitness.example import Example
from evomerge.fitness.graders.grader import Grader
from evomerge.messages import one_line

GROUP = "evomerge.graders"


class Installed(Grader):
    """What a function of an installed package says: it is called with a reply and the item's
    record, and gives a number in [0, 1]."""

    kind: Literal["installed"] = "installed"
    name: str = Field(description=f"Of an entry point of the group `{GROUP}`.")

    def check(self) -> None:
        """See Grader."""
        if not callable(self._function):
            raise TaskError(f"score: installed: '{self.name}' is no function: mend its package")

    def worth(self, reply: str, item: Example) -> float:
        """See Grader."""
        found = self._function(reply, item.record)
        if not isinstance(found, Real):
            raise ValueError(f"'{self.name}' gave {found!r}: a number from 0 to 1 is needed")
        return float(found)

    @cached_property
    def _function(self) -> Callable[[str, Mapping[str, Any]], Any]:
        known = {point.name: point for point in entry_points(group=GROUP)}
        if self.name not in known:
            remedy = (
                nearest(self.name, known)
                if known
                else f"no installed package has an entry point of the group '{GROUP}'"
            )
            raise TaskError(f"score: installed: '{self.name}' is unknown: {remedy}")
        try:
            function: Callable[[str, Mapping[str, Any]], Any] = known[self.name].load()
        except Exception as error:  # whatever the package does when it is imported
            raise TaskError(
                f"score: installed: '{self.name}' cannot be loaded: {one_line(error)}"
            ) from None
        return function
