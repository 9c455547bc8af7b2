"""`evomerge serve` in processes of its own, and the tokens that say who may use one."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import typer

from evomerge.cli.app import app
from evomerge.store import Audit, Queue, Store, Tokens
from tests import tiny
from tests.running import PATIENCE, Ended, ended, evomerge_, log, start, url, wait_for


class Server:
    """A server of a store in a folder, which models of the zoo may be named beside."""

    def __init__(self, folder: Path, *options: str | Path) -> None:
        roots = ("--root", folder, "--root", tiny.ROOT)
        where = ("--store", url(folder / "store.db"), "--data", folder / "server")
        self.process = start("serve", *where, *roots, *options)
        self.before = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.fullmatch(r"evomerge serves \S+ on (https?://\S+)\n", line):
                self.address = found[1]
                return
            self.before += line
        raise AssertionError(self.before)

    def end(self, by: signal.Signals = signal.SIGINT) -> Ended:
        """Send it a signal, and wait for its end."""
        self.process.send_signal(by)
        return ended(self.process)


@contextmanager
def serving(folder: Path, *options: str | Path) -> Iterator[Server]:
    """A server on a free port, unless it is told one; it does not outlive the context."""
    server = Server(folder, *(("--port", "0") if "--port" not in options else ()), *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            ended(server.process)


def refused(end: Ended, message: str) -> None:
    """Nothing but one line, which says what is wrong."""
    assert (end.code, end.out) == (2, "")
    assert re.fullmatch(r"evomerge: .*\n", end.err), end.err
    assert message in end.err


@pytest.mark.slow
def test_server_says_where_it_is_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert server.address.startswith("http://127.0.0.1:")
        assert httpx.get(f"{server.address}/healthz").json() == {"status": "ok"}
        end = evomerge_("ls", "--server", server.address, "--json")
        assert (end.code, json.loads(end.out)) == (0, [])
        port = server.address.rpartition(":")[2]
        taken = evomerge_("serve", "--store", url(tmp_path / "b.db"), "--port", port)
        assert taken.code == 2
        assert re.search(r"cannot be served: Address already in use.*: choose another", taken.err)
        end = server.end()
        assert (end.code, end.out) == (0, "")
        assert "Traceback" not in end.err


def test_server_that_cannot_be_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for options, message in {
        "--tls-cert cert.pem": "TLS needs both",
        "--tls-cert cert.pem --tls-key key.pem": "--tls-cert: there is no file 'cert.pem'",
        "--root nowhere": "nowhere': make it, or correct the path",
        "--store nothing://": "nothing://",
        "--port 70000": "Invalid value for '--port'",
        "--searches 0": "Invalid value for '--searches'",
    }.items():
        refused(evomerge_("serve", *options.split()), message)
    assert list(tmp_path.iterdir()) == []


def test_others_than_this_machine_are_served_with_a_token_alone(tmp_path: Path) -> None:
    where = ("--store", url(tmp_path / "store.db"), "--data", tmp_path / "data")
    for options in (("--host", "0.0.0.0"), ("--public-url", "https://evomerge.example")):
        end = evomerge_("serve", *where, "--port", "0", *options)
        assert (end.code, end.out) == (2, "")
        assert "make one with: evomerge token create NAME" in end.err
    assert list(tmp_path.iterdir()) == []


def test_server_without_its_libraries_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import sys\n"
        "sys.modules['fastapi'] = None\n"
        "from evomerge.cli import main\n"
        f"sys.argv = ['evomerge', 'serve', '--store', 'sqlite:///{tmp_path}/store.db']\n"
        "main()\n"
    )
    end = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    refused(Ended(end.returncode, end.stdout, end.stderr), "pip install 'evomerge[serve]'")


def test_secret_of_a_token_is_printed_once_and_kept_nowhere(tmp_path: Path) -> None:
    store = ("--store", url(tmp_path / "store.db"))
    end = evomerge_("token", "create", "ada", "--scopes", "read,unseal", "--days", "7", *store)
    assert end.code == 0, end.err
    assert re.fullmatch(r"evm_[A-Za-z0-9_-]{43}\n", end.out)
    secret = end.out.strip()
    assert secret not in end.err
    other = json.loads(evomerge_("token", "create", "bob", *store, "--json").out)
    with Store(url(tmp_path / "store.db")) as opened:
        found = Tokens(opened).find(secret)
        assert found is not None
        assert (found.name, found.scopes) == ("ada", {"read", "unseal"})
        found = Tokens(opened).find(other["secret"])
        assert found is not None
        assert (found.name, found.scopes) == ("bob", {"read", "run"})
    rows = json.loads(evomerge_("token", "ls", *store, "--json").out)
    assert [(row["name"], row["state"]) for row in rows] == [("ada", "usable"), ("bob", "usable")]
    assert rows[1] == other["token"]
    assert rows[0]["expires_at"] is not None
    listed = evomerge_("token", "ls", *store).out
    assert "read, unseal" in listed
    assert secret not in listed
    assert max(map(len, listed.splitlines())) <= 100


def test_token_that_is_revoked_opens_nothing_and_the_audit_log_says_so(tmp_path: Path) -> None:
    address = url(tmp_path / "store.db")
    secret = evomerge_("token", "create", "ada", "--store", address).out.strip()
    assert evomerge_("token", "revoke", "ada", "--store", address).code == 0
    with Store(address) as opened:
        assert Tokens(opened).find(secret) is None
        lines = [(a.who, a.address, a.action, a.subject) for a in Audit(opened).lines()]
    assert lines == [
        ("local", "command line", "revoke token", "ada"),
        ("local", "command line", "create token", "ada"),
    ]
    for words, message in (
        (("create", "ada"), "there is one of this name"),
        (("create", "bob", "--scopes", "raed"), "scope 'raed' is unknown: did you mean 'read'?"),
        (("create", "bob", "--scopes", ","), "no scope"),
        (("revoke", "adda"), "did you mean 'ada'?"),
    ):
        refused(evomerge_("token", *words, "--store", address), message)


def test_commands_in_files_of_the_document_have_their_options() -> None:
    text = (tiny.ROOT / "docs" / "service.md").read_text()
    lines = re.findall(r"^ExecStart=\S*/evomerge serve (.*)$", text, re.M)
    assert lines
    known = {o for p in typer.main.get_command(app).commands["serve"].params for o in p.opts}
    for line in lines:
        assert {word for word in shlex.split(line) if word.startswith("--")} <= known


@pytest.mark.slow
def test_search_at_a_server_is_followed_to_the_end_that_it_has_without_one(
    tmp_path: Path,
) -> None:
    job = tiny.write_job(tmp_path)
    with serving(tmp_path) as server:
        there = evomerge_("run", job, "--server", server.address)
        assert there.code == 0, there.err
        assert "baseline ja " in there.err
        assert "stopped: the budget of 12 candidates is spent" in there.err
        said = evomerge_("logs", "tiny", "--server", server.address)
        assert said.out.splitlines()[-1].endswith(" finished")
    assert evomerge_("run", job, "--store", url(tmp_path / "alone.db")).code == 0
    assert log(tmp_path / "store.db") == log(tmp_path / "alone.db")


@pytest.mark.slow
def test_search_goes_on_with_the_next_server_while_somebody_watches(tmp_path: Path) -> None:
    job = tiny.write_job(tmp_path, budget={"candidates": 200})
    with serving(tmp_path) as server, Store(url(tmp_path / "store.db")) as store:

        def generations() -> int:
            return sum(len(store.generations(row.id)) for row in store.searches())

        port = server.address.rpartition(":")[2]
        evomerge_("run", job, "--server", server.address, "--detach")
        watching = start("watch", "tiny", "--server", server.address)
        assert wait_for(server.process, lambda: generations() > 5)
        end = server.end()
        assert end.code == 0, end.err
        assert "searches go on with the next server" in end.err
        assert store.search("tiny").state == "stopped"
        many = generations()
        with serving(tmp_path, "--port", port):
            assert wait_for(watching, lambda: generations() > many + 3)
            asked = evomerge_("stop", "tiny", "--server", server.address)
            assert asked.code == 0, asked.err
            seen = ended(watching)
            assert seen.code == 0, seen.err
            assert "is waited for" in seen.err
            assert "stopped: asked to stop by local" in seen.err
            assert "* the winner" in seen.out
            (one,) = Queue(store).all()
            assert one.state == "finished"


@pytest.mark.slow
def test_team_with_tokens_is_served_by_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    request = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 "
        f"-subj /CN=localhost -addext subjectAltName=DNS:localhost -keyout {key} -out {cert}"
    )
    subprocess.run(
        request.split(),
        check=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    store = ("--store", url(tmp_path / "store.db"))
    secret = evomerge_("token", "create", "ada", *store).out.strip()
    job = tiny.write_job(tmp_path, budget={"candidates": 200})
    tls = ("--host", "0.0.0.0", "--tls-cert", cert, "--tls-key", key)
    with serving(tmp_path, *tls) as server:
        assert "without TLS" not in server.before
        there = ("--server", server.address.replace("127.0.0.1", "localhost"))
        end = evomerge_("ls", *there)
        assert end.code == 2
        assert "CERTIFICATE_VERIFY_FAILED" in end.err
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        assert "set EVOMERGE_TOKEN" in evomerge_("ls", *there).err
        monkeypatch.setenv("EVOMERGE_TOKEN", secret)
        assert evomerge_("run", job, *there, "--detach").code == 0
        with Store(store[1]) as opened:
            assert wait_for(server.process, lambda: bool(opened.searches()))
            assert wait_for(
                server.process, lambda: len(opened.generations(opened.search("tiny").id)) > 2
            )
            assert evomerge_("pause", "tiny", *there).code == 0
            assert evomerge_("watch", "tiny", *there).code == 130
            assert opened.search("tiny").state == "stopped"
            assert {line.who for line in Audit(opened).lines()} == {"local", "ada"}
        assert "EVOMERGE_TOKEN" in os.environ
        assert secret not in server.end().err
