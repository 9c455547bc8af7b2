"""Commands on a server: the same answers as from its store, and one line for whatever is wrong."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from evomerge.cli import remote
from evomerge.cli.remote import Remote, portable
from evomerge.job import Job, packaged
from evomerge.store import Queue, Tokens
from tests import tiny
from tests.running import Ended, evomerge_
from tests.service.serving import Served, listening, served

NOWHERE = "http://127.0.0.1:1"


class Line:
    """A connection to a server that can be cut: a fault is what it is for."""

    def __init__(self, address: str) -> None:
        self._port = int(address.rpartition(":")[2])
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.is_cut = False
        self.answers_to_lose = 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """From now on nothing goes through."""
        self.is_cut = True
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                if self.is_cut:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._port))
                self._open += [near, far]
                for pair in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        with source, sink, suppress(OSError):
            while data := source.recv(65536):
                if is_answer and self.answers_to_lose:
                    self.answers_to_lose -= 1
                    sink.shutdown(socket.SHUT_RDWR)
                    return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def line(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """To that server."""
    monkeypatch.setattr(remote, "_PAUSE", 0.05)
    found = Line(address)
    yield found
    found.close()


def refused(end: Ended, message: str, code: int = 2) -> None:
    """Nothing but one line, which says what is wrong."""
    assert (end.code, end.out) == (code, "")
    assert re.fullmatch(r"evomerge: .*\n", end.err), end.err
    assert message in end.err


def test_server_answers_as_its_store_does(server: Served, address: str) -> None:
    for command in ("show tiny", "ls", "top tiny", "top tiny -n 3"):
        words = command.split()
        there = evomerge_(*words, "--json", "--server", address)
        here = evomerge_(*words, "--json", "--store", server.settings.store)
        assert there.code == 0, there.err
        assert json.loads(there.out) == json.loads(here.out)


def test_detached_search_is_in_the_queue_as_the_job_file_says(
    server: Served, address: str, job: Path, name: str
) -> None:
    given = (f"name={name}", "budget.candidates=7")
    end = evomerge_("run", job, *given, "--server", address, "--detach")
    assert (end.code, end.out) == (0, "")
    assert f"evomerge watch {name} --server {address}" in end.err
    one = Queue(server.store).of(name)
    assert one is not None
    assert (one.state, one.by) == ("queued", "local")
    wanted = Job.from_file(job, given).document()
    assert {**one.document, "store": None} == {**wanted, "store": None}
    there = ("--server", address, "--detach", "--json")
    assert json.loads(evomerge_("run", job, f"name={name}b", *there).out)["search"] == f"{name}b"


def test_search_that_waits_is_listed_and_has_nothing_to_show(
    address: str, job: Path, name: str
) -> None:
    evomerge_("run", job, f"name={name}", "--server", address, "--detach")
    rows = json.loads(evomerge_("ls", "--server", address, "--json").out)
    assert {row["name"]: row["state"] for row in rows}[name] == "queued"
    refused(evomerge_("show", name, "--server", address), "is queued and has not begun")


@pytest.mark.slow
def test_paused_search_goes_on_at_the_server(address: str, job: Path, name: str) -> None:
    there = ("--server", address)
    evomerge_("run", job, f"name={name}", *there, "--detach")
    evomerge_("pause", name, *there)
    end = evomerge_("resume", name, *there, "--detach", "--json")
    assert end.code == 0, end.err
    assert json.loads(end.out)["state"] == "queued"
    again = evomerge_("resume", name, *there, "--detach")
    refused(again, f"search '{name}' is queued: it needs no resuming")
    late = evomerge_("resume", name, "budget.candidates=9", *there, "--detach")
    refused(late, "has not begun: cancel it and submit it with other keys instead")


def test_answer_that_is_lost_is_asked_for_again_and_the_search_is_submitted_once(
    server: Served, line: Line, job: Path, name: str
) -> None:
    line.answers_to_lose = 2
    end = evomerge_("run", job, f"name={name}", "--server", line.address, "--detach")
    assert end.code == 0, end.err
    assert end.err.count("is waited for") == 1
    assert [one.search for one in Queue(server.store).all()].count(name) == 1


@pytest.mark.parametrize(
    ("address", "warnings"),
    [
        ("http://merges.example:8765", 1),
        ("http://10.0.0.2", 1),
        ("https://merges.example", 0),
        ("http://localhost:8765", 0),
        ("http://127.0.0.1:8765", 0),
        ("http://[::1]:8765", 0),
    ],
)
def test_a_token_that_could_be_read_on_the_way_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, address: str, warnings: int
) -> None:
    told: list[str] = []
    with Remote(address, told.append):
        assert told == []
    monkeypatch.setenv("EVOMERGE_TOKEN", "evm_" + "x" * 43)
    with Remote(address, told.append):
        assert len(told) == warnings
    assert not any("evm_x" in line for line in told)


def test_server_that_goes_away_is_waited_for_by_whoever_follows(
    line: Line, job: Path, name: str
) -> None:
    told: list[str] = []
    evomerge_("run", job, f"name={name}", "--server", line.address, "--detach")
    with Remote(line.address, told.append) as found, closing(found.pulses(name)) as pulses:
        assert next(pulses).queued == "queued"
        line.cut()
        threading.Timer(0.3, lambda: setattr(line, "is_cut", False)).start()
        assert next(pulses).queued == "queued"
        assert found.standing(name).state == "queued"
    assert len(told) == 1
    assert "is waited for" in told[0]


def test_server_that_stays_away_is_given_up(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PATIENCE", 0.2)
    with Remote(line.address, lambda _: None) as found:
        assert found.standing("tiny").state == "finished"
        line.cut()
        with pytest.raises(remote.EvomergeError, match="nothing is lost there"):
            found.standing("tiny")


def test_where_nobody_listens_nothing_is_waited_for(job: Path) -> None:
    for command in (("ls",), ("watch", "tiny"), ("run", job, "name=x"), ("stop", "tiny")):
        refused(evomerge_(*command, "--server", NOWHERE), "start one there with: evomerge serve")


def test_token_opens_what_its_scopes_say(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path) as server, listening(server.app) as address:
        _, secret = Tokens(server.store).create("reader", ["read"])
        check_token(secret, job, monkeypatch, "--server", address)


def check_token(secret: str, job: Path, monkeypatch: pytest.MonkeyPatch, *there: str) -> None:
    """Of the scope 'read' alone."""
    refused(evomerge_("ls", *there), "set EVOMERGE_TOKEN")
    monkeypatch.setenv("EVOMERGE_TOKEN", f"{secret}\n")
    assert evomerge_("ls", *there).code == 0
    refused(evomerge_("run", job, "name=x", *there), "'reader' lacks the scope 'run'")
    monkeypatch.setenv("EVOMERGE_TOKEN", "evm_" + 43 * "x")
    end = evomerge_("ls", *there)
    refused(end, "the token is unknown, revoked or expired")
    assert "xxx" not in end.err
    monkeypatch.setenv("EVOMERGE_TOKEN", "två ord")
    end = evomerge_("ls", *there)
    refused(end, "EVOMERGE_TOKEN: it is no token")
    assert "ord" not in end.err


def test_refused_path_is_said_to_be_the_servers(
    address: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tiny.write_job(tmp_path_factory.mktemp("outside"), name="outside")
    end = evomerge_("run", outside, "--server", address)
    refused(end, "leads out of the folders that this server reads")
    assert "paths are looked up where the server runs" in end.err


def test_tasks_that_ship_with_evomerge_travel_by_name(tmp_path: Path) -> None:
    tasks = [{"task": name} for name in ("ja_list_ops", "ja_list_ops/task.yaml", "task")]
    tasks[1]["task"] = str(packaged("fitness") / "ja_transcription")
    document = portable(Job.from_file(tiny.write_job(tmp_path, tasks=tasks)))
    named = [entry["task"] for entry in document["tasks"]]
    assert named == ["ja_list_ops", "ja_transcription", str(tmp_path / "task" / "task.yaml")]
    again = Job.located(document, "sent", tmp_path)
    assert [entry.task for entry in again.tasks] == [
        str((packaged("fitness") / name / "task.yaml").resolve())
        for name in ("ja_list_ops", "ja_transcription")
    ] + [str(tmp_path / "task" / "task.yaml")]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("ls --server localhost:8765", "give its address, such as http://127.0.0.1:8765"),
        ("ls --server ftp://host", "give its address, such as http://127.0.0.1:8765"),
        ("ls --server http://ada:secret@host", "set EVOMERGE_TOKEN instead"),
        ("ls --server http://a --store b.db", "--server and --store: a search is in one place"),
        ("run JOB --server http://a --storage-path b", "--server and --storage-path"),
        ("run JOB --detach", "--detach: nobody would conduct it here"),
        ("resume tiny --detach", "--detach: nobody would conduct it here"),
    ],
)
def test_place_that_makes_no_sense_is_refused(
    command: str, message: str, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    end = evomerge_(*command.replace("JOB", str(job)).split())
    refused(end, message)
    assert "secret" not in end.err
    assert list(tmp_path.iterdir()) == []


def test_option_goes_before_the_environment_and_a_server_before_a_store(
    server: Served, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_SERVER", NOWHERE)
    monkeypatch.setenv("EVOMERGE_STORE", "sqlite:///nowhere.db")
    assert NOWHERE in evomerge_("ls").err
    assert evomerge_("ls", "--server", address).code == 0
    assert evomerge_("ls", "--store", server.settings.store).code == 0
    monkeypatch.setenv("EVOMERGE_SERVER", "")
    assert "nowhere.db" in evomerge_("ls").err
    monkeypatch.setenv("EVOMERGE_SERVER", f"{address}/")
    refused(evomerge_("watch", "nothing"), f"server {address}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (404, {}, "answers '404 Not Found': no evomerge serves there"),
        (502, {}, "answers '502 Bad Gateway': no evomerge serves there"),
        (301, {"Location": "https://elsewhere/"}, "redirects to https://elsewhere/"),
    ],
)
def test_what_is_no_server_of_ours_is_named_and_not_followed(
    status: int, headers: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_TOKEN", "evm_" + 43 * "x")

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "2"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"hi")

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        end = evomerge_("ls", "--server", f"http://127.0.0.1:{other.server_port}")
        other.shutdown()
    refused(end, message)
