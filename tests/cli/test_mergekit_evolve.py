"""A file of mergekit-evolve on the command line: unchanged, with the flags its users know."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny
from tests.running import Ended, count, evomerge_, query


def write(folder: Path, **changes: Any) -> Path:
    """A file over the zoo, as mergekit-evolve reads it, with one task of lm-eval's."""
    origin = tiny.ROOT / "fitness" / "ja_list_ops" / "data" / "train.jsonl"
    lines = origin.read_text(encoding="utf-8").splitlines()[:30]
    tiny.write_jsonl(folder / "data" / "items.jsonl", [json.loads(line) for line in lines])
    task = {
        "task": "lists_ja",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "data/items.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{ prompt }}",
        "doc_to_target": "{{ answer }}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    }
    (folder / "lists_ja.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    genome = {
        "models": [str(tiny.ZOO / "ops"), str(tiny.ZOO / "ja")],
        "merge_method": "task_arithmetic",
        "base_model": str(tiny.ZOO / "base"),
        "layer_granularity": 3,
    }
    tasks = [{"name": "lists_ja", "weight": 1.0, "metric": "exact_match,none"}]
    keys = {"limit": 4, "apply_chat_template": False, **changes}
    path = folder / "evolve.yml"
    path.write_text(yaml.safe_dump({"genome": genome, "tasks": tasks, **keys}))
    return path


def run(folder: Path, *arguments: str | Path) -> Ended:
    return evomerge_("run", write(folder), "--storage-path", folder / "kept", *arguments)


@pytest.mark.slow
def test_a_file_of_mergekit_evolve_is_searched_unchanged(tmp_path: Path) -> None:
    end = run(
        tmp_path,
        *("--max-fevals", "2", "--random-seed", "5", "--force-population-size", "2"),
        *("engine.device=cpu", "engine.threads=1", "guard.validation_looks=2", "--json"),
    )
    assert end.code == 0, end.err
    assert json.loads(end.out)["name"] == "evolve"
    for words in (
        "genome.merge_method: space.preset mergekit_evolve_task_arithmetic",
        "limit: staging.stages [4]",
        "warning: it has no training split",
    ):
        assert words in end.err
    database = tmp_path / "kept" / "evomerge.db"
    assert query(database, "SELECT name, seed, state FROM search") == [("evolve", 5, "finished")]
    splits = query(database, "SELECT split FROM split WHERE task = 'lists_ja' ORDER BY split")
    assert splits == [("test",), ("train",), ("validation",)]
    assert count(database, "SELECT count(*) FROM candidate WHERE genotype IS NOT NULL") >= 2


@pytest.mark.slow
def test_check_says_what_became_of_the_keys(tmp_path: Path) -> None:
    end = evomerge_("check", write(tmp_path), "engine.device=cpu", "engine.threads=1", "--json")
    assert end.code == 0, end.err
    assert "genome.models: parents ops, ja" in end.err
    job = json.loads(end.out)["job"]
    assert (job["space"]["per"], job["space"]["granularity"]) == ("slice", 3)


@pytest.mark.parametrize("flag", ["--vllm", "--strategy", "--in-memory", "--load-in-4bit"])
def test_a_flag_without_a_counterpart_is_told_from_a_misspelt_one(
    tmp_path: Path, flag: str
) -> None:
    end = run(tmp_path, flag)
    assert end.code == 2
    assert end.err.startswith(f"evomerge: {flag} of mergekit-evolve: ")
    assert end.err.endswith(": leave it out\n")
    assert "No such option: --vlm" in run(tmp_path, "--vlm").err
    assert not (tmp_path / "kept").exists()
