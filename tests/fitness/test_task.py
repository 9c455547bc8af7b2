"""Tasks: data errors that name file and line, overlaps, the sealed split, content hashes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import SealedError, TaskError
from evomerge.fitness.data import Origin
from evomerge.fitness.example import Example
from evomerge.fitness.fingerprints import exact_hash
from evomerge.fitness.task import Seen, Split, Task, Unsealed
from evomerge.fitness.task_file import SPLITS
from tests import tiny

TASK: dict[str, Any] = {
    "name": "sums",
    "data": {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
}


def write(folder: Path, changes: dict[str, Any] | None = None, **splits: str) -> Path:
    """A task.yaml with one record per split; `splits` replaces the text of a split's file."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        record = {"prompt": f"{split}?", "answer": split}
        text = splits.get(split, json.dumps(record) + "\n")
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump({**TASK, **(changes or {})}), encoding="utf-8")
    return path


def asked(examples: tuple[Example, ...]) -> list[tuple[Any, str]]:
    """What a model is given, and what is wanted of it."""
    return [(example.prompt, example.target) for example in examples]


def refusal(task: Task, split: Split = "train") -> str:
    """The one-line message with which a split is refused."""
    with pytest.raises(TaskError) as caught:
        task.examples(split)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_examples_are_rendered_in_file_order(tmp_path: Path) -> None:
    lines = [{"q": "一", "a": 1, "unused": None}, {"q": "二", "a": 2}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    changes = {"prompt": "{{ q }} =", "target": "<{{ a }}>"}
    task = Task.open(write(tmp_path, changes, train=text))
    assert task.name == "sums"
    assert asked(task.examples("train")) == [("一 =", "<1>"), ("二 =", "<2>")]


def test_the_default_templates_take_prompt_and_answer(tmp_path: Path) -> None:
    task = Task.open(write(tmp_path))
    assert asked(task.examples("validation")) == [("validation?", "validation")]


def test_markup_in_a_record_stays_as_it_is(tmp_path: Path) -> None:
    record = {"prompt": "a < b & {{ c }}", "answer": '"{% x %}"'}
    task = Task.open(write(tmp_path, train=json.dumps(record)))
    assert asked(task.examples("train")) == [("a < b & {{ c }}", '"{% x %}"')]


@settings(max_examples=50, deadline=None)
@given(text=st.text('a"{}\\\n\t\x00\x7f\x85\u2028é日😀 ', max_size=12), ascii_only=st.booleans())
def test_any_text_comes_back_from_a_record(
    tmp_path_factory: pytest.TempPathFactory, text: str, ascii_only: bool
) -> None:
    record = {"prompt": f"{text}?", "answer": text, "self": 1}
    line = json.dumps(record, ensure_ascii=ascii_only)
    folder = tmp_path_factory.mktemp("task")
    task = Task.open(write(folder, train=line))
    assert asked(task.examples("train")) == [(f"{text}?", text)]
    shutil.rmtree(folder)


@pytest.mark.parametrize("break_", ["\u2028", "\u2029", "\x85"])
def test_a_unicode_line_break_inside_a_string_ends_no_line(tmp_path: Path, break_: str) -> None:
    line = json.dumps({"prompt": f"a{break_}b", "answer": "c"}, ensure_ascii=False)
    assert Task.open(write(tmp_path, train=line)).examples("train")[0].prompt == f"a{break_}b"


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_any_line_ending_will_do(tmp_path: Path, end: str) -> None:
    path = write(tmp_path)
    line = b'{"prompt": "p", "answer": "a"}'
    (tmp_path / "train.jsonl").write_bytes(line + (end or "\n").encode() + line + end.encode())
    assert len(Task.open(path).examples("train")) == 2


GOOD = '{"prompt": "p", "answer": "a"}'


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        (f"{GOOD}\n\n{GOOD}\n", 2, "the line is empty: remove it"),
        (f"{GOOD}\n   \n", 2, "the line is empty: remove it"),
        ("\n", 1, "the line is empty: remove it"),
        (f"{GOOD}\n{GOOD}\n{{'prompt'", 3, "not JSON"),
        (f"{GOOD}\n[1, 2]\n", 2, "not a JSON object: give fields such as prompt and answer"),
        (f'{GOOD}\n"text"\n', 2, "not a JSON object"),
        (f'{GOOD}\n{{"prompt": "p"}}\n', 2, "does not fit the record: 'answer' is undefined"),
        (f'{GOOD}\n{{"prompt": null, "answer": "a"}}\n', 2, "a value is null, and has no text"),
        (f'{GOOD}\n{{"prompt": "p", "answer": null}}\n', 2, "write {{ field or '' }}"),
    ],
)
def test_a_bad_line_is_named_with_its_file(
    tmp_path: Path, text: str, line: int, complaint: str
) -> None:
    message = refusal(Task.open(write(tmp_path, train=text)))
    assert message.startswith(f"{tmp_path / 'train.jsonl'}:{line}: ")
    assert complaint in message


@pytest.mark.parametrize("template", ["{{ a + 1 }}", "{{ 1 / (b - b) }}", "{{ a.x.y }}"])
def test_a_template_that_fails_on_a_record_names_its_line(tmp_path: Path, template: str) -> None:
    task = Task.open(write(tmp_path, {"prompt": template}, train='{"a": "x", "b": 1}'))
    message = refusal(task)
    assert message.startswith(f"{tmp_path / 'train.jsonl'}:1: the template does not fit the record")


def test_a_template_may_say_what_stands_for_null(tmp_path: Path) -> None:
    changes = {"prompt": "{{ a or '' }}{% if b is none %}no b{% endif %}", "target": "{{ c }}"}
    task = Task.open(write(tmp_path, changes, train='{"a": null, "b": null, "c": 0}'))
    (found,) = task.examples("train")
    assert (found.prompt, found.target) == ("no b", "0")


def test_an_empty_file_needs_an_example(tmp_path: Path) -> None:
    message = refusal(Task.open(write(tmp_path, validation="")), "validation")
    assert message == (
        "task 'sums': 'validation.jsonl' is empty: validation needs at least one example"
    )


def test_a_missing_file_is_named_with_its_task_and_split(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    message = refusal(Task.open(path))
    assert message == (
        f"task 'sums': train data '{tmp_path / 'train.jsonl'}' is missing: put it there, or under "
        "a folder that EVOMERGE_DATA names"
    )


def test_data_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "train.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    assert "train.jsonl' is not UTF-8: convert it" in refusal(Task.open(path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"promt": "x"}, ["promt: unknown key", "did you mean 'prompt'?"]),
        (
            {"data": {"train": "a.jsonl", "validation": "b.jsonl"}},
            ["data.test: required, and missing"],
        ),
        ({"generate": {"max_new_tokens": 0}}, ["generate.max_new_tokens: 0", "or equal to 1"]),
        ({"generate": {"stop": ["\n", ""]}}, ["generate.stop: '' stands at the start of every"]),
        ({"score": "exact"}, ["'exact' is unknown", "'exact_match'"]),
        ({"prompt": "{{ prompt"}, ["prompt: not a Jinja template"]),
        ({"target": "{% if %}"}, ["target: not a Jinja template"]),
        ({"data": "train.jsonl"}, ["data: 'train.jsonl'", "give keys and their values"]),
    ],
)
def test_a_wrong_task_file_is_refused_by_key(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    path = write(tmp_path, changes)
    with pytest.raises(TaskError) as caught:
        Task.open(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert all(word in message for word in words)


@pytest.mark.parametrize("text", ["a: [", "- list", "", "\x00"])
def test_a_task_file_that_holds_no_keys_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(text)
    with pytest.raises(TaskError) as caught:
        Task.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"task\.yaml' cannot be read"):
        Task.open(tmp_path / "task.yaml")


@pytest.mark.parametrize(("one", "other"), [("train", "test"), ("train", "validation")])
def test_splits_that_share_a_prompt_are_refused_with_both_places(
    tmp_path: Path, one: str, other: str
) -> None:
    shared = '{"prompt": "same", "answer": "x"}\n'
    splits = {one: shared, other: GOOD + "\n" + shared}
    with pytest.raises(TaskError) as caught:
        Task.open(write(tmp_path, **splits)).check_splits()
    assert f"item 2 of {other} is item 1 of {one}" in str(caught.value)
    assert "remove it from one of them" in str(caught.value)


def test_a_prompt_twice_in_one_split_is_no_overlap(tmp_path: Path) -> None:
    task = Task.open(write(tmp_path, train=f"{GOOD}\n{GOOD}\n"))
    assert task.check_splits() == {"train": 2, "validation": 1, "test": 1}


def test_prompts_are_compared_as_they_are_rendered(tmp_path: Path) -> None:
    changes = {"prompt": "{{ prompt | lower }}"}
    splits = {"train": '{"prompt": "A", "answer": "x"}', "test": '{"prompt": "a", "answer": "y"}'}
    with pytest.raises(TaskError, match="item 1 of test is item 1 of train"):
        Task.open(write(tmp_path, changes, **splits)).check_splits()


def test_a_record_that_is_asked_in_other_words_is_the_same(tmp_path: Path) -> None:
    record = '{"prompt": "A", "answer": "x"}'
    one = Task.open(write(tmp_path / "one", {"name": "one"}, test=record))
    other = {"name": "two", "prompt": "Q: {{ prompt }}"}
    two = Task.open(write(tmp_path / "two", other, train=record))
    seen: Seen = {}
    one.check_splits(seen)
    with pytest.raises(TaskError, match="item 1 of train is item 1 of test of task 'one'"):
        two.check_splits(seen)


def test_item_hashes_of_equal_prompts_are_equal_and_of_others_not(tmp_path: Path) -> None:
    prompts = ["a", "b", "a"]
    text = "".join(
        json.dumps({"prompt": p, "answer": str(i)}) + "\n" for i, p in enumerate(prompts)
    )
    first, second, third = Task.open(write(tmp_path, train=text)).item_hashes("train")
    assert first == third != second


def test_item_hashes_are_of_what_reads_the_same(tmp_path: Path) -> None:
    prompts = ["What is 12+3?", "what is  12 + 3", "What is 12-3?", "What is 1 23?"]
    text = "".join(json.dumps({"prompt": p, "answer": ""}) + "\n" for p in prompts)
    one, two, *others = Task.open(write(tmp_path, train=text)).item_hashes("train")
    assert one == two
    assert len({one, *others}) == 3


def test_fingerprints_are_of_what_the_record_says_and_not_of_its_template(tmp_path: Path) -> None:
    asked = {"prompt": "{% if n %}Say it {{ n }} times: {% endif %}{{ q }}\nAnswer:"}
    records = [{"q": "Where to?", "n": 0}, {"q": "where to", "n": 3}]
    text = "".join(json.dumps({**record, "answer": ""}) + "\n" for record in records)
    others = dict.fromkeys(SPLITS[1:], '{"q": "Where to?", "n": 0, "answer": ""}')
    task = Task.open(write(tmp_path, asked, train=text, **others))
    first, second = task.fingerprints("train")
    assert first.exact != second.exact
    assert second.tokens.tolist()[1:] == first.tokens.tolist()
    (sealed,) = task.fingerprints("test")
    assert (sealed.exact, sealed.text) == (first.exact, first.text)
    assert sealed.exact == task.item_hashes("test")[0]


def test_a_template_that_works_on_its_own_words_is_compared_with_them(tmp_path: Path) -> None:
    shouting = "{% filter upper %}So: {% endfilter %}{{ prompt }}"
    counting = "{% set n %}12{% endset %}{{ n | int + 1 }} {{ prompt }}"
    for number, (prompt, text) in enumerate({shouting: "SO: a", counting: "13 a"}.items()):
        lines = {split: json.dumps({"prompt": "a", "answer": ""}) for split in SPLITS}
        task = Task.open(write(tmp_path / str(number), {"prompt": prompt}, **lines))
        (found,) = task.fingerprints("train")
        assert found.exact == exact_hash(text)
        assert found.text == (exact_hash("a") if prompt == shouting else exact_hash(text))


def test_choices_belong_to_an_item(tmp_path: Path) -> None:
    score = {"kind": "multiple_choice", "choices": "{{ choices }}", "answer": "{{ answer }}"}
    changes = {"prompt": "Which is true?", "target": "", "score": score}
    lines = [{"choices": [f"{n} is odd", f"{n} is even"], "answer": 0} for n in (1, 2, 1)]
    texts = [json.dumps(line) + "\n" for line in lines]
    splits = {"train": "".join(texts), "validation": '{"choices": ["a", "b"], "answer": 0}'}
    splits["test"] = '{"choices": ["c", "d"], "answer": 0}'
    task = Task.open(write(tmp_path, changes, **splits))
    assert task.check_splits() == {"train": 3, "validation": 1, "test": 1}
    one, two, again = task.fingerprints("train")
    assert one.exact == again.exact != two.exact
    assert one.text == again.text != two.text


def test_items_of_a_group_have_one_number_in_test_too(tmp_path: Path) -> None:
    def lines(*documents: str) -> str:
        records = [{"prompt": f"{d} {n}?", "answer": "", "d": d} for n, d in enumerate(documents)]
        return "".join(json.dumps(record) + "\n" for record in records)

    grouped = {"data": {**TASK["data"], "group": "d"}}
    splits = {"train": lines("x", "y", "x"), "validation": lines("z"), "test": lines("u", "v", "v")}
    task = Task.open(write(tmp_path, grouped, **splits))
    found = [task.groups(split) for split in SPLITS]
    assert [None if one is None else one.tolist() for one in found] == [[0, 1, 0], [0], [0, 1, 1]]
    assert Task.open(write(tmp_path / "none")).groups("test") is None


def test_where_records_come_from_is_known_row_by_row(tmp_path: Path) -> None:
    source = {"file": "train.jsonl", "hub": "org/name", "config": "c", "split": "s"}
    data = {
        "source": {**source, "revision": "r"},
        "split": "ranges",
        "ranges": {"train": [1, 3], "validation": [0, 1]},
        "test": "test.jsonl",
    }
    lines = "".join(json.dumps({"prompt": str(n), "answer": ""}) + "\n" for n in range(3))
    task = Task.open(write(tmp_path, {"data": data}, train=lines))
    train, test = task.origin("train"), task.origin("test")
    assert train == Origin("train.jsonl", "org/name", "c", "s", (1, 2))
    assert test == Origin("test.jsonl", None, None, None, (0,))


@pytest.mark.slow
def test_the_packaged_tasks_have_splits_that_do_not_overlap() -> None:
    for path in sorted((tiny.ROOT / "fitness").glob("*list_ops*/task.yaml")):
        assert min(Task.open(path).check_splits().values()) >= 100


@pytest.mark.parametrize("leave", [None, Unsealed(""), Unsealed("0" * 64)])
def test_the_test_split_is_sealed_without_leave_for_this_content(
    tmp_path: Path, leave: Unsealed | None
) -> None:
    task = Task.open(write(tmp_path))
    with pytest.raises(SealedError, match="task 'sums': the test split is sealed"):
        task.examples("test", leave)


def test_leave_for_another_split_does_not_open_the_test_split(tmp_path: Path) -> None:
    task = Task.open(write(tmp_path))
    with pytest.raises(SealedError):
        task.examples("test", Unsealed(task.content("train")))


def test_the_test_split_opens_with_leave_for_its_content_and_stays_sealed_for_others(
    tmp_path: Path,
) -> None:
    task = Task.open(write(tmp_path))
    opened = task.examples("test", Unsealed(task.identity("test")))
    assert asked(opened) == [("test?", "test")]
    with pytest.raises(SealedError):
        task.examples("test")


def test_leave_ends_when_the_test_data_changes(tmp_path: Path) -> None:
    path = write(tmp_path)
    leave = Unsealed(Task.open(path).identity("test"))
    (tmp_path / "test.jsonl").write_text(GOOD)
    with pytest.raises(SealedError):
        Task.open(path).examples("test", leave)


def test_openings_are_counted_for_the_records_however_they_are_asked(tmp_path: Path) -> None:
    path = write(tmp_path)
    records = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}]
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    before = Task.open(path).identity("test")
    data.write_text("".join(json.dumps(r, indent=None) + "\n" for r in reversed(records))[:-1])
    task = yaml.safe_load(path.read_text()) | {"generate": {"max_new_tokens": 9}}
    path.write_text(yaml.safe_dump(task))
    assert Task.open(path).identity("test") == before
    data.write_text(json.dumps(records[0]))
    assert Task.open(path).identity("test") != before


def contents(path: Path) -> list[str]:
    task = Task.open(path)
    return [task.content(split) for split in SPLITS]


def test_a_content_hash_is_64_hex_digits_of_its_own_for_each_split(tmp_path: Path) -> None:
    found = contents(write(tmp_path))
    assert len(set(found)) == 3
    assert all(len(content) == 64 and int(content, 16) >= 0 for content in found)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "{{ prompt }} "},
        {"target": "{{ answer }}."},
        {"generate": {"max_new_tokens": 8}},
        {"generate": {"stop": ["\n"]}},
        {"teacher_forced": True},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_the_content_hash_depends_on_what_is_asked_and_how_it_is_scored(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    before, after = contents(write(tmp_path / "a")), contents(write(tmp_path / "b", changes))
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_the_content_hash_depends_on_the_records_of_its_own_split_alone(tmp_path: Path) -> None:
    before = contents(write(tmp_path / "a"))
    other = '{"prompt": "validation?", "answer": "validation", "unused": 1}\n'
    after = contents(write(tmp_path / "b", validation=other))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    spaced = '{"answer":   "validation", "prompt": "validation?"}'
    assert contents(write(tmp_path / "c", validation=spaced)) == before


def test_the_content_hash_depends_on_the_order_of_the_records(tmp_path: Path) -> None:
    lines = ['{"prompt": "a", "answer": "b"}', '{"prompt": "c", "answer": "d"}']
    before = Task.open(write(tmp_path / "a", train="\n".join(lines)))
    after = Task.open(write(tmp_path / "b", train="\n".join(reversed(lines))))
    assert before.content("train") != after.content("train")
    assert before.identity("train") == after.identity("train")


def test_the_content_hash_depends_neither_on_the_name_nor_on_where_the_files_are(
    tmp_path: Path,
) -> None:
    before = contents(write(tmp_path / "a"))
    data = {split: f"d/{split}.json" for split in SPLITS}
    elsewhere = write(tmp_path / "b", {"name": "other", "data": data})
    (tmp_path / "b" / "d").mkdir()
    for split in SPLITS:
        (tmp_path / "b" / f"{split}.jsonl").rename(tmp_path / "b" / "d" / f"{split}.json")
    assert contents(elsewhere) == before


def records(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"{n} + 1 =", "answer": n + 1} for n in range(first, first + count)]


def divided(folder: Path, found: list[dict[str, Any]], **data: Any) -> Task:
    """A task over one file with these records, as `data` says."""
    tiny.write_jsonl(folder / "all.jsonl", found)
    return Task.open(write(folder, {"data": {"source": "all.jsonl", "split": "hash", **data}}))


def prompts(task: Task) -> dict[Split, list[str]]:
    """Of each split, by the one way there is to read all of them."""
    leave = Unsealed(task.identity("test"))
    return {s: [e.prompt for e in task.examples(s, leave if s == "test" else None)] for s in SPLITS}


def test_a_source_is_divided_whole_in_file_order_by_its_shares(tmp_path: Path) -> None:
    found = prompts(divided(tmp_path, records(1000), shares=[0.5, 0.3, 0.2]))
    numbers = {split: [int(text.split()[0]) for text in texts] for split, texts in found.items()}
    assert all(values == sorted(values) for values in numbers.values())
    assert sorted(n for values in numbers.values() for n in values) == list(range(1000))
    for split, share in zip(SPLITS, (0.5, 0.3, 0.2), strict=True):
        assert abs(len(numbers[split]) - 1000 * share) < 60


def test_a_record_stays_in_its_split_whatever_stands_beside_it(tmp_path: Path) -> None:
    before = prompts(divided(tmp_path / "a", records(40)))
    reordered = [dict(reversed(record.items())) for record in reversed(records(60))]
    after = prompts(divided(tmp_path / "b", reordered))
    assert all(set(before[split]) < set(after[split]) for split in SPLITS)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(copies=st.lists(st.integers(0, 39), min_size=1, max_size=20))
def test_copies_of_a_record_share_its_split(
    tmp_path_factory: pytest.TempPathFactory, copies: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("task")
    found = divided(folder, records(40) + [records(40)[n] for n in copies]).check_splits()
    assert sum(found.values()) == 40 + len(copies)
    shutil.rmtree(folder)


def test_a_source_beside_train_is_halved_into_validation_and_test(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "mine.jsonl", records(5, first=1000))
    task = divided(tmp_path, records(400), train="mine.jsonl")
    sizes = task.check_splits()
    assert sizes["train"] == 5
    assert sizes["validation"] + sizes["test"] == 400
    assert abs(sizes["test"] - 200) < 40


def test_the_test_part_of_a_source_is_sealed_too(tmp_path: Path) -> None:
    task = divided(tmp_path, records(40))
    for leave in (None, Unsealed(task.content("train")), Unsealed(task.identity("validation"))):
        with pytest.raises(SealedError):
            task.examples("test", leave)


def test_a_new_record_changes_the_content_of_its_own_split_alone(tmp_path: Path) -> None:
    before = contents(divided(tmp_path / "a", records(40)).path)
    task = divided(tmp_path / "b", records(41))
    (grown,) = (s for s, texts in prompts(task).items() if "40 + 1 =" in texts)
    after = contents(task.path)
    assert [s for s, a, b in zip(SPLITS, before, after, strict=True) if a != b] == [grown]


def test_a_split_that_no_record_falls_into_is_named(tmp_path: Path) -> None:
    task = divided(tmp_path, records(2), shares=[0.98, 0.01, 0.01])
    assert "of the records of 'all.jsonl' none falls into validation" in refusal(task, "validation")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"source": "a.jsonl", "split": "random"}, "data.split: 'random'"),
        ({"source": "a.jsonl"}, "data.split: required, and missing"),
        (
            {"source": "a.jsonl", "split": "hash", "share": 1},
            "data.share: unknown key: did you mean 's",
        ),
        (
            {"source": "a.jsonl", "split": "hash", "shares": [0.5, 0.5]},
            "shares: give 3: of train, val",
        ),
        (
            {"source": "a.jsonl", "split": "hash", "shares": [0.5, 0.5, 0.5]},
            "they add up to 1.5, not",
        ),
        ({"source": "a.jsonl", "split": "hash", "shares": [1, 0, 0]}, "data.shares[0]: 1"),
        (
            {"source": "a.jsonl", "train": "b.jsonl", "split": "hash", "shares": [0.2, 0.2, 0.6]},
            "shares: give 2: of validation, test",
        ),
    ],
)
def test_a_wrong_division_is_refused_by_key(
    tmp_path: Path, data: dict[str, Any], words: str
) -> None:
    with pytest.raises(TaskError) as caught:
        Task.open(write(tmp_path, {"data": data}))
    assert words in str(caught.value)
