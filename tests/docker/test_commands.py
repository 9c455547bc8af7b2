"""The commands of the containers, as these would run them: a store is made, a search is launched,
killed, resumed and exported, a server is sent one, nodes of Ray find each other."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import yaml
from psycopg import sql

from evomerge.job import Job
from tests import tiny
from tests.docker import files
from tests.docker.containers import Containers, write_folders
from tests.postgres import Server
from tests.processes import descendants
from tests.running import PATIENCE, Ended, ended, wait_for
from tests.tiny import ROOT

T = TypeVar("T")


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


@pytest.mark.slow
def test_an_empty_database_becomes_a_store_once(host: Host, migrated: Ended) -> None:
    assert migrated.code == 0, migrated.err
    assert migrated.out == "postgresql://evomerge@postgres/evomerge is a new store\n"
    again = ended(host.containers().start("migrate"))
    assert again.code == 0, again.err
    assert again.out == "postgresql://evomerge@postgres/evomerge is up to date\n"


@pytest.mark.slow
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
@pytest.mark.parametrize("name", ["SEARCH", "JOB"])
def test_a_coordinator_that_is_told_nothing_asks_for_it(host: Host, name: str) -> None:
    end = ended(host.containers(**{name: ""}).start("coordinator"))
    assert end.code == 2
    assert f"{name}: name " in end.err


@pytest.mark.slow
@pytest.mark.usefixtures("migrated")
def test_an_exporter_of_a_search_that_is_not_there_says_so(host: Host) -> None:
    end = ended(host.containers(SEARCH="none").start("exporter"))
    assert end.code == 2
    assert "'none'" in end.err


def test_ray_takes_the_options_that_nodes_are_started_with() -> None:
    from ray.scripts.scripts import cli

    services: dict[str, Any] = files.compose(files.WRITTEN)["services"]
    commands = [services[name]["command"] for name in ("ray-head", "worker")]
    commands += [services[name]["healthcheck"]["test"][2:] for name in ("ray-head", "worker")]
    for name in ("coordinator", "server"):
        joining = services[name]["entrypoint"][2].replace("\\\n", " ")
        commands.append(re.findall(r"ray (start .*) >", joining)[0].split())
    for name, *options in commands:
        cli.commands[name].make_context(name, options)  # raises for what it does not know


def test_ray_takes_the_options_that_the_document_gives_it() -> None:
    from ray.scripts.scripts import cli

    text = (ROOT / "docs" / "operations.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    whole = [block.replace("\\\n", " ") for block in blocks]  # lines that go on
    lines = [shlex.split(line, comments=True) for block in whole for line in block.splitlines()]
    written = [words for words in lines if words[:1] == ["ray"]]
    written += [shlex.split(words) for words in re.findall(r"`(ray [^`]*)`", text)]
    assert written
    for _, name, *options in written:
        kept = options[: options.index(">")] if ">" in options else options
        cli.commands[name].make_context(name, kept)


def test_ray_takes_the_parameters_that_kuberay_gives_it() -> None:
    from ray.scripts.scripts import cli

    (cluster,) = (each for _, each in files.manifests() if each["kind"] == "RayCluster")
    for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]):
        options = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
        cli.commands["start"].make_context("start", options)


def test_a_job_of_kuberay_is_started_as_the_coordinator_is() -> None:
    coordinator: str = files.compose(files.WRITTEN)["services"]["coordinator"]["command"][2]
    jobs = {name: each for name, each in files.manifests() if each["kind"] == "RayJob"}
    ours = coordinator[coordinator.index("if evomerge") :].replace('"', "")
    for file, name in (("job.yaml", "ja-math"), ("search.yaml", "ja-code")):
        due = ours.replace("$JOB", f"{name}.yaml").replace("$SEARCH", name)
        theirs = re.sub(r";(?= |$)", "", jobs[file]["spec"]["entrypoint"])
        priority = " executor.priority=1"
        assert theirs.count(priority) == (2 if file == "search.yaml" else 0)
        assert due.split() == theirs.replace(priority, "").split()


def test_what_manifests_override_are_keys_of_a_job(tmp_path: Path) -> None:
    job = tiny.write_job(tmp_path)
    for _, document in files.manifests():
        command = document["spec"].get("entrypoint", "")
        for overrides in re.findall(r"evomerge (?:run|resume) \S+((?: \S+=\S+)*);", command):
            Job.from_file(job, ["executor.kind=ray", *overrides.split()])


@dataclass(frozen=True)
class Night:
    """What became of the containers, in this order."""

    killed: int
    resumed: Ended
    resumed_again: Ended
    refused: Ended
    openings: int
    exported: Ended


@pytest.fixture(scope="module")
def night(
    host: Host, migrated: Ended, postgres: Server, tmp_path_factory: pytest.TempPathFactory
) -> Night:
    """From an empty store to an export, with a power failure; before the export one from which the
    sealed data are kept."""
    containers = host.containers()
    count = sql.SQL("SELECT count(*) FROM evaluation")
    first = containers.start("coordinator")
    assert wait_for(first, lambda: postgres.execute(count, "evomerge")[0][0] != 0), ended(first)
    first.kill()
    ended(first)
    resumed, again = (ended(containers.start("coordinator")) for _ in range(2))
    nothing = host.containers(SEALED=str(tmp_path_factory.mktemp("nothing")))
    refused = ended(nothing.start("exporter"))
    unseals = sql.SQL("SELECT count(*) FROM ledger WHERE kind = 'unseal'")
    openings = postgres.execute(unseals, "evomerge")[0][0]
    exported = ended(containers.start("exporter"))
    return Night(first.returncode, resumed, again, refused, openings, exported)


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
def test_an_exporter_without_the_sealed_data_opens_nothing(night: Night) -> None:
    assert night.refused.code == 2
    assert "tiny/test.jsonl' is missing" in night.refused.err
    assert night.openings == 0


@pytest.mark.slow
def test_the_exporter_writes_the_model_and_its_report(host: Host, night: Night) -> None:
    assert night.exported.code == 0, night.exported.err
    out = host.containers().volume("exports") / "tiny"
    assert json.loads((out / "evomerge_report.json").read_text())["search"] == "tiny"
    assert (out / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("migrated")
def test_a_search_is_not_launched_without_the_hashes_of_test(host: Host, tmp_path: Path) -> None:
    shutil.copytree(host.folder / "jobs", tmp_path / "jobs")
    (tmp_path / "jobs" / "task" / "task.sealed.json").unlink()
    containers = host.containers(JOBS=str(tmp_path / "jobs"), SEARCH="unsealed")
    end = ended(containers.start("coordinator"))
    assert end.code == 2
    assert "tiny/test.jsonl" in end.err


@dataclass(frozen=True)
class Service:
    """What became of a server that was sent a search, and was to export it."""

    refused: Ended
    healthy: Ended
    search: dict[str, Any]
    exporting: dict[str, Any]
    openings: int
    ended: Ended
    exported: Ended


@pytest.fixture(scope="module")
def service(host: Host, migrated: Ended, postgres: Server) -> Service:
    """From a store without a token to an export, which the exporter makes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Nobody has to name a search for it; its port is one that is free on this machine.
    containers = host.containers(SEARCH="", JOB="", SERVER_PORT=str(port))
    serve = [*containers.services["server"]["command"], f"--port={port}"]
    refused = ended(containers.start("server", *serve))
    scopes = ("--scopes", "read,run,unseal")
    secret = ended(containers.start("migrate", "token", "create", "ada", *scopes)).out.strip()
    server = containers.start("server", *serve)
    try:
        probe = containers.services["server"]["healthcheck"]["test"][1:]
        probe = [word.replace(":8765/", f":{port}/") for word in probe]
        healthy = _eventually(
            lambda: ended(containers.start("server", *probe)), lambda end: not end.code
        )
        address = f"http://127.0.0.1:{port}/api/v1/searches"
        with httpx.Client(headers={"Authorization": f"Bearer {secret}"}) as client:
            job = yaml.safe_load((host.folder / "jobs" / "job.yaml").read_text())
            tasks = [{"task": "/data/jobs/task/task.yaml"}]
            body = {"job": {**job, "name": "served", "tasks": tasks}}
            _sent(client, address, body)
            search = _done(lambda: client.get(f"{address}/served").json())
            _sent(client, f"{address}/served/exports", {"unseal": True})
            exporting = _done(lambda: client.get(f"{address}/served/exports").json()[0])
        unseals = sql.SQL(
            "SELECT count(*) FROM ledger WHERE kind = 'unseal' AND subject LIKE 'served/%'"
        )
        openings = postgres.execute(unseals, "evomerge")[0][0]
        _init, main, *_ = sorted(descendants(server.pid))
        os.kill(main, signal.SIGTERM)
        end = ended(server)
    finally:
        server.kill()
    exported = ended(host.containers(SEARCH="served").start("exporter"))
    return Service(refused, healthy, search, exporting, openings, end, exported)


def _sent(client: httpx.Client, address: str, body: dict[str, Any]) -> None:
    answer = client.post(address, json=body, timeout=PATIENCE)
    assert answer.status_code in (201, 202), answer.text


def _done(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The submission that an answer is of, once it is worked off."""
    return _eventually(
        lambda: ask()["submission"], lambda one: one["state"] in ("finished", "failed")
    )


def _eventually(ask: Callable[[], T], is_due: Callable[[T], bool]) -> T:
    """What is answered as soon as it is due, or when patience ends."""
    deadline = time.monotonic() + PATIENCE
    while not is_due(found := ask()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


@pytest.mark.slow
def test_a_server_waits_for_a_token(service: Service) -> None:
    assert service.refused.code == 2
    assert "evomerge token create NAME" in service.refused.err


@pytest.mark.slow
def test_a_server_is_healthy_and_ends_well(service: Service) -> None:
    assert service.healthy.code == 0, service.healthy.err
    assert service.ended.code == 0, service.ended.err


@pytest.mark.slow
def test_a_server_works_off_what_is_in_the_folders(host: Host, service: Service) -> None:
    assert service.search["state"] == "finished", service.search
    logs = host.containers().volume("work") / "server" / "logs"
    assert (logs / "served.log").exists()


@pytest.mark.slow
def test_a_server_without_the_sealed_data_leaves_the_export_to_the_exporter(
    service: Service,
) -> None:
    assert service.exporting["state"] == "failed"
    assert "tiny/test.jsonl' is missing" in service.exporting["error"]
    assert service.openings == 0
    assert service.exported.code == 0, service.exported.err
