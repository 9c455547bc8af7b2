"""A task file of lm-eval's, on sums."""

from pathlib import Path
from typing import Any

import yaml

from tests import tiny

FILE: dict[str, Any] = {
    "task": "sums",
    "dataset_path": "json",
    "dataset_kwargs": {
        "data_files": {"train": "train.jsonl", "val": "val.jsonl", "test": "test.jsonl"}
    },
    "training_split": "train",
    "validation_split": "val",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "Question: {{ question }}\nAnswer:",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["\n", "Question:"], "max_gen_toks": 9, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "pair",
    "doc_to_target": "right",
    "generation_kwargs": None,
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def write(folder: Path, n: int = 20, **changes: Any) -> Path:
    """The file with keys replaced, None leaving one out, beside n records for each split."""
    for number, split in enumerate(("train", "val", "test")):
        start = 1000 * number
        found = [
            {"question": f"{i}+{i}", "answer": str(2 * i), "right": 0, "pair": [str(2 * i), "none"]}
            for i in range(start, start + n)
        ]
        tiny.write_jsonl(folder / f"{split}.jsonl", found)
    path = folder / "sums.yaml"
    data = {key: value for key, value in {**FILE, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path
