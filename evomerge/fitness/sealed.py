"""What is known of a test split whose records are elsewhere: hashes alone, in a file beside the
task file that was made where the records are.

With it a search is launched, and its splits compared, on machines that have no test data. Hashes of
words keep nobody from guessing the words: the file is no secret, and no substitute for keeping the
data themselves apart. It holds neither answers nor what a model could be asked; but of each record,
its answer included, it holds the hash, by which whoever guesses all of it can tell.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field, ValidationError

from evomerge.errors import TaskError
from evomerge.fitness.fingerprints import Fingerprint
from evomerge.fitness.task_file import Listed, Section
from evomerge.messages import explain, one_line


@dataclass(frozen=True)
class SealedSplit:
    """What may be known of a test split.

    identity, content: see Task. records: SHA-256 of each record. fingerprints: of each item.
    groups: SHA-256 of what names each record's group; None where the task declares none.
    made_with: the hash of what this task, by this version of evomerge, makes of train: where it is
    another now, all the rest would be another too.
    """

    identity: str
    content: str
    records: tuple[str, ...]
    fingerprints: tuple[Fingerprint, ...]
    groups: tuple[str, ...] | None
    made_with: str

    @property
    def item_hashes(self) -> list[str]:
        """See Task."""
        return [each.exact for each in self.fingerprints]

    @property
    def listed(self) -> Listed:
        """What a manifest says of it."""
        return Listed(items=len(self.records), identity=self.identity)

    def write(self, path: Path) -> None:
        """Whole or not at all. Raises TaskError."""
        document = _File(
            identity=self.identity,
            content=self.content,
            made_with=self.made_with,
            items=tuple(
                _Item(
                    record=record,
                    asked=print.exact,
                    text=print.text,
                    tokens=base64.b64encode(print.tokens.astype("<u8").tobytes()).decode(),
                    unspaced=print.unspaced,
                    group=None if self.groups is None else self.groups[place],
                )
                for place, (record, print) in enumerate(
                    zip(self.records, self.fingerprints, strict=True)
                )
            ),
        )
        text = document.model_dump_json(indent=1, exclude_none=True) + "\n"
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(path)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise TaskError(f"'{path}' cannot be written: {one_line(error)}") from None

    @classmethod
    def read(cls, path: Path) -> "SealedSplit":
        """Raises TaskError for a file that is not one of these."""
        try:
            found = _File.model_validate_json(path.read_bytes())
        except OSError as error:
            raise TaskError(f"'{path}' cannot be read: {one_line(error)}") from None
        except ValidationError as error:
            raise TaskError(f"{path}: {explain(error, _File)}") from None
        try:
            fingerprints = tuple(item.fingerprint() for item in found.items)
        except ValueError as error:
            raise TaskError(f"{path}: items.tokens: {error}: make the file again") from None
        groups = tuple(item.group for item in found.items if item.group is not None)
        if groups and len(groups) < len(found.items):
            raise TaskError(f"{path}: items.group: not every item has one: make the file again")
        return cls(
            found.identity,
            found.content,
            tuple(item.record for item in found.items),
            fingerprints,
            groups or None,
            found.made_with,
        )


def made_with(
    content: str, fingerprints: Iterable[Fingerprint], groups: Sequence[str] | None
) -> str:
    """See SealedSplit. content, fingerprints, groups: those of train."""
    digest = hashlib.sha256(f"{content} {json.dumps(groups)}".encode())
    for each in fingerprints:
        digest.update(f"\n{each.exact} {each.text} {each.unspaced}".encode())
        digest.update(each.tokens.astype("<u8").tobytes())
    return digest.hexdigest()


class _Item(Section):
    record: str
    asked: str
    text: str
    tokens: str = Field(description="Of 64 bits each, little-endian, in base64.")
    unspaced: bool
    group: str | None = None

    def fingerprint(self) -> Fingerprint:
        packed = base64.b64decode(self.tokens, validate=True)
        return Fingerprint(
            self.asked, self.text, np.frombuffer(packed, "<u8").astype(np.uint64), self.unspaced
        )


class _File(Section):
    identity: str
    content: str
    made_with: str
    items: tuple[_Item, ...] = Field(min_length=1)
