"""The grader that asks which language a reply is in, by lingua."""

from functools import lru_cache
from typing import Any, Literal

from pydantic import Field

from evomerge.errors import TaskError, nearest
from evomerge.fitness.example import Example
from evomerge.fitness.graders.grader import Grader, require

# What a reply may be taken for, beside what it ought to be. All of lingua's languages would take
# 1 GB and tell short replies apart less well: more of them look alike.
_OTHERS = frozenset({"ar", "bn", "de", "en", "es", "fr", "hi", "id", "it", "ja"}) | frozenset(
    {"ko", "nl", "pt", "ru", "sw", "te", "th", "tr", "vi", "zh"}
)


class Language(Grader):
    """1 if the reply is in a language, rather than in one of twenty widely used ones. Japanese
    without kana reads as Chinese; a reply of numbers alone has no language, and is worth 0."""

    kind: Literal["language"] = "language"
    is_: str = Field(alias="is", description="ISO 639-1.")

    @property
    def target_is_reply(self) -> bool:
        """See Grader. A bare number is in no language."""
        return False

    def check(self) -> None:
        """See Grader."""
        require("lingua", self)
        from lingua import Language as Known

        known = {language.iso_code_639_1.name.lower() for language in Known.all()}
        if self.is_ not in known:
            raise TaskError(
                f"score: language: is: '{self.is_}' is unknown: {nearest(self.is_, known)}"
            )

    def worth(self, reply: str, item: Example) -> float:
        """See Grader."""
        found = _detector(_OTHERS | {self.is_}).detect_language_of(reply)
        return float(found is not None and found.iso_code_639_1.name.lower() == self.is_)


@lru_cache
def _detector(codes: frozenset[str]) -> Any:
    from lingua import IsoCode639_1, LanguageDetectorBuilder

    chosen = [getattr(IsoCode639_1, code.upper()) for code in sorted(codes)]
    return LanguageDetectorBuilder.from_iso_codes_639_1(*chosen).build()
