"""A PostgreSQL server of the tests' own, in a temporary folder, on a free port.

Fast and without any promise of durability: nothing is synced. A server refuses to run as root, who
therefore runs it as user `postgres`.
"""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
}
_ADMIN = "postgres"


class Server:
    """A running server, with no password. Every database is made by `database` and has a URL."""

    def __init__(self) -> None:
        self._binaries = _binaries()
        self._folder = Path(tempfile.mkdtemp(prefix="evomerge-postgres-", dir=_place()))
        if _is_root():
            shutil.chown(self._folder, "postgres")
        self._data = self._folder / "data"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._run(
            "initdb", "--no-sync", "--auth=trust", f"--username={_ADMIN}", "--encoding=UTF8",
            "--locale=C", "--no-instructions",
        )  # fmt: skip
        settings = {**_SETTINGS, "port": str(self.port)}
        with (self._data / "postgresql.conf").open("a") as config:
            config.writelines(f"{key} = '{value}'\n" for key, value in settings.items())
        self._template: str | None = None
        self._store: str | None = None
        self._made = 0
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.pg_ctl("start", "-w", "-l", str(self._folder / "log"))

    def stop(self, mode: str = "fast") -> None:
        """Stop it; its databases stay. mode: smart | fast | immediate, as of pg_ctl."""
        self.pg_ctl("stop", "-w", "-m", mode)

    def pg_ctl(self, *arguments: str) -> None:
        """Run pg_ctl on the server's data."""
        self._run("pg_ctl", *arguments)

    def url(self, name: str, user: str = _ADMIN) -> str:
        """The URL of a database, whether it is there or not."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{name}"

    def database(self, migrated: bool = False) -> str:
        """Make a database of a new name and give its URL.

        migrated: it is a store of the newest schema, without searches; else there is nothing in it.
        """
        self._made += 1
        name = f"db{self._made}"
        template = self._migrated() if migrated else "template0"
        self.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
        return self.url(name)

    def store(self) -> str:
        """The URL of a store without searches: the same database each time, emptied."""
        from evomerge.store import schema

        if self._store is None:
            self._store = self.database(migrated=True)
        names = sql.SQL(", ").join(sql.Identifier(t.name) for t in schema.metadata.sorted_tables)
        name = self._store.rpartition("/")[2]
        self.execute(sql.SQL("TRUNCATE {} RESTART IDENTITY").format(names), name)
        return self._store

    def execute(self, statement: sql.Composable, name: str = _ADMIN) -> list[tuple[object, ...]]:
        """Run a statement in a database, outside any transaction, as its owner; gives its rows."""
        with psycopg.connect(self.url(name), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def remove(self) -> None:
        """Stop it and delete everything."""
        try:
            self.stop("immediate")
        finally:
            shutil.rmtree(self._folder)

    def _migrated(self) -> str:
        """The name of an empty store that others are copied from, made on the first call."""
        if self._template is None:
            from evomerge.store import Store

            self.execute(sql.SQL("CREATE DATABASE migrated TEMPLATE template0"))
            with Store(self.url("migrated"), create=True):
                pass
            self._template = "migrated"
        return self._template

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), "-D", str(self._data), *arguments]
        if _is_root():
            command = [
                "setpriv",
                "--reuid=postgres",
                "--regid=postgres",
                "--clear-groups",
                *command,
            ]
        done = subprocess.run(
            command,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a server that was started would keep a pipe open
            stderr=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            log = self._folder / "log"
            text = log.read_text() if log.exists() else ""
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{text[-2000:]}")


def _place() -> str | None:
    """Where files are made: in memory if there is room, else in the temporary folder."""
    memory = "/dev/shm"
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30
    return memory if roomy else None


def _is_root() -> bool:
    return os.geteuid() == 0


def _binaries() -> Path:
    """The folder of initdb and pg_ctl; skips the test where there is none, in CI fails it."""
    found = shutil.which("initdb")
    debian = Path("/usr/lib/postgresql").glob("*/bin")  # not on the PATH
    newest_first = sorted(debian, key=lambda folder: int(folder.parent.name), reverse=True)
    for folder in [Path(found).resolve().parent, *newest_first] if found else newest_first:
        if (folder / "initdb").exists() and (folder / "pg_ctl").exists():
            return folder
    reason = "PostgreSQL's initdb and pg_ctl are not installed"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
