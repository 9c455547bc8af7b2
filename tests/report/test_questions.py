"""What a stored search asked is read again only where nothing has to be fetched or run for it."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from evomerge.fitness.task import Task
from evomerge.report.questions import at_hand, groups_of
from evomerge.store import Coordinator, NewSplit, SearchRow, Store
from tests import tiny
from tests.running import url

Searched = Callable[[str], tuple[Store, SearchRow]]


@pytest.fixture
def grouped(tmp_path: Path) -> Path:
    """A task whose items belong together in pairs."""
    path = tiny.write_task(tmp_path / "task", train=8, validation=4, test=4)
    for number, split in enumerate(("train", "validation", "test")):
        file = path.parent / "data" / f"{split}.jsonl"
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        pairs = [{**record, "story": f"{number}/{i // 2}"} for i, record in enumerate(records)]
        tiny.write_jsonl(file, pairs)
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["data"]["group"] = "story"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture
def searched(tmp_path: Path) -> Iterator[Searched]:
    """Gives a search that was launched with a task, named by its file, as it is now."""
    with Store(url(tmp_path / "store.db"), create=True) as store:

        def searched(file: str) -> tuple[Store, SearchRow]:
            job = {"parents": {}, "tasks": [{"task": file}], "budget": {}}
            splits = [
                NewSplit("ja_list_ops", split, "?", "?", ["x"]) for split in ("train", "test")
            ]
            if file.endswith("task.yaml"):
                task = Task.open(Path(file))
                splits = [
                    NewSplit(
                        task.name, "train", task.content("train"), task.identity("train"), ["x"]
                    )
                ]
            name = f"search-{len(store.searches())}"
            Coordinator.launch(store, name, 0, job, {}, [], splits).close()
            return store, store.search(name)

        yield searched


def test_groups_are_those_of_the_task(grouped: Path, searched: Searched) -> None:
    store, row = searched(str(grouped))
    found = groups_of(store, row, "train", ["ja_list_ops"])
    assert np.array_equal(found["ja_list_ops"], [0, 0, 1, 1, 2, 2, 3, 3])


def test_groups_of_other_records_say_nothing(grouped: Path, searched: Searched) -> None:
    store, row = searched(str(grouped))
    file = grouped.parent / "data" / "train.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[::-1]), encoding="utf-8")
    assert groups_of(store, row, "train", ["ja_list_ops"]) == {}
    assert at_hand(store, row, "ja_list_ops") is None


def test_a_task_that_is_asked_otherwise_by_now_is_another(
    grouped: Path, searched: Searched
) -> None:
    store, row = searched(str(grouped))
    assert at_hand(store, row, "ja_list_ops") is not None
    text = grouped.read_text(encoding="utf-8")
    grouped.write_text(text.replace("{{ prompt }}", "Q: {{ prompt }}"), encoding="utf-8")
    assert at_hand(store, row, "ja_list_ops") is None


def test_a_task_whose_files_stay_as_they_are_is_read_once(
    grouped: Path, searched: Searched
) -> None:
    store, row = searched(str(grouped))
    before = at_hand(store, row, "ja_list_ops")
    assert before is not None
    assert at_hand(store, row, "ja_list_ops") is before
    file = grouped.parent / "data" / "train.jsonl"
    text = file.read_bytes()
    stamp = file.stat()
    file.write_bytes(text[::-1])
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert at_hand(store, row, "ja_list_ops") is None
    file.write_bytes(text)
    after = at_hand(store, row, "ja_list_ops")
    assert after is not None
    assert after is not before


def test_a_task_whose_worked_examples_are_elsewhere_is_not_at_hand(
    grouped: Path, searched: Searched
) -> None:
    document = yaml.safe_load(grouped.read_text(encoding="utf-8"))
    document["fewshot"] = {"n": 1}
    grouped.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    assert Task.at_hand(grouped, "validation") is not None
    document["data"]["train"] = {"hub": "org/data", "split": "train", "revision": "a" * 40}
    grouped.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    assert Task.at_hand(grouped, "validation") is None
    document["fewshot"] = {"n": 1, "examples": [{"prompt": "p", "answer": "a"}]}
    grouped.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    assert Task.at_hand(grouped, "validation") is not None


@pytest.mark.parametrize("text", ["task: [", "- 1", "name: ja_list_ops", "a: 1\na: 2", "\0"])
def test_what_is_no_task_any_more_is_not_at_hand(
    grouped: Path, searched: Searched, text: str
) -> None:
    store, row = searched(str(grouped))
    grouped.write_text(text, encoding="utf-8")
    assert at_hand(store, row, "ja_list_ops") is None
    grouped.unlink()
    assert at_hand(store, row, "ja_list_ops") is None


def test_tasks_of_lm_eval_are_not_opened(tmp_path: Path, searched: Searched) -> None:
    """One that would leave a trace if any of its code ran."""
    trace, path = tmp_path / "trace", tmp_path / "harness.yaml"
    path.with_name("own.py").write_text(f"open({str(trace)!r}, 'w')\ndef f(d): return d\n")
    plain = "task: ja_list_ops\ndataset_path: json\ntest_split: test\ndoc_to_target: x\n"
    for text in ("doc_to_text: x\n", "doc_to_text: !function own.f\n"):
        path.write_text(plain + text)
        store, row = searched(f"{path}")
        assert at_hand(store, row, "ja_list_ops") is None
        assert groups_of(store, row, "train", ["ja_list_ops"]) == {}
    assert not trace.exists()


def test_a_task_by_name_of_lm_eval_is_not_opened(searched: Searched) -> None:
    store, row = searched("lm-eval:arc_easy")
    assert at_hand(store, row, "ja_list_ops") is None
    assert groups_of(store, row, "train", ["ja_list_ops"]) == {}
