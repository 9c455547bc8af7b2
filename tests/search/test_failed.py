"""A search that failed, and whose cause is gone: it goes on as if nothing had happened."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import ClusterLost, SearchFailed
from evomerge.executor import Landed, Take
from evomerge.fitness.results import Failed
from evomerge.job import Job
from evomerge.search import Silent, launch, resume
from evomerge.search.setting import Setting
from evomerge.store import Store
from evomerge.store.integrity import check
from tests import tiny
from tests.dice import Rolling
from tests.running import log, query, url


class Broken(Rolling):
    """Fails whatever is asked once so many evaluations have landed, or on this split."""

    def __init__(
        self,
        setting: Setting,
        after: int = 10**6,
        split: str = "",
        workers: int = 1,
        order: int = 0,
    ) -> None:
        super().__init__(setting, workers, order)
        self._after, self._split = after, split

    def evaluate(self, take: Take) -> Iterator[Landed]:
        for landed in super().evaluate(take):
            self._after -= 1
            broken = self._after < 0 or landed.request.split == self._split
            yield replace(landed, evaluation=Failed("no GPU", 1)) if broken else landed


def executed(setting: Setting, kind: type[Rolling], **how: Any) -> Rolling:
    """The executor of a setting."""
    return kind(setting, **how)


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Of three generations."""
    optimizer = {"name": "cma-es", "population": 8}
    folder = tmp_path_factory.mktemp("job")
    return Job.from_file(tiny.write_job(folder, optimizer=optimizer, budget={"candidates": 24}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"after": 4}, "baseline '.+' cannot be scored: no GPU"),
        ({"after": 15}, "every candidate of generation 2 failed"),
        ({"split": "validation"}, "cannot be scored on validation: no GPU"),
    ],
)
def test_a_failed_search_is_resumed_to_the_end_that_it_would_have_had(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: dict[str, Any], said: str
) -> None:
    undisturbed, failed = tmp_path / "undisturbed.db", tmp_path / "failed.db"
    monkeypatch.setattr(Setting, "executor", lambda setting: Rolling(setting))
    launch(Setting.open(job), url(undisturbed), Silent(), never)
    with monkeypatch.context() as patch:
        patch.setattr(Setting, "executor", lambda setting: Broken(setting, **broken))
        with pytest.raises(SearchFailed, match=said):
            launch(Setting.open(job), url(failed), Silent(), never)
    with Store(url(failed)) as store:
        with monkeypatch.context() as patch:  # the cause is still there
            patch.setattr(Setting, "executor", lambda setting: Broken(setting, after=0))
            with pytest.raises(SearchFailed, match="no GPU"):
                resume("tiny", store, Silent(), never)
        assert store.search("tiny").state == "failed"
        resume("tiny", store, Silent(), never)
    assert log(failed) == log(undisturbed)
    assert check(url(failed), lambda done, of: None).violations == ()
    events = query(failed, "SELECT COUNT(*) FROM event WHERE kind = 'reopened'")
    assert events == [(2,)]


@pytest.mark.slow
def test_the_first_baseline_that_fails_is_named_whichever_lands_first(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = set()
    for order in range(3):
        executor = partialmethod(executed, Broken, after=0, workers=8, order=order)
        monkeypatch.setattr(Setting, "executor", executor)
        with pytest.raises(SearchFailed) as failed:
            launch(Setting.open(job), url(tmp_path / f"{order}.db"), Silent(), never)
        said.add(str(failed.value))
    first = next(iter(Setting.open(job).baselines()))
    assert said == {f"baseline '{first}' cannot be scored: no GPU"}


def test_a_search_that_failed_with_generations_open_together_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, failed = {"name": "lra-cma-es", "population": 8}, tmp_path / "failed.db"
    changes = {"optimizer": optimizer, "budget": {"candidates": 40}, "mode": "asynchronous"}
    written = Job.from_file(tiny.write_job(tmp_path, **changes))
    broken = partialmethod(executed, Broken, after=15, workers=8)
    monkeypatch.setattr(Setting, "executor", broken)
    with pytest.raises(SearchFailed, match=r"every candidate of generation \d failed"):
        launch(Setting.open(written), url(failed), Silent(), never)
    untold = "SELECT COUNT(*) FROM generation WHERE told_at IS NULL"
    assert query(failed, untold) > [(1,)]
    monkeypatch.setattr(Setting, "executor", partialmethod(executed, Rolling, workers=8))
    with Store(url(failed)) as store:
        resume("tiny", store, Silent(), never)
        assert store.search("tiny").state == "finished"
    assert check(url(failed), lambda done, of: None).violations == ()
    assert query(failed, untold) == [(1,)]  # that of the mean, of which nobody is told


def test_where_devices_went_is_kept_of_a_search_that_was_broken_off(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lost(Rolling):
        def evaluate(self, take: Take) -> Iterator[Landed]:
            for place, landed in enumerate(super().evaluate(take)):
                if place == 3:
                    raise ClusterLost("the cluster is gone: resume once it is back")
                yield landed

    monkeypatch.setattr(Setting, "executor", lambda setting: Lost(setting))
    with pytest.raises(ClusterLost):
        launch(Setting.open(job), url(tmp_path / "lost.db"), Silent(), never)
    assert query(tmp_path / "lost.db", "SELECT name FROM device") == [("dice",)]
