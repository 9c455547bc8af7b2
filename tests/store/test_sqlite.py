"""SQLite: where its file may be, who may write it, and what is said of its versions."""

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from evomerge.errors import StoreError
from evomerge.store import Coordinator, Store, probe, sqlite
from evomerge.store.sqlite import wal_reset_warning

MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:5 / /proc rw - proc proc rw
30 22 0:40 / /home rw,relatime shared:2 master:1 - nfs4 server:/home rw,vers=4.2
31 30 254:1 / /home/local rw - xfs /dev/vdb rw
32 22 0:41 / /mnt/my\040share rw - cifs //server/share rw
33 22 0:42 / /mnt/ssh rw - fuse.sshfs me@host:/ rw
34 22 0:43 / /mnt/vm rw - 9p share rw,trans=virtio
35 22 0:44 / /mnt/plan9 rw - 9p host rw,trans=tcp,port=564
36 22 0:45 / /mnt/hidden rw - nfs server:/hidden rw
37 36 0:46 / /mnt/hidden rw - tmpfs tmpfs rw
38 22 0:47 / /scratch rw - lustre mgs:/scratch rw
""".lstrip()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/store.db", None),
        ("/home/me/store.db", "nfs4"),
        ("/home/local/store.db", None),
        ("/homeless/store.db", None),
        ("/mnt/my share/store.db", "cifs"),
        ("/mnt/ssh/a/b/store.db", "sshfs"),
        ("/mnt/vm/store.db", None),
        ("/mnt/plan9/store.db", "9p"),
        ("/mnt/hidden/store.db", None),
        ("/scratch/store.db", "lustre"),
    ],
)
def test_file_system_is_that_of_the_nearest_mount(
    path: str, kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    monkeypatch.setattr(sqlite, "_MOUNTS", mounts)
    assert sqlite.network_filesystem(Path(path)) == kind


@pytest.mark.parametrize("create", [True, False])
def test_network_file_system_is_refused_behind_a_link_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, create: bool
) -> None:
    far, mounts = tmp_path / "far", tmp_path / "mountinfo"
    far.mkdir()
    (tmp_path / "near").symlink_to(far)
    if not create:
        (far / "store.db").touch()
    mounts.write_text(f"22 1 254:0 / / rw - ext4 /dev/vda rw\n30 22 0:40 / {far} rw - nfs s:/ rw\n")
    monkeypatch.setattr(sqlite, "_MOUNTS", mounts)
    with pytest.raises(
        StoreError, match=r"is on a network file system \(nfs\), .*or use PostgreSQ"
    ):
        Store(f"sqlite:///{tmp_path}/near/store.db", create)
    Store(f"sqlite:///{tmp_path}/store.db", create=True).database.close()


def test_where_mounts_are_not_known_no_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_MOUNTS", tmp_path / "missing")
    assert sqlite.network_filesystem(tmp_path) is None


@pytest.mark.parametrize(
    ("version", "warned"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 52, 0), False),
    ],
)
def test_versions_that_may_damage_a_file_are_warned_of(
    version: tuple[int, ...], warned: bool
) -> None:
    text = wal_reset_warning(version)
    assert (text is not None) is warned
    if text is not None:
        assert text.startswith(f"SQLite {'.'.join(map(str, version))} may, very rarely, damage")


def test_store_tells_what_there_is_to_be_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    for version, count in (((3, 40, 1), 1), ((3, 53, 0), 0)):
        monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
        with Store(url, create=True) as store:
            assert len(store.warnings) == count


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that everybody may enter and read, with a store in which nobody conducts search 'one'."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    with Store(f"sqlite:///{path}/store.db", create=True) as store:
        Coordinator.launch(store, "one", 7, {}, {}, [], []).close()
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


@contextmanager
def powerless() -> Iterator[None]:
    """Be someone whom file modes bind, and who does not own what was made before."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def file_only(folder: Path) -> None:
    """Of a store that anybody may add files to, the database is read-only."""
    (folder / "store.db").chmod(0o444)
    folder.chmod(0o777)


def folder_only(folder: Path) -> None:
    """The database could be written, but nothing beside it."""
    (folder / "store.db").chmod(0o666)
    folder.chmod(0o555)


def both(folder: Path) -> None:
    """As on a disk that is mounted read-only."""
    (folder / "store.db").chmod(0o444)
    folder.chmod(0o555)


@pytest.mark.parametrize("protect", [file_only, folder_only, both])
def test_read_only_store_is_read_and_refused_for_writing_at_once(
    folder: Path, protect: Callable[[Path], None]
) -> None:
    url = f"sqlite:///{folder}/store.db"
    protect(folder)
    with powerless():
        with Store(url) as store:
            assert [row.state for row in store.searches()] == ["stopped"]
            with pytest.raises(StoreError, match="readonly database: make the file and its folder"):
                Coordinator.take_over(store, "one")
        with pytest.raises(StoreError, match="readonly database: make the file and its folder"):
            Store(url, create=True)
    assert [path.name for path in folder.iterdir()] == ["store.db"]


def test_read_only_store_is_read_while_its_owner_writes_it(folder: Path) -> None:
    url = f"sqlite:///{folder}/store.db"
    with Store(url) as ours, Coordinator.take_over(ours, "one") as coordinator:
        both(folder)
        with powerless(), Store(url) as theirs:
            assert theirs.search("one").state == "running"
            if os.geteuid() != 0:
                with pytest.raises(StoreError, match="not written"):
                    theirs.database.probe()
        folder.chmod(0o755)
        (folder / "store.db").chmod(0o644)
        coordinator.log("note", "text")


def test_file_that_may_not_be_read_is_refused_with_what_to_do(folder: Path) -> None:
    (folder / "store.db").chmod(0o000)
    with powerless(), pytest.raises(StoreError, match="see whether the file and its folder may be"):
        Store(f"sqlite:///{folder}/store.db")


def test_place_that_cannot_be_written_is_refused_before_there_is_a_store(folder: Path) -> None:
    folder.chmod(0o555)
    with powerless(), pytest.raises(StoreError, match=r"cannot be made in .*: Permission denied: "):
        probe(f"sqlite:///{folder}/new.db")
    folder.chmod(0o755)
    probe(f"sqlite:///{folder}/new.db")
    assert [path.name for path in folder.iterdir()] == ["store.db"]


def test_store_that_cannot_be_written_is_refused_before_a_search_is_launched(folder: Path) -> None:
    both(folder)
    with powerless(), pytest.raises(StoreError, match="readonly database: make the file and its"):
        probe(f"sqlite:///{folder}/store.db")


def test_probe_reaches_the_disk_and_changes_nothing(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path}/store.db", create=True) as store:
        log = tmp_path / "store.db-wal"
        before = log.stat().st_size
        with store.database.read() as db:
            version = db.exec_driver_sql("PRAGMA user_version").scalar()
        store.database.probe()
        assert log.stat().st_size > before
        with store.database.read() as db:
            assert db.exec_driver_sql("PRAGMA user_version").scalar() == version
