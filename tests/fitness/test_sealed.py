"""Test splits that are known by their hashes alone: the same to a search as the records, and no use
for anything else."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.errors import TaskError
from evomerge.fitness.sealed import SealedSplit
from evomerge.fitness.task import Task, Unsealed
from evomerge.search.check import check_task
from evomerge.search.splits import examine
from evomerge.search.wear import sealed
from tests import tiny
from tests.fitness.test_task import write

STORY = "a farmer sells seven baskets of plums on monday and twice as many on friday how many then"


def parted(task: Path) -> Path:
    """Seal a task and take its test file away; gives where that is now."""
    Task.open(task).seal()
    away = task.parent.parent / "away" / task.parent.name / "test.jsonl"
    away.parent.mkdir(parents=True)
    shutil.move(task.parent / "test.jsonl", away)
    return away


def bring_back(task: Path, away: Path) -> None:
    shutil.move(away, task.parent / "test.jsonl")


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def change(task: Path, **changes: Any) -> None:
    task.write_text(yaml.safe_dump({**yaml.safe_load(task.read_text()), **changes}))


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Of three items of test, one of them like one of train."""
    items = lines(
        {"prompt": f"{STORY} in spring?", "answer": "さくらもち"},
        {"prompt": "東京の人口は何人ですか", "answer": "2"},
        {"prompt": "?", "answer": "3"},
    )
    own = lines({"prompt": f"{STORY} in autumn?", "answer": "9"}, {"prompt": "1+1", "answer": "2"})
    return write(tmp_path / "sums", train=own, test=items)


def test_a_search_learns_from_a_sealed_split_what_it_learns_from_the_records(task: Path) -> None:
    whole = Task.open(task)
    sizes, found = whole.check_splits(), examine([whole])
    assert found["quarantined"] == {"sums": {"train": [0]}}
    parted(task)
    alone = Task.open(task)
    assert alone.check_splits() == sizes
    assert examine([alone]) == found
    assert alone.identity("test") == whole.identity("test")
    assert alone.content("test") == whole.content("test")
    assert alone.item_hashes("test") == whole.item_hashes("test")
    assert alone.origin("test") == whole.origin("test")
    assert alone.manifest() == whole.manifest()
    assert sealed({"sums": alone}) == sealed({"sums": whole})
    for one, other in zip(alone.fingerprints("test"), whole.fingerprints("test"), strict=True):
        assert (one.exact, one.text, one.unspaced) == (other.exact, other.text, other.unspaced)
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_a_sealed_split_says_that_it_is_one_and_whole_ones_do_not(task: Path) -> None:
    Task.open(task).seal()
    assert Task.open(task).notes == ()
    (task.parent / "test.jsonl").unlink()
    (note,) = check_task(task)["notes"]
    assert "test is known by 'task.sealed.json' alone" in note


def test_nothing_is_asked_of_a_sealed_split(task: Path) -> None:
    away = parted(task)
    alone = Task.open(task)
    leave = Unsealed(alone.identity("test"))
    for read in (lambda: alone.examples("test", leave), alone.require_test):
        with pytest.raises(TaskError, match=r"test data '.*test\.jsonl' is missing: put it there"):
            read()
    bring_back(task, away)
    Task.open(task).require_test()
    assert len(Task.open(task).examples("test", leave)) == 3


def test_no_text_of_a_test_split_stands_in_its_file(task: Path) -> None:
    text = Task.open(task).seal().read_text(encoding="utf-8")
    assert not any(
        word in text for word in ("farmer", "plums", "東京", "さくらもち", "さ", "prompt")
    )


def test_what_test_shares_with_another_split_is_an_error_without_its_records_too(
    task: Path,
) -> None:
    parted(task)
    same = lines({"prompt": "東京の人口は、何人ですか。", "answer": "4"})
    (task.parent / "validation.jsonl").write_text(same)
    with pytest.raises(TaskError, match="item 2 of test is item 1 of validation"):
        Task.open(task).check_splits()


def test_records_that_are_asked_in_other_words_elsewhere_are_found(
    task: Path, tmp_path: Path
) -> None:
    parted(task)
    record = lines({"prompt": "東京の人口は何人ですか", "answer": "2"})
    words = {"name": "others", "prompt": "Please answer this one: {{ prompt }}"}
    other = Task.open(write(tmp_path / "others", words, train=record))
    seen: dict[str, Any] = {}
    other.check_splits(seen)
    with pytest.raises(TaskError, match="item 2 of test is item 1 of train of task 'others'"):
        Task.open(task).check_splits(seen)


def test_groups_are_kept_apart_without_their_names(task: Path) -> None:
    def grouped(name: str, prompt: str) -> str:
        return lines({"prompt": prompt, "answer": "1", "book": name})

    for split, name in (("train", "Emma"), ("validation", "Persuasion"), ("test", "Ulysses")):
        (task.parent / f"{split}.jsonl").write_text(grouped(name, f"{split}?"))
    data = yaml.safe_load(task.read_text())["data"]
    change(task, data={**data, "group": "book"})
    parted(task)
    assert "Ulysses" not in task.with_suffix(".sealed.json").read_text()
    numbers = Task.open(task).groups("test")
    assert numbers is not None
    assert numbers.tolist() == [0]
    (task.parent / "validation.jsonl").write_text(grouped("Ulysses", "validation?"))
    with pytest.raises(TaskError, match='item 1 of validation has the group "Ulysses"'):
        Task.open(task).check_splits()
    change(task, data=data)
    with pytest.raises(TaskError, match="make it again where test is"):
        Task.open(task).check_splits()


@pytest.mark.parametrize(
    "changes",
    [{"prompt": "Q: {{ prompt }}"}, {"chat": True}, {"generate": {"max_new_tokens": 3}}, {}],
    ids=["words", "chat", "length", "train"],
)
def test_a_task_that_is_asked_otherwise_wants_another_seal(
    task: Path, changes: dict[str, Any]
) -> None:
    away = parted(task)
    change(task, **changes)
    if not changes:  # worked examples might be taken from there
        (task.parent / "train.jsonl").write_text(lines({"prompt": "2+2", "answer": "4"}))
    with pytest.raises(TaskError, match=r"make it again where test is: evomerge check .* --seal"):
        Task.open(task).identity("test")
    bring_back(task, away)
    parted_again = Task.open(task)
    parted_again.seal()
    (task.parent / "test.jsonl").unlink()
    assert Task.open(task).content("test") == parted_again.content("test")


def test_records_that_are_not_those_of_the_seal_are_refused(task: Path) -> None:
    away = parted(task)
    away.write_text(lines({"prompt": "another?", "answer": "1"}))
    bring_back(task, away)
    with pytest.raises(TaskError, match=r"test is not what '.*' was made of: put back the data"):
        Task.open(task).require_test()
    Task.open(task).seal()
    Task.open(task).require_test()


def test_a_seal_of_what_the_manifest_does_not_list_is_refused(task: Path) -> None:
    (task.parent / "manifest.json").write_text(json.dumps(Task.open(task).manifest()))
    (task.parent / "test.jsonl").write_text(lines({"prompt": "another?", "answer": "1"}))
    with pytest.raises(TaskError, match="test has 1 items with hash"):
        Task.open(task).seal()


def test_only_a_split_in_a_file_of_its_own_is_sealed(task: Path, tmp_path: Path) -> None:
    divided = {"source": "train.jsonl", "split": "hash"}
    change(task, data=divided)
    with pytest.raises(TaskError, match="test has no file of its own"):
        Task.open(task).seal()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"identity"', '"identities"', "identities: unknown key"),
        ('"tokens": "', '"tokens": "!', "items.tokens: .*: make the file again"),
        ("{", "[", "not JSON|JSON"),
    ],
    ids=["key", "tokens", "json"],
)
def test_a_file_that_is_no_seal_is_refused_in_one_line(
    task: Path, old: str, new: str, message: str
) -> None:
    parted(task)
    path = task.with_suffix(".sealed.json")
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(TaskError, match=message) as caught:
        SealedSplit.read(path)
    assert "\n" not in str(caught.value)


def test_a_seal_is_made_from_what_a_folder_of_the_environment_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny.write_task(tmp_path / "jobs" / "task")
    away = tmp_path / "sealed" / "tiny"
    away.mkdir(parents=True)
    shutil.move(task.parent / "data" / "test.jsonl", away)
    task.write_text(task.read_text().replace("data/test.jsonl", "tiny/test.jsonl"))
    with pytest.raises(TaskError, match="is missing"):
        check_task(task)
    with monkeypatch.context() as here:
        here.setenv("EVOMERGE_DATA", str(away.parent))
        found = check_task(task, seal=True)
        assert found["sealed"] == str(task.with_suffix(".sealed.json"))
        assert found["notes"] == []
    assert check_task(task)["splits"] == found["splits"]
