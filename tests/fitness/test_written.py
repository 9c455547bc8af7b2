"""Tasks of a task.yaml: how splits divide, what prompts show, which choice is right."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.engine import Turn
from evomerge.errors import TaskError
from evomerge.fitness.example import Example
from evomerge.fitness.task import Split, Task, Unsealed
from evomerge.fitness.task_file import SPLITS, Divided, Ranged
from tests import tiny

SHARED = tiny.ROOT.parent / "shared" / "data"
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data in {SHARED}")

# Texts for reading: train is "a?" to "e?" with answers A to E.
TRAIN = [{"prompt": f"{letter}?", "answer": letter.upper()} for letter in "abcde"]


def write(folder: Path, train: list[dict[str, Any]] | None = None, **keys: Any) -> Path:
    """A task.yaml over these records of train, and one each of validation and test."""
    tiny.write_jsonl(folder / "train.jsonl", TRAIN if train is None else train)
    for split in SPLITS[1:]:
        tiny.write_jsonl(folder / f"{split}.jsonl", [{"prompt": f"{split}?", "answer": split}])
    task = {"name": "t", "data": {split: f"{split}.jsonl" for split in SPLITS}, **keys}
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(task), encoding="utf-8")
    return path


def opened(folder: Path, train: list[dict[str, Any]] | None = None, **keys: Any) -> Task:
    return Task.open(write(folder, train, **keys))


def prompts(task: Task, split: Split = "train") -> list[Any]:
    leave = Unsealed(task.identity("test")) if split == "test" else None
    return [example.prompt for example in task.examples(split, leave)]


def refusal(task: Task, split: Split = "train") -> str:
    """The one-line message with which a split is refused."""
    with pytest.raises(TaskError) as caught:
        task.item_hashes(split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- splits --------------------------------------------------------------------------------------

RECORDS = st.lists(st.fixed_dictionaries({"document": st.integers(0, 9), "n": st.integers()}))


@settings(deadline=None, derandomize=True)
@given(records=RECORDS, seed=st.integers(0, 9), grouped=st.booleans())
def test_a_division_by_hash_is_blind_to_order_and_keeps_groups_whole(
    records: list[dict[str, int]], seed: int, grouped: bool
) -> None:
    rule = Divided.model_validate(
        {"source": "a.jsonl", "split": "hash", "group": "document" if grouped else None}
    )
    parts = rule.divide(records)
    assert set(parts) <= set(SPLITS)
    order = random.Random(seed).sample(range(len(records)), len(records))
    assert rule.divide([records[i] for i in order]) == [parts[i] for i in order]
    owner: dict[int, Any] = {}
    for record, part in zip(records if grouped else [], parts, strict=False):
        assert owner.setdefault(record["document"], part) == part


@settings(deadline=None, derandomize=True)
@given(ends=st.sets(st.integers(0, 12), min_size=6, max_size=6), order=st.permutations(SPLITS))
def test_ranges_give_each_record_to_the_split_whose_range_holds_its_place(
    ends: set[int], order: list[Split]
) -> None:
    limits = sorted(ends)
    ranges = {split: limits[2 * i : 2 * i + 2] for i, split in enumerate(order)}
    rule = Ranged.model_validate({"source": "a.jsonl", "split": "ranges", "ranges": ranges})
    parts = rule.divide([{"n": n} for n in range(12)])
    for split, (first, behind) in ranges.items():
        assert [n for n, part in enumerate(parts) if part == split] == list(range(first, behind))


def test_a_source_is_divided_beside_a_test_file_of_its_own(tmp_path: Path) -> None:
    records = [{"prompt": f"{n}?", "answer": "x"} for n in range(200)]
    tiny.write_jsonl(tmp_path / "all.jsonl", records)
    data = {"source": "all.jsonl", "split": "hash", "shares": [0.9, 0.1], "test": "test.jsonl"}
    task = opened(tmp_path, data=data)
    sizes = task.check_splits()
    assert sizes["train"] + sizes["validation"] == 200
    assert 5 < sizes["validation"] < 40
    assert prompts(task, "test") == ["test?"]


def test_a_source_is_divided_by_the_places_of_its_records(tmp_path: Path) -> None:
    ranges = {"train": [0, 2], "validation": [2, 3], "test": [4, 5]}
    task = opened(tmp_path, data={"source": "train.jsonl", "split": "ranges", "ranges": ranges})
    assert [prompts(task, split) for split in SPLITS] == [["a?", "b?"], ["c?"], ["e?"]]


def test_ranges_beyond_the_last_record_are_refused(tmp_path: Path) -> None:
    ranges = {"train": [0, 2], "validation": [2, 4], "test": [4, 6]}
    task = opened(tmp_path, data={"source": "train.jsonl", "split": "ranges", "ranges": ranges})
    words = "data.ranges.test: [4, 6] ends behind its 5 records"
    assert refusal(task) == f"{tmp_path / 'task.yaml'}: {words}"


def test_a_group_in_two_files_is_refused_with_both_places(tmp_path: Path) -> None:
    train = [{"prompt": f"{n}?", "answer": "x", "document": n} for n in range(3)]
    path = write(tmp_path, train)
    task = yaml.safe_load(path.read_text())
    task["data"]["group"] = "document"
    path.write_text(yaml.safe_dump(task))
    validation = tmp_path / "validation.jsonl"
    tiny.write_jsonl(tmp_path / "test.jsonl", [{"prompt": "t?", "answer": "x", "document": 9}])
    tiny.write_jsonl(validation, [{"prompt": "v?", "answer": "x", "document": 1}])
    with pytest.raises(TaskError) as caught:
        Task.open(path).check_splits()
    assert str(caught.value) == (
        f"{validation}:1: its document is that of {tmp_path / 'train.jsonl'}:2, so validation "
        "shares it with train: keep the records of a group in one split"
    )
    tiny.write_jsonl(validation, [{"prompt": "v?", "answer": "x"}])
    assert refusal(Task.open(path), "validation") == (
        f"{validation}:1: no 'document' that says to which group it belongs"
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"file": "a.txt"}, "data.train.file: 'a.txt': its name ends in none of .jsonl, .json"),
        ({}, "data.train: give file, or hub, or both"),
        (3, "data.train: 3: give the name of a file, or the keys of a source"),
        ({"file": "a.jsonl", "columns": ["q"]}, "data.train.columns: only a .csv or .tsv file"),
        ({"file": "a.csv", "columns": ["q", "q"]}, "data.train.columns: a name stands there twice"),
        ({"hub": "gsm8k", "split": "x", "revision": "y"}, "data.train.hub: 'gsm8k': write ORG/"),
        ({"hub": "o/n", "split": "train"}, "data.train.revision: required with hub, and missing"),
        ({"hub": "o/n", "revision": "main"}, "data.train.split: required with hub, and missing"),
        ({"file": "a.csv", "split": "x"}, "data.train.split: it belongs to a data set of the hub"),
        ({"fil": "a.csv"}, "data.train.fil: unknown key: did you mean 'file'?"),
    ],
)
def test_a_wrong_source_is_refused_by_key(tmp_path: Path, data: Any, words: str) -> None:
    path = write(tmp_path, data={"train": data, "validation": "v.jsonl", "test": "t.jsonl"})
    with pytest.raises(TaskError) as caught:
        Task.open(path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"ranges": {"train": [0, 1]}}, "data.ranges: give one to each of train, validation, test"),
        ({"ranges": {"train": [0, 1], "dev": [1, 2]}}, "data.ranges.dev"),
        (
            {"ranges": {"train": [0, 3], "validation": [2, 4], "test": [4, 5]}},
            "data.ranges.validation: [2, 4] overlaps another",
        ),
        (
            {"ranges": {"train": [0, 3], "validation": [3, 3], "test": [4, 5]}},
            "data.ranges.validation: [3, 3] holds no record",
        ),
        ({"split": "range"}, "data.split: 'range' is unknown: did you mean 'ranges'?"),
        ({"split": "hash", "train": "a.csv", "test": "b.csv"}, "data.source: there is nothing to"),
    ],
)
def test_a_wrong_rule_is_refused_by_key(tmp_path: Path, data: dict[str, Any], words: str) -> None:
    rule = {"source": "all.jsonl", "split": "ranges"} | data
    with pytest.raises(TaskError) as caught:
        opened(tmp_path, data=rule)
    assert words in str(caught.value)


# --- manifests -----------------------------------------------------------------------------------


def test_a_manifest_refuses_data_that_it_does_not_list(tmp_path: Path) -> None:
    path = write(tmp_path)
    manifest = Task.open(path).manifest()
    assert manifest["splits"]["train"]["items"] == 5
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert len(Task.open(path).examples("train")) == 5
    tiny.write_jsonl(tmp_path / "train.jsonl", TRAIN[:-1])
    assert len(Task.open(path).examples("validation")) == 1
    message = refusal(Task.open(path))
    assert message.startswith("task 't': train has 4 items with hash ")
    assert f"where '{tmp_path / 'manifest.json'}' lists 5 with hash " in message
    assert Task.open(path).manifest()["splits"]["train"]["items"] == 4


def test_a_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "manifest.json").write_text('{"splits": {"train": {"items": 5}}}')
    words = f"{tmp_path / 'manifest.json'}: splits.train.identity: required, and missing"
    assert refusal(Task.open(path)) == words


# --- prompts -------------------------------------------------------------------------------------


def test_the_first_other_items_of_train_are_shown_before_a_question(tmp_path: Path) -> None:
    task = opened(tmp_path, fewshot={"n": 2, "delimiter": " ", "separator": "\n"})
    assert prompts(task)[:3] == ["b? B\nc? C\na?", "a? A\nc? C\nb?", "a? A\nb? B\nc?"]
    assert prompts(task, "test") == ["a? A\nb? B\ntest?"]
    example = task.examples("train")[0]
    assert (example.question, example.target, example.reference) == ("a?", "A", "A")


def test_an_item_is_shown_none_that_asks_the_same(tmp_path: Path) -> None:
    twice = [*TRAIN[:2], {"prompt": "a?", "answer": "another"}]
    for choose in ("first", "random"):
        task = opened(tmp_path, twice, fewshot={"n": 1, "choose": choose, "separator": "|"})
        assert prompts(task)[0] == prompts(task)[2] == "b?B|a?"


def test_random_examples_depend_on_the_seed_and_the_question_alone(tmp_path: Path) -> None:
    many = [{"prompt": f"{n}?", "answer": "x"} for n in range(40)]
    few = {"n": 3, "choose": "random", "separator": "|"}
    task = opened(tmp_path / "a", many, fewshot=few)
    shown = [prompt.split("|")[:-1] for prompt in prompts(task)]
    assert all(len(set(found)) == 3 for found in shown)
    assert all(f"{n}?x" not in found for n, found in enumerate(shown))
    assert Counter(len(found) for found in shown) == {3: 40}
    assert len({tuple(found) for found in shown}) > 30
    again = opened(tmp_path / "b", many, fewshot=few, generate={"max_new_tokens": 9})
    assert prompts(again) == prompts(task)
    reseeded = opened(tmp_path / "c", many, fewshot=few | {"seed": 1})
    assert prompts(reseeded) != prompts(task)


def test_too_few_items_to_show_are_refused(tmp_path: Path) -> None:
    message = refusal(opened(tmp_path, fewshot={"n": 5}))
    assert message.startswith("task 't': fewshot.n is 5, and train has only 4 other items: ask")


def test_examples_that_are_written_out_are_shown_in_place_of_train(tmp_path: Path) -> None:
    few = {"n": 1, "examples": [TRAIN[0], {"prompt": "z?", "answer": "Z"}], "separator": "|"}
    task = opened(tmp_path, fewshot=few)
    assert prompts(task)[:2] == ["z?Z|a?", "a?A|b?"]
    assert prompts(task, "validation") == ["a?A|validation?"]


def test_a_written_example_that_is_an_item_of_test_is_refused(tmp_path: Path) -> None:
    few = {"n": 1, "examples": [{"prompt": "test?", "answer": "test"}]}
    task = opened(tmp_path, fewshot=few)
    with pytest.raises(TaskError) as caught:
        task.check_splits()
    assert str(caught.value) == (
        f"{tmp_path / 'test.jsonl'}:1: this item of test is one of fewshot.examples: show another"
    )


def test_a_written_example_that_fits_no_template_is_named(tmp_path: Path) -> None:
    task = opened(tmp_path, fewshot={"n": 1, "examples": [{"prompt": "z?"}]})
    assert "fewshot.examples[0]: the template does not fit the record: 'answer'" in refusal(task)


def test_fewer_written_examples_than_are_asked_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"fewshot\.n: 2, of 1 examples: write more, or ask for f"):
        opened(tmp_path, fewshot={"n": 2, "examples": [TRAIN[0]]})


def test_a_conversation_has_a_turn_for_each_question_and_reply(tmp_path: Path) -> None:
    keys = {"system": "Be {{ answer }}.", "fewshot": {"n": 1}, "reference": "It is {{ answer }}"}
    task = opened(tmp_path, chat=True, **keys)
    assert prompts(task)[0] == (
        Turn("system", "Be A."),
        Turn("user", "b?"),
        Turn("assistant", "It is B"),
        Turn("user", "a?"),
    )
    assert task.examples("train")[0].reference == "It is A"


def test_the_system_message_stands_above_a_plain_prompt(tmp_path: Path) -> None:
    task = opened(tmp_path, system="Answer.", fewshot={"n": 1, "delimiter": " "})
    assert prompts(task)[0] == "Answer.\n\nb? B\n\na?"


def test_whoever_opens_a_task_may_choose_whether_it_is_a_conversation(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert prompts(Task.open(path, chat=True))[0] == (Turn("user", "a?"),)
    chats = write(tmp_path, chat=True)
    assert prompts(Task.open(chats, chat=False))[0] == "a?"
    as_told, as_written = Task.open(path, chat=True), Task.open(chats)
    assert as_told.content("train") == as_written.content("train")
    assert as_told.content("train") != Task.open(chats, chat=False).content("train")


def test_the_content_of_a_split_depends_on_what_is_shown_beside_it(tmp_path: Path) -> None:
    few = {"n": 1}
    before = opened(tmp_path / "a", fewshot=few)
    train = [{"prompt": "a?", "answer": "other"}, *TRAIN[1:]]
    after = opened(tmp_path / "b", train, fewshot=few)
    assert before.content("test") != after.content("test")
    assert before.identity("test") == after.identity("test")


def test_worked_examples_need_whole_replies(tmp_path: Path) -> None:
    score = {"kind": "regex", "pattern": "[A-E]"}
    with pytest.raises(TaskError, match="reference: worked examples show whole replies"):
        opened(tmp_path, score=score, fewshot={"n": 1})


# --- choices -------------------------------------------------------------------------------------

CHOICES = "{{ choices }}"


def chosen(folder: Path, record: dict[str, Any], **keys: Any) -> Example:
    """The one item of train of a multiple choice."""
    score = {"kind": "multiple_choice", "choices": CHOICES} | keys
    return opened(folder, [{"prompt": "?"} | record], score=score).examples("train")[0]


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["x", "y", "z"], 1, 1),
        (["x", "y", "z"], "1", 1),
        (["x", "y", "z"], "B", 1),
        (["x", "y", "z"], "y", 1),
        (["x", "y", "z"], " y\n", 1),
        (["B", "C", "A"], 1, 1),
        (["A", "B", "C"], "B", 1),
        (["10", "20", "30"], "20", 1),
        ([10, 2.5, 30], "2.5", 1),
        (["日本", "中国"], "中国", 1),
    ],
)
def test_the_right_choice_is_told_by_place_letter_or_text(
    tmp_path: Path, choices: list[Any], answer: Any, right: int
) -> None:
    found = chosen(tmp_path, {"choices": choices, "answer": answer})
    assert found.choices == tuple(map(str, choices))
    assert (found.right, found.target) == (right, found.choices[right])


def test_choices_may_be_templates_of_their_own(tmp_path: Path) -> None:
    record = {"wrong": "no", "good": "yes"}
    keys = {"choices": ["{{ wrong }}", "{{ good }}."], "answer": "{{ 1 }}"}
    found = chosen(tmp_path, record, **keys)
    assert (found.choices, found.right) == (("no", "yes."), 1)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"choices": ["x", "y"], "answer": 2}, "score.answer: 2 is none of the 2 choices: give a"),
        ({"choices": ["x", "y"], "answer": -1}, "score.answer: -1 is none of the 2 choices"),
        ({"choices": ["x", "y"], "answer": "C"}, "score.answer: 'C' is none of the 2 choices"),
        ({"choices": ["x", "y"], "answer": True}, "score.answer: True is none of the 2 choices"),
        ({"choices": ["x", "y"]}, "the template does not fit the record: 'answer' is undefined"),
        ({"answer": 0}, "the template does not fit the record: 'choices' is undefined"),
        ({"choices": "xy", "answer": 0}, "score.choices: 'xy': give an expression that is a list"),
        ({"choices": ["x"], "answer": 0}, "score.choices: 1 given: give 2 or more"),
        ({"choices": ["x", ""], "answer": 0}, "score.choices: one of them is empty"),
        ({"choices": ["x", None], "answer": 0}, "score.choices: None is no text"),
        ({"choices": ["2", "0", "1"], "answer": "1"}, "'1' may mean the choices 1 and 2, counted"),
        ({"choices": ["x", "x"], "answer": "x"}, "'x' may mean the choices 0 and 1, counted"),
    ],
)
def test_choices_that_cannot_be_told_are_refused_with_their_line(
    tmp_path: Path, record: dict[str, Any], words: str
) -> None:
    with pytest.raises(TaskError) as caught:
        chosen(tmp_path, record)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'train.jsonl'}:1: ")
    assert words in message
    assert "\n" not in message


def test_a_choice_that_no_model_could_be_given_is_refused(tmp_path: Path) -> None:
    task = opened(tmp_path, score={"kind": "multiple_choice", "choices": CHOICES})
    line = r'{"prompt": "?", "choices": ["x", "\ud800"], "answer": 0}'
    (tmp_path / "train.jsonl").write_text(line, encoding="utf-8")
    assert r"train.jsonl:1: score.choices: '\ud800' holds half a surrogate pair" in refusal(task)


def test_worked_examples_of_a_multiple_choice_end_in_the_right_one(tmp_path: Path) -> None:
    train = [{"prompt": f"{n}?", "choices": ["x", "y"], "answer": n} for n in (0, 1)]
    score = {"kind": "multiple_choice", "choices": CHOICES}
    task = opened(tmp_path, train, score=score, fewshot={"n": 1})
    assert prompts(task) == ["1? y\n\n0?", "0? x\n\n1?"]


@pytest.mark.parametrize(
    "template", ["{{ prompt.__class__.__mro__ }}", "{{ ''.__class__ }}", "{{ self.__init__ }}"]
)
def test_templates_reach_no_python(tmp_path: Path, template: str) -> None:
    assert "does not fit the record" in refusal(opened(tmp_path, prompt=template))
    keys = {"choices": template, "answer": "0"}
    with pytest.raises(TaskError):
        chosen(tmp_path, {"choices": ["x", "y"]}, **keys)


def test_templates_draw_nothing(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="prompt: not a Jinja template: No filter named 'random'"):
        opened(tmp_path, prompt="{{ [1, 2] | random }}")
    assert "'lipsum' is undefined" in refusal(opened(tmp_path, prompt="{{ lipsum() }}"))


# --- real data -----------------------------------------------------------------------------------


@pytest.mark.slow
@real_data
def test_gsm8k_is_divided_beside_its_sealed_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_DATA", str(SHARED))
    data = {
        "source": "gsm8k/train.jsonl",
        "split": "hash",
        "shares": [0.9, 0.1],
        "test": "gsm8k/test.jsonl",
    }
    task = opened(
        tmp_path,
        data=data,
        prompt="Q: {{ question }}\nA:",
        target="{{ answer.split('####')[-1].strip() }}",
        reference=" {{ answer }}",
        fewshot={"n": 5, "choose": "random"},
        score="last_number",
    )
    sizes = task.check_splits()
    assert sizes["train"] + sizes["validation"] == 7473
    assert sizes["test"] == 1319
    example = task.examples("validation")[0]
    assert str(example.prompt).count("Q: ") == 6
    assert example.reference.endswith(f"#### {example.target}")
