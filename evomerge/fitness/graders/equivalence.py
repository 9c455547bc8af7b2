"""Graders that compare mathematics.

Expressions are read and compared by math-verify in a process of its own, which is ended by an
expression that takes too long, and started again for the next.
"""

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal, TextIO

from pydantic import Field

from evomerge.fitness.example import Example
from evomerge.fitness.graders.grader import Grader, require


class MathEquivalence(Grader):
    """1 if the answer that a reply ends in equals the target, whatever way both are written. Of a
    reply, what is boxed comes before what is LaTeX, and that before plain numbers. The target is
    LaTeX, with or without dollar signs or a box."""

    kind: Literal["math_equivalence"] = "math_equivalence"
    seconds: float = Field(
        5.0, gt=0, allow_inf_nan=False, description="Of processor time, for each reply."
    )

    def check(self) -> None:
        """See Grader."""
        require("math_verify", self)

    def worth(self, reply: str, item: Example) -> float:
        """See Grader."""
        if reply.strip() == item.target.strip():
            return 1.0
        return float(_mathematics.ask(self.seconds, reply=reply, target=item.target)["equal"])

    def vote(self, reply: str, item: Example) -> str | None:
        """See Grader."""
        try:
            canonical: str | None = _mathematics.ask(self.seconds, reply=reply)["canonical"]
        except Unanswered:
            return None
        return canonical


class Unanswered(Exception):
    """A question that took too long, or too much memory, or is no mathematics."""


class _Mathematics:
    """The process, started when it is first asked. Threads take turns."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._line: TextIO | None = None
        atexit.register(self._end)

    def ask(self, seconds: float, **question: str) -> dict[str, Any]:
        """The answer to a question; see math_process.py. Raises Unanswered."""
        with self._turn:
            try:
                said = self._exchange(json.dumps({"seconds": seconds, **question}))
            except BaseException:  # an answer that nobody has read must not meet the next question
                self._end()
                raise
            if not said:
                how = self._end()
                over = f"it took more than {seconds:g} s of processor time"
                raise Unanswered(over if how == -signal.SIGPROF else f"its process ended: {how}")
        answer: dict[str, Any] = json.loads(said)
        if "error" in answer:
            raise Unanswered(answer["error"])
        return answer

    def _exchange(self, question: str) -> str:
        """A line of JSON, or nothing where the process ended over it."""
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None or self._line is None:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                self._line = ours.makefile("rw", encoding="utf-8")
                self._process = subprocess.Popen(
                    # -P: beside the script lie modules with the names of others
                    [sys.executable, "-P", str(Path(__file__).with_name("math_process.py"))],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy sorts by hashes
                    start_new_session=True,  # Ctrl-C is for us
                )
        try:
            print(question, file=self._line, flush=True)
            return self._line.readline()
        except OSError:
            return ""

    def _end(self) -> int | None:
        """Ends the process; gives how it ended, as Popen.returncode."""
        if self._process is None or self._line is None:
            return None
        self._process.kill()
        with contextlib.suppress(OSError):  # of a question that could not be sent
            self._line.close()
        process, self._process, self._line = self._process, None, None
        return process.wait()


_mathematics = _Mathematics()
