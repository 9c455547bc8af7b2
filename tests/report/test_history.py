"""A search's history says generation by generation what the store holds, and what is wrong."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from evomerge.errors import StoreError
from evomerge.fitness.results import Failed, Scored, Scores
from evomerge.guard.estimates import combined
from evomerge.report.history import History, history
from evomerge.search import summary
from evomerge.store import Coordinator, NewCandidate, NewSplit, Store
from tests.running import query, url


def of(store: Path, name: str = "tiny") -> History:
    with Store(url(store)) as opened:
        return history(opened, name)


def results(*values: float, truncated: int = 0) -> Scored:
    n = len(values)
    none, cut = np.zeros(n, np.bool_), np.arange(n) < truncated
    scores = np.array(values, np.float32)
    tokens = np.full(n, 5, np.uint32)
    return Scored(
        {"t": Scores(np.arange(n, dtype=np.uint32), scores, -scores, cut, tokens, none)}, 0, 1
    )


def test_there_is_a_point_for_each_generation_with_what_its_review_says(raced: Path) -> None:
    found = of(raced)
    rows = query(raced, "SELECT number, kind, step_size, review FROM generation ORDER BY number")
    assert [(p.generation, p.kind, p.step_size) for p in found.points] == [r[:3] for r in rows]
    reviews = [json.loads(row[3]) if row[3] else {} for row in rows]
    assert [p.best for p in found.points] == [review.get("shrunk") for review in reviews]
    assert [p.raw_best for p in found.points] == [review.get("train") for review in reviews]
    assert [p.monitor for p in found.points] == [review.get("monitor") for review in reviews]
    assert any(p.gap is not None for p in found.points)
    for point, review in zip(found.points, reviews, strict=True):
        if point.gap is not None and point.gap_interval is not None:
            low, high = point.gap_interval
            assert (low + high) / 2 == pytest.approx(point.gap)
            assert (high - low) / 2 == pytest.approx(1.96 * review["standard_error"], rel=1e-3)


def test_the_mean_of_a_generation_is_of_those_that_were_scored_to_the_end(raced: Path) -> None:
    for point in of(raced).points:
        sql = f"""SELECT AVG(m) FROM (
            SELECT SUM(s.mean * s.n) / SUM(s.n) AS m, MAX(e.stage) AS last FROM candidate c
            JOIN evaluation e ON e.candidate_id = c.id AND e.purpose = 'train'
            JOIN score s ON s.evaluation_id = e.id
            WHERE c.generation = {point.generation} AND c.label IS NULL GROUP BY c.id
        ) WHERE last = 2"""
        (expected,) = query(raced, sql)[0]
        assert point.mean == (None if expected is None else pytest.approx(expected))


def test_failed_candidates_and_examples_are_counted_up(raced: Path) -> None:
    found = of(raced)
    (failed,) = query(raced, "SELECT COUNT(*) FROM candidate WHERE state = 'failed'")[0]
    assert sum(point.failed for point in found.points) == failed > 0
    with Store(url(raced)) as store:
        shown = summary.show(store, "tiny")
    assert found.points[-1].examples == shown["budget"]["example_evaluations"]["used"]
    examples = [point.examples for point in found.points]
    assert examples == sorted(examples)
    assert {key: (s.used, s.allowed) for key, s in found.budget.items()} == {
        key: (s["used"], s["allowed"]) for key, s in shown["budget"].items()
    }


def test_references_are_the_baselines_as_show_scores_them(raced: Path) -> None:
    found = {one.name: one for one in of(raced).references}
    with Store(url(raced)) as store:
        shown = summary.show(store, "tiny")
    compared = shown["parents"] | shown["baselines"]
    assert {name: one.score for name, one in found.items()} == {
        name: one["score"]["train"]["value"] for name, one in compared.items()
    }
    assert {name for name, one in found.items() if one.parent} == {"ops", "ja", "base"}
    (best,) = (one for one in found.values() if one.best)
    assert best.score == max(one.score for one in found.values() if one.parent)
    assert best.candidate == shown["best_parent"]


class TestOfASearchUnderWay:
    """What is written by a coordinator here, and read beside it."""

    @pytest.fixture
    def held(self, tmp_path: Path) -> Coordinator:
        """Of a search with two tasks' worth of nothing but what a test records."""
        job = {
            "parents": {"a": {"model": "/a"}, "b": {"model": "/b"}},
            "tasks": [{"task": "t", "weight": 1.0}],
            "objective": "mean",
            "budget": {"candidates": 100},
        }
        store = Store(url(tmp_path / "store.db"), create=True)
        splits = [NewSplit("t", split, split, split, ["x"]) for split in ("train", "validation")]
        held = Coordinator.launch(store, "tiny", 0, job, {}, [], splits)
        baselines = [NewCandidate(i, name, None, {}, name) for i, name in enumerate("ab")]
        for id in held.open_generation(0, "baselines", None, baselines):
            held.record(id, "full", 0, results(1, 0, 0, 0), fitness=0.25)
        held.close_generation(0, {}, None)
        return held

    def proposed(self, held: Coordinator, count: int) -> list[int]:
        new = [NewCandidate(i, None, np.zeros(1), {}, str(i)) for i in range(count)]
        return held.open_generation(1, "proposed", 0.1, new)

    def test_what_is_not_known_yet_is_none(self, held: Coordinator) -> None:
        self.proposed(held, 2)
        point = history(held.store, "tiny").points[-1]
        assert (point.mean, point.best, point.best_interval, point.told_at) == (None,) * 4
        assert (point.candidates, point.failed, point.examples) == (2, 0, 0)
        assert history(held.store, "tiny").alerts == ()

    def test_many_failures_are_an_alert(self, held: Coordinator) -> None:
        first, *others = self.proposed(held, 4)
        held.record(first, "train", 0, Failed("out of luck"))
        for id in others:
            held.record(id, "train", 0, results(1))
        held.log("whatever", "writes what waits")
        (alert,) = history(held.store, "tiny").alerts
        assert alert.kind == "failures"
        assert "1 of 4 candidates" in alert.text

    def test_replies_that_are_cut_off_are_an_alert_of_the_one_that_leads(
        self, held: Coordinator
    ) -> None:
        first, second = self.proposed(held, 2)
        held.record(first, "train", 0, results(1, 1, 1, 1))
        held.record(second, "train", 0, results(0, 0, 0, 0, truncated=1))
        review = {"incumbent": first, "train": 1.0, "shrunk": 1.0}
        held.close_generation(1, {}, review)
        assert history(held.store, "tiny").alerts == ()
        held.close_generation(1, {}, review | {"incumbent": second})
        (alert,) = history(held.store, "tiny").alerts
        assert alert.kind == "truncation"
        assert f"25% of the replies of candidate {second}" in alert.text

    def test_silence_is_an_alert_while_it_runs(self, held: Coordinator) -> None:
        (first,) = self.proposed(held, 1)
        held.record(first, "train", 0, results(1))
        held.log("whatever", "writes what waits")
        long_ago = (datetime.now(UTC) - timedelta(hours=3)).isoformat(timespec="milliseconds")
        with held.store.database.write() as db:
            db.exec_driver_sql(f"UPDATE evaluation SET recorded_at = '{long_ago}'")
        (alert,) = history(held.store, "tiny").alerts
        assert (alert.kind, alert.at) == ("stale", long_ago)
        assert "180 minutes" in alert.text
        held.close()
        assert history(held.store, "tiny").alerts == ()

    def test_what_was_noted_of_gap_and_contamination_is_an_alert(self, held: Coordinator) -> None:
        held.log("gap", "by heart")
        held.log("contamination", "shared")
        held.log("resume", "nothing to worry about")
        found = history(held.store, "tiny").alerts
        assert [(a.kind, a.text) for a in found] == [
            ("gap", "by heart"),
            ("contamination", "shared"),
        ]
        assert all(a.at for a in found)


def test_of_the_worst_task_references_are_the_worst(tmp_path: Path) -> None:
    job = {
        "parents": {"a": {"model": "/a"}},
        "base": {"model": "/base"},
        "tasks": [{"task": "s", "weight": 1.0}, {"task": "t", "weight": 3.0}],
        "budget": {"candidates": 100},
    }
    expected = {
        "mean": combined({"s": (1.0, 4), "t": (0.5, 4)}, {"s": 1, "t": 3}),
        "worst": combined({"t": (0.5, 4)}, {"t": 1}),
        "relative": combined({"s": (1.0, 4), "t": (0.5, 4)}, {"s": 1 / 1.0, "t": 3 / 0.5}),
    }
    with Store(url(tmp_path / "store.db"), create=True) as store:
        for objective, estimate in expected.items():
            splits = [NewSplit(task, "train", task, task, ["x"]) for task in "st"]
            own = {**job, "objective": objective}
            with Coordinator.launch(store, objective, 0, own, {}, [], splits) as held:
                (id,) = held.open_generation(
                    0, "baselines", None, [NewCandidate(0, "a", None, {}, "a")]
                )
                easy, hard = results(1, 1, 1, 1).tasks["t"], results(1, 1, 0, 0).tasks["t"]
                held.record(id, "full", 0, Scored({"s": easy, "t": hard}, 0, 1))
            (reference,) = history(store, objective).references
            assert reference.score == pytest.approx(estimate.value)
            assert reference.interval == pytest.approx(estimate.interval)


@pytest.mark.slow
def test_stores_of_earlier_versions_have_a_history(old: Path) -> None:
    for name in ("finished", "stopped", "failed"):
        found = of(old, name)
        assert len(found.points) >= 2
        assert len(found.references) >= 3
        assert found.state == name


def test_an_unknown_search_is_refused(raced: Path) -> None:
    with pytest.raises(StoreError, match="no search 'tny'"):
        of(raced, "tny")
