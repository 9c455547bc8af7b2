"""What the process of one submission does: exports and pushes; searches are in test_scheduler."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import InputError, Withdrawn
from evomerge.export.export import REPORT
from evomerge.job import Job
from evomerge.merge.disk import RECIPE
from evomerge.service import confine
from evomerge.service.child import Work, _Redacting, _worked_off, capped
from evomerge.service.folders import export_folder, log_file
from evomerge.store import Queue, Store, Tokens
from tests import tiny
from tests.running import url


@pytest.fixture
def store(exported: Path, tmp_path: Path) -> Iterator[Store]:
    """Of a search 'tiny' whose winner was exported."""
    shutil.copyfile(exported.parent / "store.db", tmp_path / "store.db")
    with Store(url(tmp_path / "store.db")) as opened:
        yield opened


@pytest.fixture
def work(store: Store, tmp_path: Path) -> Callable[..., Work]:
    """What is asked for by a document."""

    def of(kind: Any, **document: Any) -> Work:
        one = Queue(store).submit(kind, "tiny", document, by="ada")
        return Work(store, one, tmp_path / "server", (tmp_path,), None, lambda: False)

    return of


def winner(store: Store) -> int:
    """Its id."""
    verdict = store.search("tiny").verdict
    assert verdict is not None
    return int(verdict["winner"])


def test_recipe_alone_is_exported_to_a_folder_of_its_own(
    store: Store, work: Callable[..., Work], tmp_path: Path
) -> None:
    folder = export_folder(tmp_path / "server", "tiny", winner(store), recipe_only=True)
    expected = {"candidate": winner(store), "folder": str(folder)}
    assert work("export", recipe_only=True).export() == expected
    assert [path.name for path in folder.iterdir()] == ["mergekit_config.yml"]
    assert work("export", recipe_only=True).export() == expected  # begun again after a crash


def test_export_that_was_done_before_the_crash_is_done(
    store: Store, work: Callable[..., Work], exported: Path, tmp_path: Path
) -> None:
    folder = export_folder(tmp_path / "server", "tiny", winner(store))
    shutil.copytree(exported, folder)
    before = (folder / REPORT).stat().st_mtime_ns
    assert work("export", candidate=winner(store)).export()["folder"] == str(folder)
    assert (folder / REPORT).stat().st_mtime_ns == before


def test_push_is_of_what_was_exported_and_needs_a_token(
    store: Store,
    work: Callable[..., Work],
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    push = work("push", repository="ada/tiny")
    with pytest.raises(InputError, match=f"candidate {winner(store)} is not exported"):
        push.push()
    shutil.copytree(exported, export_folder(tmp_path / "server", "tiny", winner(store)))
    with pytest.raises(InputError, match="'ada/tiny' of the hub: not written: ") as refused:
        push.push()
    assert "hf_abc" not in str(refused.value)
    with pytest.raises(InputError, match="'a b/c' of the hub: not written: "):
        work("push", repository="a b/c").push()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="no token for the hub: set HF_TOKEN"):
        push.push()


@pytest.mark.parametrize(("recipe_only", "file"), [(False, REPORT), (True, RECIPE)])
def test_export_of_another_store_is_not_taken_for_its_own(
    recipe_only: bool, file: str, store: Store, work: Callable[..., Work], tmp_path: Path
) -> None:
    folder = export_folder(tmp_path / "server", "tiny", winner(store), recipe_only)
    folder.mkdir(parents=True)
    (folder / file).write_text("{}")
    with pytest.raises(InputError, match="holds the export of another store: move it away"):
        work("export", recipe_only=recipe_only).export()
    assert (folder / file).read_text() == "{}"
    if not recipe_only:
        with pytest.raises(InputError, match="holds the export of another store"):
            work("push", repository="ada/tiny").push()


def test_process_whose_submission_was_taken_back_does_not_go_on_with_a_search(
    store: Store, tmp_path: Path
) -> None:
    queue = Queue(store)
    one = queue.resume("tiny", "ada")
    work = Work(store, one, tmp_path / "server", (tmp_path,), None, lambda: False)
    with pytest.raises(Withdrawn, match="'tiny' is queued by now: it does not go on"):
        work.search()
    queue.begin(one.id)
    assert work.search()["winner"] == winner(store)


def test_search_that_has_failed_to_go_on_says_nothing_of_its_end_before(
    store: Store, tmp_path: Path
) -> None:
    queue = Queue(store)
    one = queue.submit("export", "tiny", {"candidate": 999_999}, by="ada")
    queue.begin(one.id)
    queue.add_result(queue.end(one.id, "finished", (), None, {"winner": 1}), {"webhook": "taken"})
    queue.change(one.id, state="queued")
    begun = queue.begin(one.id)
    assert begun is not None
    work = Work(store, begun, tmp_path / "server", (tmp_path,), None, lambda: False)
    assert _worked_off(work) == InputError.exit_code
    assert (queue.get(one.id).state, queue.get(one.id).result) == ("failed", None)


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "", ".a", "a\n"])
def test_name_that_leads_elsewhere_has_no_folder(name: str, tmp_path: Path) -> None:
    for path in (lambda: log_file(tmp_path, name), lambda: export_folder(tmp_path, name, 1)):
        with pytest.raises(InputError, match="is no name of a search"):
            path()


def test_search_that_leads_elsewhere_since_it_was_submitted_is_not_begun(tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(tiny.ZOO, root / "zoo")
    parents = {name: {"model": str(root / "zoo" / name)} for name in ("ops", "ja")}
    base = {"model": str(root / "zoo" / "base")}
    job = Job.from_file(tiny.write_job(root, name="moved", parents=parents, base=base))
    confine.job(job, (root,))
    shutil.move(root / "zoo" / "ja", tmp_path / "elsewhere")
    (root / "zoo" / "ja").symlink_to(tmp_path / "elsewhere")
    with Store(url(tmp_path / "store.db"), create=True) as store:
        one = Queue(store).submit("search", "moved", job.document(), by="ada")
        work = Work(store, one, tmp_path / "server", (root,), None, lambda: False)
        with pytest.raises(InputError, match=r"parents.ja: .* leads out of the folders"):
            work.search()
        assert store.searches() == []


@pytest.mark.parametrize(("by", "is_begun"), [("carol", True), ("local", True), ("ada", False)])
def test_what_is_left_to_admins_is_begun_for_them_alone(
    by: str, is_begun: bool, tmp_path: Path
) -> None:
    given = {"executor": {"kind": "ray", "address": "1.2.3.4:1"}, "tasks": [{"task": "none"}]}
    with Store(url(tmp_path / "store.db"), create=True) as store:
        Tokens(store).create("carol", ["admin"])
        Tokens(store).create("ada", ["run"])
        document = Job.from_file(tiny.write_job(tmp_path)).document() | given
        one = Queue(store).submit("search", "tiny", document, by=by)
        work = Work(store, one, tmp_path / "server", (tmp_path, tiny.ROOT), None, lambda: False)
        with pytest.raises(InputError) as refused:
            work.search()
        assert ("executor.address" not in str(refused.value)) == is_begun


def test_resumed_search_takes_no_more_devices_than_its_server_may() -> None:
    job = {"executor": {"kind": "ray", "workers": 2}, "engine": {"tensor_parallel": 2}}
    assert capped(job, ("executor.workers=9",), 8) == ("executor.workers=4",)
    assert capped(job, ("executor.workers=3",), 8) == ()
    assert capped(job, ("executor.workers=9",), None) == ()
    assert capped(job, (), 2) == ("executor.workers=1",)


def test_whatever_a_process_says_is_written_without_secrets(capfd: Any) -> None:
    for stream in (sys.stdout, sys.stderr):
        redacting: Any = _Redacting(stream)
        print("token hf_abcdefghijkl", file=redacting)
        redacting.writelines(["token ", "evm_abcdefghijkl"])
        redacting.flush()
    for text in capfd.readouterr():
        assert text == "token hf_***\ntoken evm_***"
