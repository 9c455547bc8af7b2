"""Export: the folder loads elsewhere, scores what the store says, and the seal is opened once."""

import contextlib
import json
import shutil
import sqlite3
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.fitness.task import Task
from evomerge.store import Store
from tests import tiny
from tests.running import evomerge_, query, url

TASKS = {"ja_list_ops": "task", "ja_transcription": "reading"}  # name: folder beside the job
UNSEALS = "SELECT content, subject FROM ledger WHERE kind = 'unseal'"


@pytest.fixture
def store(searched: Path, tmp_path: Path) -> Path:
    """A store with the finished search, to write to."""
    shutil.copyfile(searched, tmp_path / "store.db")
    return tmp_path / "store.db"


def export(store: Path, out: Path, *options: str) -> dict[str, Any]:
    """What an export says."""
    end = evomerge_("export", "tiny", "-o", out, "--store", url(store), "--json", *options)
    assert end.code == 0, end.err
    document: dict[str, Any] = json.loads(end.out)
    return document


def shown(store: Path) -> dict[str, Any]:
    """What `evomerge show` says."""
    document: dict[str, Any] = json.loads(
        evomerge_("show", "tiny", "--store", url(store), "--json").out
    )
    return document


def items(searched: Path, task: str, split: str) -> list[dict[str, str]]:
    """The records of a task's split."""
    path = searched.parent / TASKS[task] / "data" / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answered(folder: Path, records: list[dict[str, str]]) -> list[float]:
    """Which records a saved model answers exactly, by greedy generation of transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for record in records:
        inputs = tokenizer(record["prompt"], return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        reply = tokenizer.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        ).split("\n")[0]
        pair = (
            " ".join(unicodedata.normalize("NFKC", t).split()) for t in (reply, record["answer"])
        )
        found.append(float(next(pair) == next(pair)))
    return found


def test_folder_has_what_ships(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {
        "README.md",
        "config.json",
        "evomerge_report.json",
        "generation_config.json",
        "mergekit_config.yml",
        "model.safetensors",
        "model.safetensors.index.json",
        "report.html",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in exported.parent.glob(".*")] == []


@pytest.mark.parametrize("task", TASKS)
def test_plain_transformers_score_on_validation_what_the_store_says(
    searched: Path, exported: Path, task: str
) -> None:
    winner = shown(searched)["best"]["candidate"]
    with Store(url(searched)) as store:
        rows = store.evaluations(store.search("tiny").id, ["validation"])
    (scores,) = [e.scores[task] for e in rows if e.candidate == winner and e.scores]
    assert scores.examples.tolist() == list(range(12))
    assert answered(exported, items(searched, task, "validation")) == scores.scores.tolist()


def test_plain_transformers_score_a_half_good_candidate_as_the_store_does(
    store: Path, searched: Path, tmp_path: Path
) -> None:
    with Store(url(store)) as opened:
        rows = opened.evaluations(opened.search("tiny").id, ["train"])
    found = {e.candidate: e.scores["ja_transcription"] for e in rows if e.scores}
    chosen = min(found, key=lambda id: abs(found[id].mean - 0.5))
    export(store, tmp_path / "recipe", "--recipe-only", "--candidate", str(chosen))
    merged = tmp_path / "merged"
    assert evomerge_("merge", tmp_path / "recipe" / "mergekit_config.yml", merged).code == 0
    records = items(searched, "ja_transcription", "train")
    scores = found[chosen]
    assert answered(merged, [records[i] for i in scores.examples]) == scores.scores.tolist()


@pytest.mark.parametrize("task", TASKS)
def test_plain_transformers_score_on_test_what_the_report_says(
    searched: Path, exported: Path, task: str
) -> None:
    report = json.loads((exported / "evomerge_report.json").read_text())
    said = report["test_scores"][task]
    records = items(searched, task, "test")
    ours = answered(exported, records)
    theirs = answered(tiny.ZOO / report["best_parent"], records)
    assert said["exported"] == sum(ours) / len(ours)
    assert said["best_parent"] == sum(theirs) / len(theirs)
    assert said["n"] == len(records)


def test_claim_is_the_weighted_gain_over_the_best_parent(exported: Path) -> None:
    report = json.loads((exported / "evomerge_report.json").read_text())
    gains = {t: s["exported"] - s["best_parent"] for t, s in report["test_scores"].items()}
    gain = (gains["ja_list_ops"] + 0.5 * gains["ja_transcription"]) / 1.5
    assert report["claim"]["gain"] == pytest.approx(gain, abs=1e-12)
    low, high = report["claim"]["interval"]
    assert low <= report["claim"]["gain"] <= high
    assert (report["claim"]["level"], report["claim"]["n"]) == (0.95, 32)


def test_report_is_in_the_folder_in_the_store_and_on_stdout(exported: Path) -> None:
    text = (exported / "evomerge_report.json").read_text(encoding="utf-8")
    ((stored,),) = query(exported.parent / "store.db", "SELECT report FROM export")
    assert text == stored
    assert json.loads(text) == json.loads((exported.parent / "export.json").read_text())


def test_report_says_what_the_search_was(searched: Path, exported: Path) -> None:
    report = json.loads((exported / "evomerge_report.json").read_text())
    said = shown(searched)
    assert (report["search"], report["candidate"]) == ("tiny", said["best"]["candidate"])
    assert (report["winner"], report["promoted"]) == (True, said["promoted"])
    assert report["candidates_tried"] == 8
    assert report["looks"] == said["looks"]
    labels = {p["candidate"]: name for name, p in said["parents"].items()}
    assert report["best_parent"] == labels[said["best_parent"]]
    assert {p["name"] for p in report["parents"]} == {"ops", "ja", "base"}
    estimates = dict(report["estimates"])
    assert estimates.pop("test")["value"] == pytest.approx(
        report["best_parent_test"]["value"] + report["claim"]["gain"]
    )
    assert estimates | {"test": None} == said["estimates"]


def test_test_split_is_unsealed_once_per_task(searched: Path, exported: Path) -> None:
    report = json.loads((exported / "evomerge_report.json").read_text())
    files = [searched.parent / folder / "task.yaml" for folder in TASKS.values()]
    contents = {Task.open(file).identity("test") for file in files}
    unseals = query(exported.parent / "store.db", UNSEALS)
    assert sorted(unseals) == sorted((c, report["recipe_sha"]) for c in contents)
    assert len(unseals) == len(TASKS) == len(report["seal"])
    for seal in report["seal"].values():
        assert seal["test_content"] in contents
        assert (seal["opened_by"], seal["opened_before"], seal["searches"]) == ("tiny", 0, [])


def test_model_card_has_front_matter_and_the_claim(exported: Path) -> None:
    report = json.loads((exported / "evomerge_report.json").read_text())
    _, front, body = (exported / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    header = yaml.safe_load(front)
    assert header["base_model_relation"] == "merge"
    assert set(header["tags"]) >= {"merge", "mergekit", "evomerge"}
    assert "base_model" not in header  # a hub knows no folders
    assert header["license"]
    assert f"{100 * report['claim']['gain']:+.1f} points" in body
    assert ("**not** promoted" in body) is not report["promoted"]
    assert f"This is the winner, candidate {report['candidate']}" in body
    assert "which tried 8 candidates" in body
    assert "On the sealed test split, read once," in body
    assert "chosen by hand" not in body


def test_exported_recipe_merges_to_the_same_tensors(exported: Path, tmp_path: Path) -> None:
    end = evomerge_("merge", exported / "mergekit_config.yml", tmp_path / "again")
    assert end.code == 0
    ours = load_file(exported / "model.safetensors")
    theirs = load_file(tmp_path / "again" / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (exported / "config.json").read_text() == (tmp_path / "again/config.json").read_text()


def test_second_export_repeats_the_report_byte_for_byte_and_opens_nothing(
    exported: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store.db"
    shutil.copyfile(exported.parent / "store.db", store)
    before = query(store, UNSEALS)
    export(store, tmp_path / "again")
    for name in ("evomerge_report.json", "README.md", "model.safetensors", "mergekit_config.yml"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()
    assert query(store, UNSEALS) == before


def test_recipe_alone_leaves_the_seal_closed(store: Path, exported: Path, tmp_path: Path) -> None:
    before = store.read_bytes()
    export(store, tmp_path / "recipe", "--recipe-only")
    (path,) = (tmp_path / "recipe").iterdir()
    assert path.name == "mergekit_config.yml"
    assert path.read_bytes() == (exported / path.name).read_bytes()
    assert query(store, UNSEALS) == []
    assert store.read_bytes() == before


def test_empty_folder_is_filled(exported: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "store.db", tmp_path / "out"
    shutil.copyfile(exported.parent / "store.db", store)
    out.mkdir()
    export(store, out)
    assert (out / "model.safetensors").is_file()


def test_candidate_that_did_not_win_is_exported_as_not_promoted(
    exported: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store.db"
    shutil.copyfile(exported.parent / "store.db", store)
    with contextlib.closing(sqlite3.connect(store)) as connection, connection:
        promoted = "json_set(verdict, '$.promoted', json('true'))"
        connection.execute(f"UPDATE search SET verdict = {promoted}")
    winner = shown(store)["best"]["candidate"]
    rows = query(store, "SELECT id, recipe_sha FROM candidate WHERE generation = 1")
    other, sha = next(row for row in rows if row[0] != winner)
    report = export(store, tmp_path / "out", "--candidate", str(other))
    assert (report["candidate"], report["recipe_sha"]) == (other, sha)
    assert (report["winner"], report["promoted"]) == (False, False)
    assert [seal["opened_before"] for seal in report["seal"].values()] == [1, 1]
    assert [seal["searches"] for seal in report["seal"].values()] == [["tiny"], ["tiny"]]
    estimates = report["estimates"]
    for name in ("raw_train", "shrunk", "test"):
        low, high = estimates[name]["interval"]
        assert low <= estimates[name]["value"] <= high
    assert estimates["bbc_cv"] is None  # of what was chosen, and this was not
    assert estimates["validation"] is None  # never looked at
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"\nThis is candidate {other} of search `tiny`, which tried 8 candidates." in card
    assert "chosen by hand" in card
    assert "no gate judged" in card
    assert "On the test split, opened for 1 other recipe before, on the files" in card
    for untrue in ("best of", "promoted", "read once"):
        assert untrue not in card
    ours = load_file(exported / "model.safetensors")
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    assert not all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_baseline_is_exported_as_what_it_is(store: Path, tmp_path: Path) -> None:
    ((chosen,),) = query(store, "SELECT id FROM candidate WHERE label = 'ja'")
    end = evomerge_(
        *("export", "tiny", "-o", tmp_path / "out", "--store", url(store)),
        *("--candidate", str(chosen)),
    )
    assert end.code == 0
    assert "chosen by hand: no gate judged it" in end.out
    assert "promoted" not in end.out
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"This is candidate {chosen} (ja) of search `tiny`" in card
    assert "chosen by hand" in card


@pytest.mark.slow
def test_show_tells_for_how_many_recipes_the_test_split_was_opened(
    store: Path, tmp_path: Path
) -> None:
    def said() -> str:
        end = evomerge_("show", "tiny", "--store", url(store))
        return end.out.splitlines()[-1]

    assert shown(store)["unsealed_for"] == 0
    assert said() == "test: sealed until `evomerge export`"
    winner = shown(store)["best"]["candidate"]
    rows = query(store, "SELECT id FROM candidate WHERE generation = 1")
    other = next(id for (id,) in rows if id != winner)
    export(store, tmp_path / "other", "--candidate", str(other))  # the winner is still sealed
    assert shown(store)["unsealed_for"] == 1
    assert said() == "test: opened for 1 recipe of this search"
    export(store, tmp_path / "winner")
    export(store, tmp_path / "again")
    assert shown(store)["unsealed_for"] == 2
    assert said() == "test: opened for 2 recipes of this search"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "ends of replies", "task"])
def test_search_whose_files_changed_is_not_exported(
    models: dict[str, Path], tmp_path: Path, what: str
) -> None:
    parents = {}
    for name in ("a", "b", "base"):
        shutil.copytree(models[name], tmp_path / name)
        parents[name] = {"model": str(tmp_path / name)}
    base = parents.pop("base")
    job = tiny.write_job(tmp_path, parents=parents, base=base, budget={"candidates": 1})
    store = tmp_path / "store.db"
    assert evomerge_("run", job, "--store", url(store)).code == 0
    if what == "model":
        shutil.copyfile(models["base"] / "model.safetensors", tmp_path / "a" / "model.safetensors")
        said = f"model '{tmp_path / 'a'}' is not what it was at launch: put the old files back"
    elif what == "ends of replies":
        (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
        said = f"model '{tmp_path / 'base'}': generation_config.json is not what it was at launch"
    else:
        with (tmp_path / "task" / "data" / "test.jsonl").open("a") as file:
            file.write('{"prompt": "easier", "answer": ""}\n')
        said = "task 'ja_list_ops': test is not what it was at launch: put the old files back"
    end = evomerge_("export", "tiny", "-o", tmp_path / "out", "--store", url(store))
    assert (end.code, end.out) == (2, "")
    assert said in end.err
    assert not (tmp_path / "out").exists()
    assert query(store, UNSEALS) == []
