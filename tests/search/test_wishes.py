"""What others ask of a search under way, from any process: to pause, or to stop."""

from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge import search
from evomerge.job import Job
from evomerge.search import Interrupted, Status
from evomerge.search.setting import Setting
from evomerge.store import Store, Wishes
from tests import tiny
from tests.running import log, url


class At(search.Silent):
    """Does something once a generation is complete, or before a finalist is scored."""

    def __init__(self, generation: int, do: Callable[[], None], finals: bool = False) -> None:
        self._generation = generation
        self._do = do
        self._finals = finals

    def generation(self, status: Status) -> None:
        if status.generation == self._generation:
            self._do()

    def finalist(self, name: str, done: int, of: int) -> None:
        if self._finals:
            raise KeyboardInterrupt


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Of a search with three generations, which heeds wishes at once."""
    monkeypatch.setattr("evomerge.store.coordinator._GLANCE", -1.0)
    job = tiny.write_job(tmp_path, space={"preset": "global_task_arithmetic"})
    return Setting.open(Job.from_file(job))


def wish(store: str, kind: str) -> Callable[[], None]:
    """Another process asks for it."""

    def ask() -> None:
        with Store(store) as other:
            Wishes(other).add("tiny", kind, "ada")  # type: ignore[arg-type]  # of two words

    return ask


def conducted(setting: Setting, store: str, watcher: search.Watcher) -> None:
    """To its end, or until it is paused."""
    search.launch(setting, store, watcher, lambda: False)


@pytest.mark.slow
def test_stopped_search_opens_no_further_generation_and_has_a_winner(
    setting: Setting, tmp_path: Path
) -> None:
    store = url(tmp_path / "store.db")
    conducted(setting, store, At(1, wish(store, "stop")))
    with Store(store) as opened:
        row = opened.search("tiny")
        kinds = [generation.kind for generation in opened.generations(row.id)]
    assert (row.state, row.stop_reason) == ("finished", "asked to stop by ada")
    assert row.verdict is not None
    assert kinds == ["baselines", "proposed", "final"]


@pytest.mark.slow
def test_search_that_was_stopped_stays_so_when_its_finals_are_interrupted(
    setting: Setting, tmp_path: Path
) -> None:
    store = url(tmp_path / "store.db")
    with pytest.raises(KeyboardInterrupt):
        conducted(setting, store, At(1, wish(store, "stop"), finals=True))
    with Store(store) as opened:
        search.resume("tiny", opened, search.Silent(), lambda: False)
        row = opened.search("tiny")
        kinds = [generation.kind for generation in opened.generations(row.id)]
    assert (row.state, row.stop_reason) == ("finished", "asked to stop by ada")
    assert kinds == ["baselines", "proposed", "final"]


@pytest.mark.slow
def test_paused_search_is_resumed_as_if_undisturbed(setting: Setting, tmp_path: Path) -> None:
    store, alone = url(tmp_path / "store.db"), url(tmp_path / "alone.db")
    with pytest.raises(Interrupted):
        conducted(setting, store, At(1, wish(store, "pause")))
    with Store(store) as opened:
        assert opened.search("tiny").state == "stopped"
        search.resume("tiny", opened, search.Silent(), lambda: False)
    conducted(setting, alone, search.Silent())
    assert log(store) == log(alone)


@pytest.mark.slow
def test_stopped_search_goes_on_under_other_limits(setting: Setting, tmp_path: Path) -> None:
    store = url(tmp_path / "store.db")

    def stop_and_pause() -> None:
        wish(store, "stop")()
        wish(store, "pause")()

    with pytest.raises(Interrupted):
        conducted(setting, store, At(1, stop_and_pause))
    with Store(store) as opened:
        limit = ["budget.candidates=8"]
        search.resume("tiny", opened, search.Silent(), lambda: False, limit)
        row = opened.search("tiny")
        kinds = [generation.kind for generation in opened.generations(row.id)]
    assert (row.state, row.stop_reason) == ("finished", "the budget of 8 candidates is spent")
    assert kinds == ["baselines", "proposed", "proposed", "final"]
