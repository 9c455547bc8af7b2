"""Items that two splits share: planted ones are found, those of tasks as they are make no noise."""

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence

import pytest

from evomerge.fitness.fingerprints import exact_hash, fingerprint
from evomerge.fitness.task import Task
from evomerge.fitness.task_file import SPLITS, Split
from evomerge.guard.contamination import Contamination, Overlap, Part, Place, find
from evomerge.seeds import generator
from tests.tiny import ROOT

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")


def part(split: Split, texts: Sequence[str], task: str = "t", problems: int | None = None) -> Part:
    """problems: the number of the first published problem that they are."""
    prints = [fingerprint(exact_hash(text), text, text) for text in texts]
    known = [None if problems is None else f"exam {problems + n}" for n in range(len(texts))]
    return Part(task, split, prints, known)


def sentence(seed: int, words: int) -> str:
    """Of words that are its own."""
    drawn = generator(seed, "words", words).integers(10**6, size=words)
    return " ".join("".join(chr(ord("a") + int(d)) for d in str(number)) for number in drawn)


def found(train: Sequence[str], test: Sequence[str], fill: int = 40) -> Contamination:
    """Of splits with these items, and others in front of them."""
    parts = []
    for index, (split, texts) in enumerate({"train": train, "test": test}.items(), 1):
        others = [sentence(10**6 * index + n, 11) for n in range(fill)]
        parts.append(part(split, [*others, *texts]))
    return find(parts)


def kinds(overlaps: Contamination) -> list[str]:
    return [overlap.kind for overlap in overlaps.overlaps]


# --- planted -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        "{0} {1}",
        "{0}, {1}!",
        "So: {0} -- ({1})",
        "{0} {1} {2}",
        "what stands here is new {0} {1}",
    ],
)
def test_most_of_an_item_is_a_copy_whatever_stands_around_it(other: str) -> None:
    first, second, third = sentence(1, 12), sentence(2, 12), sentence(3, 10)
    report = found([f"{first} {second}"], [other.format(first.upper(), second, third)])
    assert kinds(report) == ["copy"]
    assert report.quarantined == {"t": {"train": [40]}}


@pytest.mark.parametrize(
    ("length", "of", "kind"),
    [(13, 24, "copy"), (12, 22, "similar"), (13, 40, "shared"), (8, 40, "similar"), (7, 40, None)],
)
def test_runs_in_common_are_told_by_their_length(length: int, of: int, kind: str | None) -> None:
    common = sentence(1, length)
    ours = f"{sentence(2, 5)} {common} {sentence(3, of - length - 5)}"
    theirs = f"{sentence(4, of - length)} {common}"
    report = found([ours], [theirs])
    assert kinds(report) == ([] if kind is None else [kind])
    if kind:
        assert report.overlaps[0].length == length
        assert ("train" in report.quarantined.get("t", {})) == (kind == "copy")


@pytest.mark.parametrize("length", [50, 49])
def test_characters_are_counted_where_there_are_no_spaces(length: int) -> None:
    def text(seed: int, size: int) -> str:
        drawn = generator(seed, "characters", size).integers(0x4E00, 0x9FFF, size)
        return "".join(map(chr, drawn.tolist()))

    common = text(1, length)
    report = found([f"{text(2, 20)}、{common}"], [f"{common}。{text(3, 25)}"])
    assert kinds(report) == ["copy" if length == 50 else "similar"]
    assert report.overlaps[0].unspaced


@pytest.mark.parametrize("place", range(9))
def test_a_short_item_with_one_word_changed_is_at_least_warned_about(place: int) -> None:
    words = ["what", "is", "the", "largest", "harbour", "on", "the", "baltic", "coast"]
    changed = [*words[:place], "northern", *words[place + 1 :]]
    report = found([" ".join(words)], [" ".join(changed)])
    assert kinds(report) == ["similar"]
    assert report.overlaps[0].item == Place("t", "train", 40)
    assert not report.quarantined


def test_short_items_of_a_few_words_resemble_each_other_and_nothing_is_said() -> None:
    def sums(first: int) -> list[str]:
        return [f"now add {n} to {n % 7} and then to {n % 11} =" for n in range(first, first + 200)]

    assert kinds(find([part("train", sums(0)), part("test", sums(500))])) == []


def test_what_many_items_say_is_nobodys_own() -> None:
    frame = sentence(9, 30)
    train = [f"{frame} {sentence(n, 6)}" for n in range(8)]
    test = [f"{frame} {sentence(100 + n, 6)}" for n in range(8)]
    assert kinds(found(train, test)) == []
    assert kinds(found(train, [*test, train[3] + f" {sentence(3, 20)}"])) == []
    longer = f"{train[3]} {sentence(50, 13)}"
    assert kinds(found([*train, longer], [*test, f"{longer} {sentence(51, 5)}"])) == ["copy"]


@pytest.mark.parametrize(("ours", "theirs"), [(9, 1), (1, 9)])
def test_an_item_that_is_repeated_is_no_template(ours: int, theirs: int) -> None:
    text = sentence(1, 30)
    train, test = [f"{text} {sentence(2, 4)}"] * ours, [f"So: {text}"] * theirs
    assert kinds(found(train, test)) == ["copy"] * ours


def test_the_less_guarded_item_is_the_one_that_is_left_out() -> None:
    one, two, three = (sentence(n, 30) for n in range(3))
    report = find(
        [
            part("test", [two, three], "b"),
            part("train", [sentence(7, 30), one, two], "a"),
            part("validation", [one, sentence(8, 30), three], "a"),
        ]
    )
    assert report.overlaps == (
        Overlap("copy", Place("a", "train", 1), Place("a", "validation", 0), 30, unspaced=False),
        Overlap("copy", Place("a", "train", 2), Place("b", "test", 0), 30, unspaced=False),
        Overlap("copy", Place("a", "validation", 2), Place("b", "test", 1), 30, unspaced=False),
    )
    assert report.quarantined == {"a": {"train": [1, 2], "validation": [2]}}


def test_splits_of_one_name_may_share_what_they_like() -> None:
    texts = [sentence(n, 20) for n in range(5)]
    both = [part("train", texts, "a", problems=0), part("train", texts, "b", problems=0)]
    assert kinds(find([*both, part("test", [sentence(9, 20)], "a")])) == []


def test_repetitions_within_a_split_are_counted() -> None:
    report = find([part("train", ["One, two.", "one two", "one three", "ONE TWO"])])
    assert report.repeated == {"t": {"train": 2}}
    assert report.notes() == ["task 't': 2 items of train repeat others of train"]


def test_problems_known_to_be_the_same_are_found_in_any_words() -> None:
    train = part("train", ["eins", "zwei", "drei"], problems=4)
    report = find([train, part("test", ["five", "six"], "u", problems=5)])
    assert report.overlaps == (
        Overlap("translation", Place("t", "train", 1), Place("u", "test", 0), 0, unspaced=False),
        Overlap("translation", Place("t", "train", 2), Place("u", "test", 1), 0, unspaced=False),
    )
    assert report.quarantined == {"t": {"train": [1, 2]}}


def test_a_report_is_plain_data_and_names_no_text() -> None:
    text = sentence(1, 30)
    report = found([text], [text])
    data = json.loads(json.dumps(report.as_dict()))
    assert data["quarantined"] == {"t": {"train": [40]}}
    assert data["overlaps"] == [
        {
            "kind": "copy",
            "item": ["t", "train", 40],
            "other": ["t", "test", 40],
            "length": 30,
            "unit": "words",
        }
    ]
    assert report.notes() == [
        "task 't': 1 item of train left out, with more than half in common with test: 41"
    ]


def test_no_items_of_a_script_are_no_trouble() -> None:
    assert kinds(find([part("train", ["a"]), part("test", ["b"])])) == []
    assert kinds(find([part("train", ["日"]), part("test", ["月"])])) == []


# --- tasks as they are ---------------------------------------------------------------------------


def parts(task: Task) -> list[Part]:
    prints = {split: task.fingerprints(split) for split in SPLITS}
    return [Part(task.name, split, own, [None] * len(own)) for split, own in prints.items()]


ZOO = sorted(path.parent for path in (ROOT / "fitness").glob("*/data"))


@pytest.mark.slow
def test_the_tasks_of_the_zoo_pass_without_noise() -> None:
    opened = [Task.open(folder / "task.yaml") for folder in ZOO]
    assert len(opened) == 4
    for task in opened:
        assert find(parts(task)).notes() == []
    # Two that ask the same sums, of other sums, in other words.
    assert find([own for task in opened[:2] for own in parts(task)]).notes() == []


@pytest.mark.slow
@needs_data
def test_gsm8k_has_two_problems_of_test_in_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_DATA", str(DATA))
    report = find(parts(Task.open(ROOT / "fitness" / "gsm8k" / "task.yaml")))
    told = Counter((o.kind, o.item.split, o.other.split) for o in report.overlaps)
    assert told["copy", "train", "test"] == 2
    assert told["copy", "train", "validation"] == 6
    assert told["shared", "train", "test"] == told["shared", "train", "validation"] == 2
    assert told["copy", "validation", "test"] == 0
    assert report.quarantined["gsm8k"]["train"] == [640, 1185, 1523, 2191, 2333, 3135, 4657, 4892]
    assert all(len(note) <= 160 for note in report.notes())


@needs_data
def test_problems_in_japanese_are_unlike_each_other_and_like_themselves() -> None:
    path = DATA / "mgsm" / "mgsm_ja.tsv"
    with path.open(encoding="utf-8", newline="") as file:
        texts = [row[0] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    splits = {"train": texts[:100], "validation": texts[100:150], "test": texts[150:]}
    assert kinds(find([part(split, splits[split]) for split in SPLITS])) == []
    changed = [re.sub(r"\d+", lambda n: str(int(n[0]) + 1), text, count=1) for text in texts[150:]]
    report = find([part("train", texts[:100] + changed), part("test", texts[150:])])
    planted = [o.kind for o in report.overlaps if o.item.position >= 100]
    assert len(planted) >= 95
    assert planted.count("copy") >= 75
