"""Tasks: task.yaml, its data, and the splits. A task of lm-eval, in its own YAML, is one too.

A task opens its train and validation splits to anyone. The test split opens only to the holder of
an `Unsealed`, which the store hands out after it has written down that it did; before that, the
test items are read for one purpose, to hash their prompts, so that overlaps are found.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import jinja2
import yaml
from jinja2.sandbox import SandboxedEnvironment
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from evomerge.errors import SealedError, TaskError
from evomerge.fitness import lm_eval
from evomerge.messages import explain, one_line

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# Where a prompt was first met, by its hash: (task, split, position from 1).
Seen = dict[str, tuple[str, Split, int]]


class Files(BaseModel):
    """One JSONL file per split; paths are relative to the task file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str
    validation: str
    test: str


class Divided(BaseModel):
    """One JSONL file that is divided, record by record, whatever their order: by the SHA-256 of
    each record's canonical JSON, so that a record's split never changes and equal records share
    theirs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    split: Literal["hash"]
    train: str | None = Field(
        None, description="A file that is all of train; source then gives validation and test."
    )
    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (),
        description="Of train, validation and test, or of the two that source gives, adding up to "
        "1; default: 0.6, 0.2, 0.2, or halves.",
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.shares and len(self.shares) != len(self.parts):
            raise ValueError(f"shares: give {len(self.parts)}: of {', '.join(self.parts)}")
        if self.shares and not math.isclose(sum(self.shares), 1):
            raise ValueError(f"shares: they add up to {sum(self.shares):g}, not to 1")
        return self

    @property
    def parts(self) -> tuple[Split, ...]:
        """The splits that the source is divided into."""
        return SPLITS if self.train is None else SPLITS[1:]

    def split_of(self, record: Mapping[str, Any]) -> Split:
        """Which of its parts a record of the source belongs to."""
        position = int(hashlib.sha256(_canonical(record).encode()).hexdigest()[:12], 16) / 16**12
        shares = self.shares or ((0.6, 0.2, 0.2) if self.train is None else (0.5, 0.5))
        limits = itertools.accumulate(shares[:-1])
        return next(
            (p for p, limit in zip(self.parts, limits, strict=False) if position < limit),
            self.parts[-1],
        )


def _form_of(data: Any) -> str:
    source = isinstance(data, Divided) or (isinstance(data, Mapping) and "source" in data)
    return "Divided" if source else "Files"


Data = Annotated[
    Annotated[Files, Tag("Files")] | Annotated[Divided, Tag("Divided")], Discriminator(_form_of)
]


class Generate(BaseModel):
    """How replies are generated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(64, ge=1)
    stop: tuple[str, ...] = ()


class TaskFile(BaseModel):
    """A task file, task.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    data: Data
    prompt: str = Field("{{ prompt }}", description="Jinja over a record's fields.")
    target: str = Field("{{ answer }}", description="Jinja: the reference answer.")
    generate: Generate = Generate()
    score: Literal["exact_match"] = "exact_match"
    teacher_forced: bool = Field(
        False,
        description="Score by one forward over prompt, reference answer and end of sequence "
        "instead of generating. Equal to greedy generation where a text has one tokenization.",
    )


@dataclass(frozen=True)
class Example:
    """One item: what the model is given, and the reference answer."""

    prompt: str
    target: str


@dataclass(frozen=True)
class Unsealed:
    """Leave to read the test split with this identity. Only the store makes these."""

    content: str


class Task:
    """An opened task.

    name: as in its file; path: the task file; settings: the rest of it. notes: what a reader
    should know of how a task of lm-eval was understood.
    """

    def __init__(self, path: Path, settings: TaskFile, notes: tuple[str, ...] = ()) -> None:
        self.path = path
        self.settings = settings
        self.notes = notes
        self.name = settings.name
        self._splits: dict[Split, tuple[Example, ...]] = {}
        self._hashes: dict[Split, str] = {}
        self._prompt = _template(path, "prompt", settings.prompt)
        self._target = _template(path, "target", settings.target)

    @classmethod
    def open(cls, path: Path) -> "Task":
        """Read a task file, or one of lm-eval's. Raises TaskError."""
        notes: tuple[str, ...] = ()
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            if lm_eval.is_task(data):
                data, notes = lm_eval.understood(data, path)
            return cls(path, TaskFile.model_validate(data), notes)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            remedy = lm_eval.remedy(error)
            raise TaskError(
                f"task file '{path}' cannot be read: {remedy or one_line(error)}"
            ) from None
        except ValidationError as error:
            raise TaskError(f"{path}: {explain(error, TaskFile)}") from None

    def examples(self, split: Split, leave: Unsealed | None = None) -> tuple[Example, ...]:
        """A split's items, in file order.

        Raises SealedError for the test split without leave to read this very content, TaskError
        for data that cannot be read.
        """
        if split == "test" and (leave is None or leave.content != self.identity("test")):
            raise SealedError(
                f"task '{self.name}': the test split is sealed: only `evomerge export` reads it"
            )
        if split not in self._splits:
            self._splits[split] = self._read(split)
        return self._splits[split]

    def content(self, split: Split) -> str:
        """SHA-256 of what the split asks: its file, or its records of the source that is divided,
        the templates and the way it is scored."""
        if split not in self._hashes:
            asked = self.settings.model_dump(mode="json", exclude={"name", "data"})
            digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
            digest.update(self._bytes(split))
            self._hashes[split] = digest.hexdigest()
        return self._hashes[split]

    def identity(self, split: Split) -> str:
        """SHA-256 of the split's records, in whatever order, layout or prompt they are asked: the
        name under which a test set is opened, and under which its openings are counted."""
        records = sorted(_canonical(record) for _, record in self._records(split))
        return hashlib.sha256("\n".join(records).encode()).hexdigest()

    def item_hashes(self, split: Split) -> list[str]:
        """SHA-256 of each item's prompt; equal prompts give equal hashes."""
        return [hashlib.sha256(e.prompt.encode()).hexdigest() for e in self._read(split)]

    def check_splits(self, seen: "Seen | None" = None) -> dict[str, int]:
        """The number of items of each split. Raises TaskError when two splits share a prompt.

        seen: shared by the tasks of a search, so that train of one is not test of another.
        """
        seen = {} if seen is None else seen
        sizes: dict[str, int] = {}
        for split in SPLITS:
            hashes = self.item_hashes(split)
            sizes[split] = len(hashes)
            for position, item in enumerate(hashes, 1):
                task, other, line = seen.setdefault(item, (self.name, split, position))
                if other != split:
                    of = "" if task == self.name else f" of task '{task}'"
                    raise TaskError(
                        f"task '{self.name}': item {position} of {split} is item {line} of "
                        f"{other}{of}: splits must not overlap: remove it from one of them"
                    )
        return sizes

    def _bytes(self, split: Split) -> bytes:
        if self._divided(split):
            return "\n".join(_canonical(record) for _, record in self._records(split)).encode()
        return self._file(split).read_bytes()

    def _divided(self, split: Split) -> Divided | None:
        """The division that a split is a part of; None if it has a file of its own."""
        data = self.settings.data
        return data if isinstance(data, Divided) and split in data.parts else None

    def _file(self, split: Split) -> Path:
        key = "source" if self._divided(split) else split
        path: Path = self.path.parent / getattr(self.settings.data, key)
        if not path.is_file():
            raise TaskError(f"task '{self.name}': {key} data '{path}' is missing")
        return path

    def _read(self, split: Split) -> tuple[Example, ...]:
        return tuple(
            Example(_render(self._prompt, record, where), _render(self._target, record, where))
            for where, record in self._records(split)
        )

    def _records(self, split: Split) -> list[tuple[str, dict[str, Any]]]:
        """Each record of a split with its file and line."""
        path, division = self._file(split), self._divided(split)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise TaskError(f"'{path}' is not UTF-8: convert it") from None
        # Not splitlines: a JSON string may hold U+2028 and other breaks that are none in JSONL.
        lines = text.removesuffix("\n").split("\n") if text else []
        if not lines:
            raise TaskError(f"'{path}' is empty: {split} needs at least one example")
        wheres = [f"{path}:{number}" for number in range(1, len(lines) + 1)]
        records = [(where, _record(where, line)) for where, line in zip(wheres, lines, strict=True)]
        if division is None:
            return records
        own = [found for found in records if division.split_of(found[1]) == split]
        if not own:
            raise TaskError(
                f"'{path}': of its {len(records)} records none falls into {split}: give more of "
                "them, or a file for each split"
            )
        return own


def _canonical(record: Mapping[str, Any]) -> str:
    """Equal for equal records, however their files write them."""
    return json.dumps(record, sort_keys=True)


def _record(where: str, line: str) -> dict[str, Any]:
    if not line.strip():
        raise TaskError(f"{where}: the line is empty: remove it")
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TaskError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise TaskError(f"{where}: not a JSON object: give fields such as prompt and answer")
    return record


def _template(path: Path, key: str, text: str) -> jinja2.Template:
    # Sandboxed: a task file may come from anywhere, and a template can reach any Python object.
    environment = SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True
    )
    try:
        return environment.from_string(text)
    except jinja2.TemplateError as error:
        raise TaskError(f"{path}: {key}: not a Jinja template: {one_line(error)}") from None


def _render(template: jinja2.Template, record: Mapping[str, Any], where: str) -> str:
    try:
        return template.render(record)
    except Exception as error:  # whatever the task's own expressions raise
        raise TaskError(
            f"{where}: the template does not fit the record: {one_line(error)}"
        ) from None
