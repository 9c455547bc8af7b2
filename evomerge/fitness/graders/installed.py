"""Graders of other packages: Python entry points of the group `evomerge.graders`.

Only what is installed can be named: a task file, which may come from anywhere, runs no code.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from numbers import Real
from typing import Any, Literal

from pydantic import Field, computed_field

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
        try:
            found = self._function(reply, item.record)
        except Exception as error:
            what = f"{type(error).__name__}: {one_line(error)}"
            raise ValueError(f"'{self.name}' raised {what}") from None
        if not isinstance(found, Real):
            raise ValueError(f"'{self.name}' gave {found!r}: a number from 0 to 1 is needed")
        return float(found)

    @computed_field  # type: ignore[prop-decorator]  # pydantic's own way of writing it
    @property
    def version(self) -> str | None:
        """Of the package that it comes from: another one may grade otherwise."""
        return self._point.dist.version if self._point.dist else None

    @cached_property
    def _point(self) -> EntryPoint:
        known = {point.name: point for point in entry_points(group=GROUP)}
        if self.name not in known:
            remedy = (
                nearest(self.name, known)
                if known
                else f"no installed package has an entry point of the group '{GROUP}'"
            )
            raise TaskError(f"score: installed: '{self.name}' is unknown: {remedy}")
        return known[self.name]

    @cached_property
    def _function(self) -> Callable[[str, Mapping[str, Any]], Any]:
        try:
            function: Callable[[str, Mapping[str, Any]], Any] = self._point.load()
        except Exception as error:  # whatever the package does when it is imported
            raise TaskError(
                f"score: installed: '{self.name}' cannot be loaded: {one_line(error)}"
            ) from None
        return function
