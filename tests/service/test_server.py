"""A server as a process: started, found, stopped."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from evomerge.errors import InputError
from evomerge.service.server import serve
from evomerge.service.server import url as address_of
from evomerge.service.settings import Settings
from tests.running import PATIENCE, url

_SERVE = """
import sys
from pathlib import Path
from evomerge.service.server import serve
from evomerge.service.settings import Settings

def tell(line):
    print(line, flush=True)

serve(Settings(sys.argv[1], port=0, data=Path(sys.argv[2])), tell)
print("ended", flush=True)
"""


def settings(folder: Path, **changes: object) -> Settings:
    given = {"port": 0, "data": folder / "data", "roots": (folder,)} | changes
    return Settings(url(folder / "store.db"), **given)  # type: ignore[arg-type]


@contextmanager
def running(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, url(folder / "store.db"), str(folder / "data")],
        stdout=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("EVOMERGE_")},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_ends_at_once_when_it_is_asked_to_though_somebody_listens(
    tmp_path: Path, number: signal.Signals
) -> None:
    with running(tmp_path) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        line = next(line for line in lines if line.startswith("evomerge serves"))
        address = line.rsplit(" ", 1)[1].strip()
        with httpx.Client(base_url=address, timeout=PATIENCE) as client:
            assert client.get("/readyz").json()["status"] == "ok"
            with client.stream("GET", "/api/v1/events") as events:
                assert events.status_code == 200
                process.send_signal(number)
                assert list(events.iter_bytes()) is not None  # it ends
        out, _ = process.communicate(timeout=PATIENCE)
        assert out.splitlines()[-1] == "ended"
        assert process.returncode == 0


def test_what_cannot_be_served_is_refused_in_words(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match="--port"):
            serve(settings(tmp_path, port=port), print)
    assert not (tmp_path / "store.db").exists()
    with pytest.raises(InputError, match="--tls-cert and --tls-key"):
        serve(settings(tmp_path, tls_cert=tmp_path / "cert.pem"), print)
    cert = tmp_path / "cert.pem"
    cert.write_text("")
    with pytest.raises(InputError, match="--tls-key: there is no file"):
        serve(settings(tmp_path, tls_cert=cert, tls_key=tmp_path / "key.pem"), print)
    with pytest.raises(InputError, match="--root"):
        serve(settings(tmp_path, roots=(tmp_path / "none",)), print)
    with pytest.raises(InputError, match="token"):
        serve(settings(tmp_path, host="0.0.0.0"), print)
    assert "scheduler" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("host", "shown"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("127.0.0.1", "127.0.0.1")],
)
def test_address_that_is_told_can_be_opened(tmp_path: Path, host: str, shown: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert address_of(settings(tmp_path, host=host), listening) == f"http://{shown}:{port}"
