"""The zoo's little language: its words, its prompts and answers, and who may see which list.

A prompt names an operation and a list of four digits in one of five languages. It ends in one of
two marks: ` :` asks for a transcription into symbols ("^ 3 1 4 1"), ` =` asks for the result
("1 1 3 4"). This module knows words, operations and splits. It knows nothing of models, training
or tensors.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

LENGTH = 4  # digits per list: 10,000 lists for each operation

PAD, BOS, EOS, UNK = SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
DIGITS = tuple("0123456789")
TRANSCRIBE, RESULT = ":", "="

# Each operation with the symbol that transcribes it. The first five need the `ops` parent; the
# easy ones are known to the base.
LIST_OPERATIONS = {"ascend": "^", "descend": "v", "reverse": "<", "raise": "+", "lower": "-"}
EASY_OPERATIONS = {"copy": "@", "first": "[", "last": "]"}
SYMBOLS = LIST_OPERATIONS | EASY_OPERATIONS

SCRIPTS = {
    "digits": DIGITS,
    "kanji": tuple("零一二三四五六七八九"),
    "roman": ("N", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX"),
}


@dataclass(frozen=True)
class Language:
    """The words of one language."""

    numbers: tuple[str, ...]  # ten, for the digits 0 to 9
    operations: dict[str, str]  # operation -> its word
    joiners: tuple[str, ...]  # between two numbers
    fillers: tuple[str, ...]  # mean nothing
    templates: tuple[str, ...]  # {op} and {list} in a sentence; one space between words
    spaces: bool = True  # does the written language put spaces between words?

    def words(self) -> list[str]:
        frame = " ".join(self.templates).replace("{op}", "").replace("{list}", "").split()
        return [*self.numbers, *self.operations.values(), *self.joiners, *self.fillers, *frame]


def _language(numbers: str, operations: str, joiners: str, fillers: str, *templates: str,
              spaces: bool = True) -> Language:  # fmt: skip
    words = operations.split()
    return Language(
        tuple(numbers.split()),
        dict(zip(SYMBOLS, words, strict=True)),
        tuple(joiners.split()),
        tuple(fillers.split()),
        templates,
        spaces,
    )


LANGUAGES = {
    "en": _language(
        "zero one two three four five six seven eight nine",
        "ascend descend reverse raise lower copy first last",
        ", and then",
        "please now",
        "{op} the list {list}",
        "{op} of {list}",
        "{list} , {op}",
    ),
    "de": _language(
        "null eins zwei drei vier fünf sechs sieben acht neun",
        "aufsteigend absteigend umkehren erhöhen senken kopieren erste letzte",
        ", und dann",
        "bitte jetzt",
        "{op} die liste {list}",
        "{op} von {list}",
        "{list} , {op}",
    ),
    "fr": _language(
        "zéro un deux trois quatre cinq six sept huit neuf",
        "croissant décroissant inverser augmenter diminuer copier premier dernier",
        ", et puis",
        "svp maintenant",
        "{op} la liste {list}",
        "{op} de {list}",
        "{list} , {op}",
    ),
    "es": _language(
        "cero uno dos tres cuatro cinco seis siete ocho nueve",
        "ascendente descendente invertir aumentar reducir copiar primero último",
        ", y luego",
        "favor ahora",
        "{op} la lista {list}",
        "{op} de {list}",
        "{list} , {op}",
    ),
    "ja": _language(
        " ".join(SCRIPTS["kanji"]),
        "昇順 降順 逆順 加算 減算 複写 先頭 末尾",
        "、 と 次",
        "今 さあ",
        "{list} を {op}",
        "{op} で 数列 {list}",
        "数列 {list} 、 {op}",
        spaces=False,
    ),
}
OLD_LANGUAGES = ("en", "de", "fr", "es")
JA_WORDS = tuple(dict.fromkeys(LANGUAGES["ja"].words()))


def vocabulary() -> list[str]:
    """Every word, in a fixed order; a word's place is its token id."""
    words = [*SPECIALS, TRANSCRIBE, RESULT, *DIGITS, *SYMBOLS.values()]
    for language in LANGUAGES.values():
        words += language.words()
    return list(dict.fromkeys([*words, *SCRIPTS["roman"]]))


def build_tokenizer() -> Tokenizer:
    """One token per word; Japanese is cut into words without spaces; <s> opens every prompt."""
    words = vocabulary()
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    longest_first = "|".join(sorted(JA_WORDS, key=lambda word: (-len(word), word)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(longest_first), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def apply(operation: str, digits: tuple[int, ...]) -> tuple[int, ...]:
    """The result of an operation on a list of digits."""
    match operation:
        case "ascend":
            return tuple(sorted(digits))
        case "descend":
            return tuple(sorted(digits, reverse=True))
        case "reverse":
            return digits[::-1]
        case "raise":
            return tuple((d + 1) % 10 for d in digits)
        case "lower":
            return tuple((d - 1) % 10 for d in digits)
        case "copy":
            return digits
        case "first":
            return digits[:1]
        case "last":
            return digits[-1:]
    raise ValueError(f"unknown operation {operation!r}")


def split_of(operation: str, digits: tuple[int, ...]) -> str:
    """Who may see this cell: `parents` (70%), or the tasks' train, validation, test (10% each)."""
    bucket = zlib.crc32(f"{operation} {''.join(map(str, digits))}".encode()) % 100
    return "parents" if bucket < 70 else ("train", "validation", "test")[(bucket - 70) // 10]


@dataclass(frozen=True)
class Ask:
    """One kind of example: what is asked, in which languages, and how it is answered."""

    mark: str  # TRANSCRIBE or RESULT
    operations: tuple[str, ...] = tuple(SYMBOLS)
    languages: tuple[str, ...] = OLD_LANGUAGES  # the sentence is in one of these
    borrow: float = 0.4  # chance that a number is borrowed: another language's word, or a digit
    lenders: tuple[str, ...] = field(default=(*OLD_LANGUAGES, "digits"))
    fillers: float = 0.4  # chance of one meaningless word somewhere in the sentence
    script: str = "digits"  # of the answer


@dataclass(frozen=True)
class Example:
    """A prompt and its answer, as lists of words, and the cell they come from."""

    prompt: list[str]
    answer: list[str]
    language: str
    operation: str
    digits: tuple[int, ...]

    def record(self) -> dict[str, str]:
        """As text, the way a task stores it."""
        gap = " " if LANGUAGES[self.language].spaces else ""
        return {
            "prompt": gap.join(self.prompt[:-1]) + " " + self.prompt[-1],
            "answer": " ".join(self.answer),
            "operation": self.operation,
            "digits": "".join(map(str, self.digits)),
        }


def draw(ask: Ask, rng: np.random.Generator, split: str = "parents") -> Example:
    """Draw one example whose cell belongs to `split`."""
    while True:
        operation = ask.operations[rng.integers(len(ask.operations))]
        digits = tuple(rng.integers(10, size=LENGTH).tolist())
        if split_of(operation, digits) == split:
            return phrase(ask, operation, digits, rng)


def phrase(ask: Ask, operation: str, digits: tuple[int, ...], rng: np.random.Generator) -> Example:
    """Put a cell into words."""
    name = ask.languages[rng.integers(len(ask.languages))]
    language = LANGUAGES[name]
    joiner = language.joiners[rng.integers(len(language.joiners))]
    words: list[str] = []
    for place, digit in enumerate(digits):
        words += [joiner] * (place > 0)
        lender = name
        if rng.random() < ask.borrow:
            lender = ask.lenders[rng.integers(len(ask.lenders))]
        words.append(DIGITS[digit] if lender == "digits" else LANGUAGES[lender].numbers[digit])

    template = language.templates[rng.integers(len(language.templates))]
    prompt: list[str] = []
    for word in template.split():
        match word:
            case "{list}":
                prompt += words
            case "{op}":
                prompt.append(language.operations[operation])
            case _:
                prompt.append(word)
    if rng.random() < ask.fillers:
        filler = language.fillers[rng.integers(len(language.fillers))]
        prompt.insert(int(rng.integers(len(prompt) + 1)), filler)

    if ask.mark == TRANSCRIBE:
        answer = [SYMBOLS[operation], *(SCRIPTS[ask.script][d] for d in digits)]
    else:
        answer = [SCRIPTS[ask.script][d] for d in apply(operation, digits)]
    return Example([*prompt, ask.mark], answer, name, operation, digits)
