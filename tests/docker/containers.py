"""The services of the compose file without an engine for them: each as a process in bubblewrap.

A process sees the paths, the environment, the user and the read-only root that it would have in its
container. It runs this machine's Python instead of the image's, on this machine's network.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.fitness.task import Task
from tests import tiny
from tests.docker import files

# What a container has of its own; the rest of the root is this machine's, read-only.
_OWN = ("data", "dev", "exports", "home", "opt", "proc", "tmp")


def write_folders(folder: Path, **changes: Any) -> dict[str, str]:
    """What .env says where the folders that are mounted are below this one: a job over the zoo,
    whose task has its test split with the sealed data, and the hashes of it beside its file.
    changes: see tiny.write_job."""
    jobs, sealed = folder / "jobs", folder / "sealed"
    task = tiny.write_task(jobs / "task")
    task.write_text(task.read_text().replace("data/test.jsonl", "tiny/test.jsonl"))
    away = task.parent / "tiny"
    away.mkdir()
    shutil.move(task.parent / "data" / "test.jsonl", away)
    Task.open(task).seal()
    sealed.mkdir()
    shutil.move(away, sealed)
    parents = {name: {"model": f"/data/models/{name}"} for name in ("ops", "ja")}
    tiny.write_job(jobs, parents=parents, base={"model": "/data/models/base"}, **changes)
    folders = {"JOBS": jobs, "MODELS": tiny.ZOO, "SEALED": sealed}
    return {**files.WRITTEN, **{name: str(path) for name, path in folders.items()}}


class Containers:
    """The services, of one set of volumes. services: as the compose file has them, by name.

    hosts: names of services and the addresses that they have here. ours: variables on top of those
    that a service is given.
    """

    def __init__(
        self,
        folder: Path,
        written: Mapping[str, str],
        hosts: Mapping[str, str],
        ours: Mapping[str, str],
    ) -> None:
        self._folder = folder
        self._ours = ours
        self.services = files.compose(written)["services"]
        self._hosts = folder / "hosts"
        lines = [f"{address} {name}\n" for name, address in hosts.items()]
        self._hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))

    def volume(self, name: str) -> Path:
        """A named volume's folder on this machine."""
        found = self._folder / "volumes" / name
        found.mkdir(parents=True, exist_ok=True)
        return found

    def start(self, name: str, *arguments: str) -> "subprocess.Popen[str]":
        """Start a service; arguments: in place of its command."""
        service = self.services[name]
        dockerfile = files.DOCKER.parent / service["build"]["dockerfile"]
        image = {each.name: each.text for each in files.last_stage(dockerfile)}
        entrypoint = service.get("entrypoint") or json.loads(image["ENTRYPOINT"])
        command = list(arguments) or service["command"]
        given = {k: v for k, v in service["environment"].items() if v is not None}
        environment = {**files.environment(dockerfile), **given, **self._ours}
        environment["PATH"] = environment["PATH"].replace("$PATH", "/usr/local/bin:/usr/bin:/bin")
        walls = ["bwrap", "--die-with-parent", "--unshare-user", "--uid", "10001", "--gid", "10001"]
        walls += ["--unshare-pid", *_root(), *self._mounts(service), "--remount-ro", "/"]
        walls += ["--chdir", image["WORKDIR"], "--clearenv"]
        for key, value in environment.items():
            walls += ["--setenv", key, value]
        return subprocess.Popen(
            [*walls, *entrypoint, *command],
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ["PATH"]},
        )

    def _mounts(self, service: Mapping[str, Any]) -> list[str]:
        found = ["--ro-bind", str(self._hosts), "/etc/hosts"]
        for number, mount in enumerate(service["volumes"]):
            if mount["type"] == "bind":
                source = Path(mount["source"])
            else:
                source = self.volume(mount.get("source", f"anonymous-{id(service)}-{number}"))
            how = "--ro-bind" if mount.get("read_only") else "--bind"
            found += [how, str(source), mount["target"]]
        return found


def _root() -> list[str]:
    """bubblewrap's options for all that is not a volume."""
    options = []
    for path in sorted(Path("/").iterdir()):
        if path.name in _OWN:
            continue
        if path.is_symlink():
            options += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            options += ["--ro-bind", str(path), str(path)]
    options += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--dir", "/exports"]
    for folder in (".cache", "tmp", "work"):
        options += ["--dir", f"/home/evomerge/{folder}"]
    # The package, and the Python that has it installed, wherever they are.
    for folder in dict.fromkeys((sys.base_prefix, sys.prefix, str(tiny.ROOT))):
        options += ["--ro-bind", folder, folder]
    return [*options, "--ro-bind", sys.prefix, "/opt/evomerge"]
