"""Graders of other packages, by a real installed one."""

from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import TaskError
from evomerge.fitness.example import Example
from evomerge.fitness.graders.installed import Installed

MODULE = '''
def overlap(reply, record):
    """The share of the record's words that the reply has."""
    words = record["words"]
    return sum(word in reply for word in words) / len(words)

def given(reply, record):
    return record["gives"]

number = 7
'''
POINTS = """[evomerge.graders]
overlap = graders_of_mine:overlap
given = graders_of_mine:given
number = graders_of_mine:number
gone = graders_of_mine:gone
broken = graders_of_mine_broken:overlap

[another.group]
elsewhere = graders_of_mine:overlap
"""


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution that is installed, as pip leaves it."""
    (tmp_path / "graders_of_mine.py").write_text(MODULE)
    (tmp_path / "graders_of_mine_broken.py").write_text("import nothing_of_this_name")
    info = tmp_path / "graders_of_mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: graders-of-mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)


def test_an_installed_function_grades_a_reply_by_its_record() -> None:
    grader = Installed(name="overlap")
    grader.check()
    item = Example("", "", record={"words": ["cat", "mat", "dog", "sun"]})
    (grade,) = grader.grades([("The cat sat on the mat in the sun.", item)])
    assert (grade.worth, grade.failure) == (0.75, None)


@pytest.mark.parametrize("value", [0, 1, True, 0.5])
def test_any_number_from_0_to_1_will_do(value: Any) -> None:
    (grade,) = Installed(name="given").grades([("", Example("", "", record={"gives": value}))])
    assert (grade.worth, grade.failure) == (float(value), None)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (2, "a worth of 2: give one from 0 to 1"),
        (-0.1, "a worth of -0.1: give one from 0 to 1"),
        (float("nan"), "a worth of nan: give one from 0 to 1"),
        (None, "'given' gave None: a number from 0 to 1 is needed"),
        ("1", "'given' gave '1': a number from 0 to 1 is needed"),
    ],
)
def test_what_is_no_worth_fails_its_item_alone(value: Any, reason: str) -> None:
    items = [Example("", "", record={"gives": gives}) for gives in (1, value, 1)]
    grades = Installed(name="given").grades([("", item) for item in items])
    assert [grade.worth for grade in grades] == [1, 0, 1]
    assert [grade.failure for grade in grades] == [None, f"installed: {reason}", None]


def test_a_function_that_raises_fails_its_item_with_its_reason() -> None:
    (grade,) = Installed(name="overlap").grades([("", Example("", "", record={"words": []}))])
    assert (grade.worth, grade.failure) == (
        0,
        "installed: 'overlap' raised ZeroDivisionError: division by zero",
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("overlp", "'overlp' is unknown: did you mean 'overlap'?"),
        ("elsewhere", "'elsewhere' is unknown: known: broken, given, gone, number, overlap"),
        ("os:system", "'os:system' is unknown"),
        ("broken", "'broken' cannot be loaded: No module named 'nothing_of_this_name'"),
        ("gone", "'gone' cannot be loaded"),
        ("number", "'number' is no function"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_remedy(name: str, message: str) -> None:
    with pytest.raises(TaskError) as refusal:
        Installed(name=name).check()
    assert message in str(refusal.value)


def test_where_nothing_is_installed_the_group_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(TaskError, match="no installed package has an entry point"):
        Installed(name="overlap").check()


def test_the_version_of_its_package_is_part_of_what_a_grader_is() -> None:
    assert Installed(name="given").model_dump() == {
        "kind": "installed",
        "name": "given",
        "version": "1.0",
    }
