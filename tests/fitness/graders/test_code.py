"""Unit tests of generated code: what counts as code in a reply, and what counts as right."""

import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from evomerge.errors import TaskError
from evomerge.fitness.example import Example
from evomerge.fitness.graders.code import UnitTests, code
from evomerge.fitness.graders.grader import Grade
from evomerge.fitness.sandbox import NoSandbox
from tests.tiny import ROOT

HUMANEVAL = ROOT.parent / "shared" / "data" / "humaneval" / "HumanEval.jsonl.gz"
GRADER = UnitTests(program="{{ prompt }}{{ reply | code }}\n{{ test }}\ncheck({{ entry_point }})\n")
DOUBLE = {
    "prompt": 'def double(x: int) -> int:\n    """Twice x."""\n',
    "entry_point": "double",
    "test": "def check(f):\n    assert f(2) == 4",
}


def item(record: dict[str, Any] = DOUBLE) -> Example:
    return Example(record.get("prompt", ""), "", record=record)


def worths(*replies: str) -> list[float]:
    grades = GRADER.grades([(reply, item()) for reply in replies])
    assert not any(grade.failure for grade in grades)
    return [grade.worth for grade in grades]


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("    return 1", "    return 1"),
        ("Sure:\n```python\na = 1\n```\nDone.", "a = 1\n"),
        ("```\na\n```", "a\n"),
        ("```py title=x\na\n```\n```python\nb\n```", "a\n"),
        ("  ```python\n  a\n  ```", "  a\n"),
        ("It is ```x``` in line", "It is ```x``` in line"),
        ("```python\nprint('```')\nb = 1\n```", "print('```')\nb = 1\n"),
        ("cut off:\n```python\na\nb", "a\nb"),
        ("", ""),
    ],
)
def test_code_is_the_first_fenced_block_or_else_the_reply(reply: str, text: str) -> None:
    assert code(reply) == text


def test_a_completion_and_a_whole_function_are_right_alike() -> None:
    assert worths(
        "    return 2 * x\n",
        "\n    y = x\n    return y + x",
        "Here it is.\n```python\ndef double(x):\n    return 2 * x\n```\nIt doubles.",
        "```python\n" + DOUBLE["prompt"] + "    return x + x\n\nif __name__ == '__main__':\n"
        "    print(double(input()))\n```",
    ) == [1, 1, 1, 1]


def test_what_is_not_right_is_worth_nothing() -> None:
    assert (
        worths(
            "    return x + 1\n",
            "    pass\n",
            "",
            "I cannot do that.",
            "    return 2 * x\nimport sys\nsys.exit(0)\n",
            "    import os; print('all passed'); os._exit(0)\n",
            "    raise SystemExit(0)\n",
            "    import os; os.execv('/bin/true', ['true'])\n",
            "    return 2 * y\n",
            "    return 2 * x\ndef broken(:\n",
        )
        == [0] * 10
    )


@pytest.mark.slow
def test_limits_are_those_of_the_task_file() -> None:
    slow = "    for i in range(10 ** 12): pass\n    return 2 * x\n"
    large = "    y = bytearray(200 << 20)\n    return 2 * x\n"
    hasty = GRADER.model_copy(update={"seconds": 0.5, "memory_mb": 128})
    assert [grade.worth for grade in hasty.grades([(slow, item()), (large, item())])] == [0, 0]
    assert worths(large) == [1]


def test_replies_keep_their_order() -> None:
    replies = ["    return 2 * x\n", "    return x\n"] * 10
    assert worths(*replies) == [1, 0] * 10
    assert GRADER.grades([]) == []


def test_a_record_without_what_the_program_needs_fails_that_item_alone() -> None:
    right = "    return 2 * x\n"
    assert GRADER.grades([(right, item({"prompt": ""})), (right, item())]) == [
        Grade(0, "unit_tests: 'test' is undefined"),
        Grade(1),
    ]


def test_a_program_that_is_no_template_is_refused() -> None:
    with pytest.raises(ValidationError, match="not a Jinja template"):
        UnitTests(program="{{ reply ")
    with pytest.raises(ValidationError, match="not a Jinja template: No filter named 'cod'"):
        UnitTests(program="{{ reply | cod }}")


def test_without_a_sandbox_the_task_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    GRADER.check()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(TaskError, match=r"score: 'unit_tests' .* not installed \(apt install"):
        GRADER.check()
    with pytest.raises(NoSandbox):
        GRADER.grades([("    return 2 * x\n", item())])


def humaneval() -> list[Example]:
    if not HUMANEVAL.exists():
        pytest.skip(f"{HUMANEVAL} is absent")
    with gzip.open(HUMANEVAL, "rt", encoding="utf-8") as file:
        return [item(json.loads(line)) for line in file]


def total(items: list[Example], reply: Callable[[Any], str]) -> float:
    return sum(grade.worth for grade in GRADER.grades([(reply(i.record), i) for i in items]))


def chatted(record: Any) -> str:
    return f"Sure!\n\n```python\n{record['prompt']}{record['canonical_solution']}```\nThat is it."


def test_of_humaneval_solutions_are_right_and_others_wrong() -> None:
    some = humaneval()[::20]
    assert total(some, lambda record: record["canonical_solution"]) == len(some)
    assert total(some, chatted) == len(some)
    assert total(some, lambda record: "    return None\n") == 0


@pytest.mark.slow
def test_all_solutions_of_humaneval_are_right_and_others_wrong() -> None:
    items = humaneval()
    assert len(items) == 164
    assert total(items, lambda record: record["canonical_solution"]) == 164
    assert total(items, chatted) == 164
    for wrong in ("    pass\n", "    import os; os._exit(0)\n"):
        assert total(items, lambda record, wrong=wrong: wrong) == 0
