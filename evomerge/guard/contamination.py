"""Contamination: items of one split that another split asks too, in the same words, in most of
them, or in another language.

Works on fingerprints alone, of all splits of all tasks of a job, so that test stays sealed. Splits
of the same name, of two tasks, may share what they like: nothing is claimed of one that was chosen
by the other. Knows nothing of where items come from or of what a search does about an overlap.

The n-gram tiers are those of GPT-3 (arXiv 2005.14165, appendix C: 13 words) and of its successors
(8 words, as a warning); decision 022 has what was measured.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evomerge.fitness.fingerprints import Fingerprint
from evomerge.fitness.task_file import SPLITS, Split

Numbers = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Mask = NDArray[np.bool_]

# copy: the longest run in common is long, and over half of the shorter item. translation: known to
# be the same problem. shared: a long run in common, of less than half. similar: a shorter run, or
# between short items most pairs of neighbouring words.
Kind = Literal["copy", "translation", "shared", "similar"]
_KINDS: tuple[Kind, ...] = ("copy", "translation", "shared", "similar")
_QUARANTINED = ("copy", "translation")

# An n-gram in more items of a split than a share of them is how its items are written. Of few items
# more than a share may be copies of one; of many, a phrase is a phrase long before.
_FREQUENT, _LEAST, _MOST = 0.01, 3, 50
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no token is lost from a hash of several


@dataclass(frozen=True)
class _Lengths:
    """What counts as long, in tokens; of words, and of characters.

    long, warning: runs in common. shortest: below it items are not compared but as a whole.
    seed: the run that short items must share to be compared at all.
    """

    long: int
    warning: int
    shortest: int
    seed: int


_WORDS = _Lengths(long=13, warning=8, shortest=5, seed=3)
_CHARACTERS = _Lengths(long=50, warning=25, shortest=15, seed=6)


@dataclass(frozen=True)
class Part:
    """A split to be compared. problems: of each item, the name of the published problem that it is,
    in whatever language; None where it is none that is known."""

    task: str
    split: Split
    fingerprints: Sequence[Fingerprint]
    problems: Sequence[str | None]


@dataclass(frozen=True)
class Place:
    """An item; position: from 0."""

    task: str
    split: Split
    position: int


@dataclass(frozen=True)
class Overlap:
    """What two items of different splits have in common.

    item: of the less guarded split (train, then validation, then test). length: of the longest run
    in common, what all items of a split say left out; in words, or in characters where `unspaced`;
    0 for a translation.
    """

    kind: Kind
    item: Place
    other: Place
    length: int
    unspaced: bool


@dataclass(frozen=True)
class Contamination:
    """What was found. overlaps: for each item of a less guarded split the strongest one, in order.
    repeated: by task and split, items that are there before in the same split."""

    overlaps: tuple[Overlap, ...]
    repeated: Mapping[str, Mapping[Split, int]] = field(default_factory=dict)

    @property
    def quarantined(self) -> dict[str, dict[Split, list[int]]]:
        """Positions that must not be used, by task and split."""
        found: dict[str, dict[Split, list[int]]] = {}
        for overlap in self.overlaps:
            if overlap.kind in _QUARANTINED:
                item = overlap.item
                found.setdefault(item.task, {}).setdefault(item.split, []).append(item.position)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as the store keeps it."""
        return {
            "quarantined": self.quarantined,
            "overlaps": [
                {
                    "kind": o.kind,
                    "item": [o.item.task, o.item.split, o.item.position],
                    "other": [o.other.task, o.other.split, o.other.position],
                    "length": o.length,
                    "unit": "characters" if o.unspaced else "words",
                }
                for o in self.overlaps
            ],
            "repeated": {task: dict(counts) for task, counts in self.repeated.items()},
        }

    def notes(self) -> list[str]:
        """What a reader should know, a line for each kind between two splits; items from 1."""
        sides: dict[tuple[Kind, str, Split, str, Split], list[int]] = {}
        for o in self.overlaps:
            side = (o.kind, o.item.task, o.item.split, o.other.task, o.other.split)
            sides.setdefault(side, []).append(o.item.position + 1)
        lines = []
        gravest_first = sorted(sides.items(), key=lambda side: _KINDS.index(side[0][0]))
        for (kind, task, split, other, guarded), items in gravest_first:
            of = guarded if other == task else f"{guarded} of task '{other}'"
            said = f"{counted(len(items))} of {split} {_SAID[kind].format(of)}"
            lines.append(f"task '{task}': {said}: {_listed(items)}")
        for task, counts in self.repeated.items():
            for split, times in counts.items():
                lines.append(f"task '{task}': {counted(times)} of {split} repeat others of {split}")
        return lines


_SHOWN = 8  # items that a note names
_SAID: Mapping[Kind, str] = {
    "copy": "left out, with more than half in common with {}",
    "translation": "left out, known to be problems of {} in other words or another language",
    "shared": "with a long run of words in common with {}",
    "similar": "with a likeness to some of {}",
}


def counted(items: int) -> str:
    """As a note has it: '1 item', '2 items'."""
    return f"{items:,} item" + "s" * (items != 1)


def _listed(items: Sequence[int]) -> str:
    shown = ", ".join(map(str, items[:_SHOWN]))
    return f"{shown} and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else shown


def find(parts: Sequence[Part]) -> Contamination:
    """Compare every two splits of different names, of one task or of two. What is equal as a whole
    is the business of Task.check_splits, and is counted here within a split alone."""
    places = [Place(p.task, p.split, n) for p in parts for n in range(len(p.fingerprints))]
    found = [*_translations(parts, places)]
    for unspaced, lengths in ((False, _WORDS), (True, _CHARACTERS)):
        texts = _Texts.of(parts, unspaced)
        runs = {**_similar(texts, lengths), **_runs(texts, lengths)}
        found += [
            Overlap(kind, places[item], places[other], length, unspaced)
            for (item, other), (kind, length) in runs.items()
        ]
    return Contamination(_strongest(found), _repeated(parts))


def _repeated(parts: Sequence[Part]) -> dict[str, dict[Split, int]]:
    found: dict[str, dict[Split, int]] = {}
    for part in parts:
        times = len(part.fingerprints) - len({f.exact for f in part.fingerprints})
        if times:
            found.setdefault(part.task, {})[part.split] = times
    return found


def _strongest(overlaps: Iterable[Overlap]) -> tuple[Overlap, ...]:
    best: dict[Place, Overlap] = {}
    for new in sorted(overlaps, key=lambda o: (_KINDS.index(o.kind), -o.length)):
        best.setdefault(new.item, new)
    tasks = list(dict.fromkeys(o.item.task for o in best.values()))
    return tuple(
        sorted(
            best.values(),
            key=lambda o: (tasks.index(o.item.task), SPLITS.index(o.item.split), o.item.position),
        )
    )


def _translations(parts: Sequence[Part], places: Sequence[Place]) -> list[Overlap]:
    """Items that are known to be the same published problem."""
    problems = [problem for part in parts for problem in part.problems]
    asked: dict[str, list[Place]] = {}
    for place, problem in zip(places, problems, strict=True):
        if problem is not None:
            asked.setdefault(problem, []).append(place)
    return [
        Overlap("translation", item, other, 0, unspaced=False)
        for same in asked.values()
        for item in same
        for other in same
        if SPLITS.index(item.split) < SPLITS.index(other.split)
    ]


# --- n-grams -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Texts:
    """The items of one kind of script, end to end.

    tokens: (t,). item: (t,), whose each is, of all items of all parts. By item, part, split, the
    first item of its part that asks the same, and where its tokens are: starts, ends. limit: by
    part, in how many different items an n-gram may be.
    """

    tokens: Hashes
    item: Numbers
    first: Numbers
    part: Numbers
    split: Numbers
    starts: Numbers
    ends: Numbers
    limit: NDArray[np.float64]

    @classmethod
    def of(cls, parts: Sequence[Part], unspaced: bool) -> "_Texts":
        none = np.empty(0, np.uint64)
        tokens = [
            f.tokens if f.unspaced == unspaced else none for p in parts for f in p.fingerprints
        ]
        lengths = np.array([len(own) for own in tokens], np.int64)
        ends = np.cumsum(lengths)
        sizes = [len(p.fingerprints) for p in parts]
        asked = [(number, f.exact) for number, p in enumerate(parts) for f in p.fingerprints]
        met: dict[tuple[int, str], int] = {}
        return cls(
            tokens=np.concatenate([none, *tokens]),
            item=np.repeat(np.arange(len(tokens)), lengths),
            first=np.array([met.setdefault(own, at) for at, own in enumerate(asked)], np.int64),
            part=np.repeat(np.arange(len(parts)), sizes),
            split=np.repeat([SPLITS.index(p.split) for p in parts], sizes),
            starts=ends - lengths,
            ends=ends,
            limit=np.clip(_FREQUENT * np.array(sizes, np.float64), _LEAST, _MOST),
        )

    def grams(self, n: int) -> tuple[Hashes, Numbers, Mask]:
        """All n-grams: their hashes, where they begin, and which of them are frequent."""
        behind = max(0, len(self.tokens) - n + 1)
        hashes = np.zeros(behind, np.uint64)
        for place in range(n):
            hashes = hashes * _BASE + self.tokens[place : behind + place]
        whole = self.item[:behind] == self.item[n - 1 : n - 1 + behind]
        at = np.flatnonzero(whole)
        hashes = hashes[whole]
        return hashes, at, self._frequent(hashes, self.item[at])

    def _frequent(self, hashes: Hashes, items: Numbers) -> Mask:
        items = self.first[items]  # an item that is repeated makes no template
        order = np.lexsort((items, hashes))
        sorted_hashes, parts = hashes[order], self.part[items[order]]
        own = _changes(sorted_hashes, items[order])  # each n-gram once for each item
        sorted_hashes, parts = sorted_hashes[own], parts[own]
        begins = np.flatnonzero(_changes(sorted_hashes, parts))
        counts = np.diff(np.append(begins, len(parts)))
        many = np.unique(sorted_hashes[begins[counts > self.limit[parts[begins]]]])
        return np.isin(hashes, many)

    @cached_property
    def rare(self) -> Mask:
        """(t,), which tokens are not frequent: where all are, items are made of a few words, and
        resemble each other whatever they ask."""
        return ~self.grams(1)[2]

    def shared(self, hashes: Hashes, at: Numbers) -> Iterator[tuple[Numbers, Numbers]]:
        """Of n-grams, each pair that is in a less and in a more guarded split: where it begins in
        either. In blocks, as there may be more of them than memory holds."""
        split = self.split[self.item[at]]
        for less, more in ((0, 1), (0, 2), (1, 2)):
            own, other = split == less, split == more
            order = np.argsort(hashes[own], kind="stable")
            sorted_hashes, places, others = hashes[own][order], at[own][order], at[other]
            first = np.searchsorted(sorted_hashes, hashes[other], "left")
            counts = np.searchsorted(sorted_hashes, hashes[other], "right") - first
            block = np.cumsum(counts) // _BLOCK
            for rows in np.split(np.arange(len(counts)), np.flatnonzero(np.diff(block)) + 1):
                many = counts[rows]
                within = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
                yield places[np.repeat(first[rows], many) + within], np.repeat(others[rows], many)


_BLOCK = 2_000_000


def _distinct(columns: Iterable[Sequence[Numbers]], height: int) -> Numbers:
    """(height, n), the different ones of columns that come in blocks."""
    found = [np.unique(np.stack(block), axis=1) for block in columns]
    return np.unique(np.concatenate([np.empty((height, 0), np.int64), *found], axis=1), axis=1)


def _changes(*columns: NDArray[Any]) -> Mask:
    """(n,), where any of the sorted columns differs from the row before."""
    found = np.ones(len(columns[0]), np.bool_)
    if len(found):
        found[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return found


Runs = dict[tuple[int, int], tuple[Kind, int]]


def _runs(texts: _Texts, lengths: _Lengths) -> Runs:
    """By pair of items, the longest run of tokens that both have."""
    hashes, at, frequent = texts.grams(lengths.warning)
    said = np.zeros(len(texts.tokens) + lengths.warning, np.bool_)  # in what many items say
    for place in range(lengths.warning):
        said[at[frequent] + place] = True
    # How much of its own each item has up to a token.
    own = np.concatenate(([0], np.cumsum(~said[: len(texts.tokens)])))
    sizes = own[texts.ends] - own[texts.starts]
    rare = np.concatenate(([0], np.cumsum(texts.rare)))
    # Matches of two items at the same distance are parts of the same runs.
    places = _distinct(
        (
            (texts.item[lefts], texts.item[rights], rights - lefts)
            for lefts, rights in texts.shared(hashes[~frequent], at[~frequent])
        ),
        height=3,
    )
    found: Runs = {}
    for item, other, distance in places.T:
        begin, end = _longest(texts, own, int(item), int(other), int(distance))
        length, size = int(own[end] - own[begin]), int(min(sizes[item], sizes[other]))
        kind: Kind | None = None
        if length >= lengths.long:
            kind = "copy" if 2 * length > size else "shared"
        elif length >= lengths.warning and rare[end] > rare[begin]:
            kind = "similar"
        if kind and length > found.get((item, other), (kind, 0))[1]:
            found[item, other] = kind, length
    return found


def _longest(texts: _Texts, own: Numbers, item: int, other: int, distance: int) -> tuple[int, int]:
    """The run of equal tokens, `distance` apart, with most tokens of the items' own: where it
    begins and ends in the first."""
    begin = max(texts.starts[item], texts.starts[other] - distance)
    end = min(texts.ends[item], texts.ends[other] - distance)
    same = texts.tokens[begin:end] == texts.tokens[begin + distance : end + distance]
    borders = np.concatenate(([-1], np.flatnonzero(~same), [end - begin])) + begin
    best = np.argmax(own[borders[1:]] - own[borders[:-1] + 1])
    return int(borders[best] + 1), int(borders[best + 1])


def _similar(texts: _Texts, lengths: _Lengths) -> Runs:
    """By pair of items of which one is short, those that have two thirds of its pairs of
    neighbouring tokens in common, and among them something rare."""
    size = texts.ends - texts.starts
    short = (size >= lengths.shortest) & (size < lengths.long)
    if not short.any():
        return {}
    hashes, at, frequent = texts.grams(lengths.seed)
    hashes, at = hashes[~frequent], at[~frequent]
    seeds = np.isin(hashes, hashes[short[texts.item[at]]])
    shared = texts.shared(hashes[seeds], at[seeds])
    pairs = _distinct(((texts.item[left], texts.item[right]) for left, right in shared), height=2)
    pairs = pairs[:, (short[pairs] & (size[pairs] == size[pairs].min(axis=0))).any(axis=0)]
    found: Runs = {}
    for item, other in pairs.T:
        one, two = (item, other) if size[item] <= size[other] else (other, item)
        common = _pairs(texts, one) & _pairs(texts, two)
        marked = {
            pair
            for place, pair in enumerate(_in_order(texts, one))
            if texts.rare[texts.starts[one] + place]
        }
        if 3 * len(common) >= 2 * (size[one] - 1) and common & marked:
            found[int(item), int(other)] = "similar", len(common) + 1
    return found


def _in_order(texts: _Texts, item: int) -> list[tuple[int, int]]:
    own = texts.tokens[texts.starts[item] : texts.ends[item]].tolist()
    return list(itertools.pairwise(own))


def _pairs(texts: _Texts, item: int) -> set[tuple[int, int]]:
    return set(_in_order(texts, item))
