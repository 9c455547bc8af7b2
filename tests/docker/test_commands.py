"""The commands of the containers, as these would run them: a store is made, a search is launched,
killed, resumed and exported, nodes of Ray find each other."""

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql

from tests.docker import files
from tests.docker.containers import Containers, write_folders
from tests.postgres import Server
from tests.running import Ended, ended, wait_for


@dataclass(frozen=True)
class Host:
    """A machine to run the services on: a database with nothing in it, and what .env names."""

    folder: Path
    written: dict[str, str]
    port: int

    def containers(self, **written: str) -> Containers:
        """The services; written: other values for variables of .env."""
        ours = {"PGPORT": str(self.port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return Containers(
            self.folder, {**self.written, **written}, hosts={"postgres": "127.0.0.1"}, ours=ours
        )


@pytest.fixture(scope="module")
def host(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """See write_folders."""
    folder = tmp_path_factory.mktemp("docker")
    written = write_folders(folder, name="other", budget={"candidates": 8})
    postgres.execute(sql.SQL("CREATE ROLE evomerge SUPERUSER LOGIN"))
    postgres.execute(sql.SQL("CREATE DATABASE evomerge OWNER evomerge TEMPLATE template0"))
    yield Host(folder, written, postgres.port)
    postgres.execute(sql.SQL("DROP DATABASE evomerge WITH (FORCE)"))
    postgres.execute(sql.SQL("DROP ROLE evomerge"))


@pytest.fixture(scope="module")
def migrated(host: Host) -> Ended:
    """What became of the migration."""
    return ended(host.containers().start("migrate"))


def test_an_empty_database_becomes_a_store_once(host: Host, migrated: Ended) -> None:
    assert migrated.code == 0, migrated.err
    assert migrated.out == "postgresql://evomerge@postgres/evomerge is a new store\n"
    again = ended(host.containers().start("migrate"))
    assert again.code == 0, again.err
    assert again.out == "postgresql://evomerge@postgres/evomerge is up to date\n"


def test_images_tell_what_they_can_do(host: Host) -> None:
    end = ended(host.containers().start("exporter-gpu", "--help"))
    assert end.code == 0, end.err
    assert "resume" in end.out


@pytest.mark.slow
@pytest.mark.usefixtures("migrated")
def test_a_coordinator_without_its_job_says_so(host: Host) -> None:
    end = ended(host.containers(JOB="none.yaml").start("coordinator"))
    assert end.code == 2
    assert "/data/jobs/none.yaml" in end.err


@pytest.mark.slow
@pytest.mark.usefixtures("migrated")
def test_an_exporter_of_a_search_that_is_not_there_says_so(host: Host) -> None:
    end = ended(host.containers(SEARCH="none").start("exporter"))
    assert end.code == 2
    assert "'none'" in end.err


@pytest.fixture(scope="module")
def coordinator() -> str:
    """What the coordinator's shell is told."""
    services = files.compose({**files.WRITTEN, "RAY_ADDRESS": "ray-head:6379"})["services"]
    command: str = services["coordinator"]["command"][0]
    return command.replace("\\\n", " ")


def test_ray_takes_the_options_that_nodes_are_started_with(coordinator: str) -> None:
    from ray.scripts.scripts import cli

    services: dict[str, Any] = files.compose(files.WRITTEN)["services"]
    commands = [services[name]["command"] for name in ("ray-head", "worker")]
    commands += [services[name]["healthcheck"]["test"][2:] for name in ("ray-head", "worker")]
    commands.append(re.findall(r"ray (start .*) >", coordinator)[0].split())
    for name, *options in commands:
        cli.commands[name].make_context(name, options)  # raises for what it does not know


def test_ray_takes_the_parameters_that_kuberay_gives_it() -> None:
    from ray.scripts.scripts import cli

    (cluster,) = (each for _, each in files.manifests() if each["kind"] == "RayCluster")
    for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]):
        options = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
        cli.commands["start"].make_context("start", options)


def test_a_job_of_kuberay_is_started_as_the_coordinator_is(coordinator: str) -> None:
    (job,) = (each for _, each in files.manifests() if each["kind"] == "RayJob")
    ours = coordinator[coordinator.index("if evomerge") :].replace('"', "")
    ours = ours.replace("/data/jobs/$JOB", "/data/jobs/ja-math.yaml").replace("$SEARCH", "ja-math")
    theirs = re.sub(r";(?= |$)", "", job["spec"]["entrypoint"])
    assert ours.split() == theirs.split()


@dataclass(frozen=True)
class Night:
    """What became of the containers, in this order."""

    killed: int
    resumed: Ended
    resumed_again: Ended
    exported: Ended


@pytest.fixture(scope="module")
def night(host: Host, migrated: Ended, postgres: Server) -> Night:
    """From an empty store to an export, with a power failure."""
    containers = host.containers()
    count = sql.SQL("SELECT count(*) FROM evaluation")
    first = containers.start("coordinator")
    assert wait_for(first, lambda: postgres.execute(count, "evomerge")[0][0] != 0), ended(first)
    first.kill()
    ended(first)
    again = [ended(containers.start("coordinator")) for _ in range(2)]
    return Night(first.returncode, *again, ended(containers.start("exporter")))


@pytest.mark.slow
def test_the_coordinator_launches_what_is_not_there_and_resumes_what_is(night: Night) -> None:
    assert night.killed == -signal.SIGKILL
    assert night.resumed.code == 0, night.resumed.err
    assert night.resumed.out.startswith("search tiny: finished")  # named in .env, not in the job


@pytest.mark.slow
def test_a_coordinator_of_a_finished_search_ends_well(night: Night) -> None:
    assert (night.resumed_again.code, night.resumed_again.err) == (0, "")
    assert night.resumed_again.out == night.resumed.out


@pytest.mark.slow
def test_the_exporter_writes_the_model_and_its_report(host: Host, night: Night) -> None:
    assert night.exported.code == 0, night.exported.err
    out = host.containers().volume("exports") / "tiny"
    assert json.loads((out / "evomerge_report.json").read_text())["search"] == "tiny"
    assert (out / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("migrated")
def test_without_its_sealed_data_a_search_is_not_launched(host: Host, tmp_path: Path) -> None:
    containers = host.containers(SEALED=str(tmp_path), SEARCH="unsealed")
    end = ended(containers.start("coordinator"))
    assert end.code == 2
    assert "tiny/test.jsonl" in end.err
