"""Graders that run what a model wrote. How it is run safely is the sandbox's business.

For HumanEval one program serves base models, which go on where the prompt ends, and chat models,
which write the whole function in a fenced block: a prompt that ends in a docstring is a function
already, and the one that follows takes its place.

    program: |
      {{ prompt }}{{ reply | code }}
      {{ test }}
      check({{ entry_point }})
"""

import functools
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

import jinja2
from jinja2.sandbox import SandboxedEnvironment
from pydantic import AfterValidator, Field

from evomerge.errors import TaskError
from evomerge.fitness import sandbox
from evomerge.fitness.example import Example
from evomerge.fitness.graders.grader import Grade, Grader, named
from evomerge.messages import one_line

_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def code(reply: str) -> str:
    """The first fenced block of a reply, to the end of one that is cut off; without one the reply
    as it is. As in lm-eval's mbpp_instruct and OpenAI's simple-evals."""
    block = _FENCED.search(reply)
    return block[1] if block else reply


@functools.cache
def _template(program: str) -> jinja2.Template:
    # Sandboxed: a task file may come from anywhere, and a template can reach any Python object.
    environment = SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True
    )
    environment.filters["code"] = code
    return environment.from_string(program)


def _valid(program: str) -> str:
    try:
        _template(program)
    except jinja2.TemplateError as error:
        raise ValueError(f"not a Jinja template: {one_line(error)}") from None
    return program


class UnitTests(Grader):
    """1 if a program made of the reply runs to its end: no exception, no exit before the end, and
    within the limits. It runs in a sandbox, without network, and with Python's standard library
    only; where there is no sandbox, nothing is run."""

    kind: Literal["unit_tests"] = "unit_tests"
    program: Annotated[str, AfterValidator(_valid)] = Field(
        "{{ reply | code }}",
        description="Jinja over the record's fields and `reply`; the filter `code` takes the "
        "first fenced block, if there is one.",
    )
    seconds: float = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="Of processor time, rounded up; three times as much of wall time.",
    )
    memory_mb: int = Field(1024, ge=64, description="MiB of address space.")

    def check(self) -> None:
        """See Grader."""
        try:
            sandbox.check()
        except sandbox.NoSandbox as error:
            raise TaskError(
                f"score: '{named(self)}' runs generated code in a sandbox or not at all: {error}"
            ) from None

    def worth(self, reply: str, item: Example) -> float:
        """See Grader."""
        program = _template(self.program).render({**item.record, "reply": reply})
        return float(sandbox.run(program, self.seconds, self.memory_mb).finished)

    def grades(self, answers: Sequence[tuple[str, Example]]) -> list[Grade]:
        """See Grader. As many at once as there are cores. Raises NoSandbox: a sandbox that fails
        says nothing about the replies."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            return list(threads.map(lambda answer: self._grade(*answer), answers))

    def _grade(self, reply: str, item: Example) -> Grade:
        try:
            return Grade(self.worth(reply, item))
        except sandbox.NoSandbox:
            raise
        except Exception as error:  # the template and the record are anybody's
            return Grade(0.0, f"{named(self)}: {one_line(error)}")
