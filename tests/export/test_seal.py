"""The seal of test: who reads it, how often, what is kept of it, and how worn it is."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.errors import SealedError
from evomerge.export import reading
from evomerge.export.report import _claim
from evomerge.fitness.results import Scores
from evomerge.fitness.task import Task
from evomerge.guard.estimates import paired_gain
from evomerge.job import Job
from evomerge.search.setting import Setting
from evomerge.seeds import generator
from evomerge.store import Coordinator, Store
from tests import tiny
from tests.running import Ended, ended, evomerge_, query, start, url

UNSEALS = "SELECT content, subject FROM ledger WHERE kind = 'unseal' ORDER BY id"
READINGS = "SELECT task, subject FROM reading ORDER BY task, subject"
SECRET = "さくらもち"  # an answer of test that no model gives


def export(store: Path, name: str, out: Path, *options: str) -> Ended:
    return evomerge_("export", name, "-o", out, "--store", url(store), "--json", *options)


def report_of(store: Path, name: str, out: Path, *options: str) -> dict[str, Any]:
    end = export(store, name, out, *options)
    assert end.code == 0, end.err
    document: dict[str, Any] = json.loads(end.out)
    return document


def search(job: Path, store: Path, *overrides: str) -> None:
    end = evomerge_("run", job, "--store", url(store), *overrides)
    assert end.code == 0, end.err


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a search of a few seconds."""
    folder = tmp_path_factory.mktemp("job")
    optimizer = {"name": "cma-es", "population": 2}
    return tiny.write_job(folder, optimizer=optimizer, budget={"candidates": 2})


@pytest.fixture(scope="module")
def pair(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two searches, 'one' and 'two', that differ by their names alone."""
    store = tmp_path_factory.mktemp("pair") / "store.db"
    for name in ("one", "two"):
        search(job, store, f"name={name}")
    return store


@pytest.fixture
def store(pair: Path, tmp_path: Path) -> Path:
    """The same, to write to."""
    return Path(shutil.copyfile(pair, tmp_path / "store.db"))


@pytest.fixture(scope="module")
def first(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store from which 'one' was exported, its report beside it."""
    folder = tmp_path_factory.mktemp("first")
    shutil.copyfile(pair, folder / "store.db")
    report = report_of(folder / "store.db", "one", folder / "out")
    (folder / "report.json").write_text(json.dumps(report))
    return folder / "store.db"


@pytest.fixture
def opened(first: Path, tmp_path: Path) -> Path:
    """The same, to write to."""
    return Path(shutil.copyfile(first, tmp_path / "opened.db"))


@pytest.fixture
def report(first: Path) -> dict[str, Any]:
    """What was reported then."""
    document: dict[str, Any] = json.loads((first.parent / "report.json").read_text())
    return document


def test_nothing_but_an_export_says_what_the_answers_of_test_are(tmp_path: Path) -> None:
    task = tiny.write_task(tmp_path / "task", test=16)
    data = tmp_path / "task" / "data" / "test.jsonl"
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    tiny.write_jsonl(data, [record | {"answer": SECRET} for record in records])
    job = tiny.write_job(tmp_path, budget={"candidates": 4})
    store, samples = tmp_path / "store.db", tmp_path / "samples.jsonl"
    search(job, store)
    said = [
        evomerge_(*words)
        for words in (
            ("check", task, "--json"),
            ("show", "tiny", "--json", "--store", url(store)),
            ("top", "tiny", "--json", "--store", url(store)),
            ("ls", "--json", "--store", url(store)),
            ("export", "tiny", "--csv", tmp_path / "csv", "--store", url(store)),
            ("export", "tiny", "--optuna", url(tmp_path / "optuna.db"), "--store", url(store)),
            ("eval", tiny.ZOO / "ja", "--task", task, "--samples", samples),
            ("eval", tiny.ZOO / "ja", "--task", task, "--split", "test"),
        )
    ]
    assert [end.code for end in said] == [0] * 7 + [2]
    assert all(SECRET not in end.out + end.err for end in said)
    files = [samples, *tmp_path.glob("*.db*"), *(tmp_path / "csv").rglob("*.*")]
    assert len(files) > 4
    for file in files:
        content = file.read_bytes()
        for written in (SECRET.encode(), json.dumps(SECRET).strip('"').encode()):
            assert written not in content, file.name
    with pytest.raises(SealedError, match="only `evomerge export` reads it"):
        Task.open(task).examples("test")


@pytest.mark.slow
def test_a_search_that_never_had_the_test_data_is_exported_where_they_are(
    job: Path, report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(job.parent, tmp_path / "jobs")
    task = tmp_path / "jobs" / "task" / "task.yaml"
    sealing = evomerge_("check", task, "--seal")
    assert sealing.code == 0, sealing.err
    away = tmp_path / "away" / "data"
    away.mkdir(parents=True)
    shutil.move(task.parent / "data" / "test.jsonl", away)
    own, store = tmp_path / "jobs" / "job.yaml", tmp_path / "store.db"
    launch = evomerge_("run", own, "--store", url(store), "name=one")
    assert launch.code == 0, launch.err
    assert "test is known by 'task.sealed.json' alone" in " ".join(launch.err.split())

    refused = export(store, "one", tmp_path / "out")
    assert refused.code == 2
    assert "test.jsonl' is missing: put it there" in refused.err
    assert query(store, UNSEALS) == []

    monkeypatch.setenv("EVOMERGE_DATA", str(away.parent))
    found = report_of(store, "one", tmp_path / "out")
    for key in ("recipe_sha", "test_scores", "best_parent_test", "claim"):
        assert found[key] == report[key]


def test_leave_to_read_test_is_given_by_the_store_alone_and_asked_for_by_export_alone() -> None:
    package = tiny.ROOT / "evomerge"
    texts = {
        str(path.relative_to(package)): path.read_text(encoding="utf-8")
        for path in package.rglob("*.py")
    }
    give = {name for name, text in texts.items() if re.search(r"(?<!class )\bUnsealed\(", text)}
    ask = {name for name, text in texts.items() if re.search(r"(?<!ledger)\.unseal\(", text)}
    assert (give, ask) == ({"store/coordinator.py"}, {"export/reading.py"})


def test_recipe_that_another_search_read_is_not_read_again(
    opened: Path, report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = query(opened, UNSEALS), query(opened, READINGS)
    monkeypatch.setattr(reading, "score_alone", None)  # whoever reads fails
    again = report_of(opened, "two", tmp_path / "two")
    assert (query(opened, UNSEALS), query(opened, READINGS)) == before
    assert report["candidate"] != again["candidate"]  # an id says where a store put it
    for key in ("recipe_sha", "test_scores", "best_parent_test", "claim"):
        assert report[key] == again[key]
    (seal,) = again["seal"].values()
    assert (seal["opened_by"], seal["opened_before"]) == ("one", 0)
    assert "by search `one`, once for both" in (tmp_path / "two" / "README.md").read_text()


def test_claim_depends_on_a_candidates_place_in_its_search_and_not_on_its_id(
    pair: Path, job: Path
) -> None:
    setting, random = Setting.open(Job.from_file(job)), np.random.Generator(np.random.PCG64(0))

    def scores() -> dict[str, Scores]:
        none, zeros = np.zeros(16, np.bool_), np.zeros(16, np.float32)
        values = random.random(16, np.float32)
        examples = np.arange(16, dtype=np.uint32)
        return {"ja_list_ops": Scores(examples, values, zeros, none, examples, none)}

    found = reading.Reading(scores(), scores(), {})
    with Store(url(pair)) as opened:
        one, two = (
            opened.candidates(opened.search(name).id, generation=1) for name in ("one", "two")
        )
    claims = [[_claim(setting, c, found) for c in rows] for rows in (one, two)]
    assert {c.id for c in one}.isdisjoint({c.id for c in two})
    assert claims[0] == claims[1]
    assert claims[0][0]["interval"] != claims[0][1]["interval"]  # each has luck of its own


def test_best_parent_is_read_once_for_all_candidates(
    opened: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = query(opened, "SELECT id FROM candidate WHERE label = 'uniform average'")
    read: list[str] = []
    score_alone = reading.score_alone

    def counted(model: str, *rest: Any) -> Any:
        read.append(model)
        return score_alone(model, *rest)

    monkeypatch.setattr(reading, "score_alone", counted)
    report_of(opened, "one", tmp_path / "other", "--candidate", str(ids[0][0]))
    assert len(read) == 1
    assert read[0].endswith(".partial")  # the files to be exported
    assert len(query(opened, READINGS)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("where", ["the model", "the best parent", "the report"])
def test_export_that_breaks_off_goes_on_under_the_same_opening(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Broken off right after the model's reading is kept, after that of the parent, or after both
    and before the report is."""
    saves: list[int] = []
    save, save_report = Coordinator.save_readings, Coordinator.save_report

    def breaking(self: Coordinator, *rest: Any) -> None:
        save(self, *rest)
        saves.append(1)
        if len(saves) == {"the model": 1, "the best parent": 2}.get(where):
            raise KeyboardInterrupt

    def breaking_report(self: Coordinator, *rest: Any) -> None:
        if where == "the report":
            raise KeyboardInterrupt
        save_report(self, *rest)

    with monkeypatch.context() as fault:
        fault.setattr(Coordinator, "save_readings", breaking)
        fault.setattr(Coordinator, "save_report", breaking_report)
        assert export(store, "one", tmp_path / "out").code == 130
    kept = query(store, "SELECT id, sha256 FROM reading")
    opened = query(store, UNSEALS)
    assert len(opened) == 1
    assert len(kept) == (1 if where == "the model" else 2)
    assert not (tmp_path / "out").exists()
    report = report_of(store, "one", tmp_path / "out")
    assert query(store, UNSEALS) == opened
    assert query(store, "SELECT id, sha256 FROM reading")[: len(kept)] == kept
    (seal,) = report["seal"].values()
    assert seal["opened_before"] == 0


def at_once(store: Path, folder: Path, *names: str) -> list[Ended]:
    """Exports of these searches, each in a process of its own."""
    processes: list[subprocess.Popen[str]] = [
        start("export", name, "-o", folder / f"{name}-{number}", "--store", url(store), "--json")
        for number, name in enumerate(names)
    ]
    return [ended(process) for process in processes]


@pytest.mark.slow
def test_two_processes_that_export_two_searches_open_and_read_once(
    store: Path, tmp_path: Path
) -> None:
    ends = at_once(store, tmp_path, "one", "two")
    assert [end.code for end in ends] == [0, 0], [end.err for end in ends]
    first, second = (json.loads(end.out) for end in ends)
    assert len(query(store, UNSEALS)) == 1
    assert len(query(store, READINGS)) == 2
    assert first["test_scores"] == second["test_scores"]
    assert first["seal"] == second["seal"]


@pytest.mark.slow
def test_two_processes_that_export_one_search_write_one_report(store: Path, tmp_path: Path) -> None:
    ends = at_once(store, tmp_path, "one", "one")
    assert {end.code for end in ends} <= {0, 2}
    assert any(end.code == 0 for end in ends)
    for end in ends:
        assert end.code == 0 or "is being conducted by" in end.err
    assert len(query(store, UNSEALS)) == 1
    assert len(query(store, READINGS)) == 2
    ((stored,),) = query(store, "SELECT report FROM export")
    again = report_of(store, "one", tmp_path / "again")
    assert all(json.loads(end.out) == again for end in ends if end.code == 0)
    assert json.loads(stored) == again


@pytest.mark.slow
def test_records_that_are_asked_otherwise_are_read_again_and_that_counts(
    store: Path, job: Path, tmp_path: Path
) -> None:
    """What a recipe scores in one way says nothing of what it scores in another."""
    folder = tmp_path / "otherwise"
    shutil.copytree(job.parent, folder)
    task = folder / "task" / "task.yaml"
    text = task.read_text(encoding="utf-8")
    task.write_text(text.replace("{{ prompt }}", "{{ prompt }} "), encoding="utf-8")
    search(folder / "job.yaml", store, "name=otherwise")
    for name in ("one", "otherwise"):
        ((average,),) = query(
            store,
            "SELECT candidate.id FROM candidate JOIN search ON search.id = candidate.search_id "
            f"WHERE label = 'uniform average' AND name = '{name}'",
        )
        report = report_of(store, name, tmp_path / f"{name} out", "--candidate", str(average))
    first, second = query(store, UNSEALS)
    assert first[0] == second[0]
    assert second[1].startswith(f"{first[1]}/")
    (seal,) = report["seal"].values()
    assert (seal["opened_by"], seal["opened_before"]) == ("otherwise", 1)
    assert seal["searches"] == ["one"]
    assert len(query(store, READINGS)) == 4


def test_ledger_says_what_for_by_whom_and_against_whom(first: Path, report: dict[str, Any]) -> None:
    ((entry,),) = query(first, "SELECT entry FROM ledger WHERE kind = 'unseal'")
    assert json.loads(entry) == {
        "purpose": "export",
        "search": "one",
        "candidate": report["candidate"],
        "best_parent": report["best_parent"],
    }


def test_what_was_read_is_kept_example_by_example(first: Path, report: dict[str, Any]) -> None:
    ((asked,), *_) = query(first, "SELECT DISTINCT asked FROM reading")
    with Store(url(first)) as store:
        found = store.reading(asked, report["recipe_sha"])
    assert found is not None
    assert found.examples.tolist() == list(range(16))
    assert found.mean == report["test_scores"]["ja_list_ops"]["exported"]


@pytest.mark.slow
def test_items_of_a_group_are_drawn_together(tmp_path: Path) -> None:
    """16 items in 2 groups leave more to luck than 16 items."""
    task = tiny.write_task(tmp_path / "task", source="ja_transcription")
    text = task.read_text(encoding="utf-8")
    task.write_text(text.replace("data: {", "data: {group: set, "), encoding="utf-8")
    for split in ("train", "validation", "test"):
        data = tmp_path / "task" / "data" / f"{split}.jsonl"
        records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
        named = [r | {"set": f"{split} {n % 2}"} for n, r in enumerate(records)]
        tiny.write_jsonl(data, named)
    optimizer = {"name": "cma-es", "population": 4, "sigma0": 0.3}
    job = tiny.write_job(tmp_path, optimizer=optimizer, budget={"candidates": 4})
    store = tmp_path / "store.db"
    search(job, store)
    report = report_of(store, "tiny", tmp_path / "out")
    with Store(url(store)) as opened:
        subjects = dict(query(store, "SELECT subject, asked FROM reading"))
        ours = opened.reading(subjects[report["recipe_sha"]], report["recipe_sha"])
        (parent,) = subjects.keys() - {report["recipe_sha"]}
        theirs = opened.reading(subjects[parent], parent)
        (found,) = opened.candidates(opened.search("tiny").id, ids=[report["candidate"]])
    assert ours is not None
    assert theirs is not None
    groups = {"ja_transcription": Task.open(task).groups("test")}
    assert groups["ja_transcription"] is not None
    assert np.unique(groups["ja_transcription"]).tolist() == [0, 1]
    random = generator(3, f"claim {found.generation}", found.slot)
    pair = {"ja_transcription": ours}, {"ja_transcription": theirs}
    gain = paired_gain(*pair, {"ja_transcription": 1.0}, random, groups)
    assert report["claim"]["interval"] == list(gain.estimate.interval)
    assert report["claim"]["p_value"] == gain.p_value


@pytest.mark.slow
def test_search_on_an_opened_test_split_is_told_so_at_launch_in_check_and_in_show(
    pair: Path, opened: Path, job: Path
) -> None:
    at = ("--store", url(opened))
    text = "the test split of task 'ja_list_ops' was opened once before, by search one"
    for end in (
        evomerge_("run", job, "name=three", "budget.candidates=1", *at),
        evomerge_("check", job, *at),
        evomerge_("show", "two", *at),
    ):
        assert text in " ".join((end.out + end.err).split())
    assert text not in evomerge_("show", "one", *at).out
    assert evomerge_("show", "two", *at).out.count("opened") == 1
    assert text not in evomerge_("show", "two", "--store", url(pair)).out
    found = json.loads(evomerge_("show", "two", "--json", *at).out)
    (worn,) = found["worn"]
    assert (worn["task"], worn["times"], worn["share"]) == ("ja_list_ops", 1, 1.0)
    assert (found["unsealed_for"], found["unsealed_by"]) == (1, {"one": 1})


@pytest.mark.slow
def test_search_whose_test_split_overlaps_an_opened_one_is_told_the_share(
    opened: Path, job: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "overlapping"
    shutil.copytree(job.parent, folder)
    data = folder / "task" / "data" / "test.jsonl"
    lines = data.read_text(encoding="utf-8").splitlines()
    other = (tiny.ROOT / "fitness" / "ja_list_ops" / "data" / "test.jsonl").read_text("utf-8")
    data.write_text("\n".join([*lines[:4], *other.splitlines()[16:28]]) + "\n", encoding="utf-8")
    end = evomerge_("check", folder / "job.yaml", "--store", url(opened))
    assert end.code == 0, end.err
    text = "25% of the test split of task 'ja_list_ops' is part of one that was opened once before"
    assert text in " ".join(end.out.split())
    search(folder / "job.yaml", opened, "name=overlapping")
    report = report_of(opened, "overlapping", tmp_path / "two")
    (seal,) = report["seal"].values()
    assert seal["opened_before"] == 0
    assert seal["overlaps"] == [{"times": 1, "searches": ["one"], "share": 0.25}]
    card = (tmp_path / "two" / "README.md").read_text(encoding="utf-8")
    assert "25% of the test split of `ja_list_ops` was opened before, by search `one`" in card
