"""The language of a reply."""

import pytest

from evomerge.errors import TaskError
from evomerge.fitness.example import Example
from evomerge.fitness.graders.composed import AllOf
from evomerge.fitness.graders.language import Language

ITEM = Example("", "18")
JAPANESE = "1日に16個の卵を産み、3個を食べます。16-3-4=9個を売り、9×2=18ドル。答えは18です。"
ENGLISH = "She sells 16 - 3 - 4 = 9 eggs a day and makes 9 * 2 = $18. The answer is 18."


def language(code: str) -> Language:
    return Language.model_validate({"is": code})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "reply"),
    [
        ("ja", JAPANESE),
        ("ja", "答えは18です。"),
        ("ja", "最初に x + y = 18 とする"),
        ("en", ENGLISH),
        ("en", "The answer is 18."),
        ("zh", "答案是18。"),
        ("de", "Die Antwort ist 18."),
        ("fr", "La réponse est 18."),
        ("es", "La respuesta es 18."),
        ("ru", "Ответ: 18."),
        ("bn", "উত্তর হল 18"),
        ("te", "సమాధానం 18"),
        ("th", "คำตอบคือ 18"),
        ("sw", "Jibu ni 18."),
    ],
)
def test_a_reply_is_in_its_language_and_in_no_other(code: str, reply: str) -> None:
    grader = language(code)
    grader.check()
    assert grader.worth(reply, ITEM) == 1
    assert language("en" if code != "en" else "ja").worth(reply, ITEM) == 0


@pytest.mark.parametrize("reply", ["", "18", "$18", "16 - 3 = 13"])
def test_numbers_alone_have_no_language(reply: str) -> None:
    assert language("ja").worth(reply, ITEM) == 0
    assert language("en").worth(reply, ITEM) == 0


@pytest.mark.slow
def test_a_language_beside_the_widely_used_ones_is_told_apart_from_them() -> None:
    assert language("sv").worth("Svaret på frågan är arton kronor.", ITEM) == 1
    assert language("sv").worth(ENGLISH, ITEM) == 0


def test_an_unknown_language_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TaskError, match="is: 'jap' is unknown: did you mean 'ja'"):
        language("jap").check()


@pytest.mark.slow
def test_right_and_in_japanese_takes_both() -> None:
    both = AllOf.model_validate({"graders": ["last_number", {"kind": "language", "is": "ja"}]})
    wrong = JAPANESE.replace("18です", "19です")
    assert [both.worth(reply, ITEM) for reply in (JAPANESE, ENGLISH, wrong)] == [1, 0, 0]
