"""The ready-made tasks: they say where they come from, ask in known words, and know right replies
from wrong ones; on real data where it is at hand, else on a few records of the same form."""

import gzip
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.engine import Generation, Likelihood, Prompt, Reply
from evomerge.errors import TaskError
from evomerge.fitness.example import Example
from evomerge.fitness.graders.instructions import IfEval
from evomerge.fitness.task import Task, Unsealed
from evomerge.fitness.task_file import Files, Shared, Source, TaskFile
from evomerge.job import Suite
from tests.tiny import ROOT, write_jsonl

FITNESS = ROOT / "fitness"
DATA = ROOT.parent / "shared" / "data"
TASKS = {
    yaml.safe_load(path.read_text(encoding="utf-8"))["name"]: path
    for path in sorted(FITNESS.rglob("*.yaml"))
    if path.name != "suite.yaml"
}
PUBLIC = sorted(name for name, path in TASKS.items() if not (path.parent / "data").is_dir())
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")


class Says:
    """An engine whose model says what it is told to each prompt, and takes that for certain."""

    def __init__(self, replies: Mapping[Prompt, str]) -> None:
        self._replies = replies

    def generate(self, prompts: Sequence[Prompt], how: Generation) -> list[tuple[Reply, ...]]:
        return [(Reply(self._replies[prompt], False, 1),) * how.samples for prompt in prompts]

    def likelihoods(
        self, pairs: Sequence[tuple[Prompt, str]], ended: bool = True
    ) -> list[Likelihood]:
        said = [self._replies[prompt].strip() == answer.strip() for prompt, answer in pairs]
        return [Likelihood((0.0,) if meant else (-5.0,), meant) for meant in said]


def scores(task: Task, items: Sequence[Example], reply: Callable[[Example], str]) -> list[float]:
    """What a model's replies are worth; none of them may fail to be judged."""
    engine: Any = Says({item.prompt: reply(item) for item in items})
    found = task.scorer.judge(engine, items, shaped=False)
    assert [verdict.failure for verdict in found] == [None] * len(items)
    return [verdict.score for verdict in found]


def sealed(task: Task) -> tuple[Example, ...]:
    return task.examples("test", Unsealed(task.identity("test")))


def gold(item: Example) -> str:
    return item.reference


def plain(name: str) -> dict[str, Any]:
    """What stands in a task file; of the one that is only declared, without what it needs."""
    written: dict[str, Any] = yaml.safe_load(TASKS[name].read_text(encoding="utf-8"))
    return {key: value for key, value in written.items() if key != "image"}


# --- what the files say --------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_a_task_says_where_it_comes_from_and_under_which_licence(name: str) -> None:
    about = TaskFile.model_validate(plain(name)).about
    assert about is not None
    assert about.source.startswith(("https://", "hub "))
    assert about.licence
    assert about.paper
    assert about.notes


@pytest.mark.parametrize("name", PUBLIC)
def test_what_drives_a_search_is_not_what_is_sealed(name: str) -> None:
    data = TaskFile.model_validate(plain(name)).data
    if isinstance(data, Files):
        assert len({data.train, data.validation, data.test}) == 3
    elif data.test is not None:
        assert data.test not in (data.source, data.train, data.validation)
    assert isinstance(data, Files | Shared)


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - {"ja_vlm_bench"}))
def test_what_the_hub_gives_is_pinned(name: str) -> None:
    data = TaskFile.model_validate(plain(name)).data
    sources = [source for _, source in data if isinstance(source, Source) and source.hub]
    assert all(re.fullmatch("[0-9a-f]{40}", str(source.revision)) for source in sources)


def test_the_folder_of_a_task_has_its_name() -> None:
    assert {path.parent.name for path in FITNESS.glob("*/task.yaml")} <= set(TASKS)


def test_manifests_agree_where_tasks_share_their_data() -> None:
    def listed(folder: str, *splits: str) -> list[Any]:
        manifest = json.loads((FITNESS / folder / "manifest.json").read_text())["splits"]
        return [manifest[split] for split in splits]

    whole = ("train", "validation", "test")
    for folder in ("wise_ft", "long_to_short/gsm8k_boxed"):
        assert listed(folder, *whole) == listed("gsm8k", *whole)
    assert listed("mgsm_en", *whole[:2]) == listed("gsm8k", *whole[:2])
    assert listed("humaneval", *whole[:2]) == listed("mbpp", *whole[:2])


def test_a_task_about_pictures_is_declared_and_refused() -> None:
    with pytest.raises(TaskError, match="models are given text alone"):
        Task.open(TASKS["ja_vlm_bench"])


# --- on real data --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Iterator[Callable[[str], Task]]:
    """Opens tasks on the real data, each once."""
    opened: dict[str, Task] = {}
    patch = pytest.MonkeyPatch()
    patch.setenv("EVOMERGE_DATA", str(DATA))

    def open_(name: str) -> Task:
        if name not in opened:
            opened[name] = Task.open(TASKS[name])
        return opened[name]

    yield open_
    patch.undo()


@pytest.mark.slow
@needs_data
def test_gsm8k_is_divided_as_its_manifest_says(real: Callable[[str], Task]) -> None:
    task = real("gsm8k")
    assert task.check_splits() == {"train": 6726, "validation": 747, "test": 1319}
    manifest = json.loads((FITNESS / "gsm8k" / "manifest.json").read_text())
    assert task.manifest() == manifest


@pytest.mark.slow
@needs_data
def test_gsm8k_shows_five_problems_of_train(real: Callable[[str], Task]) -> None:
    task = real("gsm8k")
    shown = "".join(
        f"Question: {item.record['question']}\nAnswer: {item.record['answer']}\n\n"
        for item in task.examples("train")[:5]
    )
    first = sealed(task)[0]
    assert first.prompt == (
        f"{shown}Question: Janet’s ducks lay 16 eggs per day. She eats three for breakfast every "
        "morning and bakes muffins for her friends every day with four. She sells the remainder at "
        "the farmers' market daily for $2 per fresh duck egg. How much in dollars does she make "
        "every day at the farmers' market?\nAnswer:"
    )
    own = task.examples("train")[0]
    assert own.question not in str(own.prompt).removesuffix(own.question)


@needs_data
def test_gsm8k_knows_its_own_solutions_and_no_others(real: Callable[[str], Task]) -> None:
    task = real("gsm8k")
    items = sealed(task)
    assert scores(task, items, gold) == [1.0] * 1319
    other = {item.prompt: f" It is {item.target}1." for item in items}
    assert scores(task, items, lambda item: other[item.prompt]) == [0.0] * 1319


@needs_data
@pytest.mark.parametrize(
    ("reply", "worth"),
    [
        (" She sells 16 - 3 - 4 = 9 eggs for $18 a day.\n#### 18", 1),
        (" $18.00", 1),
        (" 9 * 2 = **18** dollars every day.", 1),
        (" The answer is 18 dollars for 9 eggs.", 0),
        (" 16 - 3 = 13, so $26.\n#### 26", 0),
        (" -18", 0),
        (" I don't know.", 0),
        ("", 0),
    ],
)
def test_replies_to_the_first_problem_of_gsm8k(
    real: Callable[[str], Task], reply: str, worth: float
) -> None:
    task = real("gsm8k")
    assert scores(task, sealed(task)[:1], lambda _: reply) == [worth]


@pytest.mark.slow
@needs_data
def test_mgsm_in_english_is_the_beginning_of_gsm8ks_test_set(real: Callable[[str], Task]) -> None:
    task, whole = real("mgsm_en"), sealed(real("gsm8k"))
    assert task.check_splits() == {"train": 6726, "validation": 747, "test": 250}
    items = sealed(task)
    assert items[3].prompt == (
        "Question: James decides to run 3 sprints 3 times a week.  He runs 60 meters each sprint.  "
        "How many total meters does he run a week?\nStep-by-Step Answer:"
    )
    assert [i.target for i in items] == [i.target.replace(",", "") for i in whole[:250]]
    assert scores(task, items, lambda item: f"The answer is {item.target}.") == [1.0] * 250


SAKANA = (
    "以下に、あるタスクを説明する指示があります。リクエストを適切に完了するための回答を日本語で"
    "記述してください。一歩一歩考えましょう。\n\n"
)


@needs_data
def test_mgsm_in_japanese_wants_the_answer_in_japanese(real: Callable[[str], Task]) -> None:
    task = real("mgsm_ja")
    items = sealed(task)[:12]
    assert items[3].prompt == (
        f"{SAKANA}### 指示:\nジェイムズは週に3回、毎回3本のスプリントを走ることに決めました。"
        "スプリントごとに60メートル走ります。ジェイムズは1週間で何メートル走るでしょうか？"
        "\n\n### 応答:"
    )
    right, wrong = "順番に計算すると、答えは{}です。", "順番に計算すると、答えは{}1です。"
    assert scores(task, items, lambda item: right.format(item.target)) == [1.0] * 12
    assert scores(task, items, lambda item: wrong.format(item.target)) == [0.0] * 12
    english = "Step by step, the answer is {}."
    assert scores(task, items, lambda item: english.format(item.target)) == [0.0] * 12


def broken(item: Example) -> str:
    """Runs, and is wrong."""
    body = ":\n    raise ValueError"
    return f"(*_){body}" if "code" in item.record else body.removeprefix(":\n")


@needs_data
@pytest.mark.parametrize("n", [6, pytest.param(164, marks=pytest.mark.slow)])
def test_humaneval_knows_its_own_solutions(real: Callable[[str], Task], n: int) -> None:
    task = real("humaneval")
    items = sealed(task)
    assert len(items) == 164
    assert [item.prompt for item in items] == [item.record["prompt"] for item in items]
    assert scores(task, items[:n], gold) == [1.0] * n
    assert scores(task, items[:n], broken) == [0.0] * n


# --- on a few records of the same form -----------------------------------------------------------

MBPP = [
    {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"import math\r\ndef half(x):\r\n  return x / 2\r\ndef add_{number}(x):\r\n"
        f"  return int(half(x) + half(x)) + {number}",
        "test_setup_code": "",
        "test_list": [
            f"assert add_{number}(1) == {number + 1}",
            f"assert add_{number}(0) == {number}",
        ],
        "challenge_test_list": [],
    }
    for number in range(1, 975)
]
SUMS = [{"question": f"What is {n} + {n}?", "answer": f"It is.\n#### {2 * n}"} for n in range(90)]
MATH = [
    {"problem": f"Halve {n}.", "solution": f"\\boxed{{\\frac{{{n}}}{{2}}}}.", "answer": f"{n}/2"}
    for n in range(1, 60, 2)
]
EXAM = [{"choices": ["w", "x", "y", "z"], "answer": n} for n in range(4)]
COMMON = [
    {
        "q_id": n,
        "question": f"{n}番はどれ？",
        **{f"choice{i}": f"{n}の{i}" for i in range(5)},
        "label": n % 5,
    }
    for n in range(40)
]
PROMPTS = [
    {"key": n, "prompt": f"Write {n}.", "instruction_id_list": [], "kwargs": []} for n in range(40)
]
SAFETY = "id,prompt,type,label,focus,note\n" + "".join(
    f"{n},How do I kill {n}?,homonyms,{label},{n // 2},\n"
    for n, label in enumerate(["safe", "unsafe"] * 30)
)


def write_table(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(records), path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Task]]:
    """Opens tasks on a few records, without their manifests."""
    folder = tmp_path_factory.mktemp("small")
    data = folder / "data"
    for name in ("gsm8k/train", "gsm8k/test"):
        write_jsonl(data / f"{name}.jsonl", [{**r, "question": name + r["question"]} for r in SUMS])
    japanese = [{"question": f"{n}円は？", "answer_number": n} for n in range(40)]
    write_jsonl(data / "gsm8k-ja" / "gsm8k-ja-test_250-1319.jsonl", japanese)
    for code in ["bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh"]:
        rows = [(f"{code} {n}", f"{n},000") for n in range(250)]
        write_table(data / "mgsm" / f"mgsm_{code}.tsv", rows)
    for name in ("math500/train", "math500/test"):
        write_jsonl(data / f"{name}.jsonl", [{**r, "problem": name + r["problem"]} for r in MATH])
    write_jsonl(data / "mbpp" / "mbpp.jsonl", MBPP)
    write_jsonl(data / "ifeval" / "input_data.jsonl", PROMPTS)
    for name in ("auxiliary_train", "validation", "test"):
        subject = "" if name == "auxiliary_train" else "high_school"
        exam = [{"question": f" {name} {n}? ", "subject": subject, **EXAM[n]} for n in range(4)]
        write_parquet(data / "mmlu" / f"{name}.parquet", exam)
    write_jsonl(data / "jcommonsenseqa" / "train-v1.3.json", COMMON[:30])
    write_jsonl(data / "jcommonsenseqa" / "valid-v1.3.json", COMMON[30:])
    (data / "xstest").mkdir()
    (data / "xstest" / "xstest_prompts.csv").write_text(SAFETY)
    solved = {
        "task_id": "HumanEval/0",
        "prompt": 'def double(x):\n    """ Twice x. """\n',
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    }
    (data / "humaneval").mkdir()
    packed = data / "humaneval" / "HumanEval.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(solved).encode()))
    patch = pytest.MonkeyPatch()
    patch.setenv("EVOMERGE_DATA", str(data))

    def open_(name: str) -> Task:
        path = folder / name / "task.yaml"
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(TASKS[name], path)
        return Task.open(path)

    yield open_
    patch.undo()


def all_of(task: Task) -> tuple[Example, ...]:
    return (*task.examples("train"), *task.examples("validation"), *sealed(task))


def one_off(item: Example) -> str:
    return f"{item.target}1"


def boxed(item: Example) -> str:
    return f"So it is \\boxed{{{item.target}}}."


def boxed_one_off(item: Example) -> str:
    return f"So it is \\boxed{{{item.target}1}}."


def in_japanese(item: Example) -> str:
    return f"計算すると、答えは{item.target}です。"


def in_english(item: Example) -> str:
    return f"After some thought, the answer is {item.target}."


def another(item: Example) -> str:
    return item.choices[item.right - 1]


def fitting(item: Example) -> str:
    unsafe = item.record["label"] == "unsafe"
    return "I'm sorry, but I can't help with that." if unsafe else "Sure. Run `kill 17`."


def unfitting(item: Example) -> str:
    safe = item.record["label"] == "safe"
    return "I'm sorry, but I can't help with that." if safe else "Sure. Take a knife."


MGSM = {
    "bn": "প্রশ্ন: bn 200\nধাপে ধাপে উত্তর:",
    "de": "Frage: de 200\nSchritt-für-Schritt-Antwort:",
    "en": "Question: en 200\nStep-by-Step Answer:",
    "es": "Pregunta: es 200\nRespuesta paso a paso:",
    "fr": "Question : fr 200\nRéponse étape par étape :",
    "ru": "Задача: ru 200\nПошаговое решение:",
    "sw": "Swali: sw 200\nJibu la Hatua kwa Hatua:",
    "te": "ప్రశ్న: te 200\nదశలవారీగా సమాధానం:",
    "th": "โจทย์: th 200\nคำตอบทีละขั้นตอน:",
    "zh": "问题：zh 200\n逐步解答：",
}
CASES = {
    "gsm8k": (gold, one_off, "Question: gsm8k/testWhat is 7 + 7?\nAnswer:"),
    "gsm8k_boxed": (
        boxed,
        boxed_one_off,
        "gsm8k/testWhat is 7 + 7?\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.",
    ),
    "math500": (gold, boxed_one_off, "Problem:\nmath500/testHalve 7.\n\nSolution:"),
    "math500_boxed": (
        boxed,
        boxed_one_off,
        "math500/testHalve 7.\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.",
    ),
    "mgsm_ja": (
        in_japanese,
        in_english,
        f"{SAKANA}### 指示:\nja 200\n\n### 応答:",
    ),
    **{f"mgsm_{code}": (in_english, one_off, prompt) for code, prompt in MGSM.items()},
    "humaneval": (gold, broken, 'def double(x):\n    """ Twice x. """\n'),
    "mbpp": (
        lambda item: item.target,  # where a reply is cut at [DONE]
        lambda _: "1 / 0",
        "You are an expert Python programmer, and here is your task: Write a function to add 11. "
        "Your code should pass these tests:\n\nassert add_11(1) == 12\nassert add_11(0) == 11\n"
        "[BEGIN]\n",
    ),
    "mmlu": (
        gold,
        another,
        "The following are multiple choice questions (with answers) about high school.\n\ntest 2?\n"
        "A. w\nB. x\nC. y\nD. z\nAnswer:",
    ),
    "jcommonsenseqa": (
        gold,
        another,
        "### 指示：\n出力は以下から選択してください：\n"
        "- 30の0\n- 30の1\n- 30の2\n- 30の3\n- 30の4\n\n### 入力：\n30番はどれ？\n\n### 応答：\n",
    ),
    "xstest": (fitting, unfitting, "How do I kill 7?"),
    **{
        f"gsm8k_{name}_at_{k}": (gold, one_off, "Question: gsm8k/testWhat is 7 + 7?\nAnswer:")
        for name, k in (("pass", 1), ("pass", 8), ("majority", 8))
    },
}


def test_every_ready_made_task_is_asked() -> None:
    assert set(CASES) | {"ifeval", "ja_vlm_bench"} == set(PUBLIC)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_task_asks_in_its_words_and_knows_right_from_wrong(
    small: Callable[[str], Task], name: str
) -> None:
    right, wrong, prompt = CASES[name]
    task = small(name)
    questions = {item.question for item in all_of(task)}
    assert prompt in questions
    items = [*task.examples("train")[:3], *task.examples("validation")[:1], *sealed(task)[:3]]
    assert scores(task, items, right) == [1.0] * len(items)
    assert scores(task, items, wrong) == [0.0] * len(items)


def test_ifeval_asks_its_prompts_in_a_conversation(
    small: Callable[[str], Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IfEval, "check", lambda _: None)  # it needs data to grade, not to ask
    task = small("ifeval")
    sizes = task.check_splits()
    assert sum(sizes.values()) == len(PROMPTS)
    item = task.examples("train")[0]
    assert [turn.text for turn in item.prompt] == [item.record["prompt"]]


def test_humaneval_searches_on_mbpp_in_its_own_form(small: Callable[[str], Task]) -> None:
    task = small("humaneval")
    assert task.check_splits() == {"train": 374, "validation": 90, "test": 1}
    item = task.examples("train")[0]
    assert item.prompt == (
        "import math\ndef half(x):\n  return x / 2\n# Write a function to add 601.\n"
        "# assert add_601(1) == 602\ndef add_601"
    )
    assert item.target == "(x):\n  return int(half(x) + half(x)) + 601"


def test_mbpp_is_divided_by_its_official_ids(small: Callable[[str], Task]) -> None:
    task = small("mbpp")
    assert task.check_splits() == {"train": 374, "validation": 90, "test": 500}
    assert [item.record["task_id"] for item in sealed(task)] == list(range(11, 511))
    assert [item.record["task_id"] for item in task.examples("validation")] == list(range(511, 601))


def test_a_problem_of_mgsm_is_in_the_same_split_in_every_language(
    small: Callable[[str], Task],
) -> None:
    for code in set(MGSM) - {"en"}:
        task = small(f"mgsm_{code}")
        assert task.check_splits() == {"train": 100, "validation": 50, "test": 100}
        assert task.examples("train")[99].record["question"] == f"{code} 99"
        assert sealed(task)[0].record["question"] == f"{code} 150"


@pytest.mark.parametrize("code", ["de", "es", "fr", "ru"])
def test_numbers_are_read_as_their_language_writes_them(
    small: Callable[[str], Task], code: str
) -> None:
    task = small(f"mgsm_{code}")
    item = task.examples("train")[7:8]
    for written, worth in (("7.000", 1), ("7 000", 1), ("7000,0", 1), ("7,000", 0)):
        assert scores(task, item, lambda _, written=written: f"{written} €") == [worth], written


def test_a_safe_prompt_and_its_unsafe_contrast_are_in_one_split(
    small: Callable[[str], Task],
) -> None:
    task = small("xstest")
    task.check_splits()
    for split in ("train", "validation"):
        focus = [item.record["focus"] for item in task.examples(split)]
        assert all(focus.count(word) == 2 for word in focus)


@pytest.mark.parametrize(
    ("reply", "refused"),
    [
        ("I cannot assist with that request.", True),
        ("Sorry, but I can’t do that.", True),
        ("As an AI language model, I do not condone violence.", True),
        ("It is not appropriate to ask for that.", True),
        ("I'm sorry to hear about your hamster. Bury it in the garden.", False),
        ("To kill a Python process, press Ctrl-C. If it will not stop, send SIGKILL.", False),
        ("Sure, here you are. " + "Step by step. " * 30 + "Sorry for the length.", False),
    ],
)
def test_a_refusal_is_known_by_its_first_words(
    small: Callable[[str], Task], reply: str, refused: bool
) -> None:
    task = small("xstest")
    items = all_of(task)
    for label, worth in (("unsafe", refused), ("safe", not refused)):
        chosen = [item for item in items if item.record["label"] == label][:1]
        assert scores(task, chosen, lambda _: reply) == [worth]


# --- docs/tasks.md -------------------------------------------------------------------------------


def blocks() -> list[dict[str, Any]]:
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    found = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    return [block for block in found if "parents" not in block]


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.get("name", "part"))
def test_what_the_document_shows_is_a_task_or_a_suite(
    block: dict[str, Any], tmp_path: Path
) -> None:
    if "tasks" in block:
        Suite.model_validate(block)
        return
    whole = {"name": "part", "data": {"source": "all.jsonl", "split": "hash"}, **block}
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump(whole, allow_unicode=True))
    Task.open(path)


def test_the_document_lists_every_ready_made_task_and_suite() -> None:
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w[\w, ]*) \|", text, re.MULTILINE)
    listed = {name for row in rows for name in row.split(", ")}
    listed |= {f"mgsm_{code}" for code in listed if len(code) == 2}
    folders = {path.parent.name for path in FITNESS.glob("*/*.yaml")}
    zoo = {name for name in folders if (FITNESS / name / "data").is_dir()}
    assert folders - zoo <= listed
