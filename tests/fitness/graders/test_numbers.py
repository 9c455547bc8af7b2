"""The last number of a reply, however it is written."""

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.fitness.example import Example
from evomerge.fitness.graders.numbers import LastNumber, last_number


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        # Known formats of replies to GSM8K and MGSM.
        ("Janet sells 16 - 3 - 4 = 9 eggs, so she makes 9 * 2 = $18. The answer is 18.", "18"),
        ("16 - 3 - 4 = <<16-3-4=9>>9 eggs\n9 * 2 = $<<9*2=18>>18\n#### 18", "18"),
        ("答えは18です。", "18"),
        ("答えは1,080円です", "1080"),
        ("よって、答えは **70,000** ドルです。", "70000"),
        ("$\\boxed{18}$", "18"),
        ("\\boxed{70{,}000}", "70000"),
        ("\\boxed{70\\,000}", "70000"),
        ("The answer is $1,234.50.", "1234.5"),
        ("18 dollars, i.e. 50% of the price", "50"),
        ("Total: 18.00", "18"),
        ("018", "18"),
        ("$.50", "0.5"),
        # Signs.
        ("-3", "-3"),
        ("−3", "-3"),
        ("－３", "-3"),
        ("–3", "-3"),
        ("+3", "3"),
        ("x = -3.", "-3"),
        ("(-3)", "-3"),
        ("答えは-3です", "-3"),
        ("-$3", "-3"),
        ("$-3", "-3"),
        ("−￥300", "-300"),
        ("マイナス3度", "-3"),
        ("マイナス三", "-3"),
        ("-0", "0"),
        # Subtractions, ranges and hyphens are none.
        ("16-3", "3"),
        ("16 − 3", "3"),
        ("x-3", "3"),
        ("(x)-3", "3"),
        ("5–3", "3"),
        ("5マイナス3", "3"),
        ("GPT-4", "4"),
        ("--3", "3"),
        # Digits of other scripts.
        ("１８", "18"),
        ("１，０８０．５円", "1080.5"),
        ("উত্তর হল ১৮", "18"),
        ("คำตอบคือ ๑๘", "18"),
        ("సమాధానం ౧౮", "18"),
        ("الإجابة ١٨", "18"),
        # Separators and decimal marks.
        ("1, 2", "2"),
        ("1,2,3", "3"),
        ("1、2", "2"),
        ("9，9×2=18，19", "19"),
        ("3,5", "3.5"),
        ("0,125", "0.125"),
        ("1,000", "1000"),
        ("1.000", "1"),
        ("1,000,000.", "1000000"),
        ("1.234.567", "1234567"),
        ("1.234,50 €", "1234.5"),
        ("1\u202f000\u00a0000", "1000000"),
        ("1'000", "1000"),
        ("1,00,000", "100000"),
        ("১২,৩৪,৫৬৭.৫ টাকা", "1234567.5"),
        ("10,20,30", "30"),
        ("12:30", "30"),
        ("1/2", "2"),
        ("3.5.1", "1"),
        ("is...18", "18"),
        ("10²", "10"),
        # Kanji.
        ("十八", "18"),
        ("二百三十", "230"),
        ("百万", "1000000"),
        ("千", "1000"),
        ("一万二千三百四十五", "12345"),
        ("二〇二四年", "2024"),
        ("三・五", "3.5"),
        ("1万2千", "12000"),
        ("1万2,345円", "12345"),
        ("3億5,000万円", "350000000"),
        ("1.5万人", "15000"),
        ("１２万", "120000"),
        ("二億", "200000000"),
        ("1亿", "100000000"),
        ("两百三十", "230"),
        # Kanji of words do not count beside digits.
        ("答えは18です。これで十分です。", "18"),
        ("18ドルを二人で一緒に", "18"),
        # None at all.
        ("", None),
        ("I don't know.", None),
        ("½", None),
    ],
)
def test_the_last_number_of_a_reply_is_read_as_it_is_meant(reply: str, value: str | None) -> None:
    assert last_number(reply) == (None if value is None else Decimal(value))


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("70.000", "70000"),
        ("1,000", "1"),
        ("70 000 Euro", "70000"),
        ("12 345,5", "12345.5"),
        ("im Jahr 2019 100", "100"),
        ("3,5", "3.5"),
        ("18.00", "18"),
        ("1.234.567,8", "1234567.8"),
        ("1,234,567.8", "1234567.8"),
    ],
)
def test_where_both_readings_make_sense_the_language_decides(reply: str, value: str) -> None:
    assert last_number(reply, ",") == Decimal(value)


FULL_WIDTH = str.maketrans("0123456789.-", "０１２３４５６７８９．－")
DEVANAGARI = str.maketrans("0123456789", "०१२३४५६७८९")


def kanji(value: int) -> str:
    """A whole number as it is read aloud."""
    if value == 0:
        return "零"
    written = ""
    for myriad, power in (("兆", 12), ("億", 8), ("万", 4), ("", 0)):
        section = value // 10**power % 10**4
        for unit, size in (("千", 1000), ("百", 100), ("十", 10), ("", 1)):
            digit = section // size % 10
            if digit:
                written += ("" if digit == 1 and unit else "〇一二三四五六七八九"[digit]) + unit
        written += myriad if section else ""
    return written


def mixed(value: int) -> str:
    """Digits with myriads."""
    sections = [
        (value // 10**power % 10**4, name) for name, power in (("億", 8), ("万", 4), ("", 0))
    ]
    return "".join(f"{section}{name}" for section, name in sections if section) or "0"


WHOLE = {
    "plain": str,
    "grouped": "{:,}".format,
    "decimals": "{:,.2f}".format,
    "full-width": lambda value: str(value).translate(FULL_WIDTH),
    "full-width grouped": lambda value: f"{value:,}".translate(FULL_WIDTH).replace(",", "，"),
    "no-break spaces": lambda value: f"{value:,}".replace(",", "\u00a0"),
    "LaTeX": lambda value: f"{value:,}".replace(",", "{,}"),
    "Devanagari": lambda value: str(value).translate(DEVANAGARI),
    "leading zero": "0{}".format,
    "kanji": kanji,
    "digits and myriads": mixed,
}
MINUS = ["-", "−", "－", "マイナス"]
AROUND = [
    ("", ""),
    ("The answer is ", "."),
    ("#### ", ""),
    ("答えは", "です。"),
    ("\\boxed{", "}"),
    ("= $", " in all."),
    ("**", "%**\n"),
    ("so, ", ", I think."),
]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    value=st.integers(0, 10**12 - 1) | st.integers(0, 20_000),
    way=st.sampled_from(sorted(WHOLE)),
    minus=st.sampled_from(["", *MINUS]),
    around=st.sampled_from(AROUND),
)
def test_a_whole_number_is_found_however_it_is_written(
    value: int, way: str, minus: str, around: tuple[str, str]
) -> None:
    before, behind = around
    reply = f"{before}{minus}{WHOLE[way](value)}{behind}"
    expected = -value if minus else value
    assert last_number(reply) == expected
    grader, item = LastNumber(), Example("", f"{expected:,}")
    assert grader.worth(reply, item) == 1
    assert grader.worth(reply, Example("", str(expected + 1))) == 0
    assert grader.vote(reply, item) == str(expected)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    value=st.decimals(0, 10**7, places=2, allow_nan=False, allow_infinity=False),
    way=st.sampled_from(["{}", "{:,}"]),
    mark=st.sampled_from([".", ","]),
    around=st.sampled_from(AROUND),
)
def test_a_decimal_is_found_with_either_mark(
    value: Decimal, way: str, mark: str, around: tuple[str, str]
) -> None:
    written = way.format(value)
    if mark == ",":
        written = written.translate(str.maketrans(",.", ".,"))
    reply = around[0] + written + around[1]
    assert last_number(reply) == value
    assert last_number(reply, ",") == value


def test_numbers_of_equal_value_vote_alike() -> None:
    grader, item = LastNumber(), Example("", "")
    for replies in (
        ["18", "18.00", "十八", "$18.", "018"],
        ["1,000", "千", "1000.0"],
        ["0", "-0"],
    ):
        assert len({grader.vote(reply, item) for reply in replies}) == 1
    assert grader.vote("1000000", item) == "1000000"
    assert grader.vote("0.10", item) == "0.1"
    assert grader.vote("no idea", item) is None
    long = "1234567890" * 5
    assert grader.vote(long, item) == long


def test_a_target_without_a_number_fails_its_item() -> None:
    (grade,) = LastNumber().grades([("18", Example("", "eighteen"))])
    assert (grade.worth, grade.failure) == (
        0.0,
        "last_number: the target 'eighteen' has no number",
    )


@pytest.mark.parametrize(
    "text", ["1,1.1,", "1", "一", "千万", "1 ", "-", "1,234", "$", "1'", "111 "]
)
def test_a_reply_that_repeats_itself_is_read_through(text: str) -> None:
    assert last_number(text * 20_000 + " 18") == 18
