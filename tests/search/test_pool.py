"""Winners of finished searches as parents: merged once, into a folder that stays."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.errors import InputError, JobError, ModelError, StoreError
from evomerge.job import Job
from evomerge.merge.checkpoint import Checkpoint
from evomerge.progress import Steps
from evomerge.recipe import Recipe
from evomerge.search.pool import resolved
from evomerge.store import Coordinator, NewCandidate, NewModel, Store
from tests import tiny
from tests.running import url

HALF = {"weight": 0.5}


class Told:
    """What was said while winners were merged."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.bytes: list[tuple[int, int]] = []

    @property
    def as_steps(self) -> Steps:
        return Steps(self.steps.append, lambda done, of: self.bytes.append((done, of)))


@pytest.fixture
def folders(models: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Two models that may be changed."""
    return {name: Path(shutil.copytree(models[name], tmp_path / name)) for name in ("a", "b")}


def conducted(
    store: Path, folders: dict[str, Path], name: str = "ps", state: str = "finished"
) -> Recipe:
    """A search whose winner is the average of two models, as `conduct` leaves it."""
    entries = [{"model": str(folder), "parameters": HALF} for folder in folders.values()]
    recipe = Recipe.from_dict({"merge_method": "linear", "models": entries})
    opened = {str(folder): Checkpoint.open(folder) for folder in folders.values()}
    shas = {path: model.sha for path, model in opened.items()}
    with Store(url(store), create=True) as found:
        models = [NewModel(Path(p).name, p, m.sha, m.files, False) for p, m in opened.items()]
        with Coordinator.launch(found, name, 0, {}, {}, models, []) as coordinator:
            candidate = NewCandidate(0, "mean", None, recipe.to_dict(), recipe.sha(shas))
            (winner,) = coordinator.open_generation(0, "final", None, [candidate])
            verdict = {"winner": winner} if state == "finished" else None
            coordinator.finish(state, verdict)
    return recipe


@pytest.fixture
def store(tmp_path: Path, folders: dict[str, Path]) -> Path:
    """A store with the finished search 'ps'."""
    path = tmp_path / "store" / "searches.db"
    path.parent.mkdir()
    conducted(path, folders)
    return path


def job_with(tmp_path: Path, folders: dict[str, Path], **parents: Any) -> Job:
    """A layer search whose pool holds these beside the two models."""
    own = {name: {"model": str(folder)} for name, folder in folders.items()}
    space = {"kind": "layers"}
    return Job.from_file(tiny.write_job(tmp_path, parents=own | parents, base=None, space=space))


def winner_of(job: Job, name: str = "best") -> Path:
    return Path(job.parents[name].model or "")


def test_a_winner_becomes_a_model_folder_beside_the_store(
    tmp_path: Path, folders: dict[str, Path], store: Path
) -> None:
    told = Told()
    job = job_with(tmp_path, folders, best={"search": "ps"})
    found = resolved(job, url(store), told.as_steps)
    assert list(found.parents) == ["a", "b", "best"]
    assert {n: p for n, p in found.parents.items() if n != "best"} == {
        name: parent for name, parent in job.parents.items() if name != "best"
    }
    folder = winner_of(found)
    assert folder.is_absolute()
    assert folder.parent == store.parent / "searches-winners"
    merged, (a, b) = Checkpoint.open(folder), map(Checkpoint.open, folders.values())
    assert merged.headers.keys() == a.headers.keys()
    for name in merged.headers:
        expected = (a.tensor(name) + b.tensor(name)) / 2
        assert torch.allclose(merged.tensor(name), expected, atol=1e-6)
    assert told.steps == [f"merging the winner of search 'ps' into {folder}"]
    assert told.bytes[-1][0] == told.bytes[-1][1] > 0


def test_a_winner_may_be_the_base(tmp_path: Path, folders: dict[str, Path], store: Path) -> None:
    path = tiny.write_job(
        tmp_path,
        parents={name: {"model": str(folder)} for name, folder in folders.items()},
        base={"search": "ps"},
    )
    job = resolved(Job.from_file(path), url(store), Told().as_steps)
    assert job.base is not None
    assert job.base.search is None
    assert Path(job.base.model or "").parent == store.parent / "searches-winners"


def test_a_winner_that_is_merged_already_is_used_again(
    tmp_path: Path, folders: dict[str, Path], store: Path
) -> None:
    job = job_with(tmp_path, folders, best={"search": "ps"})
    first = winner_of(resolved(job, url(store), Told().as_steps))
    before = (first / "model.safetensors").stat()
    for folder in folders.values():
        shutil.rmtree(folder)  # what it was merged from is not needed any more
    told = Told()
    again = winner_of(resolved(job, url(store), told.as_steps))
    assert again == first
    assert told.steps == []
    after = (again / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_searches_with_the_same_winner_share_its_folder(
    tmp_path: Path, folders: dict[str, Path], store: Path
) -> None:
    conducted(store, folders, "other")
    found = {
        name: winner_of(
            resolved(
                job_with(tmp_path, folders, best={"search": name}), url(store), Told().as_steps
            )
        )
        for name in ("ps", "other")
    }
    assert found["ps"] == found["other"]


def test_a_job_without_such_parents_needs_no_store(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    job = job_with(tmp_path, folders)
    assert resolved(job, url(tmp_path / "none.db"), Told().as_steps) is job
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize(
    ("state", "words"),
    [("failed", "'going' is failed"), ("open", "'going' is stopped and has no winner yet: resume")],
)
def test_an_unfinished_search_has_no_winner(
    tmp_path: Path, folders: dict[str, Path], store: Path, state: str, words: str
) -> None:
    conducted(store, folders, "going", state)
    job = job_with(tmp_path, folders, best={"search": "going"})
    with pytest.raises(JobError, match=words) as caught:
        resolved(job, url(store), Told().as_steps)
    assert str(caught.value).startswith("parents.best.search: ")
    assert not (store.parent / "searches-winners").exists()


def test_an_unknown_search_is_refused(
    tmp_path: Path, folders: dict[str, Path], store: Path
) -> None:
    job = job_with(tmp_path, folders, best={"search": "pss"})
    with pytest.raises(StoreError, match="no search 'pss': did you mean 'ps'"):
        resolved(job, url(store), Told().as_steps)


def test_a_store_that_is_not_there_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    job = job_with(tmp_path, folders, best={"search": "ps"})
    with pytest.raises(JobError, match=r"parents\.best\.search: 'ps': there is no store"):
        resolved(job, url(tmp_path / "none.db"), Told().as_steps)


def test_models_that_changed_since_are_refused(
    tmp_path: Path, folders: dict[str, Path], store: Path, models: dict[str, Path]
) -> None:
    shutil.copyfile(models["base"] / "model.safetensors", folders["b"] / "model.safetensors")
    job = job_with(tmp_path, folders, best={"search": "ps"})
    with pytest.raises(ModelError, match="is not what it was when search 'ps' was launched"):
        resolved(job, url(store), Told().as_steps)
    assert not (store.parent / "searches-winners").exists()


@pytest.mark.slow
def test_what_a_merge_that_broke_off_left_is_no_winner(
    tmp_path: Path, folders: dict[str, Path], store: Path
) -> None:
    job = job_with(tmp_path, folders, best={"search": "ps"})

    def fail(done: int, of: int) -> None:
        raise InputError("stopped half way")

    with pytest.raises(InputError, match="stopped half way"):
        resolved(job, url(store), Steps(lambda text: None, fail))
    assert list((store.parent / "searches-winners").iterdir()) == []
    assert winner_of(resolved(job, url(store), Told().as_steps)).is_dir()
