"""Looks that are asked for after the launch: allowed, written down, and post hoc for ever."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import JobError, LooksSpent, SearchBusy
from evomerge.fitness.task import Task
from evomerge.guard.estimates import paired_gain, promoted
from evomerge.job import Job
from evomerge.search import Interrupted, Silent, finals, looks, resume
from evomerge.search.loop import Run
from evomerge.search.setting import Setting, versions
from evomerge.search.summary import show
from evomerge.seeds import generator
from evomerge.store import Coordinator, Store
from tests import tiny
from tests.running import Ended, evomerge_, query, url

MORE = "guard.validation_looks=5"


@pytest.fixture
def store(searched: Path, tmp_path: Path) -> Path:
    """A store of its own with the finished search, all of whose three looks are spent."""
    return Path(shutil.copyfile(searched, tmp_path / "store.db"))


@pytest.fixture(scope="module")
def more(searched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose finished search was allowed five looks later; nothing was exported."""
    folder = tmp_path_factory.mktemp("more")
    shutil.copyfile(searched, folder / "store.db")
    end = go_on(folder / "store.db", MORE)
    assert end.code == 0, end.err
    return folder / "store.db"


def go_on(store: Path, *overrides: str) -> Ended:
    return evomerge_("resume", "tiny", *overrides, "--store", url(store), "--json")


def shown(store: Path) -> dict[str, Any]:
    with Store(url(store)) as opened:
        return show(opened, "tiny")


def kinds(store: Path) -> list[str]:
    return [kind for (kind,) in query(store, "SELECT kind FROM ledger ORDER BY id")]


def test_further_finalists_look_and_the_verdict_is_made_anew(searched: Path, more: Path) -> None:
    before, after = shown(searched), shown(more)
    assert (after["state"], after["looks"]) == ("finished", {"used": 5, "allowed": 5})
    ids = [[finalist["candidate"] for finalist in said["finalists"]] for said in (before, after)]
    assert len(ids[1]) == 4
    assert set(ids[0]) < set(ids[1])
    assert after["best"]["candidate"] in ids[1]
    assert kinds(more) == [*kinds(searched), "more looks", "look", "look"]


def test_promotion_is_judged_by_the_number_of_looks_that_there_are_now(more: Path) -> None:
    said = shown(more)
    with Store(url(more)) as opened:
        row = opened.search("tiny")
        looked = {e.candidate: e.scores for e in opened.evaluations(row.id, ["validation"])}
    ours, theirs = looked[said["best"]["candidate"]], looked[said["best_parent"]]
    assert ours is not None
    assert theirs is not None
    weights = {"ja_list_ops": 1.0, "ja_transcription": 0.5}
    gain = paired_gain(ours, theirs, weights, generator(3, "verdict"))
    assert said["promoted"] is promoted(gain, 0.05, 5)


def test_it_is_post_hoc_in_every_answer(searched: Path, more: Path) -> None:
    assert (shown(searched)["post_hoc"], shown(searched)["more_looks"]) == (False, [])
    said = shown(more)
    (later,) = said["more_looks"]
    assert said["post_hoc"] is True
    assert (later["before"], later["allowed"], later["opened"]) == (3, 5, False)
    text = evomerge_("show", "tiny", "--store", url(more)).out
    assert f"post hoc: 5 looks instead of 3 since {later['at'][:16]}" in text


def test_it_is_an_event_that_says_who_had_won(searched: Path, more: Path) -> None:
    winner = shown(searched)["best"]["candidate"]
    ((text,),) = query(more, "SELECT text FROM event WHERE kind = 'more looks'")
    assert text.startswith("from 3 to 5 looks at validation; ")
    assert f"candidate {winner} had won" in text


def test_ledger_says_from_what_to_what(more: Path) -> None:
    ((entry,),) = query(more, "SELECT entry FROM ledger WHERE kind = 'more looks'")
    assert json.loads(entry) == {"from": 3, "to": 5, "search": "tiny"}


@pytest.mark.parametrize("fewer", ["guard.validation_looks=2", "guard.validation_looks=1"])
def test_fewer_looks_are_refused(store: Path, fewer: str) -> None:
    end = go_on(store, fewer)
    assert end.code == 2
    assert "validation_looks" in end.err
    assert kinds(store).count("more looks") == 0


def test_as_many_as_there_are_change_nothing(store: Path) -> None:
    before = store.read_bytes()
    assert go_on(store, "guard.validation_looks=3").code == 0
    assert store.read_bytes() == before


@pytest.mark.parametrize("other", ["guard.alpha=0.5", "guard.monitor=0", "budget.candidates=99"])
def test_nothing_else_may_change_after_the_end(store: Path, other: str) -> None:
    with Store(url(store)) as opened, pytest.raises(JobError):
        resume("tiny", opened, Silent(), lambda: False, [MORE, other])
    assert kinds(store).count("more looks") == 0


def test_killed_after_the_looks_were_allowed_it_goes_on_to_the_same_end(
    store: Path, searched: Path, more: Path
) -> None:
    tasks = [Task.open(searched.parent / folder / "task.yaml") for folder in ("task", "reading")]
    with Store(url(store)) as opened:
        with Coordinator.take_over(opened, "tiny") as coordinator:
            coordinator.allow_looks(looks.content(tasks), 5)
        assert (opened.search("tiny").state, opened.search("tiny").verdict) == ("stopped", None)
    assert go_on(store).code == 0
    verdict = "SELECT verdict, job, state FROM search"
    assert query(store, verdict) == query(more, verdict)
    assert kinds(store) == kinds(more)


def test_looks_that_another_process_allowed_meanwhile_are_not_taken_back(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_over = Coordinator.take_over

    def beaten(opened: Store, name: str, *rest: Any) -> Coordinator:
        with take_over(opened, name) as other:
            other.allow_looks("c" * 64, 8)
            other.finish("finished", other.search.verdict)
        return take_over(opened, name, *rest)

    with Store(url(store)) as opened, monkeypatch.context() as fault:
        fault.setattr(Coordinator, "take_over", beaten)
        with pytest.raises(SearchBusy, match="changed by another process just now"):
            resume("tiny", opened, Silent(), lambda: False, [MORE])
        assert opened.search("tiny").job["guard"]["validation_looks"] == 8


def test_candidates_from_outside_spend_the_same_looks(
    store: Path, searched: Path, tmp_path: Path
) -> None:
    task = Task.open(searched.parent / "task" / "task.yaml")
    with Store(url(store)) as opened:
        seen = {r.entry["candidate"] for r in opened.ledger() if r.kind == "look"}
        rows = opened.candidates(opened.search("tiny").id)
        unseen = next(c.id for c in rows if c.label is None and c.id not in seen)
    folder = tmp_path / "merged"
    end = evomerge_(
        *("export", "tiny", "--recipe-only", "--candidate", str(unseen), "-o", folder),
        *("--store", url(store)),
    )
    assert end.code == 0
    with pytest.raises(LooksSpent, match=r"resume tiny guard\.validation_looks=4"):
        looks.reserve(url(store), str(folder), task)
    with (
        Store(url(store)) as opened,
        Coordinator.take_over(opened, "tiny") as coordinator,
    ):
        coordinator.allow_looks("c" * 64, 4)
        coordinator.finish("finished", {"winner": 1})
    assert looks.reserve(url(store), str(folder), task) == ["tiny"]
    assert kinds(store)[-1] == "look"


@pytest.mark.slow
def test_report_that_was_stored_stays_and_a_later_one_says_that_test_was_open(
    exported: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copyfile(exported.parent / "store.db", tmp_path / "store.db"))
    reports = query(store, "SELECT candidate_id, report FROM export")
    assert go_on(store, MORE).code == 0
    first = shown(store)["best"]["candidate"]
    rows = query(store, "SELECT id FROM candidate WHERE generation = 1")
    other = next(id for (id,) in rows if id not in (first, reports[0][0]))
    end = evomerge_(
        *("export", "tiny", "-o", tmp_path / "out", "--candidate", str(other)),
        *("--store", url(store), "--json"),
    )
    report = json.loads(end.out)
    assert report["post_hoc"] is True
    (later,) = report["more_looks"]
    assert (later["before"], later["allowed"], later["opened"]) == (3, 5, True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "post hoc: the search was allowed 5 looks" in card
    assert "after its test split had been opened" in card
    again = evomerge_(
        *("export", "tiny", "-o", tmp_path / "again", "--candidate", str(reports[0][0])),
        *("--store", url(store)),
    )
    assert again.code == 0
    text = (tmp_path / "again" / "evomerge_report.json").read_text(encoding="utf-8")
    assert text == reports[0][1]


@pytest.mark.slow
def test_whoever_looked_before_stays_a_finalist(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are to be more knees of a front, they are others."""
    before = {finalist["candidate"] for finalist in shown(store)["finalists"]}
    choose = finals._finalists

    def others(*rest: Any) -> list[Any]:
        return [member for member in choose(*rest) if member.id not in before]

    monkeypatch.setattr(finals, "_finalists", others)
    assert go_on(store, MORE).code == 0
    assert {finalist["candidate"] for finalist in shown(store)["finalists"]} > before


@pytest.mark.slow
def test_search_under_way_may_be_allowed_more_looks_with_another_budget(tmp_path: Path) -> None:
    job = tiny.write_job(tmp_path, budget={"candidates": 99})
    setting, store = Setting.open(Job.from_file(job)), tmp_path / "store.db"
    with Store(url(store), create=True) as opened:
        held = Coordinator.launch(
            *(opened, "tiny", 3, setting.document(), versions()),
            *(setting.new_models(), setting.new_splits()),
        )
        executor = setting.executor()
        with held as coordinator:
            run = Run(setting, coordinator, executor, Silent(), lambda: len(run.record.members) > 1)
            run.score_baselines()
            with pytest.raises(Interrupted):
                run.optimize()
        executor.close()
        found = show(opened, "tiny")
        assert (found["state"], found["post_hoc"]) == ("stopped", False)
        estimates = found["estimates"]
        assert estimates["raw_train"]["value"] == found["best"]["score"]["train"]["value"]
        assert [estimates[name] for name in ("bbc_cv", "validation", "test")] == [None] * 3
        more = ["budget.candidates=8", "guard.validation_looks=4"]
        resume("tiny", opened, Silent(), lambda: False, more)
        found = show(opened, "tiny")
        job_now = opened.search("tiny").job
    assert (job_now["guard"]["validation_looks"], job_now["budget"]["candidates"]) == (4, 8)
    assert (found["state"], found["post_hoc"]) == ("finished", True)
    assert found["looks"] == {"used": 4, "allowed": 4}
