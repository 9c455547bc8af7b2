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

from evomerge import yaml_text
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

_MANIFEST = "manifest.json"  # beside a task file: what its splits are


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
        self._opened: dict[Split, _Opened] = {}
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
            data = yaml_text.load(path.read_text(encoding="utf-8"))
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

    @classmethod
    def at_hand(cls, path: Path, split: Split, chat: bool | None = None) -> "AtHand | None":
        """A task whose items of a split are made of files here, if it is one of evomerge's own: to
        read it nothing is fetched, and no code that came with it runs. Raises TaskError."""
        try:
            data = yaml_text.load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise TaskError(f"task file '{path}' cannot be read: {one_line(error)}") from None
        if harness.is_task(data):
            return None
        definition = WrittenTask.open(data, path, chat)
        folder, files = path.parent, [path, path.parent / _MANIFEST]
        for name in definition.files(split):
            found = None if name is None else find(name, folder)
            if found is None:
                return None
            files.append(found)
        return AtHand(cls(path, definition), tuple(files))

    def examples(self, split: Split, leave: Unsealed | None = None) -> tuple[Example, ...]:
        """A split's items, in the order of its records.

        Raises SealedError for the test split without leave to read these very records, TaskError
        for data that cannot be read.
        """
        if split == "test" and (leave is None or leave.content != self.identity("test")):
            raise SealedError(
                f"task '{self.name}': the test split is sealed: only `evomerge export` reads it"
            )
        return self._open(split).items

    def content(self, split: Split) -> str:
        """SHA-256 of what the split asks and of how it is scored: settings, records, and the
        prompts, in which worked examples stand."""
        return self._known(split).content

    def identity(self, split: Split) -> str:
        """SHA-256 of the split's records, in whatever order, layout or prompt they are asked: the
        name under which a test set is opened, and under which its openings are counted."""
        return self._known(split).identity

    def item_hashes(self, split: Split) -> list[str]:
        """SHA-256 of all that each item asks, choices included, equal where it reads the same: see
        `item_hash`."""
        return self._known(split).item_hashes

    def fingerprints(self, split: Split) -> tuple[Fingerprint, ...]:
        """What may be known of each item's text, of test too, to compare it with others."""
        return self._known(split).fingerprints

    def origin(self, split: Split) -> Origin:
        """Where the records of a split come from; of test too."""
        known = self._known(split)
        if isinstance(known, _Opened):
            return self._definition.origin(split)
        rows = tuple(range(len(known.records)))
        return Origin(self._definition.own_file(split), None, None, None, rows)

    def groups(self, split: Split) -> NDArray[np.int64] | None:
        """A number for each item of a split, equal for items of one group and for no others; None
        where the task declares no groups. Of test too: numbers say nothing of what is asked."""
        names = self._known(split).groups
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
            met = itertools.chain(enumerate(questions, 1), enumerate(self._known(split).records, 1))
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
        unchecked = {split: _Opened(self._definition, split) for split in SPLITS}
        splits = {
            split: (self._stand_in if self._is_elsewhere(split) else found).listed
            for split, found in unchecked.items()
        }
        return Manifest(splits=splits).model_dump(mode="json")

    def portable(self) -> dict[str, bytes] | None:
        """See Definition; its content is that of this task, see `content`."""
        return self._definition.portable()

    def require_test(self) -> None:
        """Read the records of test, to fail early: raises TaskError where they are not at hand, or
        are not those that were listed or sealed."""
        self._open("test")

    def seal(self) -> Path:
        """Write what may be known of test beside the task file, over what an earlier version of the
        data left there; gives the file. Raises TaskError where test is no file of its own, or
        shares an item with another split."""
        if self._definition.own_file("test") is None:
            raise TaskError(
                f"task '{self.name}': test has no file of its own that could be kept elsewhere: "
                "name one by 'data: {test: FILE}'"
            )
        self._opened["test"] = found = _Opened(self._definition, "test")
        self._check_listed("test", found.listed)
        self.check_splits()
        SealedSplit(
            found.identity,
            found.content,
            tuple(found.records),
            found.fingerprints,
            None if found.groups is None else tuple(map(_sha, found.groups)),
            self._made_with,
        ).write(self._sealed_file)
        return self._sealed_file

    # --- a test split whose file is elsewhere ----------------------------------------------------

    @property
    def _sealed_file(self) -> Path:
        return self.path.with_suffix(".sealed.json")

    def _is_elsewhere(self, split: Split) -> bool:
        """Whether a sealed file stands for the records of a split."""
        return split == "test" and self._by_seal

    def _known(self, split: Split) -> "SealedSplit | _Opened":
        """What may be known of a split, from its records or from what stands for them."""
        return self._stand_in if self._is_elsewhere(split) else self._open(split)

    @cached_property
    def _stand_in(self) -> SealedSplit:
        found = SealedSplit.read(self._sealed_file)
        if found.made_with != self._made_with:
            raise TaskError(
                f"'{self._sealed_file}' was made with other data of train, with a task that asks "
                "otherwise, or by another version of evomerge: make it again where test is: "
                f"evomerge check {self.path} --seal"
            )
        self._check_listed("test", found.listed)
        return found

    @property
    def _made_with(self) -> str:
        train = self._open("train")
        return made_with(train.content, train.fingerprints, train.groups)

    def _check_sealed(self, found: "_Opened") -> None:
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
        if not self._is_elsewhere("test") or self._stand_in.groups is None:
            return
        known = set(self._stand_in.groups)
        for split in ("train", "validation"):
            for position, name in enumerate(self._definition.groups(split) or (), 1):
                if _sha(name) in known:
                    raise TaskError(
                        f"task '{self.name}': item {position} of {split} has the group {name}, and "
                        "so has one of test: keep the records of a group in one split"
                    )

    # --- records and items -----------------------------------------------------------------------

    def _open(self, split: Split) -> "_Opened":
        """A split whose records are here, compared with what was written down of it."""
        if split not in self._opened:
            found = _Opened(self._definition, split)
            self._check_listed(split, found.listed)
            if split == "test":
                self._check_sealed(found)
            self._opened[split] = found
        return self._opened[split]

    def _check_listed(self, split: Split, found: Listed) -> None:
        """Compare what was read with the manifest."""
        path = self.path.parent / _MANIFEST
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


@dataclass(frozen=True)
class AtHand:
    """A task, and the files that it and the items of a split are read from, of which the manifest
    may not be there."""

    task: Task
    files: tuple[Path, ...]


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class _Opened:
    """A split whose records are at hand, with the same to be known of it as of a SealedSplit; each
    is found when it is asked for first. items: what a model is asked."""

    def __init__(self, definition: Definition, split: Split) -> None:
        self._definition = definition
        self._split = split

    @cached_property
    def _lines(self) -> tuple[str, ...]:
        """Each record as canonical JSON."""
        return tuple(map(canonical, self._definition.records(self._split)))

    @cached_property
    def items(self) -> tuple[Example, ...]:
        return tuple(self._definition.items(self._split))

    @cached_property
    def identity(self) -> str:
        return _sha("\n".join(sorted(self._lines)))

    @property
    def listed(self) -> Listed:
        return Listed(items=len(self._lines), identity=self.identity)

    @property
    def content(self) -> str:
        digest = hashlib.sha256(self._definition.asked.encode())
        for line in self._lines:
            digest.update(f"\n{line}".encode())
        for item in self.items:
            digest.update(f"\n{item.prompt!r}".encode())
        return digest.hexdigest()

    @property
    def records(self) -> Sequence[str]:
        return [_sha(line) for line in self._lines]

    @cached_property
    def item_hashes(self) -> list[str]:
        return [item_hash(asked(item), own) for item, own in self._with_own_texts()]

    @property
    def fingerprints(self) -> tuple[Fingerprint, ...]:
        found = zip(self.item_hashes, self._with_own_texts(), strict=True)
        return tuple(fingerprint(exact, asked(item), own) for exact, (item, own) in found)

    @property
    def groups(self) -> Sequence[str] | None:
        return self._definition.groups(self._split)

    def _with_own_texts(self) -> list[tuple[Example, str]]:
        texts = self._definition.own_texts(self._split, self.items)
        return list(zip(self.items, texts, strict=True))
