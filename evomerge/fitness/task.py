"""Tasks: what a search, an evaluation or an export needs of one; and the seal of its test split.

A task opens its train and validation splits to anyone. The test split opens only to the holder of
an `Unsealed`, which the store hands out after it has written down that it did; before that, the
test items are made for one purpose, to hash them, so that overlaps are found. Where the file of
test is not at hand, these hashes may stand in a file of their own (sealed.py). What a task consists
of is a `Definition`; its two kinds, in written.py and harness/, know nothing of any seal.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError

from evomerge.errors import SealedError, TaskError
from evomerge.fitness import harness
from evomerge.fitness.data import Origin, find
from evomerge.fitness.example import Example, asked
from evomerge.fitness.fingerprints import Fingerprint, fingerprint, item_hash
from evomerge.fitness.harness import HarnessTask
from evomerge.fitness.scorers import Scorer
from evomerge.fitness.sealed import SealedSplit, made_with
from evomerge.fitness.task_file import SPLITS, Listed, Manifest, Split, canonical
from evomerge.fitness.written import WrittenTask
from evomerge.job.files import LM_EVAL
from evomerge.messages import explain, one_line

# Where a question or a record was first met, by its hash: (task, split, position from 1).
Seen = dict[str, tuple[str, Split, int]]


@dataclass(frozen=True)
class Unsealed:
    """Leave to read the test split with this identity. Only the store makes these."""

    content: str


class Definition(Protocol):
    """What a task consists of: the seam between tasks and the formats that describe them.

    Of each split `records` and `items` are asked for once, and kept. Both raise TaskError, with
    the place in the data where there is one.
    """

    @property
    def name(self) -> str:
        """As its file calls it."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know of how it was understood."""
        ...

    @property
    def scorer(self) -> Scorer:
        """How its items are scored."""
        ...

    @property
    def asked(self) -> str:
        """What decides a score besides the records: settings, templates, the metric."""
        ...

    def records(self, split: Split) -> Sequence[Mapping[str, Any]]:
        """Of a split, in order: at least one, each plain data as JSON has it."""
        ...

    def items(self, split: Split) -> Sequence[Example]:
        """What each record of a split becomes, in their order."""
        ...

    def own_texts(self, split: Split, items: Sequence[Example]) -> Sequence[str]:
        """Of each item of a split, what its record says: all it asks, choices included, but the
        words that its template says in every item."""
        ...

    def origin(self, split: Split) -> Origin:
        """Where the records of a split come from."""
        ...

    def groups(self, split: Split) -> Sequence[str] | None:
        """What names the group of each record of a split; None where the task declares none."""
        ...

    def portable(self) -> dict[str, bytes] | None:
        """A folder with the same task, without its test split: files by name, task.yaml among them;
        None where it cannot be written as one."""
        ...

    def own_file(self, split: Split) -> str | None:
        """The file that the records of a split come from, and of no other, as the task file names
        it; None where they may come from elsewhere too."""
        ...


class Task:
    """An opened task.

    name, notes, scorer: see Definition. path: the task file.
    """

    def __init__(self, path: Path, definition: Definition) -> None:
        self.path = path
        self.name = definition.name
        self.notes = definition.notes
        self.scorer = definition.scorer
        self._definition = definition
        self._records: dict[Split, _Records] = {}
        self._items: dict[Split, tuple[Example, ...]] = {}
        self._hashes: dict[Split, list[str]] = {}
        file = definition.own_file("test")
        is_here = file is None or find(file, path.parent) is not None
        self._by_seal = not is_here and self._sealed_file.is_file()
        if self._by_seal:
            self.notes += (
                f"task '{self.name}': test is known by '{self._sealed_file.name}' alone: its file "
                "is not here, and no export can be made here",
            )

    @classmethod
    def open(cls, path: Path, chat: bool | None = None, metric: str | None = None) -> "Task":
        """Read a task file, or one of lm-eval's, or lm-eval:NAME; no data yet.

        chat: whether it is asked as a conversation; default: as its file says. metric: of a task of
        lm-eval's, see HarnessTask. Raises TaskError, also where its scorer cannot work on this
        machine.
        """
        if str(path).startswith(LM_EVAL):
            return cls(path, HarnessTask.open(path, bool(chat), metric))
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            remedy = harness.remedy(error)
            raise TaskError(
                f"task file '{path}' cannot be read: {remedy or one_line(error)}"
            ) from None
        if harness.is_task(data):
            return cls(path, HarnessTask.open(path, bool(chat), metric))
        if metric is not None:
            raise TaskError(
                f"{path}: metric: '{metric}' is for tasks of lm-eval: leave it out: 'score' in the "
                "task file says how it is scored"
            )
        return cls(path, WrittenTask.open(data, path, chat))

    def examples(self, split: Split, leave: Unsealed | None = None) -> tuple[Example, ...]:
        """A split's items, in the order of its records.

        Raises SealedError for the test split without leave to read these very records, TaskError
        for data that cannot be read.
        """
        if split == "test" and (leave is None or leave.content != self.identity("test")):
            raise SealedError(
                f"task '{self.name}': the test split is sealed: only `evomerge export` reads it"
            )
        return self._made(split)

    def content(self, split: Split) -> str:
        """SHA-256 of what the split asks and of how it is scored: settings, records, and the
        prompts, in which worked examples stand."""
        sealed = self._sealed(split)
        if sealed is not None:
            return sealed.content
        digest = hashlib.sha256(self._definition.asked.encode())
        for line in self._read(split).lines:
            digest.update(f"\n{line}".encode())
        for item in self._made(split):
            digest.update(f"\n{item.prompt!r}".encode())
        return digest.hexdigest()

    def identity(self, split: Split) -> str:
        """SHA-256 of the split's records, in whatever order, layout or prompt they are asked: the
        name under which a test set is opened, and under which its openings are counted."""
        sealed = self._sealed(split)
        return self._read(split).identity if sealed is None else sealed.identity

    def item_hashes(self, split: Split) -> list[str]:
        """SHA-256 of all that each item asks, choices included, equal where it reads the same: see
        `item_hash`."""
        sealed = self._sealed(split)
        if sealed is not None:
            return [each.exact for each in sealed.fingerprints]
        if split not in self._hashes:
            items = self._made(split)
            texts = self._definition.own_texts(split, items)
            self._hashes[split] = [
                item_hash(asked(item), own) for item, own in zip(items, texts, strict=True)
            ]
        return self._hashes[split]

    def fingerprints(self, split: Split) -> tuple[Fingerprint, ...]:
        """What may be known of each item's text, of test too, to compare it with others."""
        sealed = self._sealed(split)
        if sealed is not None:
            return sealed.fingerprints
        hashes = self.item_hashes(split)
        texts = self._definition.own_texts(split, self._made(split))
        return tuple(
            fingerprint(exact, asked(item), own)
            for exact, item, own in zip(hashes, self._made(split), texts, strict=True)
        )

    def origin(self, split: Split) -> Origin:
        """Where the records of a split come from; of test too."""
        sealed = self._sealed(split)
        if sealed is None:
            return self._definition.origin(split)
        rows = tuple(range(len(sealed.records)))
        return Origin(self._definition.own_file(split), None, None, None, rows)

    def groups(self, split: Split) -> NDArray[np.int64] | None:
        """A number for each item of a split, equal for items of one group and for no others; None
        where the task declares no groups. Of test too: numbers say nothing of what is asked."""
        sealed = self._sealed(split)
        names = self._definition.groups(split) if sealed is None else sealed.groups
        if names is None:
            return None
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)

    def check_splits(self, seen: Seen | None = None) -> dict[Split, int]:
        """The number of items of each split. Raises TaskError when two splits share a question, or
        a record, which two tasks may ask in different words.

        seen: shared by the tasks of a search, so that train of one is not test of another.
        """
        seen = {} if seen is None else seen
        sizes: dict[Split, int] = {}
        for split in SPLITS:
            questions = self.item_hashes(split)
            sizes[split] = len(questions)
            met = itertools.chain(enumerate(questions, 1), enumerate(self._record_hashes(split), 1))
            for position, item in met:
                task, other, line = seen.setdefault(item, (self.name, split, position))
                if other != split:
                    of = "" if task == self.name else f" of task '{task}'"
                    raise TaskError(
                        f"task '{self.name}': item {position} of {split} is item {line} of "
                        f"{other}{of}: splits must not overlap: remove it from one of them"
                    )
        self._check_groups()
        return sizes

    def manifest(self) -> dict[str, Any]:
        """What a manifest.json beside the task file has to say of these data. Where there is one,
        every split is compared with it as it is read."""
        splits = {}
        for split in SPLITS:
            sealed = self._sealed(split)
            if sealed is None:
                splits[split] = _Records.of(self._definition.records(split)).listed
            else:
                splits[split] = Listed(items=len(sealed.records), identity=sealed.identity)
        return Manifest(splits=splits).model_dump(mode="json")

    def portable(self) -> dict[str, bytes] | None:
        """See Definition; its content is that of this task, see `content`."""
        return self._definition.portable()

    def require_test(self) -> None:
        """Read the records of test, to fail early: raises TaskError where they are not at hand, or
        are not those that were listed or sealed."""
        self._read("test")

    def seal(self) -> Path:
        """Write what may be known of test beside the task file, over what an earlier version of the
        data left there; gives the file. Raises TaskError where test is no file of its own."""
        if self._definition.own_file("test") is None:
            raise TaskError(
                f"task '{self.name}': test has no file of its own that could be kept elsewhere: "
                "name one by 'data: {test: FILE}'"
            )
        records = self._definition.records("test")
        groups = self._definition.groups("test")
        self._records["test"] = found = _Records.of(records)
        self._check_listed("test", found.listed)
        SealedSplit(
            found.identity,
            self.content("test"),
            tuple(self._record_hashes("test")),
            self.fingerprints("test"),
            None if groups is None else tuple(map(_sha, groups)),
            self._made_with,
        ).write(self._sealed_file)
        return self._sealed_file

    # --- a test split whose file is elsewhere ----------------------------------------------------

    @property
    def _sealed_file(self) -> Path:
        return self.path.with_suffix(".sealed.json")

    def _sealed(self, split: Split) -> SealedSplit | None:
        """What stands for the records of a split; None where they are to be read themselves."""
        return self._stand_in if split == "test" and self._by_seal else None

    @cached_property
    def _stand_in(self) -> SealedSplit:
        found = SealedSplit.read(self._sealed_file)
        if found.made_with != self._made_with:
            raise TaskError(
                f"'{self._sealed_file}' was made with other data of train, with a task that asks "
                "otherwise, or by another version of evomerge: make it again where test is: "
                f"evomerge check {self.path} --seal"
            )
        self._check_listed("test", Listed(items=len(found.records), identity=found.identity))
        return found

    @property
    def _made_with(self) -> str:
        groups = self._definition.groups("train")
        return made_with(self.content("train"), self.fingerprints("train"), groups)

    def _record_hashes(self, split: Split) -> Sequence[str]:
        sealed = self._sealed(split)
        return sealed.records if sealed else [_sha(line) for line in self._read(split).lines]

    def _check_sealed(self, found: "_Records") -> None:
        """Compare the records of test with what stands for them elsewhere."""
        path = self._sealed_file
        own = self._definition.own_file("test") is not None and path.is_file()
        if own and SealedSplit.read(path).identity != found.identity:
            raise TaskError(
                f"task '{self.name}': test is not what '{path}' was made of: put back the data, or "
                f"make the file again: evomerge check {self.path} --seal"
            )

    def _check_groups(self) -> None:
        """Compare groups with those of a sealed test split; of others it is done as they are
        read."""
        sealed = self._sealed("test")
        if sealed is None or sealed.groups is None:
            return
        known = set(sealed.groups)
        for split in ("train", "validation"):
            for position, name in enumerate(self._definition.groups(split) or (), 1):
                if _sha(name) in known:
                    raise TaskError(
                        f"task '{self.name}': item {position} of {split} has the group {name}, and "
                        "so has one of test: keep the records of a group in one split"
                    )

    # --- records and items -----------------------------------------------------------------------

    def _read(self, split: Split) -> "_Records":
        if split not in self._records:
            found = _Records.of(self._definition.records(split))
            self._check_listed(split, found.listed)
            if split == "test":
                self._check_sealed(found)
            self._records[split] = found
        return self._records[split]

    def _made(self, split: Split) -> tuple[Example, ...]:
        if split not in self._items:
            self._read(split)
            self._items[split] = tuple(self._definition.items(split))
        return self._items[split]

    def _check_listed(self, split: Split, found: Listed) -> None:
        """Compare what was read with the manifest."""
        path = self.path.parent / "manifest.json"
        if not (self.path.is_file() and path.is_file()):
            return
        try:
            due = Manifest.model_validate_json(path.read_bytes()).splits.get(split)
        except ValidationError as error:
            raise TaskError(f"{path}: {explain(error, Manifest)}") from None
        if due is not None and due != found:
            raise TaskError(
                f"task '{self.name}': {split} has {found.items} items with hash "
                f"{found.identity[:16]}, where '{path}' lists {due.items} with hash "
                f"{due.identity[:16]}: put back the data that it was made for"
            )


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class _Records:
    """The records of a split. lines: each as canonical JSON, in order."""

    lines: tuple[str, ...]
    identity: str

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> "_Records":
        lines = tuple(map(canonical, records))
        return cls(lines, hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest())

    @property
    def listed(self) -> Listed:
        """What a manifest says of them."""
        return Listed(items=len(self.lines), identity=self.identity)
