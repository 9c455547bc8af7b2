"""math-verify in a process of its own: reads questions and writes answers, JSON line by JSON line.

Started by equivalence.py as a script. Each question has a time limit, which ends the process, and
so does the end of its input. Knows nothing of the rest of the package.

    {"seconds": 5.0, "reply": "...", "target": "..."}  ->  {"equal": true}
    {"seconds": 5.0, "reply": "..."}                   ->  {"canonical": "0.5"}, or null
    a question that cannot be answered                 ->  {"error": "..."}
"""

import json
import logging
import re
import resource
import signal
import sys
from typing import Any

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_MEMORY = 2 << 30  # bytes of address space
_DIGITS = 12


def main() -> None:
    """Answers until there are no more questions."""
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for line in sys.stdin:
        question = json.loads(line)
        # SIGPROF is not caught, so that it ends even what never comes back to the interpreter.
        signal.setitimer(signal.ITIMER_PROF, question["seconds"])
        answer = _answer(question)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    try:
        found = _parsed(question["reply"])
        if "target" not in question:
            return {"canonical": _canonical(found[0]) if found else None}
        target = _target(question["target"])
        if not target:
            return {"error": f"the target is no mathematics: {question['target']!r}"}
        return {"equal": bool(verify(target, found, timeout_seconds=None))}
    except Exception as error:  # sympy raises anything
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())}


def _parsed(text: str) -> list[Any]:
    """The answer that a text ends in, read in several ways; what is boxed comes first. Without
    math-verify's own time limit, which catches a signal and so does not end a loop in C."""
    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return list(parse(text.replace("\N{MINUS SIGN}", "-"), kinds, parsing_timeout=None))


def _target(text: str) -> list[Any]:
    """All of a text is the answer, unless it says itself where that is."""
    marked = re.search(r"\\boxed|(?<!\\)\$|\\\(|\\\[", text)
    return _parsed(text if marked else rf"\boxed{{{text}}}")


def _canonical(value: Any) -> str:
    """Equal for most values that are equal: simplified, and numbers to 12 digits."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, sympy.Eq) and isinstance(value.lhs, sympy.Symbol):
        value = value.rhs
    value = sympy.simplify(value.doit())
    if isinstance(value, sympy.Number) and value.is_finite and (value - int(value)).is_zero:
        return str(int(value))
    return str(value.evalf(_DIGITS))


if __name__ == "__main__":
    main()
