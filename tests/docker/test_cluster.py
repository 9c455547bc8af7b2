"""The containers of the profile gpu find each other and search together, without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.containers import write_folders
from tests.tiny import ROOT


@pytest.mark.ray
def test_a_search_runs_on_the_nodes_of_the_compose_file(tmp_path: Path) -> None:
    executor = {"kind": "ray", "workers": 1}
    written = write_folders(tmp_path, budget={"candidates": 4}, executor=executor)
    written["RAY_ADDRESS"] = "ray-head:6379"
    command = ["unshare", "--map-root-user", "--net", sys.executable, "-m", "tests.docker.cluster"]
    done = subprocess.run(
        [*command, tmp_path, json.dumps(written)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    end = json.loads(done.stdout)
    assert end["code"] == 0, end["err"]
    assert "candidates: 4 of 4" in end["out"]
