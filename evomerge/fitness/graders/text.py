"""Graders that compare a reply with the target as texts."""

import re
import string
import unicodedata
from collections import Counter
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

import regex
from pydantic import AfterValidator, Field

from evomerge.fitness.example import Example
from evomerge.fitness.graders.grader import Grader, require

# Wall time for one reply: a pattern that backtracks without end fails the item, not the search.
_REGEX_SECONDS = 2.0


class ExactMatch(Grader):
    """1 if both texts are equal after Unicode normalisation (NFKC) and folding of white space."""

    kind: Literal["exact_match"] = "exact_match"
    ignore_case: bool = False
    ignore_punctuation: bool = False

    def worth(self, reply: str, item: Example) -> float:
        """See Grader."""
        wanted = self._compared(item.target)
        if not wanted and item.target.strip():
            raise ValueError(
                f"the target '{item.target}' is punctuation alone, which ignore_punctuation ignores"
            )
        return float(self._compared(reply) == wanted)

    def vote(self, reply: str, item: Example) -> str | None:
        """See Grader."""
        return self._compared(reply) or None

    def _compared(self, text: str) -> str:
        text = normalized(text, self.ignore_case)
        return normalized(_without_punctuation(text)) if self.ignore_punctuation else text


class Contains(Grader):
    """1 if the target stands in the reply, both normalised as for exact_match."""

    kind: Literal["contains"] = "contains"
    ignore_case: bool = False

    def worth(self, reply: str, item: Example) -> float:
        """See Grader."""
        target = normalized(item.target, self.ignore_case)
        if not target:
            raise ValueError("the target is empty, and stands in any reply")
        return float(target in normalized(reply, self.ignore_case))


def _compiles(pattern: str) -> str:
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
    return pattern


class Regex(Grader):
    """What a pattern finds in a reply.

    A pattern with a group: what the group took of the last match is to equal the target, both
    normalised as for exact_match; of several groups the first that took part. A pattern without:
    the target says whether it is to be found at all, true or false.
    """

    kind: Literal["regex"] = "regex"
    pattern: Annotated[str, AfterValidator(_compiles)] = Field(
        description="Python's syntax; `(?i)` at its start ignores case."
    )

    @property
    def target_is_reply(self) -> bool:
        """See Grader."""
        return bool(self._compiled.groups)

    def worth(self, reply: str, item: Example) -> float:
        """See Grader."""
        wanted = normalized(item.target)
        if not self._compiled.groups:
            wanted = wanted.lower()
            if wanted not in ("true", "false"):
                raise ValueError(
                    f"the pattern has no group, so that the target says whether it is to be found: "
                    f"true or false, not '{wanted}'"
                )
        return float(self.vote(reply, item) == wanted)

    def vote(self, reply: str, item: Example) -> str | None:
        """See Grader."""
        try:
            found = None
            for match in self._compiled.finditer(reply, timeout=_REGEX_SECONDS):
                found = match
        except TimeoutError:
            raise ValueError(
                f"the pattern searched for more than {_REGEX_SECONDS:g} s: let it repeat less"
            ) from None
        if not self._compiled.groups:
            return "true" if found else "false"
        taken = [group for group in found.groups() if group is not None] if found else []
        return normalized(taken[0]) if taken else None

    @cached_property
    def _compiled(self) -> Any:
        return regex.compile(self.pattern)


By = Literal["words", "characters"]


class TokenF1(Grader):
    """F1 of the tokens that reply and target share, order aside, as SQuAD counts it (arXiv
    1606.05250, section 6.1): lower case, without punctuation; of words without English articles."""

    kind: Literal["token_f1"] = "token_f1"
    by: By = "words"

    def worth(self, reply: str, item: Example) -> float:
        """See Grader."""
        given, wanted = self._tokens(reply), self._tokens(item.target)
        if not given or not wanted:
            return float(given == wanted)
        shared = sum((Counter(given) & Counter(wanted)).values())
        return 2 * shared / (len(given) + len(wanted))

    def _tokens(self, text: str) -> list[str]:
        text = _without_punctuation(normalized(text).lower())
        if self.by == "characters":
            return list("".join(text.split()))
        return [word for word in text.split() if word not in ("a", "an", "the")]


class RougeL(Grader):
    """F-measure of the longest common subsequence (Lin 2004, section 3.1), by rouge-score. Words
    are runs of Latin letters and digits there, in lower case and not stemmed; of other scripts
    compare characters."""

    kind: Literal["rouge_l"] = "rouge_l"
    by: By = "words"

    def check(self) -> None:
        """See Grader."""
        require("rouge_score", self)

    def worth(self, reply: str, item: Example) -> float:
        """See Grader."""
        scorer = _rouge(self.by)
        if self.by == "words" and not re.search("[a-z0-9]", item.target.lower()):
            raise ValueError("the target has no words of Latin letters: give by: characters")
        return float(scorer.score(item.target, reply)["rougeL"].fmeasure)


class _Characters:
    """A tokenizer of rouge-score's kind."""

    def tokenize(self, text: str) -> list[str]:
        return list("".join(normalized(text).lower().split()))


@lru_cache
def _rouge(by: By) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Characters() if by == "characters" else None)


def normalized(text: str, ignore_case: bool = False) -> str:
    """NFKC, with white space folded."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip()
    return text.casefold() if ignore_case else text


def _without_punctuation(text: str) -> str:
    """Without what Unicode or ASCII counts as such, `$` and `+` included."""
    return "".join(
        c for c in text if c not in string.punctuation and unicodedata.category(c)[0] != "P"
    )
