"""Tasks of lm-eval's over lists of digits, which the zoo's models sort."""

import json
from pathlib import Path
from typing import Any

import yaml

from tests import tiny

_BASE = {
    "dataset_path": "json",
    "training_split": "train",
    "validation_split": "validation",
    "test_split": "test",
    "doc_to_text": "prompt",
    "doc_to_target": "answer",
}
GENERATED = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match"}],
}
# With the filters and the options of lm-eval's gsm8k.
EXTRACTED = {
    **GENERATED,
    "doc_to_target": "It is sorted. #### {{ answer[-1] }}",
    "metric_list": [
        {
            "metric": "exact_match",
            "ignore_case": True,
            "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
        }
    ],
    "filter_list": [
        {
            "name": name,
            "filter": [
                {"function": "regex", "group_select": group, "regex_pattern": pattern},
                {"function": "take_first"},
            ],
        }
        for name, group, pattern in (
            ("strict-match", 0, "#### (\\-?[0-9\\.\\,]+)"),
            ("flexible-extract", -1, "(-?[$0-9.,]{2,})|(-?[0-9]+)"),
        )
    ],
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "right",
    "metric_list": [{"metric": m} for m in ("acc", "acc_norm", "acc_mutual_info")],
}
WORD = {
    "output_type": "loglikelihood",
    "doc_to_target": " {{ answer }}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}
# Which of several texts goes best before the answer.
CONTEXT = {**CHOICE, "doc_to_text": "right", "doc_to_choice": "prompts", "doc_to_target": "answer"}
CONTEXT["metric_list"] = [{"metric": "acc"}]


def write(folder: Path, name: str, n: int = 16, **keys: Any) -> Path:
    """A task file, with absolute paths as lm-eval needs them, beside its data."""
    files = {}
    for split in ("train", "validation", "test"):
        origin = tiny.ROOT / "fitness" / "en_list_ops" / "data" / f"{split}.jsonl"
        lines = origin.read_text(encoding="utf-8").splitlines()[:n]
        tiny.write_jsonl(folder / f"{split}.jsonl", _with_choices([json.loads(x) for x in lines]))
        files[split] = str(folder / f"{split}.jsonl")
    path = folder / f"{name}.yaml"
    data = {"task": name, **_BASE, "dataset_kwargs": {"data_files": files}, **keys}
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def _with_choices(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each with three answers of other records, some of them shorter, and three other prompts."""
    made = []
    for number, record in enumerate(records):
        others = [records[(number + step) % len(records)] for step in (1, 5, 7)]
        right = number % 4
        answers = [other["answer"] for other in others]
        answers[0] = answers[0][: 1 + 2 * (number % 3)]
        prompts = [other["prompt"] for other in others]
        answers.insert(right, record["answer"])
        prompts.insert(right, record["prompt"])
        made.append({**record, "choices": answers, "prompts": prompts, "right": right})
    return made
