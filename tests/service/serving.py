"""A server for tests: its app with a client in this process, or behind a real socket."""

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from evomerge.service.app import create_app
from evomerge.service.context import Context
from evomerge.service.scheduler import Scheduler
from evomerge.service.server import StreamingServer
from evomerge.service.settings import Settings
from evomerge.store import Store
from tests.running import PATIENCE, url
from tests.tiny import ROOT


@dataclass
class Served:
    """An app over a store, its scheduler not started."""

    app: FastAPI
    settings: Settings
    store: Store
    client: TestClient

    @property
    def context(self) -> Context:
        context: Context = self.app.state.context
        return context

    def get(self, path: str, **options: Any) -> Any:
        """What the API says at a path."""
        found = self.client.get(f"/api/v1{path}", **options)
        assert found.status_code == 200, found.text
        return found.json()

    def refused(self, status: int, method: str, path: str, **options: Any) -> str:
        """The code of the problem that a request meets."""
        found = self.client.request(method, f"/api/v1{path}", **options)
        assert found.status_code == status, found.text
        error = found.json()["error"]
        assert list(error) == ["code", "message"]
        assert error["message"]
        return str(error["code"])


@contextmanager
def served(folder: Path, database: Path | None = None, **settings: Any) -> Iterator[Served]:
    """Of a copy of a database, by default of a store in that folder. Models of the zoo may be
    named, and what is beside the database."""
    copy, data, roots = folder / "store.db", folder / "data", (folder, ROOT)
    if database is not None:
        shutil.copyfile(database, copy)
        roots = (database.parent, ROOT)
    data.mkdir()
    given = Settings(url(copy), **({"data": data, "roots": roots} | settings))
    with Store(given.store, create=True) as store:
        app = create_app(given, store, Scheduler(given, store))
        with TestClient(app, f"http://127.0.0.1:{given.port}", client=("127.0.0.1", 50_000)) as c:
            yield Served(app, given, store, c)


@dataclass(frozen=True)
class Listening:
    """A server behind a socket of this machine, in a thread of its own."""

    address: str
    server: uvicorn.Server

    def stop(self) -> None:
        """Have it end."""
        self.server.should_exit = True


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The address of an app behind a socket."""
    with behind_socket(app) as found:
        yield found.address


@contextmanager
def behind_socket(app: FastAPI) -> Iterator[Listening]:
    """An app as `serve` puts it there."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5)
        server = StreamingServer(config, app.state.context.broadcaster.close)
        found = Listening(f"http://127.0.0.1:{bound.getsockname()[1]}", server)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            deadline = time.monotonic() + PATIENCE
            while not server.started and time.monotonic() < deadline:
                time.sleep(0.01)
            yield found
        finally:
            found.stop()
            thread.join()
