"""Graders that compare texts: what counts as equal, as found, as overlapping."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from evomerge.fitness.example import Example
from evomerge.fitness.graders.grader import Grader
from evomerge.fitness.graders.text import Contains, ExactMatch, Regex, RougeL, TokenF1


def worth(grader: Grader, reply: str, target: str) -> float:
    (grade,) = grader.grades([(reply, Example("", target))])
    assert grade.failure is None, grade.failure
    return grade.worth


def failure(grader: Grader, reply: str, target: str) -> str:
    (grade,) = grader.grades([(reply, Example("", target))])
    assert grade.worth == 0
    assert grade.failure is not None
    return grade.failure


@pytest.mark.parametrize(
    ("reply", "target", "equal"),
    [
        ("三一四", "三一四", True),
        ("3 1 4", "3 1 4", True),
        ("  3  1\t4 \n", "3 1 4", True),
        ("3 1 4", "3 1 5", False),
        ("3 1", "3 1 4", False),
        ("31 4", "3 1 4", False),
        ("", "", True),
        (" \n", "", True),
        ("", "3", False),
        ("ABC", "abc", False),
        ("A.B", "AB", False),
        ("\uff13\u3000\uff11", "3 1", True),  # full-width digits, ideographic space
        ("\uff76\uff9e", "\u30ac", True),  # half-width katakana with its voicing mark
        ("e\u0301", "\u00e9", True),  # composed and decomposed
        ("e", "\u00e9", False),
        ("\ufb01", "fi", True),
    ],
)
def test_texts_match_after_unicode_normalisation_and_folding_of_white_space(
    reply: str, target: str, equal: bool
) -> None:
    assert worth(ExactMatch(), reply, target) == float(equal)
    assert worth(ExactMatch(), target, reply) == float(equal)


WORDS = st.lists(st.text("ab3三é", min_size=1, max_size=3), max_size=5)
SPACES = st.sampled_from([" ", "\n", "\t ", "\u3000", "  "])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(words=WORDS, one=SPACES, other=SPACES)
def test_only_the_words_count_not_the_space_between_them(
    words: list[str], one: str, other: str
) -> None:
    assert worth(ExactMatch(), one.join(words), other + other.join(words) + one) == 1.0
    assert worth(ExactMatch(), one.join(words), one.join([*words, "b"])) == 0.0


def test_case_and_punctuation_count_unless_they_are_ignored() -> None:
    assert worth(ExactMatch(ignore_case=True), "STRASSE", "straße") == 1
    assert worth(ExactMatch(ignore_case=True), "Yes.", "yes") == 0
    assert worth(ExactMatch(ignore_punctuation=True), "「はい。」", "はい") == 1
    assert worth(ExactMatch(ignore_punctuation=True), "$5 , yes", "5 yes") == 1
    assert worth(ExactMatch(ignore_punctuation=True), "Yes.", "yes") == 0
    both = ExactMatch(ignore_case=True, ignore_punctuation=True)
    assert worth(both, "Yes.", "yes") == 1
    assert worth(both, "", "") == 1
    assert "punctuation alone" in failure(both, "-", "+")


def test_replies_that_match_each_other_vote_alike() -> None:
    item = Example("", "yes")
    grader = ExactMatch(ignore_case=True, ignore_punctuation=True)
    assert grader.vote("Yes.", item) == grader.vote(" yes ", item) == "yes"
    assert grader.vote(" .", item) is None


def test_contains_finds_the_target_anywhere() -> None:
    assert worth(Contains(), "答えは １８ です。", "18") == 1
    assert worth(Contains(), "It is Tokyo.", "tokyo") == 0
    assert worth(Contains(ignore_case=True), "It is Tokyo.", "tokyo") == 1
    assert worth(Contains(), "one\n  two", "one two") == 1
    assert "empty" in failure(Contains(), "anything", " ")


def test_what_the_group_of_a_pattern_took_of_the_last_match_is_compared() -> None:
    grader = Regex(pattern="(?i)answer is ([^.]+)")
    assert worth(grader, "The answer is 3. No: the Answer is  18 .", "18") == 1
    assert worth(grader, "The answer is 18. No: the answer is 3.", "18") == 0
    assert worth(grader, "18", "18") == 0
    item = Example("", "18")
    assert grader.vote("The answer is １８.", item) == "18"
    assert grader.vote("18", item) is None


def test_of_several_groups_the_first_that_took_part_counts() -> None:
    grader = Regex(pattern=r"answer is (\w+)|答えは(\d+)")
    assert worth(grader, "答えは18です", "18") == 1
    assert worth(grader, "the answer is B", "B") == 1


def test_a_pattern_without_a_group_is_to_be_found_or_not_as_the_target_says() -> None:
    grader = Regex(pattern="(?i)i (?:can't|cannot)")
    refusal, help_ = "I'm sorry, but I cannot help with that.", "Sure: first, ..."
    for target, of_refusal in (("True", 1), ("true", 1), ("False", 0)):
        assert worth(grader, refusal, target) == of_refusal
        assert worth(grader, help_, target) == 1 - of_refusal
    assert "true or false, not '18'" in failure(grader, refusal, "18")
    assert not grader.target_is_reply
    assert Regex(pattern="(a)").target_is_reply


def test_a_pattern_that_backtracks_without_end_fails_the_item(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("evomerge.fitness.graders.text._REGEX_SECONDS", 0.05)
    found = failure(Regex(pattern=r"((\w|\d)+)+$"), "1" * 60 + "!", "1")
    assert "let it repeat less" in found


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="no regular expression: missing \\)"):
        Regex(pattern="(a")


# Independent references: by hand, over the same tokens.


def longest_common_subsequence(one: list[str], other: list[str]) -> int:
    row = [0] * (len(other) + 1)
    for a in one:
        new = [0]
        for j, b in enumerate(other):
            new.append(row[j] + 1 if a == b else max(row[j + 1], new[j]))
        row = new
    return row[-1]


def f_measure(shared: int, given: int, wanted: int) -> float:
    if not shared:
        return 0.0
    precision, recall = shared / given, shared / wanted
    return 2 * precision * recall / (precision + recall)


TEXTS = st.lists(st.sampled_from(["cat", "sat", "The", "a", "mat,", "Dog", "12", "三猫", "。"]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(reply=TEXTS, target=TEXTS)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(
    reply: list[str], target: list[str]
) -> None:
    one, other = " ".join(reply), " ".join(target)
    found = re.findall("[a-z0-9]+", one.lower()), re.findall("[a-z0-9]+", other.lower())
    if found[1]:
        expected = f_measure(longest_common_subsequence(*found), len(found[0]), len(found[1]))
        assert worth(RougeL(), one, other) == pytest.approx(expected)
    else:
        assert "by: characters" in failure(RougeL(), one, other)
    found = list("".join(reply).lower()), list("".join(target).lower())
    expected = f_measure(longest_common_subsequence(*found), len(found[0]), len(found[1]))
    assert worth(RougeL(by="characters"), one, other) == pytest.approx(expected)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(reply=TEXTS, target=TEXTS)
def test_token_f1_counts_shared_tokens_whatever_their_order(
    reply: list[str], target: list[str]
) -> None:
    def tokens(words: list[str]) -> list[str]:
        bare = [word.strip(",。").lower() for word in words]
        return [word for word in bare if word and word not in ("a", "the")]

    def expected(given: list[str], wanted: list[str]) -> float:
        if not given or not wanted:
            return float(given == wanted)
        shared = sum(min(given.count(token), wanted.count(token)) for token in set(given))
        return f_measure(shared, len(given), len(wanted))

    one, other = " ".join(reply), " ".join(target)
    assert worth(TokenF1(), one, other) == pytest.approx(expected(tokens(reply), tokens(target)))
    letters = [
        list("".join(words).lower().replace(",", "").replace("。", "")) for words in (reply, target)
    ]
    assert worth(TokenF1(by="characters"), one, other) == pytest.approx(expected(*letters))


def test_token_f1_of_a_known_answer() -> None:
    # Two of the reply's three words, two of the target's two: articles and the full stop go.
    assert worth(TokenF1(), "The Eiffel Tower, Paris.", "an eiffel tower") == pytest.approx(0.8)
    assert worth(TokenF1(), "", "") == 1
    assert worth(TokenF1(by="characters"), "東京都", "東京") == pytest.approx(0.8)
