"""IFEval: the checks of lm-eval, on records in IFEval's form."""

import random
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import TaskError
from evomerge.fitness.example import Example
from evomerge.fitness.graders.grader import Grade
from evomerge.fitness.graders.instructions import IfEval

nltk = pytest.importorskip("nltk", reason="needs the extra lm-eval")


@pytest.fixture(autouse=True)
def punkt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sentence splitter that has learnt no abbreviations, where NLTK looks for its own."""
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (folder / name).touch()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    return tmp_path


def item(*instructions: str, **kwargs: Any) -> Example:
    """kwargs: of the last instruction; None among them as the data set has it."""
    own = [{"num_words": None} for _ in instructions[:-1]] + [{"relation": None, **kwargs}]
    record = {
        "key": 1,
        "prompt": "Write something.",
        "instruction_id_list": list(instructions),
        "kwargs": own,
    }
    return Example(record["prompt"], "", record=record)


def worth(reply: str, of: Example, strict: bool = True) -> float:
    (found,) = IfEval(strict=strict).grades([(reply, of)])
    assert found.failure is None
    return found.worth


@pytest.mark.parametrize(
    ("instruction", "kwargs", "follows", "breaks"),
    [
        ("punctuation:no_comma", {}, "One two.", "One, two."),
        (
            "length_constraints:number_sentences",
            {"relation": "at least", "num_sentences": 3},
            "One. Two. Three.",
            "One. Two.",
        ),
        (
            "length_constraints:number_words",
            {"relation": "less than", "num_words": 3},
            "two words",
            "now three words",
        ),
        (
            "change_case:capital_word_frequency",
            {"capital_relation": "at least", "capital_frequency": 2},
            "HELLO WORLD out there",
            "HELLO world out there",
        ),
        (
            "language:response_language",
            {"language": "ja"},
            "これは日本語です。",
            "This is English.",
        ),
        ("keywords:existence", {"keywords": ["fox", "hen"]}, "A fox and a hen.", "A fox."),
        ("detectable_format:json_format", {}, '{"a": 1}', "a: 1"),
        ("startend:end_checker", {"end_phrase": "Bye."}, "Hello. Bye.", "Bye. Hello."),
    ],
)
def test_a_reply_follows_an_instruction_or_does_not(
    instruction: str, kwargs: dict[str, Any], follows: str, breaks: str
) -> None:
    assert worth(follows, item(instruction, **kwargs)) == 1
    assert worth(breaks, item(instruction, **kwargs)) == 0


def test_all_instructions_of_an_item_count() -> None:
    both = item("punctuation:no_comma", "startend:quotation")
    assert worth('"One two."', both) == 1
    assert worth('"One, two."', both) == 0
    assert worth("One two.", both) == 0


def test_the_loose_accuracy_overlooks_first_and_last_lines_and_asterisks() -> None:
    reply = "Sure, here it is:\n**One two.**"
    assert worth(reply, item("punctuation:no_comma")) == 0
    assert worth(reply, item("punctuation:no_comma"), strict=False) == 1


def test_an_empty_reply_follows_nothing() -> None:
    assert worth(" \n", item("punctuation:no_comma")) == 0


def test_an_unknown_instruction_fails_that_item_alone() -> None:
    found = IfEval().grades(
        [("a", item("no:such")), ("a", Example("", "")), ("a", item("punctuation:no_comma"))]
    )
    assert found == [Grade(0, "ifeval: 'no:such'"), Grade(0, "ifeval: 'key'"), Grade(1)]


def test_the_global_generator_is_left_alone() -> None:
    before = random.getstate()
    worth("One.", item("length_constraints:number_words"))  # which draws what it is not given
    assert random.getstate() == before


def test_without_nltks_data_the_task_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    IfEval().check()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nowhere")])
    with pytest.raises(TaskError, match=r"'ifeval' .* python -m nltk.downloader punkt_tab"):
        IfEval().check()
