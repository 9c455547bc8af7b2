"""A file shows that its process is alive, and that it is dead from the moment it dies."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evomerge.store.lock import LivenessFile, is_alive
from tests.running import PATIENCE

OWNER = """
import sys, pathlib
from evomerge.store.lock import LivenessFile
file = LivenessFile(pathlib.Path(sys.argv[1]), "one")
print(file.name, file.identity, flush=True)
sys.stdin.read()
file.release()
"""

# With a worker that it forks, and that outlives it.
FORKING = OWNER.replace("print(", "import os, time\nif os.fork() == 0:\n    time.sleep(60)\nprint(")

Owner = tuple["subprocess.Popen[str]", str, str]


def owner(folder: Path, script: str = OWNER) -> Owner:
    """Another process that shows that it is alive; the name of its file, and what it is."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    name, identity = process.stdout.readline().split()
    return process, name, identity


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Owner]:
    """Such a process, which is killed in the end."""
    found = owner(tmp_path)
    with found[0]:
        yield found
        found[0].kill()


def test_living_process_is_alive_and_a_killed_one_is_dead_at_once(
    tmp_path: Path, other: Owner
) -> None:
    process, name, identity = other
    assert is_alive(tmp_path, name, identity) is True
    process.kill()
    process.wait()
    assert is_alive(tmp_path, name, identity) is False


def test_process_that_has_let_go_leaves_no_file(tmp_path: Path, other: Owner) -> None:
    process, name, identity = other
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
    assert list(tmp_path.iterdir()) == []
    assert is_alive(tmp_path, name, identity) is None


def test_fork_does_not_keep_a_dead_process_alive(tmp_path: Path) -> None:
    process, name, identity = owner(tmp_path, FORKING)
    with process:
        process.kill()
        process.wait()
        try:
            # The worker lets go as soon as it runs, which may be after its parent was killed.
            deadline = time.monotonic() + PATIENCE
            while is_alive(tmp_path, name, identity) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert is_alive(tmp_path, name, identity) is False
        finally:
            os.killpg(process.pid, 9)


def test_fork_that_ends_leaves_its_parent_alive(tmp_path: Path) -> None:
    file = LivenessFile(tmp_path, "one")
    child = multiprocessing.get_context("fork").Process(target=file.release)
    child.start()
    child.join()
    assert is_alive(tmp_path, file.name, file.identity) is True
    file.release()


def test_own_process_is_alive_until_it_lets_go(tmp_path: Path) -> None:
    file = LivenessFile(tmp_path, "one")
    assert is_alive(tmp_path, file.name, file.identity) is True
    file.release()
    assert is_alive(tmp_path, file.name, file.identity) is None
    successor = LivenessFile(tmp_path, "one")
    file.release()  # once more
    assert is_alive(tmp_path, successor.name, successor.identity) is True
    successor.release()


def test_two_files_of_one_stem_are_apart(tmp_path: Path) -> None:
    first, second = LivenessFile(tmp_path, "one"), LivenessFile(tmp_path, "one")
    second.release()
    assert is_alive(tmp_path, first.name, first.identity) is True
    first.release()


def test_nothing_is_known_of_a_file_that_is_another_one(tmp_path: Path) -> None:
    file = LivenessFile(tmp_path, "one")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    assert is_alive(folder, file.name, file.identity) is None
    shutil.copy(tmp_path / file.name, folder)
    assert is_alive(folder, file.name, file.identity) is None
    file.release()


def test_asking_never_gets_in_the_way(tmp_path: Path) -> None:
    file = LivenessFile(tmp_path, "one")
    for _ in range(3):
        assert is_alive(tmp_path, file.name, file.identity) is True
    file.release()
    assert list(tmp_path.iterdir()) == []
