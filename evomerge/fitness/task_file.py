"""A task file, task.yaml: one pydantic model per section. Reads no data."""

import hashlib
import itertools
import json
import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from evomerge.errors import nearest
from evomerge.fitness.graders import Grader
from evomerge.fitness.graders.grader import named
from evomerge.fitness.graders.text import ExactMatch
from evomerge.fitness.scorers import Score

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Section(BaseModel):
    """What every section is: frozen, and without keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(Section):
    """Records: a file, a data set of the hub, or both, which then hold the same records."""

    file: str | None = Field(
        None,
        description="JSON Lines (.jsonl, .json), a table (.csv, .tsv, .parquet), or one of these "
        "packed (.gz). Looked up beside the task file, then in the folder EVOMERGE_DATA names.",
    )
    columns: tuple[str, ...] = Field(
        (), description="Of a .csv or .tsv file whose first row is a record and no header."
    )
    hub: str | None = Field(
        None, description="A data set of the hub, ORG/NAME; read where the file is not at hand."
    )
    config: str | None = Field(None, description="Of the hub's data set, where it has several.")
    split: str | None = Field(None, description="Of the hub's data set: the split to read.")
    revision: str | None = Field(
        None, description="Of the hub's data set: a commit, or a branch, which may move."
    )

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.file or f"{self.hub}"

    @model_validator(mode="after")
    def _readable(self) -> Self:
        if self.file is None and self.hub is None:
            raise ValueError("give file, or hub, or both")
        if self.file is not None and ending(self.file) not in ENDINGS:
            raise ValueError(f"file: '{self.file}': its name ends in none of {', '.join(ENDINGS)}")
        if self.columns and (self.file is None or ending(self.file) not in (".csv", ".tsv")):
            raise ValueError("columns: only a .csv or .tsv file is given names of columns")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError("columns: a name stands there twice")
        if self.hub is None:
            for key in ("config", "split", "revision"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: it belongs to a data set of the hub: give hub")
            return self
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.hub):
            raise ValueError(f"hub: '{self.hub}': write ORG/NAME")
        for key in ("split", "revision"):
            if getattr(self, key) is None:
                raise ValueError(f"{key}: required with hub, and missing")
        return self


ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def ending(name: str) -> str:
    """How the name of a file of records ends, packed or not, in lower case."""
    return PurePath(name.lower().removesuffix(".gz")).suffix


def _written_out(source: Any) -> Any:
    """A name alone is that of a file."""
    if not isinstance(source, str | Mapping | Source):
        raise ValueError(f"{source!r}: give the name of a file, or the keys of a source")
    return {"file": source} if isinstance(source, str) else source


# What stands in a task file for records: the name of a file, or the keys of a Source.
Records = Annotated[
    Source,
    BeforeValidator(
        _written_out, json_schema_input_type=Annotated[str | Source, Field(union_mode="smart")]
    ),
]


class _Splits(Section):
    group: str | None = Field(
        None,
        description="A field, such as document_id: records that share its value are never in two "
        "splits.",
    )


class Files(_Splits):
    """Records of its own for each split."""

    train: Records
    validation: Records
    test: Records


class Shared(_Splits):
    """A source that is divided, beside whatever splits have records of their own."""

    source: Records
    train: Records | None = Field(None, description="Records that are all of train.")
    validation: Records | None = Field(None, description="Records that are all of validation.")
    test: Records | None = Field(None, description="Records that are all of test.")

    @property
    def parts(self) -> tuple[Split, ...]:
        """The splits that the source is divided into."""
        return tuple(split for split in SPLITS if getattr(self, split) is None)

    @abstractmethod
    def divide(self, records: Sequence[Mapping[str, Any]]) -> Sequence[Split | None]:
        """Which part each record of the source belongs to; None: to no split.

        The field that groups must be there. Raises ValueError where there are too few records.
        """


def _known_rule(split: Any) -> Any:
    if split != "hash":
        raise ValueError(f"'{split}' is unknown: {nearest(str(split), ('hash', 'ranges'))}")
    return split


class Divided(Shared):
    """A source divided record by record, whatever their order: by the SHA-256 of each record's
    canonical JSON, or of the field that groups them. So a record's split never changes, and equal
    records, or those of a group, share theirs."""

    split: Annotated[Literal["hash"], BeforeValidator(_known_rule)]
    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (),
        description="Of train, validation and test, or of those that the source is divided into, "
        "adding up to 1; default: 0.6, 0.2, 0.2; of train and one other: 0.8, 0.2; else halves.",
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if len(self.parts) < 2:
            raise ValueError("source: there is nothing to divide it into: leave out two splits")
        if self.shares and len(self.shares) != len(self.parts):
            raise ValueError(f"shares: give {len(self.parts)}: of {', '.join(self.parts)}")
        if self.shares and not math.isclose(sum(self.shares), 1):
            raise ValueError(f"shares: they add up to {sum(self.shares):g}, not to 1")
        return self

    def divide(self, records: Sequence[Mapping[str, Any]]) -> Sequence[Split | None]:
        """See above."""
        keys = records if self.group is None else [record[self.group] for record in records]
        return [part_of(key, self.parts, self.shares) for key in keys]


def part_of(key: Any, parts: Sequence[Split], shares: Sequence[float] = ()) -> Split:
    """Which part plain data fall into, by the SHA-256 of their canonical JSON. shares: of each
    part, adding up to 1; default: as Divided has it."""
    position = int(hashlib.sha256(canonical(key).encode()).hexdigest()[:12], 16) / 16**12
    limits = itertools.accumulate((shares or _SHARES[tuple(parts)])[:-1])
    found = (part for part, limit in zip(parts, limits, strict=False) if position < limit)
    return next(found, parts[-1])


_SHARES: dict[tuple[Split, ...], tuple[float, ...]] = {
    ("train", "validation", "test"): (0.6, 0.2, 0.2),
    ("train", "validation"): (0.8, 0.2),
    ("train", "test"): (0.8, 0.2),
    ("validation", "test"): (0.5, 0.5),
}


class Ranged(Shared):
    """A source divided by the places of its records: from the first, 0, up to the second."""

    split: Literal["ranges"]
    ranges: dict[Split, tuple[Annotated[int, Field(ge=0)], int]] = Field(
        description="Of each split without records of its own: [first, behind the last]."
    )

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if set(self.ranges) != set(self.parts):
            raise ValueError(f"ranges: give one to each of {', '.join(self.parts) or 'no split'}")
        end = 0
        for split, (first, behind) in sorted(self.ranges.items(), key=lambda item: item[1]):
            if first >= behind:
                raise ValueError(f"ranges.{split}: [{first}, {behind}] holds no record")
            if first < end:
                raise ValueError(f"ranges.{split}: [{first}, {behind}] overlaps another")
            end = behind
        return self

    def divide(self, records: Sequence[Mapping[str, Any]]) -> Sequence[Split | None]:
        """See above."""
        found: list[Split | None] = [None] * len(records)
        for split, (first, behind) in self.ranges.items():
            if behind > len(records):
                raise ValueError(
                    f"ranges.{split}: [{first}, {behind}] ends behind its {len(records)} records"
                )
            found[first:behind] = [split] * (behind - first)
        return found


def canonical(record: Any) -> str:
    """Equal for equal records, however their files write them."""
    return json.dumps(record, sort_keys=True)


def _form_of(data: Any) -> str:
    if isinstance(data, Section):
        return type(data).__name__
    if not isinstance(data, Mapping) or "source" not in data:
        return "Files"
    return "Ranged" if data.get("split") == "ranges" or "ranges" in data else "Divided"


# Three forms:
#   {train: train.jsonl, validation: validation.jsonl, test: test.jsonl}
#   {source: all.jsonl, split: hash, shares: [0.6, 0.2, 0.2]}
#   {source: all.jsonl, split: ranges, ranges: {train: [0, 800], validation: [800, 900], ...}}
# In the last two a split may have records of its own, {source: train.jsonl, split: hash,
# test: test.jsonl}; each form takes a `group`, and for every file name the keys of a Source.
Data = Annotated[
    Annotated[Files, Tag("Files")]
    | Annotated[Divided, Tag("Divided")]
    | Annotated[Ranged, Tag("Ranged")],
    Discriminator(_form_of),
]


class About(Section):
    """Where a benchmark comes from; changes nothing."""

    source: str
    licence: str
    paper: str | None = None
    notes: str | None = None


class Fewshot(Section):
    """Worked examples before each prompt: other items of train, or records written out."""

    n: int = Field(ge=1)
    choose: Literal["first", "random"] = Field(
        "first", description="The first ones, or others for each item, by `seed`."
    )
    seed: int = 0
    examples: tuple[dict[str, Any], ...] = Field(
        (), description="Records written out, in place of those of train."
    )
    delimiter: str | None = Field(
        None,
        description="Between a worked example's prompt and its reply; default: nothing, or the "
        "delimiter of a multiple choice. Conversations need neither this nor a separator.",
    )
    separator: str = Field("\n\n", description="After each worked example.")

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.examples and len(self.examples) < self.n:
            raise ValueError(
                f"n: {self.n}, of {len(self.examples)} examples: write more, or ask for fewer"
            )
        return self


class Generate(Section):
    """How replies are generated."""

    max_new_tokens: int = Field(64, ge=1)
    stop: tuple[str, ...] = ()
    samples: int = Field(1, ge=1, description="Replies to each prompt.")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="0: greedy.")
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if "" in self.stop:
            raise ValueError("stop: '' stands at the start of every reply: leave it out")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples: {self.samples} greedy replies are all the same: give a temperature"
            )
        return self


class TaskFile(Section):
    """A task file, task.yaml."""

    name: str
    about: About | None = None
    data: Data
    prompt: str = Field("{{ prompt }}", description="Jinja over a record's fields.")
    target: str = Field("{{ answer }}", description="Jinja: the answer that replies are graded by.")
    reference: str | None = Field(
        None,
        description="Jinja: a whole reply that is right, for worked examples and for shaping; "
        "default: the target.",
    )
    chat: bool = Field(
        False, description="Ask as a conversation, in the words of the model's chat template."
    )
    system: str | None = Field(
        None,
        description="Jinja: the system message of a conversation; of a plain prompt what stands "
        "above all else, a blank line after it.",
    )
    fewshot: Fewshot | None = None
    generate: Generate = Generate()
    score: Score = ExactMatch()
    teacher_forced: bool = Field(
        False,
        description="Score by one forward over prompt, target and end of sequence instead of "
        "generating. Equal to greedy generation where a text has one tokenization.",
    )

    @model_validator(mode="after")
    def _shows_replies(self) -> Self:
        shown = self.fewshot is not None and self.reference is None
        if shown and isinstance(self.score, Grader) and not self.score.target_is_reply:
            raise ValueError(
                f"reference: worked examples show whole replies, and for {named(self.score)} the "
                "target is none: give one"
            )
        return self


class Listed(Section):
    """What a manifest says of a split."""

    items: int
    identity: str = Field(description="SHA-256 of its records, in whatever order.")


class Manifest(Section):
    """A manifest.json beside a task file: the data that the task was made for."""

    splits: dict[Split, Listed]
