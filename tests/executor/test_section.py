"""The executor section of a job: what it takes, what it refuses, and what stands without Ray."""

import re
import sys
from pathlib import Path

import pytest

from evomerge.errors import JobError
from evomerge.executor.cluster import Cluster
from evomerge.executor.demand import demanded, environment, settled, spelt
from evomerge.job import Engine, Executor, Job
from tests import tiny
from tests.running import evomerge_, url


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("executor.kind=dask", "executor.kind: 'dask'"),
        ("executor.workers=0", "executor.workers: 0"),
        ("executor.workers=many", "executor.workers: 'many'"),
        ("executor.gpus=1.5", "gpus: 1.5: give a whole number, or a fraction below 1"),
        ("executor.cpus=-1", "executor.cpus: -1"),
        ("executor.time_limit=0", "executor.time_limit: 0"),
        ("executor.devices=3", "executor.devices"),
        ("executor.priority=high", "executor.priority: 'high'"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(JobError, match=re.escape(message)):
        Job.from_file(tiny.write_job(tmp_path), ["executor.kind=ray", override])


def test_keys_of_ray_are_refused_without_it(tmp_path: Path) -> None:
    message = "workers: only executor.kind: ray has it: leave it out"
    with pytest.raises(JobError, match=message):
        Job.from_file(tiny.write_job(tmp_path), ["executor.workers=2"])


def test_a_stored_job_names_every_key(tmp_path: Path) -> None:
    job = Job.from_file(tiny.write_job(tmp_path), ["executor.kind=ray", "executor.workers=2"])
    stored = job.model_dump(mode="json", exclude_none=True, by_alias=True)
    assert Job.from_dict(stored, "search 'tiny'").executor == job.executor
    stored["executor"]["kind"], stored["executor"]["workers"] = "inline", "auto"
    assert Job.from_dict(stored, "search 'tiny'").executor == Executor()


@pytest.mark.parametrize(
    ("section", "engine", "has", "asked"),
    [
        ({}, {"threads": 2}, {"CPU": 8}, "2 CPU"),
        ({}, {"threads": 2}, {"CPU": 8, "GPU": 2}, "1 CPU, 1 GPU"),
        ({}, {"threads": 2, "device": "cpu"}, {"CPU": 8, "GPU": 2}, "2 CPU"),
        ({}, {"threads": 2, "device": "cuda"}, {"CPU": 8}, "1 CPU, 1 GPU"),
        ({}, {"kind": "vllm", "tensor_parallel": 4}, {"GPU": 8}, "1 CPU, 4 GPU"),
        ({"gpus": 0.25, "cpus": 0}, {}, {"GPU": 8}, "0.25 GPU"),
        ({"gpus": 0, "resources": {"tpu": 1}}, {"threads": 1}, {"GPU": 8}, "1 CPU, 1 tpu"),
        ({"gpus": 0, "cpus": 0}, {}, {}, "nothing"),
    ],
)
def test_a_worker_asks_for_what_its_engine_uses(
    section: dict[str, object], engine: dict[str, object], has: dict[str, float], asked: str
) -> None:
    keys = {"kind": "ray", **section}
    opened = Engine.model_validate(engine)
    found = demanded(Executor.model_validate(keys), opened, has)
    assert spelt(found) == asked
    device = "cuda" if "GPU" in asked else "cpu"
    assert settled(opened, found).device == (device if opened.device == "auto" else opened.device)


def test_workers_see_what_they_need_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/a/folder/here")
    found = environment(Engine(threads=3))
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["HF_TOKEN"] == "hf_secret"
    assert "HF_HOME" not in found
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert environment(Engine(threads=3))["OMP_NUM_THREADS"] == "2"


def test_without_ray_it_is_told_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(JobError, match=re.escape("pip install 'evomerge[ray]'")):
        Cluster(None)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "somewhere"])
def test_an_address_without_a_cluster_is_told_at_once(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(JobError, match=f"executor.address: '{address}': no Ray cluster can be"):
        Cluster(address)


@pytest.mark.parametrize(
    ("left_behind", "why"),
    [
        ("127.0.0.1:1", r"[\d.]+:1: Connection refused"),
        (None, "this machine is no node of one: give HOST:PORT"),
    ],
)
def test_a_cluster_that_no_longer_runs_here_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_behind: str | None, why: str
) -> None:
    services = pytest.importorskip("ray._private.services")
    monkeypatch.setattr(services, "find_gcs_addresses", frozenset)  # whatever else runs here
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if left_behind is not None:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(left_behind)
    with pytest.raises(
        JobError, match=rf"^executor.address: 'auto': no Ray cluster can be reached: {why}$"
    ):
        Cluster("auto")


def test_the_flag_is_a_key_of_the_job(tmp_path: Path) -> None:
    end = evomerge_(
        "run", tiny.write_job(tmp_path), "--executor", "dask", "--store", url(tmp_path / "store.db")
    )
    assert end.code == 2
    assert "executor.kind: 'dask'" in end.err
