"""The images and the compose file: valid, and what they promise of users, secrets and sealed data.

There is no engine here to build them: hadolint and the formats' own parsers stand in for it.
"""

import fnmatch
import re
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml

from tests.docker import files
from tests.tiny import ROOT

DOCKERFILES = [files.COORDINATOR, files.WORKER]
images = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """Those of the compose file, by name."""
    found: dict[str, Any] = files.compose(files.WRITTEN)["services"]
    return found


@images
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", dockerfile], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@images
def test_images_run_as_a_numbered_user_with_an_entry_point_of_their_own(dockerfile: Path) -> None:
    stage = files.last_stage(dockerfile)
    assert any(each.name == "ARG" and each.text == "UID=10001" for each in stage)
    last = {each.name: each.text for each in stage}
    assert last["USER"] == "${UID}:${UID}"  # Kubernetes takes no name where root is refused
    assert last["ENTRYPOINT"] == '["evomerge"]'


@images
def test_base_images_are_pinned(dockerfile: Path) -> None:
    pinned = dict(
        each.text.split("=", 1) for each in files.instructions(dockerfile) if each.name == "ARG"
    )
    for each in files.instructions(dockerfile):
        if each.name == "FROM":
            image = pinned[each.text.split()[0].strip("${}")]
            tag = image.partition(":")[2]
            assert tag
            assert tag != "latest"


def test_the_pinned_vllm_is_one_that_the_package_takes() -> None:
    image = next(each for each in files.instructions(files.WORKER) if "VLLM_IMAGE=" in each.text)
    version = image.text.rpartition(":v")[2].rsplit(".", 1)[0]
    assert f"vllm>={version}," in (ROOT / "constraints.txt").read_text()


def test_what_rays_nodes_are_made_of_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {re.split("[=<>]", line)[0].lower().replace("_", "-") for line in lines}
    of_nodes = [text for text in requires("ray") or () if 'extra == "default"' in text]
    names = {re.split(r"[^\w-]", text)[0].replace("_", "-") for text in of_nodes}
    assert "aiohttp" in names
    assert names <= pinned


@images
def test_versions_come_from_the_constraints(dockerfile: Path) -> None:
    installs = [
        part
        for each in files.instructions(dockerfile)
        if each.name == "RUN"
        for part in each.text.split("&&")
        if "pip" in part and (" install " in part or " wheel " in part)
    ]
    assert installs
    for install in installs:
        assert "--constraint" in install or "PIP_CONSTRAINT=constraints.txt" in install, install


def test_the_coordinator_takes_torch_without_cuda_before_anything_asks_for_it() -> None:
    runs = [each.text for each in files.instructions(files.COORDINATOR) if each.name == "RUN"]
    assert '--index-url "${TORCH_INDEX}"' in runs[0]
    assert runs[0].endswith("torch")


@images
def test_everything_is_written_under_the_home(dockerfile: Path) -> None:
    found = files.environment(dockerfile)
    home = found.pop("HOME")
    for name in ("XDG_CACHE_HOME", "HF_HOME", "EVOMERGE_CACHE", "TMPDIR", "RAY_TMPDIR"):
        assert found[name].startswith(home + "/"), name
    workdir = [each.text for each in files.last_stage(dockerfile) if each.name == "WORKDIR"]
    assert workdir[-1].startswith(home + "/")


@images
def test_no_secret_is_baked_in(dockerfile: Path) -> None:
    for each in files.instructions(dockerfile):
        if each.name in ("ARG", "ENV"):
            assert not any(word in each.text.upper() for word in ("PASSWORD", "TOKEN", "SECRET"))


@images
def test_images_say_what_they_are(dockerfile: Path) -> None:
    labels = next(each.text for each in files.last_stage(dockerfile) if each.name == "LABEL")
    for key in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{key}=" in labels


def test_both_images_have_the_version_of_the_package() -> None:
    from evomerge import __version__

    for dockerfile in DOCKERFILES:
        assert f"ARG VERSION={__version__}\n" in dockerfile.read_text()
    assert f"EVOMERGE_VERSION:-{__version__}}}" in (files.DOCKER / "compose.yaml").read_text()


def sent(context: Path) -> list[Path]:
    """The files that a build is sent: .dockerignore read as the list of names that it is."""
    rules = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert rules[0] == "*"
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    dropped = [rule.removeprefix("**/") for rule in rules[1:] if not rule.startswith("!")]
    return [
        path
        for name in kept
        for path in (
            [context / name] if (context / name).is_file() else context.glob(f"{name}/**/*")
        )
        if path.is_file()
        and not any(fnmatch.fnmatch(part, rule) for part in path.parts for rule in dropped)
    ]


def test_what_a_build_is_sent_is_enough_for_the_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for path in sent(ROOT):
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "evomerge/cli/app.py" in names
    assert "evomerge/packaged/fitness/gsm8k/task.yaml" in names
    assert any(name.startswith("evomerge/packaged/search_spaces/") for name in names)


def test_the_compose_file_is_valid() -> None:
    document = files.compose(files.WRITTEN)
    plain = {key: value for key, value in document.items() if not key.startswith("x-")}
    # The format has a number of attempts here, which this parser has not heard of.
    coordinator = plain["services"]["coordinator"]
    coordinator["restart"] = coordinator["restart"].removesuffix(":10")
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(plain)).validate()


@pytest.mark.parametrize("name", files.WRITTEN)
def test_nothing_secret_or_chosen_has_a_default(name: str) -> None:
    assert f"\n{name}=\n" in (files.DOCKER / "example.env").read_text()
    written = {key: value for key, value in files.WRITTEN.items() if key != name}
    if name in ("SEARCH", "JOB"):  # of the coordinator alone, which says so itself
        assert files.compose(written)["services"]["coordinator"]["environment"][name] == ""
    else:
        with pytest.raises(KeyError, match=name):
            files.compose(written)


def test_the_file_with_the_password_is_never_committed() -> None:
    done = subprocess.run(["git", "check-ignore", "docker/.env"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0


def test_ports_are_published_on_this_machine_alone(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_clients_find_the_server_where_it_is_published() -> None:
    for port in ("8765", "9000"):
        server = files.compose({**files.WRITTEN, "SERVER_PORT": port})["services"]["server"]
        assert server["ports"] == [f"127.0.0.1:{port}:8765"]
        assert f"--public-url=http://127.0.0.1:{port}" in server["command"]


def test_sealed_data_reach_exports_alone_and_read_only(services: dict[str, Any]) -> None:
    mounts = {
        name: mount
        for name, service in services.items()
        for mount in service.get("volumes", [])
        if mount["target"] == "/data/sealed"
    }
    assert set(mounts) == {"exporter", "exporter-gpu"}
    assert all(mount["read_only"] for mount in mounts.values())
    told = {n for n, service in services.items() if "EVOMERGE_DATA" in service["environment"]}
    assert told == set(mounts)


def test_what_users_mount_is_read_only(services: dict[str, Any]) -> None:
    mounts = [mount for service in services.values() for mount in service.get("volumes", [])]
    assert all(mount["read_only"] for mount in mounts if mount["type"] == "bind")


def test_workers_have_no_way_to_the_store(services: dict[str, Any]) -> None:
    for name in ("worker", "ray-head"):
        assert services[name]["networks"] == ["cluster"]
        assert not {"EVOMERGE_STORE", "PGPASSWORD"} & set(services[name]["environment"])
    assert services["postgres"]["networks"] == ["store"]


def test_profiles_add_gpus_and_exports_to_the_rest(services: dict[str, Any]) -> None:
    profiles = {name: service.get("profiles") for name, service in services.items()}
    assert profiles == {
        "postgres": None,
        "migrate": None,
        "coordinator": None,
        "server": ["serve"],
        "ray-head": ["gpu"],
        "worker": ["gpu"],
        "exporter": ["export"],
        "exporter-gpu": ["export-gpu"],
    }


def test_our_containers_are_hardened(services: dict[str, Any]) -> None:
    for name in services.keys() - {"postgres"}:
        service = services[name]
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
