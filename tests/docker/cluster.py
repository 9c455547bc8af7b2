"""A night on Ray with the containers of the compose file. Prints how the coordinator ended.

Started by test_cluster.py in a network of its own, where the ports of the compose file are free.

Containers have an address each; here all have this network's loopback, and are told which of it.
"""

import fcntl
import json
import socket
import struct
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tests.docker.containers import Containers
from tests.running import PATIENCE, ended

_HEAD, _WORKER, _COORDINATOR = (f"--node-ip-address=127.0.0.{i}" for i in (1, 2, 3))


def main(folder: Path, written: dict[str, str]) -> None:
    """Start the nodes, wait until the head is healthy, and run a coordinator to its end."""
    _raise_loopback()
    ours = {
        "EVOMERGE_STORE": "sqlite:///store.db",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    containers = Containers(folder, written, hosts={"ray-head": "127.0.0.1"}, ours=ours)
    services = containers.services
    nodes: list[subprocess.Popen[str]] = []
    try:
        nodes.append(containers.start("ray-head", *services["ray-head"]["command"], _HEAD))
        probe = services["ray-head"]["healthcheck"]["test"][2:]
        deadline = time.monotonic() + PATIENCE
        while ended(containers.start("ray-head", *probe)).code:
            if nodes[0].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no head: {ended(nodes[0])}")
        command = [*services["worker"]["command"], "--num-cpus=1", _WORKER]
        nodes.append(containers.start("worker", *command))
        shell = services["coordinator"]["entrypoint"]
        shell[2] = shell[2].replace("ray start", f"ray start {_COORDINATOR}")
        print(json.dumps(asdict(ended(containers.start("coordinator")))))
    finally:
        for node in nodes:
            node.kill()


def _raise_loopback() -> None:
    """What `ip link set lo up` does."""
    request = struct.pack("16sh14x", b"lo", 0x1)  # IFF_UP
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
