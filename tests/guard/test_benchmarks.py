"""Public test sets: known by where they come from, and by what they ask."""

import csv
import gzip
import json
from typing import Any

import pytest

from benchmarks import test_sets as script
from evomerge.fitness.data import Origin
from evomerge.fitness.fingerprints import Fingerprint, exact_hash, fingerprint
from evomerge.fitness.task_file import Shared, TaskFile
from evomerge.guard.benchmarks import Known, Use, recognise, uses
from tests.fitness.test_ready_made import DATA, PUBLIC, needs_data, plain
from tests.tiny import ROOT


def prints(*texts: str) -> list[Fingerprint]:
    return [fingerprint(exact_hash(text), text, text) for text in texts]


UNKNOWN = prints("nobody has ever asked this", "nor that")


def origin(**keys: Any) -> Origin:
    """Of two records, the first two."""
    return Origin(**dict.fromkeys(("file", "hub", "config", "split")) | {"rows": (0, 1)} | keys)


@pytest.mark.parametrize(
    ("keys", "benchmark"),
    [
        ({"hub": "openai/gsm8k", "config": "main", "split": "test"}, "GSM8K"),
        ({"hub": "openai/gsm8k", "config": "main", "split": "train"}, None),
        ({"hub": "gsm8k", "split": "test"}, "GSM8K"),
        ({"hub": "OpenAI/GSM8K", "split": "test[:50%]"}, "GSM8K"),
        ({"hub": "openai/gsm8k", "split": "train+test"}, "GSM8K"),
        ({"hub": "somebody/gsm8k", "split": "test"}, None),
        ({"file": "data/mgsm/mgsm_de.tsv"}, "MGSM"),
        ({"file": "mgsm_german.tsv"}, None),
        ({"file": "humaneval/HumanEval.jsonl.gz"}, "HumanEval"),
        ({"hub": "google/IFEval", "split": "train"}, "IFEval"),
        ({"hub": "Rowan/hellaswag", "split": "validation"}, "HellaSwag"),
        ({"hub": "Rowan/hellaswag", "split": "train"}, None),
        ({"hub": "cais/mmlu", "split": "auxiliary_train"}, None),
        ({"hub": "cais/mmlu", "split": "test"}, "MMLU"),
        ({"hub": "shunk031/JGLUE", "config": "JCommonsenseQA", "split": "validation"},
         "JCommonsenseQA"),
        ({"hub": "shunk031/JGLUE", "config": "JSQuAD", "split": "validation"}, None),
        ({"file": "train.jsonl", "hub": "allenai/ai2_arc", "split": "test"}, "ARC"),
    ],
)  # fmt: skip
def test_a_test_set_is_known_by_where_it_is_published(
    keys: dict[str, Any], benchmark: str | None
) -> None:
    known = recognise(origin(**keys), UNKNOWN)
    assert [item and item.benchmark for item in known] == [benchmark] * 2


def test_of_a_file_that_holds_more_the_rows_of_test_are_meant() -> None:
    found = recognise(origin(file="mbpp/mbpp.jsonl", rows=(9, 10, 509, 510)), [*UNKNOWN, *UNKNOWN])
    assert found == [None, Known("MBPP", None), Known("MBPP", None), None]


def test_a_problem_has_one_name_in_every_language() -> None:
    german = recognise(origin(file="mgsm_de.tsv", rows=(7, 249)), UNKNOWN)
    assert german == [Known("MGSM", "gsm8k 7"), Known("MGSM", "gsm8k 249")]
    japanese = origin(hub="SakanaAI/gsm8k-ja-test_250-1319", split="test", rows=(0, 1068))
    assert recognise(japanese, UNKNOWN) == [
        Known("GSM8K", "gsm8k 250"),
        Known("GSM8K", "gsm8k 1318"),
    ]


def test_where_nobody_can_tell_the_rows_no_problem_is_named() -> None:
    cut = recognise(origin(hub="openai/gsm8k", split="test[100:]"), UNKNOWN)
    processed = recognise(origin(hub="openai/gsm8k", split="test", rows=None), UNKNOWN)
    assert cut == processed == [Known("GSM8K", None)] * 2


def test_how_much_is_used_is_said_for_each_benchmark() -> None:
    items = [Known("MGSM", "gsm8k 1"), None, Known("MGSM", None), Known("ARC", None)]
    assert uses("t", "train", items) == [
        Use("t", "train", "MGSM", 2, 0.5),
        Use("t", "train", "ARC", 1, 0.25),
    ]


# --- by what is asked ----------------------------------------------------------------------------


def published() -> dict[str, list[str]]:
    """The questions of each test set that is at hand."""

    def table(path: str) -> list[str]:
        with (DATA / path).open(encoding="utf-8", newline="") as file:
            return [row[0] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]

    gsm8k = (DATA / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    packed = gzip.decompress((DATA / "humaneval" / "HumanEval.jsonl.gz").read_bytes())
    return {
        "gsm8k": [json.loads(line)["question"] for line in gsm8k],
        "en": table("mgsm/mgsm_en.tsv"),
        "ja": table("mgsm/mgsm_ja.tsv"),
        "humaneval": [json.loads(line)["prompt"] for line in packed.decode().splitlines()],
    }


@needs_data
def test_the_hashes_are_those_of_the_published_test_sets(tmp_path: Any) -> None:
    assert script.main(["--data", str(DATA), "--out", str(tmp_path / "again.json")]) == 0
    packaged = ROOT / "evomerge" / "guard" / "test_sets.json"
    assert (tmp_path / "again.json").read_bytes() == packaged.read_bytes()


@needs_data
def test_an_item_is_known_by_its_text_wherever_it_turns_up() -> None:
    texts, anywhere = published(), origin(file="mine.jsonl", rows=None)
    for name, benchmark, family, size in (
        ("gsm8k", "GSM8K", "gsm8k", 1319),
        ("en", "GSM8K", "gsm8k", 250),
        ("ja", "MGSM", "gsm8k", 250),
        ("humaneval", "HumanEval", "humaneval", 164),
    ):
        found = recognise(anywhere, prints(*(f"  {text.upper()} " for text in texts[name])))
        assert found == [Known(benchmark, f"{family} {n}") for n in range(size)]


@pytest.mark.slow
@needs_data
def test_no_problem_of_gsm8ks_train_is_taken_for_one_of_its_test() -> None:
    lines = (DATA / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["question"] for line in lines]
    assert recognise(origin(file="mine.jsonl", rows=None), prints(*texts)) == [None] * 7473


# --- the ready-made tasks ------------------------------------------------------------------------

# Those that search on a part of a public test set, as docs/tasks.md says.
ON_TEST_SETS = {
    "ifeval": "IFEval",
    "ja_vlm_bench": "JA-VLM-Bench",
    "mgsm_ja": "GSM8K",
    "xstest": "XSTest",
    **{f"mgsm_{code}": "MGSM" for code in ("bn", "de", "es", "fr", "ru", "sw", "te", "th", "zh")},
}


@pytest.mark.parametrize("name", PUBLIC)
def test_which_ready_made_tasks_search_on_a_public_test_set(name: str) -> None:
    data = TaskFile.model_validate(plain(name)).data
    shared = isinstance(data, Shared) and data.train is None
    source = data.source if shared else data.train
    first = data.ranges["train"][0] if hasattr(data, "ranges") else 0
    train = Origin(source.file, source.hub, source.config, source.split, (first, first + 1))
    known = recognise(train, UNKNOWN)
    assert {item and item.benchmark for item in known} == {ON_TEST_SETS.get(name)}
