"""What counts when texts are compared, and what does not."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.fitness.fingerprints import exact_hash, fingerprint, item_hash, normalised

# Of every kind of character that is treated in a way of its own.
CHARACTERS = "aBx1 2３½²①.,:-–−*/+×'’%$^ßİΣ한国かガ゙ｶﾞ。、ไทยำ٣\u200b\u0301ǅﬁⅣ\n"
TEXTS = st.one_of(st.text(CHARACTERS), st.text(), st.text("ab 12+-.,"))
PLAIN = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]))


@settings(derandomize=True, deadline=None, max_examples=400)
@given(text=TEXTS)
def test_what_is_normalised_stays_as_it_is(text: str) -> None:
    tokens = normalised(text)
    assert normalised(" ".join(tokens)) == tokens


@settings(derandomize=True, deadline=None)
@given(text=PLAIN)
def test_case_does_not_count(text: str) -> None:
    assert normalised(text.upper()) == normalised(text) == normalised(text.lower())


@settings(derandomize=True, deadline=None)
@given(words=st.lists(st.from_regex("[a-z]{2,9}", fullmatch=True)), data=st.data())
def test_space_and_punctuation_between_words_do_not_count(
    words: list[str], data: st.DataObject
) -> None:
    between = data.draw(st.lists(st.text(' \n\t!?.,;:"()[]#_…“”«»。、！？', min_size=1)))
    gaps = [*between, *[" "] * len(words)]
    text = "".join(f"{gap}{word}" for gap, word in zip(gaps, words, strict=False))
    assert normalised(text) == tuple(words)


@settings(derandomize=True, deadline=None)
@given(text=PLAIN)
def test_full_width_characters_are_the_plain_ones(text: str) -> None:
    wide = "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text)
    assert unicodedata.normalize("NFKC", wide) == text
    assert normalised(wide) == normalised(text)


@settings(derandomize=True, deadline=None)
@given(numbers=st.lists(st.integers(0, 10**6), min_size=2, max_size=4))
def test_where_numbers_begin_and_end_counts_and_their_operators_do(numbers: list[int]) -> None:
    digits = tuple(map(str, numbers))
    assert normalised(" ".join(digits)) == digits
    found = {normalised(sign.join(digits)) for sign in ("+", "-", "*", "/", " ", "", ":")}
    assert len(found) == 7


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12+3", "12-3"),
        ("12+3", "1 23"),
        ("12-3", "1 23"),
        ("12 3", "123"),
        ("-3", "3"),
        ("x - y", "x + y"),
        ("1.5", "15"),
        ("1,5", "1, 5"),
        ("5%", "5"),
        ("a < b", "a > b"),
        ("2^3", "23"),
        ("か", "が"),
        ("Which film is 👸🐸?", "Which film is 🐸👸?"),
        ("30°", "30"),
    ],
)
def test_what_asks_something_else_differs(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)
    assert exact_hash(one) != exact_hash(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,000 yen", "1000 Yen!"),
        ("12 + 3 =", "１２＋３＝"),
        ("12−3", "12 - 3"),
        ("Don’t stop", "dont stop."),
        ("a well-known fact", "A well known fact:"),
        ("- one\n- two", "one; two"),
        ("**Bold** and/or _not_", "bold and or not"),
        ("Straße", "STRASSE"),
        ("ジェームズは３回、走る。", "ジェームズは3回走る"),
        ("ｶﾞｲﾄﾞ", "ガイド"),
        ("cafe\u0301", "café"),
        ("zero\u200bwidth", "zerowidth"),
        ("٣ + ٤", "3 + 4"),
        ("I ❤\ufe0f it", "I ❤ it"),
    ],
)
def test_what_reads_the_same_is_the_same(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)
    assert exact_hash(one) == exact_hash(other)


def test_scripts_without_spaces_fall_into_characters_and_others_into_words() -> None:
    assert normalised("東京とParis 2024年") == ("東", "京", "と", "paris", "2024", "年")
    assert normalised("กรุงเทพ") == tuple("กรุงเทพ")
    assert normalised("서울 시청, हिन्दी") == ("서울", "시청", "हिन्दी")
    assert fingerprint("", "", "東京はどこですか？").unspaced
    assert not fingerprint("", "", "Where is 東京?").unspaced


def test_texts_of_nothing_but_punctuation_are_told_apart() -> None:
    assert normalised("?!") == normalised("...") == ()
    assert exact_hash("?!") != exact_hash("...")
    found = fingerprint(exact_hash("a ?!"), asked="a ?!", own="?!")
    assert len(found.tokens) == 1
    assert item_hash("Close: [ (", "[ (") != item_hash("Close: ( [", "( [")
    assert item_hash("Close: [ (", "Close") == item_hash("Close: ( [", "Close")


def test_hashes_of_tokens_are_the_same_in_every_process() -> None:
    tokens = fingerprint("", "", "one 2").tokens
    assert tokens.dtype == np.uint64
    assert tokens.tolist() == [14489617718373642804, 7813587015057732635]
