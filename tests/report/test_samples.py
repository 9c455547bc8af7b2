"""Replies are kept as they were written, and shown beside what the parents replied."""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from evomerge.fitness.example import Verdict
from evomerge.fitness.results import Scored, Scores
from evomerge.fitness.score import sampled
from evomerge.job import Job
from evomerge.report import candidate as reported
from evomerge.search import Silent, launch
from evomerge.search.record import Record
from evomerge.search.setting import Setting
from evomerge.store import Coordinator, NewCandidate, Store, Sums, copy
from tests.running import evomerge_, query, url

TASK = "en_list_ops"


@pytest.fixture(scope="module")
def store(spoken: Path) -> Iterator[Store]:
    with Store(url(spoken)) as opened:
        yield opened


def ids(store: Store, generation: int | None = None) -> dict[int, str | None]:
    row = store.search("tiny")
    found = store.candidates(row.id, generation=generation, with_genotypes=False)
    return {c.id: c.label for c in found}


def test_of_a_baseline_every_reply_is_kept_of_others_eight(store: Store) -> None:
    for id, label in ids(store).items():
        found = reported.samples(store, "tiny", id)
        assert [one.position for one in found] == sorted(one.position for one in found)
        assert {one.task for one in found} == {TASK}
        assert len(found) == (24 if label not in (None, "mean") else 8), label


def test_others_replies_stand_beside_those_of_the_parents_to_the_same(store: Store) -> None:
    parents = {label: id for id, label in ids(store, 0).items() if label in ("ops", "ja", "base")}
    own = {
        label: {one.position: one for one in reported.samples(store, "tiny", id)}
        for label, id in parents.items()
    }
    for id in ids(store, 1):
        for one in reported.samples(store, "tiny", id):
            assert set(one.others) == {"ops", "ja", "base"}
            for label, reply in one.others.items():
                theirs = own[str(label)][one.position]
                assert (reply.reply, reply.score) == (theirs.reply, theirs.score)
    assert set(reported.samples(store, "tiny", parents["ja"])[0].others) == {"ops", "base"}


def test_scores_are_those_of_the_replies(store: Store) -> None:
    """The task is graded by exact match."""
    right = 0
    for id in ids(store):
        for one in reported.samples(store, "tiny", id):
            assert one.score == float(one.reply.strip() == one.target)
            right += one.score == 1
    assert right > 0


def test_questions_are_read_again_from_the_task(spoken: Path, store: Store) -> None:
    lines = (spoken.parent / "task/data/train.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for one in reported.samples(store, "tiny", 1):
        assert one.prompt == records[one.position]["prompt"]
        assert one.target == records[one.position]["answer"]


def test_questions_that_are_not_what_they_were_are_not_shown(spoken: Path, store: Store) -> None:
    before = reported.samples(store, "tiny", 1)
    data = spoken.parent / "task/data/train.jsonl"
    kept = data.read_text(encoding="utf-8")
    try:
        data.write_text(kept.replace("{", '{"more": 1, ', 1), encoding="utf-8")
        after = reported.samples(store, "tiny", 1)
        assert {(one.prompt, one.target) for one in after} == {(None, None)}
        assert [(one.reply, one.score) for one in after] == [(o.reply, o.score) for o in before]
        data.unlink()
        assert reported.samples(store, "tiny", 1) == after
    finally:
        data.write_text(kept, encoding="utf-8")
    assert reported.samples(store, "tiny", 1) == before


def test_no_reply_is_kept_of_other_splits(spoken: Path, store: Store) -> None:
    sql = "SELECT DISTINCT purpose, stage FROM sample JOIN evaluation ON id = evaluation_id"
    assert set(query(spoken, sql)) == {("full", 0), ("train", 0)}
    looked = query(spoken, "SELECT COUNT(*) FROM evaluation WHERE purpose = 'validation'")
    assert looked[0][0] > 0


def test_as_many_as_asked_for_are_given(store: Store) -> None:
    assert reported.samples(store, "tiny", 1, limit=3) == reported.samples(store, "tiny", 1)[:3]


@pytest.mark.slow
def test_a_copied_result_has_the_replies_of_the_original(
    spoken: Path, tmp_path: Path, store: Store
) -> None:
    """A second search of the store takes its baselines over from the first."""
    copied = tmp_path / "store.db"
    with sqlite3.connect(spoken) as source, sqlite3.connect(copied) as target:
        source.backup(target)
    target.close()
    source.close()
    job = Job.from_file(spoken.parent / "job.yaml", ["name=second", "budget.candidates=4"])
    launch(Setting.open(job), url(copied), Silent(), lambda: False)
    with Store(url(copied)) as opened:
        row = opened.search("second")
        first = {label: id for id, label in ids(opened, 0).items()}
        for c in opened.candidates(row.id, generation=0, with_genotypes=False):
            ours = reported.samples(opened, "second", c.id)
            theirs = reported.samples(opened, "tiny", first[c.label])
            assert ours == theirs
            assert len(ours) == 24
        (proposed, *_) = opened.candidates(row.id, generation=1, with_genotypes=False)
        for one in reported.samples(opened, "second", proposed.id):
            assert set(one.others) == {"ops", "ja", "base"}


def test_replies_go_into_the_store_and_nobody_holds_them(spoken: Path, tmp_path: Path) -> None:
    setting = Setting.open(Job.from_file(spoken.parent / "job.yaml"))
    none = np.zeros(2, np.bool_)
    values, tokens = np.zeros(2, np.float32), np.zeros(2, np.uint32)
    scores = Scores(np.array([4, 7], np.uint32), values, values, none, tokens, none)
    replies = {TASK: {4: "half a \ud800 pair, and a \0", 7: ""}}
    with Store(url(tmp_path / "store.db"), create=True) as opened:
        models, splits = setting.new_models(), setting.new_splits()
        job = setting.document()
        with Coordinator.launch(opened, "tiny", 0, job, {}, models, splits) as held:
            record = Record(setting, held)
            new = NewCandidate(0, "ops", None, {}, "sha")
            (member,) = record.open(0, "baselines", None, [new])
            record.add(member.id, "full", 0, Scored({TASK: scores}, 0.0, 1.0, replies))
            found = record.evaluation(member.id, "full")
        assert isinstance(found, Scored)
        assert found.replies == {}
        rows = Sums(opened, held.search.id).samples([member.id])
        assert [(row.position, row.reply) for row in rows] == [
            (4, "half a \\ud800 pair, and a \N{SYMBOL FOR NULL}"),
            (7, ""),
        ]


def test_a_long_reply_is_kept_from_its_beginning_and_of_several_the_first() -> None:
    verdicts = [
        Verdict(1.0, replies=("x" * 3000, "other")),
        Verdict(0.0),
        Verdict(0.5, replies=("y",)),
    ]
    found = sampled(np.array([9, 3, 5], np.uint32), verdicts, 3)
    assert found == {9: "x" * 2000, 5: "y"}
    assert sampled(np.array([9, 3, 5], np.uint32), verdicts, 2) == {5: "y"}
    assert sampled(np.array([9, 3, 5], np.uint32), verdicts, 0) == {}


def test_a_store_with_replies_is_whole_and_can_be_copied(spoken: Path, tmp_path: Path) -> None:
    end = evomerge_("db", "check", "--store", url(spoken))
    assert end.code == 0, end.err
    copy(url(spoken), url(tmp_path / "copy.db"), lambda done, of: None)
    sql = "SELECT * FROM sample ORDER BY evaluation_id, task, position"
    assert query(tmp_path / "copy.db", sql) == query(spoken, sql) != []
