"""Which tasks of lm-eval are opened, how, and what is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import TaskError
from evomerge.fitness.task import Task
from tests import tiny
from tests.fitness.harness.sums import CHOICE, write


@pytest.mark.slow
def test_lm_eval_is_not_loaded_for_a_task_of_evomerge() -> None:
    path = tiny.ROOT / "fitness" / "ja_list_ops" / "task.yaml"
    code = f"""
import sys
from pathlib import Path
from evomerge.fitness.task import Task
Task.open(Path({str(path)!r})).examples("train")
sys.exit(" ".join({{"lm_eval", "datasets", "pandas"}} & sys.modules.keys()) or None)
"""
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert end.returncode == 0, end.stderr


def test_what_is_asked_is_as_lm_eval_has_it(tmp_path: Path) -> None:
    task = Task.open(write(tmp_path, description="Add.\n"))
    item = task.examples("validation")[3]
    assert item.prompt == "Add.\nQuestion: 1003+1003\nAnswer:"
    assert (item.question, item.target) == ("Question: 1003+1003\nAnswer:", "2006")
    assert item.reference == " 2006"
    assert task.name == "sums"
    assert task.scorer.generates
    assert task.check_splits() == {"train": 20, "validation": 20, "test": 20}
    (note,) = task.notes
    assert "scored by exact_match,none" in note


def test_choices_are_part_of_what_an_item_asks(tmp_path: Path) -> None:
    task = Task.open(write(tmp_path, **CHOICE))
    item = task.examples("train")[3]
    assert (item.choices, item.right, item.target) == (("6", "none"), 0, "6")
    assert item.question.endswith("Answer:\n6\nnone")
    assert not task.scorer.generates


def test_what_may_come_before_a_text_are_choices_too(tmp_path: Path) -> None:
    changes = {**CHOICE, "doc_to_text": "right", "doc_to_target": "question"}
    item = Task.open(write(tmp_path, **changes)).examples("train")[3]
    assert (item.prompt, item.choices, item.target) == ("6", ("6", "none"), "3+3")


def test_the_content_of_a_split_depends_on_what_is_asked_not_on_names_and_places(
    tmp_path: Path,
) -> None:
    def content(folder: str, metric: str | None = None, chat: bool = False, **more: Any) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        path = write(tmp_path / folder, **{**CHOICE, **more})
        return Task.open(path, chat, metric).content("validation")

    same = content("here")
    assert content("there", task="other", tag="some") == same
    assert content("there", "acc,none") == same
    changed = [
        content("there", "acc_norm"),
        content("there", chat=True),
        content("there", target_delimiter=""),
        content("there", n=21),
        content("there", metadata={"version": 2.0}),
    ]
    assert len({same, *changed}) == 6


def test_the_metric_may_be_chosen_and_the_filter(tmp_path: Path) -> None:
    chains = [
        {"name": name, "filter": [{"function": "take_first"}]} for name in ("strict", "loose")
    ]
    path = write(tmp_path, filter_list=chains)
    assert "exact_match,strict" in Task.open(path).notes[0]
    assert "exact_match,loose" in Task.open(path, metric="exact_match,loose").notes[0]
    with pytest.raises(TaskError, match="'lose' is none of its filters: did you mean 'loose'"):
        Task.open(path, metric="exact_match,lose")
    with pytest.raises(TaskError, match="metric: 'acc' is none of its: known: exact_match"):
        Task.open(path, metric="acc")


def test_a_metric_of_the_whole_corpus_is_passed_over_and_refused_by_name(tmp_path: Path) -> None:
    metrics = [{"metric": "perplexity"}, {"metric": "acc"}]
    changes = {"output_type": "loglikelihood", "generation_kwargs": None, "metric_list": metrics}
    path = write(tmp_path, **changes)
    assert "scored by acc,none" in Task.open(path).notes[0]
    with pytest.raises(TaskError, match=r"'perplexity' is no mean over examples .*: name acc"):
        Task.open(path, metric="perplexity")


def test_a_metric_is_not_chosen_for_a_task_of_evomerge(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="metric: 'acc' is for tasks of lm-eval: leave it out"):
        Task.open(tiny.write_task(tmp_path), metric="acc")


def test_a_conversation_has_the_turns_of_lm_eval(tmp_path: Path) -> None:
    path = write(tmp_path, description="Add.", num_fewshot=1, fewshot_split="train")
    item = Task.open(path, chat=True).examples("validation")[3]
    assert not isinstance(item.prompt, str)
    assert [turn.role for turn in item.prompt] == ["system", "user", "assistant", "user"]
    assert item.prompt[-1].text == "Question: 1003+1003\nAnswer:"
    assert item.reference == "2006"


def test_a_file_may_include_another_and_wins_over_it(tmp_path: Path) -> None:
    write(tmp_path, description="Add.\n").rename(tmp_path / "_base")
    path = tmp_path / "mine.yaml"
    path.write_text("include: _base\ntask: mine\ndoc_to_text: question\n")
    task = Task.open(path)
    assert (task.name, task.examples("train")[1].prompt) == ("mine", "Add.\n1+1")


def test_data_are_found_beside_the_file_or_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    (tmp_path / "deep").mkdir()
    moved = path.rename(tmp_path / "deep" / "sums.yaml")
    monkeypatch.chdir(tmp_path)
    assert len(Task.open(moved).examples("train")) == 20
    monkeypatch.chdir(tmp_path / "deep")
    with pytest.raises(TaskError, match=r"lm-eval cannot open it: .*\.jsonl"):
        Task.open(moved)


@pytest.mark.parametrize("folder", [False, True])
def test_data_that_changed_are_read_again(tmp_path: Path, folder: bool) -> None:
    changes = {"dataset_path": "records", "dataset_kwargs": None} if folder else {}
    (tmp_path / "records").mkdir()
    for n in (3, 5):
        path = write(tmp_path, n=n, validation_split=None, **changes)
        for split in ("train", "test"):
            (tmp_path / f"{split}.jsonl").replace(tmp_path / "records" / f"{split}.jsonl")
            if not folder:
                (tmp_path / "records" / f"{split}.jsonl").rename(tmp_path / f"{split}.jsonl")
        assert len(Task.open(path).examples("train")) == n
    assert not (tmp_path / "datasets").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_type": "loglikelihood_rolling"}, "measures a whole corpus"),
        ({"doc_to_image": "picture"}, "models are given text alone"),
        ({"unsafe_code": True}, "unsafe_code: lm-eval runs what a model writes without a sandbox"),
        ({"doc_to_txt": "x"}, "doc_to_txt: unknown key: did you mean 'doc_to_text'?"),
        ({"doc_to_text": None}, "doc_to_text: required, and missing"),
        ({"process_docs": "mine.process"}, "process_docs: no Python is run"),
        ({"process_results": "mine.process"}, "process_results: no Python is run"),
        ({"custom_dataset": "mine.load"}, "custom_dataset: no Python is run"),
        ({"class": "mine.Task"}, "class: no Python is run"),
        ({"dataset_path": "pandas"}, "'pandas' reads pickles, which may run code"),
        ({"metric_list": [{"metric": "exact_mach"}]}, "did you mean 'exact_match'?"),
        ({"metric_list": [{"metric": "rouge", "hf_evaluate": True}]}, "'rouge' is none of lm-eval"),
        ({"metric_list": [{"metric": "bleu"}]}, "'bleu' is no mean over examples"),
        ({"training_split": "trian"}, "'trian' is none of data_files: did you mean 'train'?"),
        ({"doc_to_text": "{{ qestion }}"}, "UndefinedError: 'qestion' is undefined"),
        ({"doc_to_text": "{{ question.__class__.__mro__ }}"}, "SecurityError: access to"),
        ({"include": "sums.yaml"}, "includes itself"),
        ({"include": "other.yaml"}, "cannot be read"),
        (
            {"training_split": None, "validation_split": None, "test_split": None},
            "no split is named",
        ),
    ],
)
def test_what_cannot_be_asked_or_scored_by_example_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(TaskError) as caught:
        Task.open(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_to_text": "{{ 1 // (answer | int - 6) }}"}, "record 4 of train: ZeroDivisionError"),
        (
            {**CHOICE, "doc_to_target": "{{ 2 if answer == '6' else 0 }}"},
            "record 4 of train: its label 2 is none of its 2 choices",
        ),
        ({"generation_kwargs": {"until": "x", "num_beams": 3}}, "'num_beams' cannot be set"),
        ({"generation_kwargs": {"until": "x", "do_sample": True}}, "needs a temperature above 0"),
    ],
)
def test_what_cannot_be_asked_of_a_record_is_said_of_the_record(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(TaskError, match=message):
        Task.open(path).examples("train")


def test_in_a_conversation_no_reply_is_begun(tmp_path: Path) -> None:
    path = write(tmp_path, gen_prefix="It is")
    assert str(Task.open(path).examples("train")[0].prompt).endswith("It is")
    with pytest.raises(TaskError, match="gen_prefix: 'It is': in a conversation"):
        Task.open(path, chat=True)


@pytest.mark.parametrize("beneath", [False, True])
def test_python_functions_are_not_run(tmp_path: Path, beneath: bool) -> None:
    (tmp_path / "utils.py").write_text("raise SystemExit('it ran')")
    path = tmp_path / "task.yaml"
    path.write_text("task: sums\nprocess_docs: !function utils.process\n")
    if beneath:
        path = path.rename(tmp_path / "beneath.yaml").with_name("task.yaml")
        path.write_text("include: beneath.yaml\ntask: sums\n")
    with pytest.raises(TaskError, match="no Python is run: write Jinja in place of !function"):
        Task.open(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arc_easi", "lm-eval has no task 'arc_easi': did you mean 'arc_easy'"),
        ("zzzzqq", "lm-eval has no task 'zzzzqq': see `lm-eval ls tasks`"),
        ("mmlu", "'mmlu' is a group of tasks: name one or more of mmlu_stem, mmlu_other"),
        ("math_word_problems", "is a tag of tasks such as .*gsm8k"),
        ("humaneval", "unsafe_code"),
        ("wikitext", "loglikelihood_rolling"),
    ],
)
def test_of_the_tasks_that_come_with_lm_eval_some_are_refused(name: str, message: str) -> None:
    with pytest.raises(TaskError, match=f"^lm-eval:{name}: .*{message}"):
        Task.open(Path(f"lm-eval:{name}"))


@pytest.mark.slow
def test_every_task_is_found_where_lm_eval_itself_finds_it() -> None:
    from lm_eval.tasks import TaskManager

    from evomerge.fitness.harness.opening import _catalogue

    manager = TaskManager()
    entries = {name: manager.task_index[name].yaml_path for name in manager.all_subtasks}
    tasks, groups = _catalogue()
    assert {name: path.resolve() for name, path in tasks.items()} == entries
    assert groups.keys() >= set(manager.all_groups)


@pytest.mark.slow
def test_lm_evals_own_file_opens_on_a_copy_of_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"question": f"{n}+{n}?", "answer": f"So\n#### {2 * n}"} for n in range(40)]
    folder = tmp_path / "openai" / "gsm8k"
    tiny.write_jsonl(folder / "train.jsonl", records[:20])
    tiny.write_jsonl(folder / "test.jsonl", records[20:])
    files = [{"split": split, "path": f"{split}.jsonl"} for split in ("train", "test")]
    about = yaml.safe_dump({"configs": [{"config_name": "main", "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{about}---\n")
    monkeypatch.chdir(tmp_path)
    task = Task.open(Path("lm-eval:gsm8k"), metric="exact_match,flexible-extract")
    assert sum(task.check_splits().values()) == 40
    prompt = str(task.examples("train")[0].prompt)
    assert prompt.count("Question:") == 6
    assert prompt.endswith("Question: 0+0?\nAnswer:")


def test_what_an_item_says_itself_is_what_fills_its_template(tmp_path: Path) -> None:
    task = Task.open(write(tmp_path))
    other = Task.open(write(tmp_path / "other", doc_to_text="Please add {{question}}"))
    plain = Task.open(write(tmp_path / "plain", doc_to_text="question"))
    one, two, three = (opened.fingerprints("test")[3] for opened in (task, other, plain))
    assert one.text == two.text == three.text
    assert len({one.exact, two.exact, three.exact}) == 3
    assert task.groups("train") is None


def test_choices_belong_to_what_an_item_says(tmp_path: Path) -> None:
    first = Task.open(write(tmp_path, **CHOICE)).fingerprints("train")[3]
    bare = Task.open(write(tmp_path / "bare")).fingerprints("train")[3]
    assert len(first.tokens) == len(bare.tokens) + 2


def test_where_records_of_lm_evals_come_from_is_known(tmp_path: Path) -> None:
    task = Task.open(write(tmp_path, n=30, test_split=None))
    rows = [task.origin(split).rows for split in ("train", "validation", "test")]
    assert task.origin("test").split == task.origin("validation").split == "val"
    assert task.origin("train").split == "train"
    assert rows[0] == tuple(range(30))
    assert sorted([*(rows[1] or ()), *(rows[2] or ())]) == list(range(30))
    records = [item.record["question"] for item in task.examples("validation")]
    assert records == [f"{1000 + row}+{1000 + row}" for row in rows[1] or ()]
