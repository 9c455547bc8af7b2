"""When `evomerge eval` spends a look: after all that can be refused, before the first example."""

import shutil
from pathlib import Path

import pytest

from evomerge.engine import BrokenModel
from evomerge.fitness.scorers import TeacherForced
from evomerge.store import Coordinator, Store
from tests.running import Ended, evomerge_, query, url

LOOKS = "SELECT count(*) FROM ledger WHERE kind = 'look'"


@pytest.fixture
def store(searched: Path, tmp_path: Path) -> Path:
    """A store with a finished search that has one look left."""
    path = Path(shutil.copyfile(searched, tmp_path / "store.db"))
    with Store(url(path)) as opened, Coordinator.take_over(opened, "tiny") as coordinator:
        verdict = coordinator.search.verdict
        coordinator.allow_looks("c" * 64, 4)
        coordinator.finish("finished", verdict)
    return path


@pytest.fixture
def recipe(store: Path, tmp_path: Path) -> Path:
    """The folder of a candidate that nobody has looked at, its recipe and nothing else."""
    with Store(url(store)) as opened:
        looked = {row.entry.get("candidate") for row in opened.ledger()}
        candidates = opened.candidates(opened.search("tiny").id)
        unseen = next(c.id for c in candidates if c.label is None and c.id not in looked)
    end = evomerge_(
        *("export", "tiny", "--recipe-only", "--candidate", str(unseen)),
        *("-o", tmp_path / "recipe", "--store", url(store)),
    )
    assert end.code == 0, end.err
    return tmp_path / "recipe"


def evaluate(store: Path, searched: Path, model: Path, *options: str) -> Ended:
    task = searched.parent / "task"
    return evomerge_("eval", model, "--task", task, "--store", url(store), *options)


@pytest.mark.parametrize("engine", ["", "device=nonsense", "dtype=nonsense"])
def test_what_is_refused_spends_no_look(
    store: Path, searched: Path, recipe: Path, engine: str
) -> None:
    model = recipe
    if engine:
        model = recipe.parent / "merged"
        assert evomerge_("merge", recipe / "mergekit_config.yml", model).code == 0
    end = evaluate(store, searched, model, *(["--engine", engine] if engine else []))
    assert end.code != 0
    assert query(store, LOOKS) == [(3,)]


def test_evaluation_that_breaks_off_does_not_give_its_look_back(
    store: Path, searched: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = recipe.parent / "merged"
    assert evomerge_("merge", recipe / "mergekit_config.yml", merged).code == 0

    def breaking(*_: object, **__: object) -> None:
        assert query(store, LOOKS) == [(4,)]  # written down before anything is asked
        raise BrokenModel("broken by the test")

    with monkeypatch.context() as fault:
        fault.setattr(TeacherForced, "judge", breaking)
        assert evaluate(store, searched, merged).code != 0
    assert query(store, LOOKS) == [(4,)]
    again = evaluate(store, searched, merged)
    assert again.code == 0, again.err
    assert "a look at validation of search 'tiny'" in again.err
    assert query(store, LOOKS) == [(4,)]
