"""Errors: exit codes, and the remedy for an unknown word."""

import inspect

import pytest

from evomerge import errors
from evomerge.errors import EvomergeError, InputError, nearest

CLASSES = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, EvomergeError)
]
WRONG_INPUT = {
    "InputError",
    "JobError",
    "RecipeError",
    "ModelError",
    "OutOfMemory",
    "TaskError",
    "SealedError",
    "StoreError",
    "NotFound",
    "NameTaken",
    "KeyReused",
    "SearchBusy",
    "OutputExists",
}


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_wrong_input_exits_with_2_and_a_failure_with_1(error: type[EvomergeError]) -> None:
    assert error("what").exit_code == (2 if error.__name__ in WRONG_INPUT else 1)
    assert issubclass(error, InputError) == (error.__name__ in WRONG_INPUT)


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_every_error_says_what_it_is_in_a_docstring_of_its_own(error: type[EvomergeError]) -> None:
    assert error.__dict__["__doc__"].endswith(".")


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("tis", "did you mean 'ties'?"),
        ("linaer", "did you mean 'linear'?"),
        ("ties", "did you mean 'ties'?"),
        ("zzz", "known: linear, slerp, ties"),
        ("", "known: linear, slerp, ties"),
    ],
)
def test_nearest_names_the_closest_word_or_all_of_them_sorted(word: str, remedy: str) -> None:
    assert nearest(word, ["ties", "slerp", "linear"]) == remedy


def test_nearest_takes_any_iterable() -> None:
    assert nearest("alpah", (word for word in ("beta", "alpha"))) == "did you mean 'alpha'?"
