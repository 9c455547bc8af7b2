"""What becomes of candidates that break, in the finals and before."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from evomerge.coordinates import start_of
from evomerge.errors import LooksSpent, SearchFailed
from evomerge.executor import Executor, Request
from evomerge.fitness.results import Evaluation, Failed
from evomerge.job import Job
from evomerge.merge.disk import RECIPE
from evomerge.search import Silent, resume
from evomerge.search.finals import decide
from evomerge.search.looks import reserve
from evomerge.search.loop import Run
from evomerge.search.setting import Setting, versions
from evomerge.store import Coordinator, Store
from tests import tiny
from tests.running import url


class Breaking:
    """An executor whose merges break for some requests: injects the fault, does the rest."""

    def __init__(self, inner: Executor, breaks: str, labels: set[int]) -> None:
        self._inner, self._split, self.broken = inner, breaks, labels

    def evaluate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Evaluation]]:
        for request, evaluation in self._inner.evaluate(requests):
            breaks = request.candidate in self.broken and request.split == self._split
            yield request, Failed("broken by the test") if breaks else evaluation

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_finalist_that_breaks_is_passed_over(
    tmp_path: Path, split: str, all_of_them: bool
) -> None:
    setting = Setting.open(Job.from_file(tiny.write_job(tmp_path, budget={"candidates": 4})))
    store = Store(url(tmp_path / "store.db"), create=True)
    held = Coordinator.launch(
        store, "tiny", 0, setting.document(), versions(), setting.new_models(), setting.new_splits()
    )
    executor = Breaking(setting.executor(), split, set())
    with store, held as coordinator:
        run = Run(setting, coordinator, executor, Silent(), lambda: False)
        run.score_baselines()
        optimizer = run.optimize()
        mean = max(m.id for m in run.record.proposed) + 1
        executor.broken |= {mean}
        if all_of_them:
            executor.broken |= {m.id for m in run.record.proposed}
            with pytest.raises(SearchFailed, match="there is no winner"):
                decide(run, optimizer)
            return
        verdict = decide(run, optimizer)
        assert run.record.members[2][0].id == mean
        assert mean not in verdict["finalists"]
        assert verdict["winner"] in verdict["finalists"]
    executor.close()


def test_looks_from_outside_leave_fewer_finalists(tmp_path: Path) -> None:
    """Of three looks one is given away, and no more: the other two are the finals'."""
    setting = Setting.open(Job.from_file(tiny.write_job(tmp_path, budget={"candidates": 4})))
    store_url = url(tmp_path / "store.db")
    store = Store(store_url, create=True)
    held = Coordinator.launch(
        store, "tiny", 0, setting.document(), versions(), setting.new_models(), setting.new_splits()
    )
    executor = setting.executor()
    with store:
        with held as coordinator:
            run = Run(setting, coordinator, executor, Silent(), lambda: False)
            run.score_baselines()
            run.optimize()
            worst = sorted(run.record.proposed, key=lambda m: run.record.rank(m.id))[:2]
            for member in worst:
                (tmp_path / member.name).mkdir()
                text = run.record.recipe(member).to_yaml()
                (tmp_path / member.name / RECIPE).write_text(text, encoding="utf-8")
        folders = [str(tmp_path / member.name) for member in worst]
        task = setting.tasks["ja_list_ops"]
        assert reserve(store_url, folders[0], task) == ["tiny"]
        with pytest.raises(LooksSpent, match="needs 2 of them"):
            reserve(store_url, folders[1], task)
        resume("tiny", store, Silent(), lambda: False, ["budget.candidates=8"])  # not yet too late
        verdict = store.search("tiny").verdict
    executor.close()
    assert verdict is not None
    assert len(verdict["finalists"]) == 1
    assert worst[0].id not in verdict["finalists"]


def test_a_failure_that_landed_before_a_crash_is_copied_after_it(tmp_path: Path) -> None:
    """As it would have been without the crash: equal recipes are not tried twice."""
    setting = Setting.open(Job.from_file(tiny.write_job(tmp_path)))
    store = Store(url(tmp_path / "store.db"), create=True)
    held = Coordinator.launch(
        store, "tiny", 0, setting.document(), versions(), setting.new_models(), setting.new_splits()
    )
    executor = setting.executor()
    with store, held as coordinator:
        record = Run(setting, coordinator, executor, Silent(), lambda: False).record
        start = start_of(setting.space.coordinates)
        twins = record.open(1, "proposed", None, [record.proposal(i, start) for i in range(3)])
        record.add(twins[0].id, "train", 0, Failed("broken by the test", 1.0))
        resumed = Run(setting, coordinator, executor, Silent(), lambda: False)
        found = resumed.evaluate(resumed.record.members[1], "train", setting.driving)
        reasons = [e.reason for e in found.values() if isinstance(e, Failed)]
        assert reasons == ["broken by the test"] * 3
        rows = store.evaluations(coordinator.search.id, ["train"])
        assert [row.copied_from for row in rows] == [None, twins[0].id, twins[0].id]
    executor.close()
