"""Fingerprints: what may be known of an item's text without the text, so that items are compared
across splits while test stays sealed.

Texts are compared as they read: case, white space, punctuation and the many ways of writing one
character do not count; operators, signs, and where a number begins and ends do. Knows nothing of
tasks, splits, or of what a likeness means.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Blocks of scripts that put no space between words; their characters are tokens. Han with its
# radicals and extensions, kana, bopomofo; Thai, Lao; Burmese; Khmer.
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x19E0, 0x19FF),
    (0x2E80, 0x2FDF),
    (0x3005, 0x3007),
    (0x3031, 0x312F),
    (0x31A0, 0x31BF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xA9E0, 0xA9FF),
    (0xAA60, 0xAA7F),
    (0xF900, 0xFAFF),
    (0x1B000, 0x1B16F),
    (0x20000, 0x3FFFF),
)
_DASHES = "‐‑‒–−"
_PRESENTATION = "\ufe0e\ufe0f"  # a sign as text, or in colours
_OPERATORS = "^%"  # beside what Unicode calls mathematical, currencies and other symbols (emoji)
_AMBIGUOUS = "-*/"  # operators between numbers and letters, punctuation elsewhere
# W: of a word; D: digit; U: of a script without spaces; O: operator or another symbol; A: one of
# the ambiguous ones; Q: apostrophe; S: separator in numbers; else a space.
_TOKEN = re.compile("W+(?:QW+)*|D+(?:SD+)*|U|O|A")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def normalised(text: str) -> tuple[str, ...]:
    """The tokens of a text: words, numbers, operators, and the characters of scripts that put no
    space between words.

    "12+3", "12-3" and "1 23" differ; "1,000" and "1000" do not, nor do "don't" and "DONT". A minus,
    an asterisk or a slash is an operator before a number, and between numbers and single letters.
    """
    text = _folded(text)
    kinds = text.translate(_KINDS)
    found = [
        (kinds[match.start()], text[match.start() : match.end()])
        for match in _TOKEN.finditer(kinds)
    ]
    tokens = []
    for place, (kind, token) in enumerate(found):
        if kind == "D" and _THOUSANDS.fullmatch(token):
            token = token.replace(",", "")
        elif kind == "W":
            token = token.translate(_NO_QUOTES)
        elif kind == "A" and not _is_operator(found, place):
            continue
        tokens.append(token)
    return tuple(tokens)


def _folded(text: str) -> str:
    """Compatible characters made one (NFKC), upper and lower case too, any digit one of 0 to 9."""
    if text.isascii():
        return text.lower()
    text = text.translate(_PLAIN)  # what shows nothing would keep an accent from its letter
    for form in ("NFD", "NFKC"):
        text = unicodedata.normalize(form, text).casefold()
    return unicodedata.normalize("NFKC", text).translate(_PLAIN)


def _is_operator(found: Sequence[tuple[str, str]], place: int) -> bool:
    """Whether an ambiguous sign stands for one."""
    before = found[place - 1] if place else (" ", "")
    after = found[place + 1] if place + 1 < len(found) else (" ", "")
    return after[0] == "D" or all(
        kind == "D" or (kind == "W" and len(token) == 1) for kind, token in (before, after)
    )


class _Plain(dict[int, int | None]):
    """Of characters: digits and dashes as ASCII has them; those that show nothing left out."""

    def __missing__(self, code: int) -> int | None:
        char = chr(code)
        digit = unicodedata.decimal(char, None)
        plain: int | None = code
        if digit is not None:
            plain = ord("0") + int(digit)
        elif char in _DASHES:
            plain = ord("-")
        elif char == "\u2044":  # as in 1⁄2, which ½ is folded into
            plain = ord("/")
        elif unicodedata.category(char) == "Cf" or char in _PRESENTATION:
            plain = None
        self[code] = plain
        return plain


class _Kinds(dict[int, str]):
    """Of characters, the kinds that _TOKEN knows."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if char in _AMBIGUOUS:
            kind = "A"
        elif char in "'\u2019\u02bc":
            kind = "Q"
        elif char in ".,:":
            kind = "S"
        elif char in _OPERATORS or category in ("Sm", "Sc", "So"):
            kind = "O"
        elif category == "Nd":
            kind = "D"
        elif category[0] in "LMN":
            is_unspaced = any(first <= code <= last for first, last in _UNSPACED)
            kind = "U" if is_unspaced else "W"
        else:
            kind = " "
        self[code] = kind
        return kind


_PLAIN, _KINDS = _Plain(), _Kinds()
_NO_QUOTES = dict.fromkeys(map(ord, "'\u2019\u02bc"))


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Of an item; hashes alone.

    exact: SHA-256 of all it asks, choices included, see `item_hash`. text: that of its own text,
    which is what its record says: the words left out that its template says in every item.
    tokens: (n,) hashes of the own text's tokens, of 64 bits. unspaced: most of them are characters
    of a script without spaces, not words.
    """

    exact: str
    text: str
    tokens: NDArray[np.uint64]
    unspaced: bool


def fingerprint(exact: str, asked: str, own: str) -> Fingerprint:
    """Of an item. exact: its `item_hash`. own: its own text, see Fingerprint; where that holds no
    token, all it asks is compared in its place."""
    tokens = normalised(own) or normalised(asked)
    unspaced = sum(_KINDS[ord(token[0])] == "U" for token in tokens)
    return Fingerprint(
        exact=exact,
        text=_digest(tokens, own),
        tokens=np.array([_token_hash(token) for token in tokens], np.uint64),
        unspaced=2 * unspaced > len(tokens),
    )


def item_hash(asked: str, own: str) -> str:
    """SHA-256 of all that an item asks, equal where it reads the same. own: its own text, see
    Fingerprint; where that holds no token, punctuation is what tells items apart, and counts."""
    return exact_hash(asked) if normalised(own) else _digest((), asked)


def exact_hash(text: str) -> str:
    """SHA-256, equal for texts that read the same; of one without any token, for equal texts."""
    return _digest(normalised(text), text)


def _digest(tokens: Sequence[str], text: str) -> str:
    return hashlib.sha256((" ".join(tokens) or text).encode()).hexdigest()


@lru_cache(maxsize=1 << 18)
def _token_hash(token: str) -> int:
    return int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "little")
