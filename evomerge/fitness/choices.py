"""The choices of a multiple choice, and which of them is right, as a record has them."""

import re
import string
from pathlib import Path
from typing import Any

from evomerge.errors import TaskError
from evomerge.fitness.data import Record
from evomerge.fitness.scorers import MultipleChoice
from evomerge.fitness.templates import Expression, Template


class Choices:
    """What the templates of a multiple choice make of a record."""

    def __init__(self, path: Path, score: MultipleChoice) -> None:
        """Raises TaskError for what is no template."""
        self._list = self._texts = None
        if isinstance(score.choices, str):
            self._list = Expression(path, "score.choices", score.choices)
        else:
            self._texts = [Template(path, "score.choices", text) for text in score.choices]
        self._answer = Expression(path, "score.answer", score.answer)

    def of(self, record: Record) -> tuple[tuple[str, ...], int]:
        """The texts, and the place of the right one, from 0.

        Raises TaskError, with the record's place, where there are fewer than two, or none is right.
        """
        texts = self._written(record)
        if len(texts) < 2:
            raise TaskError(f"{record.where}: score.choices: {len(texts)} given: give 2 or more")
        if "" in texts:
            raise TaskError(f"{record.where}: score.choices: one of them is empty: leave it out")
        return texts, _place(self._answer.of(record), texts, record.where)

    def _written(self, record: Record) -> tuple[str, ...]:
        if self._texts is not None:
            return tuple(text.of(record) for text in self._texts)
        found = self._list.of(record) if self._list is not None else None
        if not isinstance(found, list | tuple):
            raise TaskError(
                f"{record.where}: score.choices: {found!r}: give an expression that is a list, "
                "such as {{ choices }}, or a list of templates"
            )
        for choice in found:
            if isinstance(choice, bool) or not isinstance(choice, str | int | float):
                raise TaskError(f"{record.where}: score.choices: {choice!r} is no text")
            if re.search(r"[\ud800-\udfff]", str(choice)):
                raise TaskError(
                    f"{record.where}: score.choices: {choice!r} holds half a surrogate pair, which "
                    "no model could be given"
                )
        return tuple(map(str, found))


def _place(answer: Any, texts: tuple[str, ...], where: str) -> int:
    """An integer is a place from 0; a text is a choice's own, or its letter, or its place."""
    is_place = isinstance(answer, int) and not isinstance(answer, bool)
    found = {answer} if is_place else _meant(str(answer), texts)
    found &= set(range(len(texts)))
    if not found:
        raise TaskError(
            f"{where}: score.answer: {answer!r} is none of the {len(texts)} choices: give a place "
            "from 0, a letter, or the text"
        )
    if len(found) > 1:
        places = " and ".join(map(str, sorted(found)))
        raise TaskError(
            f"{where}: score.answer: {answer!r} may mean the choices {places}, counted from 0: "
            "give the place, such as {{ answer | int }} or {{ choices.index(answer) }}"
        )
    return found.pop()


def _meant(answer: str, texts: tuple[str, ...]) -> set[int]:
    """The places that a text may mean."""
    answer = answer.strip()
    found = {place for place, text in enumerate(texts) if text.strip() == answer}
    if len(answer) == 1 and answer in string.ascii_uppercase:
        found.add(string.ascii_uppercase.index(answer))
    if answer.isascii() and answer.isdigit():
        found.add(int(answer))
    return found
