"""Public benchmarks: which items are of their test sets, and which of them are the same problem.

An item is known by where it comes from (files and data sets of the hub under their published names)
or by its text (hashes of the test sets of GSM8K, of MGSM in Japanese, and of HumanEval, which
`python -m benchmarks.test_sets` wrote). Knows no texts, and nothing of what a job allows.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Any, Final

from evomerge.fitness.data import Origin
from evomerge.fitness.fingerprints import Fingerprint

DIGITS: Final = 16  # of the hashes that are kept


@dataclass(frozen=True)
class Known:
    """What an item is known to be. problem: one name in all languages, where there is one."""

    benchmark: str
    problem: str | None


@dataclass(frozen=True)
class TestSet:
    """A published test set, or a part or translation of one.

    hub: data sets of the hub, ORG/NAME or the NAME of old; config: of them, where only one is
    meant. splits: theirs that hold it. files: patterns of the ends of paths (`*` for a name, or a
    part of one). first, behind: which records it is, from 0, where there are others in the file.
    problems, number: what its problems are called in all languages, and the number of the first.
    """

    benchmark: str
    hub: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("test",)
    config: str | None = None
    files: tuple[str, ...] = ()
    first: int = 0
    behind: int | None = None
    problems: str | None = None
    number: int = 0

    def holds(self, origin: Origin) -> bool:
        """Whether records come from where it is published."""
        hub = (origin.hub or "").lower()
        from_hub = (
            any(hub == name.lower() for name in self.hub)
            and self._of_its_splits(origin.split or "")
            and self.config in (None, origin.config)
        )
        return from_hub or any(
            origin.file is not None and PurePath(origin.file.lower()).match(pattern.lower())
            for pattern in self.files
        )

    def item(self, row: int | None, origin: Origin) -> Known | None:
        """What the record in a row of where it is published is; row: None where nobody can tell."""
        if row is not None and not self.first <= row < (self.behind or row + 1):
            return None
        # Rows of a cut split are counted from where it was cut.
        problem = None
        if row is not None and self.problems and origin.split in (None, *self.splits):
            problem = f"{self.problems} {self.number + row}"
        return Known(self.benchmark, problem)

    def _of_its_splits(self, split: str) -> bool:
        """A split of the hub may be cut (test[:50%]) or be several (train+test): where part of it
        is test, all of it is taken for test."""
        names = (split, *(re.sub(r"\[.*", "", name) for name in split.split("+")))
        return any(name in self.splits for name in names)


# The first that holds a record says what it is. Where scores are published of a split that is not
# called test, that is meant, as of HellaSwag, Winogrande, TruthfulQA and JCommonsenseQA.
_TEST_SETS = (
    TestSet("GSM8K", ("openai/gsm8k", "gsm8k"), files=("gsm8k/test.jsonl",), problems="gsm8k"),
    TestSet(
        "GSM8K",  # its problems 250 to 1318 in Japanese
        ("SakanaAI/gsm8k-ja-test_250-1319",),
        files=("gsm8k-ja-test_250-1319.jsonl",),
        problems="gsm8k",
        number=250,
    ),
    TestSet("MGSM", ("juletxara/mgsm", "mgsm"), files=("mgsm_[a-z][a-z].tsv",), problems="gsm8k"),
    TestSet("MATH", ("EleutherAI/hendrycks_math", "lighteval/MATH", "lighteval/MATH-Hard")),
    TestSet(
        "MATH-500",
        ("HuggingFaceH4/MATH-500", "nlile/hendrycks-MATH-benchmark"),
        files=("math500/test.jsonl",),
    ),
    TestSet(
        "AIME",
        (
            "HuggingFaceH4/aime_2024",
            "Maxwell-Jia/AIME_2024",
            "math-ai/aime24",
            "math-ai/aime25",
            "opencompass/AIME2025",
            "yentinglin/aime_2025",
        ),
        splits=("train", "test"),
    ),
    TestSet(
        "HumanEval",
        ("openai/openai_humaneval", "openai_humaneval", "evalplus/humanevalplus"),
        files=("HumanEval.jsonl.gz", "HumanEval.jsonl"),
        problems="humaneval",
    ),
    TestSet(
        "MBPP",
        ("google-research-datasets/mbpp", "mbpp"),
        splits=("prompt+test+validation+train",),  # as its file has them
        files=("mbpp.jsonl",),
        first=10,
        behind=510,
    ),
    TestSet("MBPP", ("google-research-datasets/mbpp", "mbpp", "evalplus/mbppplus")),
    TestSet(
        "IFEval",
        ("google/IFEval", "wis-k/instruction-following-eval"),
        splits=("train",),
        files=("ifeval/input_data.jsonl",),
    ),
    TestSet("MMLU", ("cais/mmlu", "hails/mmlu_no_train"), files=("mmlu/test.parquet",)),
    TestSet("MMLU-Pro", ("TIGER-Lab/MMLU-Pro",)),
    TestSet("ARC", ("allenai/ai2_arc", "ai2_arc")),
    TestSet("HellaSwag", ("Rowan/hellaswag", "hellaswag"), splits=("validation", "test")),
    TestSet(
        "TruthfulQA",
        ("truthfulqa/truthful_qa", "truthful_qa", "EleutherAI/truthful_qa_mc"),
        splits=("validation",),
    ),
    TestSet("Winogrande", ("allenai/winogrande", "winogrande"), splits=("validation", "test")),
    TestSet("GPQA", ("Idavidrein/gpqa",), splits=("train",)),
    TestSet(
        "BIG-Bench Hard",
        ("lukaemon/bbh", "SaylorTwift/bbh", "maveriq/bigbenchhard"),
        splits=("train", "test"),
    ),
    TestSet("JCommonsenseQA", ("shunk031/JGLUE",), splits=("validation",), config="JCommonsenseQA"),
    TestSet(
        "JCommonsenseQA",
        ("sbintuitions/JCommonsenseQA",),
        splits=("validation",),
        files=("jcommonsenseqa/valid-*.json",),
    ),
    TestSet("JA-VLM-Bench", ("SakanaAI/JA-VLM-Bench-In-the-Wild",)),
    TestSet(
        "XSTest",
        ("walledai/XSTest", "natolambert/xstest-v2-copy"),
        splits=("test", "prompts", "gpt4"),
        files=("xstest_prompts.csv",),
    ),
)


@dataclass(frozen=True)
class Use:
    """That a split takes items of a benchmark's test set. share: of the split's items."""

    task: str
    split: str
    benchmark: str
    items: int
    share: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as the store keeps it."""
        return asdict(self)


def recognise(origin: Origin, fingerprints: Sequence[Fingerprint]) -> list[Known | None]:
    """Of each item of a split, which item of a public test set it is; None where it is none that
    is known."""
    found = [_by_text().get(own.text[:DIGITS]) for own in fingerprints]
    published = next((known for known in _TEST_SETS if known.holds(origin)), None)
    if published is None:
        return found
    rows = [None] * len(found) if origin.rows is None else origin.rows
    return [published.item(row, origin) or known for row, known in zip(rows, found, strict=True)]


def uses(task: str, split: str, items: Sequence[Known | None]) -> list[Use]:
    """The benchmarks whose test sets a split takes items of."""
    counts: Mapping[str, int] = Counter(known.benchmark for known in items if known is not None)
    return [Use(task, split, name, n, n / len(items)) for name, n in counts.items()]


@cache
def _by_text() -> Mapping[str, Known]:
    """Items by the beginning of the hash of their text, see Fingerprint.text."""
    tables = json.loads((files("evomerge.guard") / "test_sets.json").read_text(encoding="utf-8"))
    found: dict[str, Known] = {}
    for table in tables:
        hashes = table["hashes"]
        for number in range(len(hashes) // DIGITS):
            known = Known(table["benchmark"], f"{table['problems']} {number}")
            found.setdefault(hashes[DIGITS * number : DIGITS * (number + 1)], known)
    return found
