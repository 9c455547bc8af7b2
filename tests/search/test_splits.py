"""The splits of a job: what is in two of them is left out of one, and public test sets are kept out
of train."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.errors import InputError
from evomerge.job import Job
from evomerge.search.splits import Splits, examine
from evomerge.seeds import generator
from evomerge.store import Store
from tests import tiny
from tests.guard.test_benchmarks import needs_data, published
from tests.guard.test_contamination import sentence
from tests.running import evomerge_, url

SIZES = {"train": 20, "validation": 12, "test": 10}


def write_task(folder: Path, name: str = "told", **changes: Any) -> Path:
    """A task of items that have nothing in common; gives its folder."""
    for index, (split, size) in enumerate(SIZES.items(), 1):
        first = 1000 * index + 10_000 * len(name)
        records = [{"prompt": sentence(first + n, 20), "answer": "x"} for n in range(size)]
        tiny.write_jsonl(folder / name / f"{split}.jsonl", records)
    task = {"name": name, "data": {split: f"{split}.jsonl" for split in SIZES}, **changes}
    (folder / name / "task.yaml").write_text(yaml.safe_dump(task))
    return folder / name


def records(task: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (task / f"{split}.jsonl").read_text().splitlines()]


def plant(task: Path, split: str, positions: list[int], other: Path, source: str) -> None:
    """In place of items, those of another split, with other words behind them."""
    own, others = records(task, split), records(other, source)
    for position in positions:
        text = others[position]["prompt"].upper()
        own[position] = {"prompt": f"{text} {sentence(position, 4)}", "answer": "y"}
    tiny.write_jsonl(task / f"{split}.jsonl", own)


def opened(*tasks: Path, **guard: Any) -> Splits:
    job = {
        "name": "j",
        "parents": {"a": {"model": "a"}, "b": {"model": "b"}},
        "space": {"preset": "global_task_arithmetic"},
        "tasks": [{"task": str(task / "task.yaml")} for task in tasks],
        "budget": {"candidates": 4},
        "guard": guard,
    }
    return Splits.open(Job.from_dict(job | {"base": {"model": "c"}}, "job"))


def used(splits: Splits, task: str = "told") -> list[int]:
    return sorted([*splits.driving[task].tolist(), *splits.monitor[task].tolist()])


def test_without_overlaps_everything_is_used_as_it_always_was(tmp_path: Path) -> None:
    splits = opened(write_task(tmp_path))
    order = generator(0, "monitor", 0).permutation(20)
    assert splits.monitor["told"].tolist() == sorted(order[:4].tolist())
    assert splits.driving["told"].tolist() == sorted(order[4:].tolist())
    assert splits.validation["told"].tolist() == list(range(12))
    assert splits.contamination == {
        "quarantined": {},
        "overlaps": [],
        "repeated": {},
        "benchmarks": [],
        "notes": [],
    }


def test_the_monitor_slice_divides_no_group(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    data = {split: f"{split}.jsonl" for split in SIZES}
    (task / "task.yaml").write_text(
        yaml.safe_dump({"name": "told", "data": {**data, "group": "d"}})
    )
    for split in SIZES:
        own = [{**r, "d": f"{split} {n % 7}"} for n, r in enumerate(records(task, split))]
        tiny.write_jsonl(task / f"{split}.jsonl", own)
    splits = opened(task)
    held, left = ({n % 7 for n in s["told"].tolist()} for s in (splits.monitor, splits.driving))
    assert 1 <= len(splits.monitor["told"]) <= 4
    assert (held | left, held & left) == (set(range(7)), set())
    assert used(splits) == list(range(20))
    assert len(opened(task, monitor=0.1).monitor["told"]) == 0  # no group is as small


def test_items_of_a_more_guarded_split_are_left_out_of_the_other(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    plant(task, "train", [3, 5], task, "test")
    plant(task, "train", [8], task, "validation")
    plant(task, "validation", [1], task, "test")
    splits = opened(task)
    assert used(splits) == [n for n in range(20) if n not in (3, 5, 8)]
    assert len(splits.monitor["told"]) == 3
    assert splits.validation["told"].tolist() == [0, *range(2, 12)]
    assert splits.sizes["told"] == SIZES
    assert splits.contamination is not None
    assert len(splits.contamination["notes"]) == 3
    told = json.dumps(splits.contamination)
    assert not any(word in told for word in records(task, "test")[3]["prompt"].split())


def test_another_task_may_be_the_more_guarded_one(tmp_path: Path) -> None:
    one = write_task(tmp_path, prompt="Question: {{ prompt }}\nAnswer:")
    two = write_task(tmp_path, "other", prompt="Reply to this: {{ prompt }}")
    shutil.copyfile(one / "train.jsonl", two / "test.jsonl")
    tiny.write_jsonl(two / "test.jsonl", [{**r, "n": 1} for r in records(one, "train")[:6]])
    splits = opened(one, two)
    assert used(splits) == list(range(6, 20))
    assert used(splits, "other") == list(range(20))


def test_equal_items_are_refused_whatever_their_punctuation(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    train, test = records(task, "train"), records(task, "test")
    train[4] = {"prompt": f"“{test[2]['prompt'].capitalize()}!”", "answer": "z"}
    tiny.write_jsonl(task / "train.jsonl", train)
    with pytest.raises(InputError, match="item 3 of test is item 5 of train: splits must not over"):
        opened(task)


def test_items_that_only_punctuation_tells_apart_are_told_apart(tmp_path: Path) -> None:
    task = write_task(tmp_path, prompt="Close the brackets: {{ prompt }}")
    for split, brackets in {"train": "[({", "validation": "{([", "test": "({["}.items():
        items = [{"prompt": " ".join(brackets[: n + 1]), "answer": "]"} for n in range(1, 3)]
        tiny.write_jsonl(task / f"{split}.jsonl", items)
    assert used(opened(task)) == [0, 1]


def test_choices_are_part_of_what_is_asked(tmp_path: Path) -> None:
    score = {"kind": "multiple_choice", "choices": "{{ choices }}", "answer": "{{ right }}"}
    task = write_task(tmp_path, prompt="Which is true?", score=score, target="")
    for index, split in enumerate(SIZES):
        choices = [[sentence(100 * index + n, 3), sentence(50 + n, 2)] for n in range(10)]
        tiny.write_jsonl(task / f"{split}.jsonl", [{"choices": c, "right": 0} for c in choices])
    assert used(opened(task)) == list(range(10))
    train = records(task, "train")
    tiny.write_jsonl(task / "test.jsonl", [{**train[2], "right": 1}])
    with pytest.raises(InputError, match="item 1 of test is item 3 of train"):
        opened(task)


def test_worked_examples_and_system_prompts_are_no_part_of_an_item(tmp_path: Path) -> None:
    few = {"fewshot": {"n": 3}, "system": sentence(9, 40), "chat": True}
    assert used(opened(write_task(tmp_path, **few))) == list(range(20))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_of_which_nothing_is_left_is_refused(tmp_path: Path, split: str) -> None:
    task, other = write_task(tmp_path), write_task(tmp_path, "other")
    tiny.write_jsonl(other / "test.jsonl", [{**r, "n": 1} for r in records(task, split)])
    (other / "task.yaml").write_text((other / "task.yaml").read_text() + "prompt: 'So: {{prompt}}'")
    with pytest.raises(InputError, match=f"task 'told': every item of {split} is also in a more"):
        opened(task, other)


def test_a_stored_report_decides_what_is_left_out_and_none_leaves_nothing_out(
    tmp_path: Path,
) -> None:
    task = write_task(tmp_path)
    plant(task, "train", [3], task, "test")
    splits = opened(task)
    job = Job.from_dict(
        {
            "name": "j",
            "parents": {"a": {"model": "a"}},
            "base": {"model": "c"},
            "space": {"preset": "global_task_arithmetic"},
            "tasks": [{"task": str(task / "task.yaml")}],
            "budget": {"candidates": 4},
        },
        "job",
    )
    again = Splits.reopen(job, json.loads(json.dumps(splits.contamination)))
    assert np.array_equal(again.driving["told"], splits.driving["told"])
    assert used(Splits.reopen(job, None)) == list(range(20))


# --- public test sets ----------------------------------------------------------------------------


def mgsm(folder: Path, code: str) -> Path:
    """A task over the first problems of a file of MGSM, which are not those here."""
    task = folder / code
    lines = [f"{sentence(ord(code[0]) * 100 + n, 20)}\t{n}\n" for n in range(30)]
    task.mkdir()
    (task / f"mgsm_{code}.tsv").write_text("".join(lines))
    ranges = {"train": [0, 10], "validation": [10, 20], "test": [20, 30]}
    source = {"file": f"mgsm_{code}.tsv", "columns": ["question", "answer"]}
    data = {"source": source, "split": "ranges", "ranges": ranges}
    content = {"name": code, "data": data, "prompt": "{{ question }}"}
    (task / "task.yaml").write_text(yaml.safe_dump(content))
    return task


def test_a_public_test_set_in_train_is_refused_unless_the_job_says_so(tmp_path: Path) -> None:
    task = mgsm(tmp_path, "de")
    with pytest.raises(InputError) as caught:
        opened(task)
    assert str(caught.value) == (
        "task 'de': train has 10 items, 100% of it, of the public test set of MGSM: search on "
        "other data, or write 'guard: {train_on_public_test_sets: true}', and the model card will "
        "say so"
    )
    splits = opened(task, train_on_public_test_sets=True)
    assert splits.contamination is not None
    assert splits.contamination["benchmarks"] == [
        {"task": "de", "split": "train", "benchmark": "MGSM", "items": 10, "share": 1.0}
    ]


def test_a_problem_in_another_language_is_the_same_problem(tmp_path: Path) -> None:
    german, french = mgsm(tmp_path, "de"), mgsm(tmp_path, "fr")
    path = french / "task.yaml"
    ranges = {"train": [5, 15], "validation": [16, 22], "test": [22, 30]}
    content = yaml.safe_load(path.read_text())
    content["data"]["ranges"] = ranges
    path.write_text(yaml.safe_dump(content))
    splits = opened(german, french, train_on_public_test_sets=True)
    # Problems 10 to 14, 16 to 19 are validation of the one and train of the other, and so on.
    assert used(splits, "fr") == [0, 1, 2, 3, 4]
    assert used(splits, "de") == list(range(10))
    assert splits.validation["fr"].tolist() == [0, 1, 2, 3]
    assert splits.validation["de"].tolist() == list(range(10))
    kinds = {overlap["kind"] for overlap in splits.contamination["overlaps"]}
    assert kinds == {"translation"}


@needs_data
def test_a_translation_of_a_public_problem_is_known_in_anybodys_file(tmp_path: Path) -> None:
    task, problems = write_task(tmp_path), published()
    for split, position, language, number in (
        ("train", 4, "gsm8k", 7),
        ("train", 9, "gsm8k", 400),
        ("validation", 2, "ja", 8),
        ("validation", 3, "gsm8k", 9),
        ("test", 0, "ja", 7),
        ("test", 5, "gsm8k", 8),
    ):
        own = records(task, split)
        own[position] = {"prompt": problems[language][number], "answer": "1"}
        tiny.write_jsonl(task / f"{split}.jsonl", own)
    with pytest.raises(InputError, match="train has 2 items, 10% of it, of the public test set of"):
        opened(task)
    splits = opened(task, train_on_public_test_sets=True)
    assert splits.contamination is not None
    assert splits.contamination["quarantined"] == {"told": {"train": [4], "validation": [2]}}


def test_examining_a_task_refuses_nothing(tmp_path: Path) -> None:
    from evomerge.fitness.task import Task

    found = examine([Task.open(mgsm(tmp_path, "de") / "task.yaml")])
    assert found["notes"] == [
        "task 'de': 10 items of train, 100% of it, of the public test set of MGSM"
    ]


# --- a whole search ------------------------------------------------------------------------------


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A job of the zoo, two of whose train items are also in test; some words stand around them."""
    tiny.write_task(tmp_path / "task")
    for split, (first, last) in {"train": (0, 24), "test": (10, 26)}.items():
        items = records(tmp_path / "task" / "data", split)
        for item, number in zip(items, range(first, last), strict=True):
            both = number in (10, 11)
            item["prompt"] += f" {sentence(number if both else number + 99 * last, 14)} {split} ="
        tiny.write_jsonl(tmp_path / "task" / "data" / f"{split}.jsonl", items)
    return tiny.write_job(tmp_path, budget={"candidates": 4})


def test_check_says_what_is_left_out_and_what_the_rest_can_show(planted: Path) -> None:
    found = json.loads(evomerge_("check", planted, "--json").out)
    task = found["tasks"]["ja_list_ops"]
    assert (task["driving"] + task["monitor"], task["judging"], task["train"]) == (22, 12, 24)
    assert found["contamination"]["quarantined"] == {"ja_list_ops": {"train": [10, 11]}}
    assert task["detectable_on_validation"] > found["tasks"]["ja_list_ops"]["detectable_on_test"]
    end = evomerge_("check", planted.parent / "task")
    assert (end.code, end.err) == (0, "")
    (note,) = [line for line in end.out.splitlines() if "left out" in line]
    assert note.startswith("task 'ja_list_ops': 2 items of train left out")
    assert len(note) <= 100


@pytest.mark.slow
def test_a_search_keeps_its_report_and_scores_no_item_that_is_left_out(planted: Path) -> None:
    store = url(planted.parent / "store.db")
    end = evomerge_("run", planted, "--store", store)
    assert end.code == 0, end.err
    with Store(store) as opened_store:
        row = opened_store.search("tiny")
        report = opened_store.contamination(row.id)
        assert report is not None
        assert report["quarantined"] == {"ja_list_ops": {"train": [10, 11]}}
        for evaluation in opened_store.evaluations(row.id, ("train", "monitor", "full")):
            assert evaluation.scores is not None
            assert not {10, 11} & set(evaluation.scores["ja_list_ops"].examples.tolist())
