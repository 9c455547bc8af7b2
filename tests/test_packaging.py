"""The wheel holds what an installed evomerge looks up."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.tiny import ROOT


@pytest.mark.slow
def test_the_wheel_ships_spaces_tasks_and_migrations(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert "evomerge/packaged/search_spaces/per_module_task_arithmetic.yaml" in names
    assert "evomerge/packaged/fitness/ja_list_ops/data/test.jsonl" in names
    assert "evomerge/store/migrations/versions/001_first.py" in names
    assert not any(name.startswith(("tests/", "examples/", "benchmarks/")) for name in names)
    # The installed copy finds its own, not the checkout's.
    code = "from evomerge.job import find_task; print(find_task('ja_list_ops'))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "installed",
        env={"PYTHONPATH": str(tmp_path / "installed")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(found.stdout.strip()).is_relative_to((tmp_path / "installed").resolve())
