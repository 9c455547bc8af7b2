"""The grader that takes the last number of a reply for its answer, and how numbers are written."""

import re
import unicodedata
from decimal import Context, Decimal
from typing import Literal

from pydantic import Field

from evomerge.fitness.example import Example
from evomerge.fitness.graders.grader import Grader

Mark = Literal[".", ","]

# Digits up to which values are exact: far beyond any answer.
_EXACT = Context(prec=4096)

_KANJI = {digit: value for value, digit in enumerate("〇一二三四五六七八九")}
_KANJI |= {"零": 0, "两": 2, "兩": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000}
_MYRIADS = {"万": 4, "萬": 4, "億": 8, "亿": 8, "兆": 12}  # powers of ten

# Between groups of three digits these mean nothing else: no-break, thin and full-width forms.
_GROUPED = re.compile(r"(?<!\d)\d{1,3}(?:[\u00a0\u2009\u202f'’，]\d{3})+(?!\d)")
_SPACED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?!\d)")
_ARABIC = r"(?:\d++(?:[.,]\d++)*+|(?<![\w.])\.\d++)"
_LAKHS = re.compile(r"[1-9]\d?(?:,\d{2})+,\d{3}(?:\.\d+)?")  # as India groups digits
_IDEOGRAPHIC = "[{0}]++(?:[・.][{0}]++)?+".format("".join(_KANJI))
_ANY_UNIT = f"[{''.join(_UNITS | _MYRIADS)}]"
_COEFFICIENT = f"(?:{_ARABIC}|{_IDEOGRAPHIC})"
# A minus behind a digit, a Latin letter or a closing bracket is a subtraction, a range or a hyphen.
_NUMBER = re.compile(
    r"(?P<minus>(?<![\dA-Za-z)\]}\-−–])[-−–]|(?<!\d)マイナス)?\\?[$¥€£￥]?"
    f"(?P<written>(?:{_COEFFICIENT}?{_ANY_UNIT})++{_COEFFICIENT}?|{_COEFFICIENT})"
)
_PARTS = re.compile(f"(?P<coefficient>{_COEFFICIENT})?(?P<unit>{_ANY_UNIT})?")


class LastNumber(Grader):
    """1 if the last number of the reply equals that of the target, however each is written.

    Digits of any script, with a sign, thousands separators and decimals: `1,000`, `−3`, `１８`,
    `1,00,000`, `1.234,50`. Kanji with digits, `1万2千`; kanji alone, `二百三十`, only in a reply
    that has no digits, since they are also parts of words. `1, 2` and `1/2` are two numbers; the
    comma of `3,5` can only be a decimal mark. Units and signs such as `$` and `%` do not count.
    """

    kind: Literal["last_number"] = "last_number"
    decimal: Mark = Field(
        ".",
        description="The decimal mark where both readings make sense: whether 1.234 is less than 2 "
        "and 1,234 more than 1000, or the other way round. With ',' a space may stand between "
        "groups of three digits.",
    )

    def worth(self, reply: str, item: Example) -> float:
        """See Grader."""
        wanted = last_number(item.target, self.decimal)
        if wanted is None:
            raise ValueError(f"the target '{item.target}' has no number")
        return float(last_number(reply, self.decimal) == wanted)

    def vote(self, reply: str, item: Example) -> str | None:
        """See Grader."""
        found = last_number(reply, self.decimal)
        return None if found is None else f"{_EXACT.add(found, 0).normalize(_EXACT):f}"


def last_number(text: str, decimal: Mark = ".") -> Decimal | None:
    """The value of the last number that is written in a text; None where there is none."""
    text = re.sub(r"(?![0-9])\d|[！-～]", _narrow, text)
    text = text.replace("{,}", ",").replace("\\,", "\u2009")  # as LaTeX groups digits
    text = _GROUPED.sub(_joined, text)
    if decimal == ",":
        text = _SPACED.sub(_joined, text)
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    last = [found for found in numbers if re.search(r"\d", found["written"])] or numbers
    value = _value(last[-1]["written"], decimal)
    return value.copy_negate() if last[-1]["minus"] else value


def _joined(found: re.Match[str]) -> str:
    """Groups of digits as one."""
    return re.sub(r"\D", "", found[0])


def _narrow(found: re.Match[str]) -> str:
    """A digit of any script, or another full-width character, in ASCII; a full-width comma stays:
    it ends clauses, without a space behind it."""
    character = found[0]
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    return character if character == "，" else chr(ord(character) - 0xFEE0)


def _value(written: str, decimal: Mark) -> Decimal:
    """Of coefficients and units: 3億5,000万, 二百三十, 18."""
    total, section = Decimal(0), Decimal(0)
    for part in _PARTS.finditer(written):
        unit = part["unit"]
        value = _coefficient(part["coefficient"], decimal) if part["coefficient"] else None
        if unit in _MYRIADS:
            section = _EXACT.add(section, value or 0) or Decimal(1)
            total = _EXACT.add(total, section.scaleb(_MYRIADS[unit], _EXACT))
            section = Decimal(0)
        elif unit:
            many = Decimal(1) if value is None else value
            section = _EXACT.add(section, _EXACT.multiply(many, _UNITS[unit]))
        elif value is not None:
            section = _EXACT.add(section, value)
    return _EXACT.add(total, section)


def _coefficient(text: str, decimal: Mark) -> Decimal:
    if text[0] in _KANJI:
        return Decimal("".join("." if c in "・." else str(_KANJI[c]) for c in text))
    return Decimal(_plain(text, decimal))


def _plain(digits: str, decimal: Mark) -> str:
    """Digits with marks between them, as Python writes the number; the last one of several."""
    if decimal == "." and _LAKHS.fullmatch(digits):
        return digits.replace(",", "")
    for separator, point in ((",", "."), (".", ",")):
        grouped = re.fullmatch(rf"[1-9]\d{{0,2}}((?:\{separator}\d{{3}})+)(\{point}\d+)?", digits)
        if grouped and (point == decimal or grouped[2] or grouped[1].count(separator) > 1):
            return digits.replace(separator, "").replace(point, ".")
    if re.fullmatch(r"\d*(?:[.,]\d+)?", digits):
        return digits.replace(",", ".")
    other = "," if decimal == "." else "."
    pieces = digits.split(other if other in digits else decimal)
    return _plain(pieces[-1], decimal)
