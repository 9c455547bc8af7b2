"""Tasks as a task.yaml writes them: records, templates over them, worked examples, choices.

Knows nothing of seals and hashes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from evomerge.engine import Generation, Prompt, Turn
from evomerge.errors import TaskError
from evomerge.fitness.choices import Choices
from evomerge.fitness.data import Origin, Record, read
from evomerge.fitness.example import Example, with_choices
from evomerge.fitness.scorers import MultipleChoice, scorer_of
from evomerge.fitness.task_file import (
    SPLITS,
    Fewshot,
    Shared,
    Source,
    Split,
    TaskFile,
    canonical,
)
from evomerge.fitness.templates import Template
from evomerge.messages import explain
from evomerge.seeds import derive

# Of ready-made tasks that are declared, though no model can be asked them yet.
_REFUSED = {"image": "models are given text alone: a task about pictures cannot be asked yet"}


class WrittenTask:
    """What a task.yaml defines; see Definition. settings: what stands there, and `written` as plain
    data."""

    def __init__(self, path: Path, settings: TaskFile, written: Mapping[str, Any]) -> None:
        self.name = settings.name
        self.notes: tuple[str, ...] = ()
        self.settings = settings
        score, generate = settings.score, Generation(**dict(settings.generate))
        try:
            self.scorer = scorer_of(score, generate, settings.teacher_forced)
        except TaskError as error:
            raise TaskError(f"{path}: {error}") from None
        self._path = path
        self._written_data = written
        self._system = Template(path, "system", settings.system or "")
        self._prompt = Template(path, "prompt", settings.prompt)
        self._target = Template(path, "target", settings.target)
        reference = settings.reference
        self._reference = None if reference is None else Template(path, "reference", reference)
        self._choices = Choices(path, score) if isinstance(score, MultipleChoice) else None
        self._splits: dict[Split, list[Record]] = {}
        self._rows: dict[Split, tuple[int, ...]] = {}
        self._groups: dict[str, tuple[Split, str]] = {}

    @classmethod
    def open(cls, data: Any, path: Path, chat: bool | None) -> "WrittenTask":
        """From the plain data of a task file. chat: see Task.open. Raises TaskError."""
        try:
            settings = TaskFile.model_validate(data)
        except ValidationError as error:
            raise TaskError(f"{path}: {explain(error, TaskFile, _REFUSED)}") from None
        if chat is not None:
            settings = settings.model_copy(update={"chat": chat})
        return cls(path, settings, data)

    @property
    def asked(self) -> str:
        """See Definition."""
        asked = self.settings.model_dump(
            mode="json", exclude={"name", "about", "data"}, exclude_defaults=True
        )
        return json.dumps(asked, sort_keys=True)

    def records(self, split: Split) -> list[Mapping[str, Any]]:
        """See Definition. Raises TaskError as well where a group of records is in two splits."""
        return [record.fields for record in self._split(split)]

    def items(self, split: Split) -> list[Example]:
        """See Definition. Raises TaskError as well where a worked example that is written out is an
        item of validation or test."""
        return [self._item(record, split) for record in self._split(split)]

    def groups(self, split: Split) -> list[str] | None:
        """See Definition."""
        field = self.settings.data.group
        return None if field is None else [_group(record, field) for record in self._split(split)]

    def own_texts(self, split: Split, items: Sequence[Example]) -> list[str]:
        """See Definition."""
        return [
            with_choices(self._prompt.own(record), item.choices)
            for record, item in zip(self._split(split), items, strict=True)
        ]

    def origin(self, split: Split) -> Origin:
        """See Definition."""
        self._split(split)
        source = self._source(split)
        return Origin(source.file, source.hub, source.config, source.split, self._rows[split])

    def files(self, split: Split) -> tuple[str | None, ...]:
        """What the items of a split are read from where it is at hand, as the task file names it:
        its records, and those of train where worked examples are drawn from them. None in the
        place of what is in the hub alone."""
        few = self.settings.fewshot
        drawn: tuple[Split, ...] = ("train",) if few is not None and not few.examples else ()
        return tuple(self._source(own).file for own in dict.fromkeys((split, *drawn)))

    def own_file(self, split: Split) -> str | None:
        """See Definition."""
        data = self.settings.data
        if isinstance(data, Shared) and split in data.parts:
            return None
        source = self._source(split)
        return source.file if source.hub is None else None

    def portable(self) -> dict[str, bytes]:
        """See Definition. Its records are the splits' own, wherever they came from: of a source
        that is divided nothing else is carried along."""
        data: dict[str, str] = {split: f"{split}.jsonl" for split in SPLITS}
        if self.settings.data.group is not None:
            data["group"] = self.settings.data.group
        text = yaml.safe_dump({**self._written_data, "data": data}, allow_unicode=True)
        carried: tuple[Split, ...] = ("train", "validation")
        lines = {split: map(json.dumps, self.records(split)) for split in carried}
        return {"task.yaml": text.encode()} | {
            f"{split}.jsonl": "".join(f"{line}\n" for line in lines[split]).encode()
            for split in carried
        }

    # --- records ---------------------------------------------------------------------------------

    def _source(self, split: Split) -> Source:
        data = self.settings.data
        if isinstance(data, Shared) and split in data.parts:
            return data.source
        own: Source = getattr(data, split)
        return own

    def _split(self, split: Split) -> list[Record]:
        if split not in self._splits:
            data = self.settings.data
            if isinstance(data, Shared) and split in data.parts:
                found = self._divided(data)
                empty = f"of the records of '{data.source.label}' none falls into {split}"
                if not any(found.values()):
                    empty = f"'{data.source.label}' is empty: give it records"
            else:
                own = self._source(split)
                found = {split: self._from(own, split)}
                self._rows[split] = tuple(range(len(found[split])))
                empty = f"'{own.label}' is empty: {split} needs at least one example"
            if not found[split]:
                raise TaskError(f"task '{self.name}': {empty}")
            for part, records in found.items():
                self._note_groups(part, records)
            self._splits |= found
        return self._splits[split]

    def _from(self, source: Source, key: str) -> list[Record]:
        return read(source, self._path.parent, f"task '{self.name}': {key}")

    def _divided(self, data: Shared) -> dict[Split, list[Record]]:
        """The parts of the source that is divided."""
        records = self._from(data.source, "source")
        if data.group is not None:
            for record in records:
                _group(record, data.group)
        try:
            parts = data.divide([record.fields for record in records])
        except ValueError as error:
            raise TaskError(f"{self._path}: data.{error}") from None
        found: dict[Split, list[Record]] = {part: [] for part in data.parts}
        for record, part in zip(records, parts, strict=True):
            if part is not None:
                found[part].append(record)
        for part in data.parts:
            self._rows[part] = tuple(row for row, other in enumerate(parts) if other == part)
        return found

    def _note_groups(self, split: Split, records: Sequence[Record]) -> None:
        """Compare the groups of a split with those of the splits that were read before."""
        field = self.settings.data.group
        if field is None:
            return
        for record in records:
            own = (split, record.where)
            other, where = self._groups.setdefault(_group(record, field), own)
            if other != split:
                raise TaskError(
                    f"{record.where}: its {field} is that of {where}, so {split} shares it with "
                    f"{other}: keep the records of a group in one split"
                )

    # --- items -----------------------------------------------------------------------------------

    def _item(self, record: Record, split: Split) -> Example:
        question = self._prompt.of(record)
        if split != "train" and self._is_written_out(question):
            raise TaskError(
                f"{record.where}: this item of {split} is one of fewshot.examples: show another"
            )
        choices, right = self._choices.of(record) if self._choices else ((), 0)
        target = choices[right] if choices else self._target.of(record)
        reference = self._reference.of(record) if self._reference else target
        prompt = self._written(self._system.of(record), self._before(question), question)
        return Example(prompt, target, question, reference, choices, right, record.fields)

    def _written(self, system: str, shown: "Sequence[_Worked]", question: str) -> Prompt:
        """The whole prompt."""
        if self.settings.chat:
            turns = [Turn("system", system)] if system else []
            for worked in shown:
                turns += [Turn("user", worked.question), Turn("assistant", worked.reply)]
            return (*turns, Turn("user", question))
        text = f"{system}\n\n" if system else ""
        if self.settings.fewshot is not None:
            between, after = self._delimiter, self.settings.fewshot.separator
            text += "".join(f"{one.question}{between}{one.reply}{after}" for one in shown)
        return text + question

    # --- worked examples -------------------------------------------------------------------------

    @property
    def _delimiter(self) -> str:
        few, score = self.settings.fewshot, self.settings.score
        if few is not None and few.delimiter is not None:
            return few.delimiter
        return score.delimiter if isinstance(score, MultipleChoice) else ""

    def _before(self, question: str) -> "list[_Worked]":
        """The worked examples that are shown before a question."""
        few = self.settings.fewshot
        if few is None:
            return []
        pool = self._pool
        own = pool.places.get(question, frozenset())
        n = min(few.n, len(pool.worked) - len(own))
        if n < few.n and not few.examples:
            raise TaskError(
                f"task '{self.name}': fewshot.n is {few.n}, and train has only {n} other items: "
                "ask for fewer, or give train more"
            )
        order = range(len(pool.worked)) if few.choose == "first" else _drawn(few, pool, question)
        return [pool.worked[place] for place in islice((p for p in order if p not in own), n)]

    @cached_property
    def _pool(self) -> "_Pool":
        few = self.settings.fewshot
        if few is None:
            return _Pool.of([])
        written_out = [
            Record(f"{self._path}: fewshot.examples[{number}]", fields)
            for number, fields in enumerate(few.examples)
        ]
        return _Pool.of([self._worked(record) for record in written_out or self._split("train")])

    def _is_written_out(self, question: str) -> bool:
        few = self.settings.fewshot
        return few is not None and bool(few.examples) and question in self._pool.places

    def _worked(self, record: Record) -> "_Worked":
        if self._reference is not None:
            reply = self._reference.of(record)
        elif self._choices is not None:
            choices, right = self._choices.of(record)
            reply = choices[right]
        else:
            reply = self._target.of(record)
        return _Worked(self._prompt.of(record), reply)


@dataclass(frozen=True)
class _Worked:
    """A worked example: a question, and a whole reply that is right."""

    question: str
    reply: str


@dataclass(frozen=True)
class _Pool:
    """What worked examples are taken from. places: where each question stands among them."""

    worked: tuple[_Worked, ...]
    places: Mapping[str, frozenset[int]]

    @classmethod
    def of(cls, worked: Sequence[_Worked]) -> "_Pool":
        places: dict[str, set[int]] = {}
        for place, one in enumerate(worked):
            places.setdefault(one.question, set()).add(place)
        return cls(tuple(worked), {text: frozenset(found) for text, found in places.items()})


def _drawn(few: Fewshot, pool: _Pool, question: str) -> Iterator[int]:
    """Every place of the pool in a random order of the question's own, without end of trying."""
    seen: set[int] = set()
    for attempt in count():
        place = derive(few.seed, f"worked examples of {question}", attempt) % len(pool.worked)
        if place not in seen:
            seen.add(place)
            yield place


def _group(record: Record, field: str) -> str:
    """What names the group of a record."""
    value = record.fields.get(field)
    if value is None:
        raise TaskError(f"{record.where}: no '{field}' that says to which group it belongs")
    return canonical(value)
