"""The commands: documented keys, one JSON document on stdout, where the store is looked for."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

import evomerge
from evomerge.cli import live
from evomerge.cli.merging import NEEDLESS
from evomerge.progress import Steps
from evomerge.recipe import Recipe
from tests import tiny
from tests.clusters import Nodes
from tests.running import Ended, evomerge_, url, wait_for

REPORT = {
    "search",
    "candidate",
    "recipe_sha",
    "best_parent",
    "promoted",
    "claim",
    "estimates",
    "candidates_tried",
    "looks",
    "seal",
    "baselines",
    "parents",
    "versions",
}
SHOW = {
    "name",
    "state",
    "seed",
    "generations",
    "candidates",
    "best",
    "parents",
    "budget",
    "gap",
    "stop_reason",
    "unsealed_for",
}
PLACES = {
    "STORE": lambda folder: url(folder / "store.db"),
    "JOB": lambda folder: folder / "job.yaml",
    "TASK": lambda folder: folder / "task",
    "MODEL": lambda folder: tiny.ZOO / "ja",
}


def say(searched: Path, command: str, *more: str | Path) -> Ended:
    """A command about `searched`, with its words in capitals filled in."""
    words = [str(PLACES[w](searched.parent)) if w in PLACES else w for w in command.split()]
    return evomerge_(*words, *more)


def document(searched: Path, command: str, *more: str | Path) -> Any:
    """The JSON that a command says."""
    end = say(searched, command, *more, "--json")
    assert end.code == 0, end.err
    return json.loads(end.out)


@pytest.mark.parametrize(
    "command",
    [
        "ls --store STORE",
        "show tiny --store STORE",
        "top tiny --store STORE",
        "top tiny -n 2 --store STORE",
        "resume tiny --store STORE",
        "eval MODEL --task TASK --split train",
        "check JOB",
    ],
)
def test_result_is_one_json_document_or_text_for_people(searched: Path, command: str) -> None:
    found = document(searched, command)
    assert isinstance(found, dict | list)
    assert found
    plain = say(searched, command)
    assert plain.code == 0
    assert plain.out.strip()
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(plain.out)


def test_show_has_the_documented_keys(searched: Path) -> None:
    found = document(searched, "show tiny --store STORE")
    assert set(found) >= SHOW
    assert (found["name"], found["state"], found["seed"]) == ("tiny", "finished", 3)
    assert found["candidates"] == {"scored": 8}
    assert found["generations"] == 2
    assert found["stop_reason"] == "the budget of 8 candidates is spent"
    assert found["budget"]["candidates"] == {"used": 8, "allowed": 8}
    for scored in (found["best"], *found["parents"].values()):
        assert set(scored) >= {"candidate", "fitness", "train", "validation"}
        assert set(scored["train"]) == {"ja_list_ops", "ja_transcription"}
        for task in scored["train"].values():
            replies = {"truncated", "tokens", "overlong", "failed"}
            assert set(task) == {"score", "n", "interval", *replies}
            assert task["interval"][0] <= task["score"] <= task["interval"][1]
        assert set(scored["score"]) == {"train", "validation"}
        assert set(scored["score"]["train"]) == {"value", "interval", "n"}
    assert set(found["parents"]) == {"ops", "ja", "base"}


def test_show_says_where_the_time_of_devices_went(searched: Path, tmp_path: Path) -> None:
    path = Path(shutil.copyfile(searched, tmp_path / "store.db"))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("DELETE FROM device")
        for id, name in enumerate(("a/gpu 0", "a/gpu 1", "b/gpu 0")):
            row = (id, name, 10.0, 1.0, 2.0, 3.0 + id, 0.5, 4)
            db.execute("INSERT INTO device VALUES (?, 1, 1, ?, 1, ?, ?, ?, ?, ?, ?, '2027')", row)
    end = evomerge_("show", "tiny", "--store", url(path), "--json")
    found = json.loads(end.out)
    assert [(d["name"], d["idle"], d["busy"]) for d in found["devices"]] == [
        ("a/gpu 0", 3.5, 0.5), ("a/gpu 1", 2.5, 0.6), ("b/gpu 0", 1.5, 0.7),
    ]  # fmt: skip
    assert (found["time"]["held"], found["time"]["busy"]) == (30.0, pytest.approx(0.6))
    assert 0 < found["time"]["candidate_median"] <= found["time"]["candidate_longest"]
    text = evomerge_("show", "tiny", "--store", url(path)).out
    assert "3 devices on 2 hosts, 60.0% busy; least busy: gpu 0 of host a, 50.0%" in text
    assert "their time: 40.0% scoring, 20.0% merging, 10.0% opening models, 5.0% lost" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "one device, " in say(searched, "show tiny --store STORE").out
    rows = document(searched, "top tiny --store STORE")
    assert all(row["gpu_seconds"] >= 0 for row in rows)


def test_show_weighs_the_tasks_as_the_job_does(searched: Path) -> None:
    found = document(searched, "show tiny --store STORE")
    for row in (found["best"], *found["parents"].values()):
        for split in ("train", "validation"):
            if row[split] is None:
                assert row["score"][split] is None
                continue
            ops, reading = row[split]["ja_list_ops"], row[split]["ja_transcription"]
            score = row["score"][split]
            assert score["value"] == pytest.approx((ops["score"] + 0.5 * reading["score"]) / 1.5)
            assert score["n"] == ops["n"] + reading["n"]
            assert score["interval"][0] < score["interval"][1]
    validation = found["best"]["score"]["validation"]
    assert found["estimates"]["validation"] == {k: validation[k] for k in ("value", "interval")}
    plain = say(searched, "show tiny --store STORE").out
    low, high = (100 * end for end in validation["interval"])
    assert f"{100 * validation['value']:.1f}%" in plain
    assert f"{low:.1f} to {high:.1f}" in plain


@pytest.mark.slow
def test_show_knows_the_weights_whatever_the_tasks_are_called(tmp_path: Path) -> None:
    tiny.write_task(tmp_path / "reading", source="ja_transcription")
    tasks = [{"task": "reading", "weight": 0.5}, {"task": "task"}]  # not in alphabetical order
    job = tiny.write_job(tmp_path, tasks=tasks, budget={"candidates": 1})
    end = evomerge_("run", job, "--store", url(tmp_path / "store.db"), "--json")
    parent = json.loads(end.out)["parents"]["ja"]
    ops, reading = (parent["train"][t]["score"] for t in ("ja_list_ops", "ja_transcription"))
    assert ops != reading
    assert parent["score"]["train"]["value"] == pytest.approx((ops + 0.5 * reading) / 1.5)


@pytest.mark.parametrize("command", ["run", "resume"])
def test_run_and_resume_end_by_showing_the_search(searched: Path, command: str) -> None:
    shown = document(searched, "show tiny --store STORE")
    if command == "run":
        assert json.loads((searched.parent / "run.json").read_text()) == shown
    else:
        assert document(searched, "resume tiny --store STORE") == shown


def test_top_lists_all_candidates_the_best_first(searched: Path) -> None:
    rows = document(searched, "top tiny --store STORE")
    assert len(rows) == 8 + 6 + 1  # proposed, baselines, the mean
    for row in rows:
        assert set(row) >= {"id", "generation", "slot", "fitness", "n", "scores", "recipe_sha"}
        assert set(row["scores"]) == {"ja_list_ops", "ja_transcription"}
    fitness = [row["fitness"] for row in rows]
    assert fitness == sorted(fitness, reverse=True)
    assert document(searched, "top tiny -n 2 --store STORE") == rows[:2]


def test_top_prints_ten_unless_told_otherwise(searched: Path) -> None:
    def rows(command: str) -> int:
        table, _, what = say(searched, f"{command} --store STORE").out.strip().rpartition("scores")
        assert "whose best flatter" in what
        return len(table.strip().splitlines()) - 2

    assert rows("top tiny") == 10
    assert rows("top tiny -n 3") == 3
    assert "\nfitness below 0: " in say(searched, "top tiny --store STORE").out


def test_ls_has_a_line_for_each_search(searched: Path) -> None:
    (row,) = document(searched, "ls --store STORE")
    assert (row["name"], row["state"], row["candidates"]) == ("tiny", "finished", 8)
    shrunk = document(searched, "show tiny --store STORE")["estimates"]["shrunk"]["value"]
    assert row["shrunk"] == shrunk
    assert f" {100 * shrunk:.1f}% " in say(searched, "ls --store STORE").out
    assert "best_fitness" not in row  # a bare maximum of train
    assert "tiny" in say(searched, "ls --store STORE").out


@pytest.mark.parametrize(("split", "n"), [("train", 30), ("validation", 12)])
def test_eval_has_the_documented_keys(searched: Path, split: str, n: int) -> None:
    found = document(searched, f"eval MODEL --task TASK --split {split}")
    keys = {"task", "split", "n", "score", "standard_error", "truncated", "overlong", "failed"}
    assert set(found) >= keys
    assert (found["task"], found["split"], found["n"]) == ("ja_list_ops", split, n)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ja_list_ops", "TASK"])
def test_check_shows_what_a_task_asks(searched: Path, name: str) -> None:
    found = document(searched, f"check {name}")
    assert (found["task"], list(found["splits"])) == (
        "ja_list_ops",
        ["train", "validation", "test"],
    )
    assert found["first"]["prompt"] in say(searched, f"check {name}").out


@pytest.mark.parametrize(
    "command",
    ["show tiny", "top tiny", "ls", "resume tiny", "eval MODEL --task TASK --split train"],
)
def test_no_line_is_wider_than_a_terminal(searched: Path, command: str) -> None:
    end = say(searched, f"{command} --store STORE")
    assert end.code == 0
    assert max(len(line) for line in (end.out + end.err).splitlines()) <= 100


def test_show_says_everything_that_is_known_of_the_winner(searched: Path) -> None:
    found = document(searched, "show tiny --store STORE")
    known = found["estimates"]
    assert known.pop("test") is None
    text = " ".join(say(searched, "show tiny --store STORE").out.split())
    for estimate in known.values():
        low, high = estimate["interval"]
        assert low <= estimate["value"] <= high
        assert f"{100 * estimate['value']:.1f}% {100 * low:.1f} to {100 * high:.1f}" in text
    assert found["candidates_tried"] == 8
    assert "candidates: 8 of 8" in text
    assert "looks at validation: 3 of 3" in text


def test_eval_of_a_few_examples_keeps_what_was_said(searched: Path, tmp_path: Path) -> None:
    kept = tmp_path / "samples.jsonl"
    words = f"eval MODEL --task TASK --split train --limit 4 --samples {kept} --engine batch_size=2"
    assert document(searched, words)["n"] == 4
    samples = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert [sample["number"] for sample in samples] == [1, 2, 3, 4]
    assert set(samples[0]) >= {"prompt", "target", "replies", "score", "truncated", "tokens"}


@pytest.mark.parametrize("parent", ["ja", "ops"])
def test_eval_says_of_a_parent_what_the_search_says(searched: Path, parent: str) -> None:
    shown = document(searched, "show tiny --store STORE")["parents"][parent]["train"]
    task = searched.parent / "reading"
    end = evomerge_("eval", tiny.ZOO / parent, "--task", task, "--split", "train", "--json")
    found = json.loads(end.out)
    assert found["score"] == shown["ja_transcription"]["score"]
    assert found["n"] == shown["ja_transcription"]["n"]


def test_report_has_the_documented_keys(exported: Path) -> None:
    report = json.loads((exported.parent / "export.json").read_text())
    assert set(report) >= REPORT
    assert set(report["claim"]) == {"gain", "interval", "level", "p_value", "n"}
    estimates = report["estimates"]
    names = {"raw_train", "shrunk", "bbc_cv", "validation", "validation_bbc", "test"}
    assert set(estimates) == names
    assert all(set(estimate) == {"value", "interval"} for estimate in estimates.values())
    assert set(report["looks"]) == {"used", "allowed"}
    for seal in report["seal"].values():
        assert set(seal) == {
            *("test_content", "opened_at", "opened_by"),
            *("opened_before", "searches", "overlaps"),
        }
    for parent in report["parents"]:
        assert set(parent) == {"name", "uri", "revision", "sha256"}


def test_export_of_the_recipe_alone_says_where_it_is(searched: Path, tmp_path: Path) -> None:
    found = document(searched, "export tiny --recipe-only --store STORE", "-o", tmp_path / "recipe")
    assert found == {"recipe": str(tmp_path / "recipe" / "mergekit_config.yml")}


def test_export_of_the_recipe_alone_writes_a_file_where_one_is_named(
    searched: Path, tmp_path: Path
) -> None:
    export = "export tiny --recipe-only --store STORE"
    file, folder = tmp_path / "new" / "recipe.yaml", tmp_path / "folder.yml"
    folder.mkdir()
    assert document(searched, export, "-o", file) == {"recipe": str(file)}
    assert document(searched, export, "-o", folder) == {"recipe": f"{folder}/mergekit_config.yml"}
    text = file.read_text()
    assert text == (folder / "mergekit_config.yml").read_text()
    assert evomerge_("check", file).code == 0
    end = say(searched, export, "-o", file)
    assert (end.code, file.read_text()) == (2, text)
    assert f"output '{file}' is there already: name another, or remove it" in end.err


def test_merge_says_where_the_model_is(tmp_path: Path, models: dict[str, Path]) -> None:
    recipe = tmp_path / "recipe.yaml"
    parts = [{"model": str(models[m]), "parameters": {"weight": 1}} for m in ("a", "b")]
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": parts}))
    end = evomerge_("merge", recipe, tmp_path / "out")
    assert (end.code, end.out) == (0, f"{tmp_path / 'out'}\n")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_merge_gives_one_json_document(tmp_path: Path, models: dict[str, Path]) -> None:
    parts = [{"model": str(models[m]), "parameters": {"weight": 1}} for m in ("a", "b")]
    recipe = Recipe.from_dict({"merge_method": "linear", "models": parts})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    end = evomerge_("merge", tmp_path / "recipe.yaml", tmp_path / "out", "--json")
    assert end.code == 0
    assert "merging" in end.err
    found = json.loads(end.out)
    assert found.pop("seconds") > 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert found == {
        "out": str(tmp_path / "out"),
        "tensors": len(tensors),
        "bytes": sum(t.nbytes for t in tensors.values()),
        "notes": [],
    }


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_command_that_is_stopped_says_so(
    tmp_path: Path, number: signal.Signals, code: int, said: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe)
    program = Path(sys.executable).with_name("evomerge")
    process = subprocess.Popen(
        [program, "merge", recipe, tmp_path / "out"], stderr=subprocess.PIPE, text=True
    )
    with recipe.open("w"):  # waits until it is being read
        process.send_signal(number)
        _, err = process.communicate()
    assert (process.returncode, err) == (code, f"evomerge: {said}\n")


def test_a_command_that_is_interrupted_while_modules_are_loaded_says_so(tmp_path: Path) -> None:
    (tmp_path / "rich").mkdir()
    lines = ("try:", " open('begun', 'w').close()", " time.sleep(100)", "finally:", " 1 / 0")
    loading = "\n".join(("import time", *lines))  # what stops it becomes another error
    (tmp_path / "rich" / "__init__.py").write_text(loading)
    process = subprocess.Popen(
        [Path(sys.executable).with_name("evomerge"), "ls", "--store", "none.db"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert wait_for(process, (tmp_path / "begun").exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) == (130, "evomerge: interrupted\n")


def test_the_version_is_said() -> None:
    assert evomerge_("--version").out == f"evomerge {evomerge.__version__}\n"


def test_help_may_be_asked_for_in_short() -> None:
    assert evomerge_("run", "-h").out == evomerge_("run", "--help").out


def test_what_a_run_says_of_itself_is_a_line_for_each_thing(searched: Path) -> None:
    said = (searched.parent / "run.log").read_text().splitlines()
    assert f"store    {url(searched)}" in said
    assert "mode     synchronous, in this process" in said
    generations = [line for line in said if line.startswith("generation 1; ")]
    assert len(generations) == 1
    assert "; time left " in generations[0]


def drawn(monkeypatch: pytest.MonkeyPatch, work: Callable[[Steps], None]) -> str:
    """What a terminal shows of the steps of some work."""
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(live, "_err", lambda: terminal)
    with live.steps() as steps:
        work(steps)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


def test_a_bar_is_shown_while_there_is_something_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, lambda steps: steps.step("opening")).strip() == "opening"

    def export(steps: Steps) -> None:
        steps.written(20_000, 40_000)
        steps.written(40_000, 40_000)
        steps.scored(256, 1000)

    *_, last = drawn(monkeypatch, export).strip().splitlines()
    assert "examples" in last
    assert "256 of 1,000" in last
    assert "writing" not in last


@pytest.mark.parametrize("switch", [*NEEDLESS, "--no-lazy-unpickle", "--write-threads 4"])
def test_merge_takes_switches_of_mergekit_that_it_does_not_need(
    tmp_path: Path, models: dict[str, Path], switch: str
) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": str(models["a"])}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    end = evomerge_("merge", tmp_path / "recipe.yaml", tmp_path / "out", *switch.split())
    assert (end.code, end.out) == (0, f"{tmp_path / 'out'}\n")


@pytest.mark.slow
def test_a_merge_says_the_first_of_many_notes(tmp_path: Path, models: dict[str, Path]) -> None:
    folder = Path(shutil.copytree(models["a"], tmp_path / "a"))
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"count_{i}": torch.tensor([i]) for i in range(12)}
    save_file(tensors, folder / "model.safetensors")
    recipe = {"merge_method": "passthrough", "models": [{"model": str(folder)}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    said = {}
    for option in ("--no-quiet", "--verbose", "--quiet"):
        done = subprocess.run(
            [sys.executable, "-m", "evomerge", "merge", "recipe.yaml", f"out{option}", option],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        said[option] = done.stderr
    assert said["--no-quiet"].count("count_") == 8
    assert "\nand 4 more: --verbose says all\n" in said["--no-quiet"]
    assert said["--verbose"].count("count_") == 12
    assert said["--quiet"] == ""


def test_check_writes_every_default_out(searched: Path) -> None:
    found = document(searched, "check JOB")
    assert set(found) >= {"job", "models", "tasks", "licence", "memory_bytes", "forecast"}
    job = found["job"]
    assert (job["budget"], job["guard"]["alpha"], job["shaping"]) == ({"candidates": 8}, 0.05, 0.05)
    assert (found["dimensions"], found["population"]) == (16, 4)
    assert set(found["task_vector_norms"]) == {"ops", "ja"}
    assert all(0 < norm < 10 for norm in found["task_vector_norms"].values())
    assert all(-1 < cosine < 1 for cosine in found["cosines"].values())
    assert "norm of the task vector of ja: " in say(searched, "check JOB").out
    for sizes in found["tasks"].values():
        assert sizes["driving"] + sizes["monitor"] == sizes["train"]
        assert 0 < sizes["detectable_on_test"] < 1


def test_check_tells_what_a_search_would_take(searched: Path) -> None:
    found = document(searched, "check JOB")
    assert found["workers"] == {"count": 1, "gpus": 0, "merge_ahead": False, "allowed": 1}
    forecast = found["forecast"]
    assert (forecast["generations"], forecast["limit"]) == (2, "candidates")
    assert forecast["whole"] > 2 * forecast["generation"] > 0
    said, _, _ = say(searched, "check JOB").out.partition("the job, with every default")
    assert max(map(len, said.splitlines())) <= 100
    assert "2 generations until the candidates are spent, baselines and finals\n" in said
    assert "worker" not in said


@pytest.mark.ray
def test_check_counts_the_workers_that_there_is_room_for(searched: Path, nodes: Nodes) -> None:
    """The head of the cluster has 4 CPUs."""
    asked = "executor.kind=ray executor.cpus=1 executor.workers={} optimizer.population={}"
    found = document(searched, f"check JOB {asked.format(3, 4)}")
    assert found["workers"] == {"count": 3, "gpus": 0, "merge_ahead": False, "allowed": 3}
    assert found["forecast"]["busy"] == pytest.approx(4 / 6)
    said, _, _ = say(searched, f"check JOB {asked.format(9, 2)}").out.partition(
        "with every default"
    )
    assert "workers: room for 4 at present, of 9 that the job asks for, each without a GPU" in said
    assert "2 of 4 workers will have nothing to do" in " ".join(said.split())
    assert " of each worker\n" in said
    assert max(map(len, said.splitlines())) <= 100


def test_check_starts_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny.write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert evomerge_("check", job).code == 0
    assert set(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """What `evomerge check --schema` prints."""
    end = evomerge_("check", "--schema")
    assert end.code == 0
    found: dict[str, Any] = json.loads(end.out)
    return found


def accepts(schema: dict[str, Any], data: Any) -> bool:
    """Whether a JSON Schema does."""
    return bool(jsonschema.Draft202012Validator(schema).is_valid(data))


EXAMPLES = sorted((tiny.ROOT / "examples").glob("*.yaml"))
TASKS = sorted((tiny.ROOT / "fitness").glob("*/task.yaml"))


def test_schema_is_a_json_schema(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_schema_accepts_the_examples_and_no_unknown_key(schema: dict[str, Any], path: Path) -> None:
    job = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert accepts(schema, job)
    assert not accepts(schema, job | {"bugdet": {}})
    assert not accepts(schema, job | {"optimizer": {"name": "cma-es", "popsize": 4}})
    assert not accepts(schema, {key: value for key, value in job.items() if key != "parents"})


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.parent.name)
def test_schema_accepts_the_task_files_and_no_unknown_key(
    schema: dict[str, Any], path: Path
) -> None:
    task_file = {"$ref": "#/$defs/TaskFile", "$defs": schema["$defs"]}
    task = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert accepts(task_file, task) == ("image" not in task)  # declared, and not read yet
    assert not accepts(task_file, task | {"promt": ""})


def test_store_comes_from_the_option_then_the_environment_then_the_folder(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(*options: str) -> list[str]:
        return [row["name"] for row in json.loads(evomerge_("ls", "--json", *options).out)]

    for name in ("option", "environment", "evomerge"):
        shutil.copyfile(searched, tmp_path / f"{name}.db")
        rename(tmp_path / f"{name}.db", name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVOMERGE_STORE", raising=False)
    assert names() == ["evomerge"]
    monkeypatch.setenv("EVOMERGE_STORE", url(tmp_path / "environment.db"))
    assert names() == ["environment"]
    assert names("--store", url(tmp_path / "option.db")) == ["option"]


def rename(database: Path, name: str) -> None:
    """Give the only search of a store another name."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE search SET name = ?", [name])


@pytest.mark.slow
def test_environment_beats_the_store_of_the_job_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny.write_job(tmp_path, store=url(tmp_path / "file.db"), budget={"candidates": 1})
    monkeypatch.setenv("EVOMERGE_STORE", url(tmp_path / "environment.db"))
    assert evomerge_("run", job).code == 0
    assert (tmp_path / "environment.db").is_file()
    assert not (tmp_path / "file.db").exists()


@pytest.mark.slow
def test_overrides_win_over_the_job_file(tmp_path: Path) -> None:
    job = tiny.write_job(tmp_path)
    overrides = ("budget.candidates=2", "optimizer.population=2", "seed=9", "name=other")
    end = evomerge_("run", job, *overrides, "--store", url(tmp_path / "store.db"), "--json")
    found = json.loads(end.out)
    assert (found["name"], found["seed"], found["candidates"]) == ("other", 9, {"scored": 2})


@pytest.mark.slow
@pytest.mark.parametrize("command", ["--help", "ls --store STORE", "top tiny --store STORE"])
def test_light_commands_load_nothing_heavy(searched: Path, command: str) -> None:
    program = (
        "import sys\n"
        "from evomerge.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'cma', 'alembic', 'ray', 'vllm', 'fastapi'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or None)\n"
    )
    words = [str(PLACES[w](searched.parent)) if w in PLACES else w for w in command.split()]
    end = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
    )
    assert (end.returncode, end.stderr) == (0, "")
    assert end.stdout


def test_help_names_every_command() -> None:
    said = evomerge_("--help").out
    of_a_search = ("run", "resume", "ls", "show", "top", "watch", "logs", "pause", "stop")
    for command in (*of_a_search, "export", "merge", "eval", "check", "serve", "token"):
        assert f"  {command} " in said
        assert evomerge_(command, "--help").code == 0
    assert "..." not in said.partition("Commands:")[2]  # each is described by a whole sentence
