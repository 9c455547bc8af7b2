"""Commands on a server: the same answers as from its store, and one line for whatever is wrong."""

import json
import math
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from evomerge.cli import fetching, remote
from evomerge.cli.remote import Remote, portable
from evomerge.export.export import REPORT
from evomerge.job import Job, packaged
from evomerge.service import exports
from evomerge.service.exports import File
from evomerge.service.folders import export_folder
from evomerge.store import Queue, Store, Tokens
from tests import tiny
from tests.running import Ended, ended, evomerge_, start, wait_for
from tests.service.serving import Served, listening, served

NOWHERE = "http://127.0.0.1:1"


class Line:
    """A connection to a server that can be cut: a fault is what it is for."""

    def __init__(self, address: str) -> None:
        self._port = int(address.rpartition(":")[2])
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.is_cut = False
        self.heals = False
        self.answers_to_lose = 0
        self.passed = 0  # bytes of answers
        self.cut_after: float = math.inf  # so many of them, for once
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
                self.passed += len(data) if is_answer else 0
                if self.passed > self.cut_after:
                    self.cut_after = math.inf
                    self.cut()
                    self.is_cut = not self.heals
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
    server: Served, address: str, job: Path, name: str
) -> None:
    evomerge_("run", job, f"name={name}", "--server", address, "--detach")
    rows = json.loads(evomerge_("ls", "--server", address, "--json").out)
    assert {row["name"]: row["state"] for row in rows}[name] == "queued"
    refused(evomerge_("show", name, "--server", address), f"search '{name}' waits in the queue, at")
    Queue(server.store).pause(name, "anna")
    refused(evomerge_("show", name, "--server", address), "was paused before it began")


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


def winner(store: Store) -> int:
    """Of the search 'tiny'."""
    verdict = store.search("tiny").verdict
    assert verdict is not None
    return int(verdict["winner"])


def files_of(folder: Path) -> dict[str, bytes]:
    """What is in a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@dataclass(frozen=True)
class Exporting:
    """A server whose search 'tiny' was exported, to `folder` there."""

    server: Served
    address: str
    folder: Path


@pytest.fixture
def exporting(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporting]:
    place = tmp_path_factory.mktemp("exporting")
    with served(place, exported.parent / "store.db") as found, listening(found.app) as address:
        candidate, queue = winner(found.store), Queue(found.store)
        folder = export_folder(found.settings.data, "tiny", candidate)
        shutil.copytree(exported, folder)
        document = {"candidate": candidate, "recipe_only": False}
        one = queue.submit("export", "tiny", document, by="ada")
        queue.begin(one.id)
        queue.end(one.id, "finished", ())
        yield Exporting(found, address, folder)


@contextmanager
def line_to(address: str) -> Iterator[Line]:
    found = Line(address)
    try:
        yield found
    finally:
        found.close()


@pytest.mark.slow
def test_winner_is_exported_by_the_server_and_fetched(searched: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with served(place, searched) as server, listening(server.app) as address:
        server.context.scheduler.start()
        try:
            there = ("--server", address)
            end = evomerge_("export", "tiny", "-o", tmp_path / "out", *there, "--json")
            assert end.code == 0, end.err
            again = evomerge_("export", "tiny", "-o", tmp_path / "again", *there)
            assert again.code == 0, again.err
        finally:
            server.context.scheduler.stop()
        folder = export_folder(server.settings.data, "tiny", winner(server.store))
        assert len(Queue(server.store).exports("tiny")) == 1
        assert [one.kind for one in server.store.ledger()].count("unseal") == 2  # of two tasks
        assert json.loads(end.out) == json.loads(server.store.report(winner(server.store)) or "")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again") == files_of(folder)
    states = re.findall(r"^export   tiny, candidate \d+: (\w+)$", end.err, re.M)
    assert states[-1] == "finished"
    assert again.out.endswith(f"{tmp_path / 'again'}\n")


@pytest.mark.slow
def test_what_was_exported_before_is_fetched_by_whoever_may_read(
    exporting: Exporting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (exporting.folder / "text encoder").mkdir()
    (exporting.folder / "text encoder" / "ü?#%2e&.bin").write_bytes(b"x")
    (exporting.folder / "empty").touch()
    _, secret = Tokens(exporting.server.store).create("reader", ["read"])
    monkeypatch.setenv("EVOMERGE_TOKEN", secret)
    monkeypatch.setenv("EVOMERGE_SERVER", exporting.address)
    out = tmp_path / "deep" / "out"
    end = evomerge_("export", "tiny", "-o", out, "--json")
    assert end.code == 0, end.err
    assert files_of(out) == files_of(exporting.folder)
    assert json.loads(end.out) == json.loads((exporting.folder / REPORT).read_text())
    assert list(out.parent.iterdir()) == [out]
    refused(evomerge_("export", "tiny", "-o", out), "is not empty: name another")
    shutil.rmtree(exporting.folder)  # then it has to be made again
    end = evomerge_("export", "tiny", "-o", tmp_path / "new")
    refused(end, f"server {exporting.address}: 'reader' lacks the scope 'run'")


@pytest.mark.slow
def test_what_opens_the_seal_needs_the_scope(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, out = tmp_path / "place", tmp_path / "out"
    place.mkdir()
    with served(place, searched) as server, listening(server.app) as address:
        _, secret = Tokens(server.store).create("ada", ["read", "run"])
        monkeypatch.setenv("EVOMERGE_TOKEN", secret)
        monkeypatch.setenv("EVOMERGE_SERVER", address)
        refused(evomerge_("export", "tiny", "-o", out), "'ada' lacks the scope 'unseal'")
        refused(
            evomerge_("export", "tiny", "-o", out, "--candidate", "99999"), "no candidate 99999"
        )
        refused(evomerge_("export", "none", "-o", out), "has no search 'none'")
        assert Queue(server.store).exports() == []
    assert list(tmp_path.iterdir()) == [place]


def test_recipe_of_a_server_is_that_of_its_store(
    server: Served, address: str, tmp_path: Path
) -> None:
    stored = ("--recipe-only", "--store", server.settings.store)
    there = ("--recipe-only", "--server", address)
    assert evomerge_("export", "tiny", "-o", tmp_path / "here.yaml", *stored).code == 0
    end = evomerge_("export", "tiny", "-o", tmp_path / "there.yaml", *there, "--json")
    assert json.loads(end.out) == {"recipe": str(tmp_path / "there.yaml")}
    end = evomerge_("export", "tiny", "-o", tmp_path / "there", *there)
    assert end.out == f"{tmp_path / 'there' / 'mergekit_config.yml'}\n"
    expected = (tmp_path / "here.yaml").read_bytes()
    assert (tmp_path / "there.yaml").read_bytes() == expected
    assert (tmp_path / "there" / "mergekit_config.yml").read_bytes() == expected
    end = evomerge_("export", "tiny", "-o", tmp_path / "there.yaml", *there)
    refused(end, "is there already: name another")
    assert Queue(server.store).exports() == []


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([File("../escaped", 1), File(REPORT, 1)], "it lists a file '../escaped'"),
        ([File("/tmp/escaped", 1), File(REPORT, 1)], "it lists a file '/tmp/escaped'"),
        ([File("a/../../escaped", 1), File(REPORT, 1)], "does not lie in the export's folder"),
        ([File("a\x00b", 1), File(REPORT, 1)], "it lists a file 'a?b'"),
        ([File("config.json", 1)], f"its export has no {REPORT}"),
    ],
)
def test_no_name_that_a_server_gives_leads_elsewhere(
    listed: list[File],
    message: str,
    exporting: Exporting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exports, "files", lambda data, found: listed)
    end = evomerge_("export", "tiny", "-o", tmp_path / "in" / "out", "--server", exporting.address)
    assert (end.code, end.out) == (1, "")
    assert message in end.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("difference", [-1, 1])
def test_file_of_another_size_than_it_was_said_to_have_is_not_taken(
    difference: int, exporting: Exporting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (exporting.folder / REPORT).stat().st_size
    monkeypatch.setattr(exports, "files", lambda data, found: [File(REPORT, size + difference)])
    end = evomerge_("export", "tiny", "-o", tmp_path / "out", "--server", exporting.address)
    assert (end.code, end.out) == (1, "")
    assert f"its file '{REPORT}' is not of the {size + difference:,} bytes that it lists" in end.err
    assert list(tmp_path.iterdir()) == []


def test_damaged_report_is_not_taken(exporting: Exporting, tmp_path: Path) -> None:
    (exporting.folder / REPORT).write_text("{")
    end = evomerge_("export", "tiny", "-o", tmp_path / "out", "--server", exporting.address)
    assert (end.code, end.out) == (1, "")
    assert f"its export's {REPORT} is damaged: nothing was written" in end.err
    assert list(tmp_path.iterdir()) == []


def with_large_file(exporting: Exporting) -> int:
    """Adds one to the export; gives how many bytes are in the midst of it."""
    (exporting.folder / "large").write_bytes(bytes(range(256)) * 20_000)
    return 2_500_000 + sum(path.stat().st_size for path in exporting.folder.glob("[a-k]*"))


@pytest.mark.slow
def test_download_that_breaks_off_is_gone_on_with(
    exporting: Exporting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PAUSE", 0.05)
    with line_to(exporting.address) as line:
        line.cut_after, line.heals = with_large_file(exporting), True
        end = evomerge_("export", "tiny", "-o", tmp_path / "out", "--server", line.address)
    assert end.code == 0, end.err
    assert end.err.count("is waited for") == 1
    size = sum(map(len, files_of(exporting.folder).values()))
    assert line.passed < 1.1 * size + 1_000_000  # what the cut line held was lost, no more
    assert files_of(tmp_path / "out") == files_of(exporting.folder)


@pytest.mark.slow
def test_server_that_goes_away_while_files_are_fetched_leaves_nothing(
    exporting: Exporting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PAUSE", 0.05)
    monkeypatch.setattr(remote, "_PATIENCE", 0.2)
    with line_to(exporting.address) as line:
        line.cut_after = with_large_file(exporting)
        end = evomerge_("export", "tiny", "-o", tmp_path / "out", "--server", line.address)
    assert (end.code, end.out) == (1, "")
    assert "nothing is lost there; try again later" in end.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("failed", "has failed: no room: see evomerge logs tiny --server"),
        ("cancelled", "was cancelled"),
    ],
)
def test_export_that_comes_to_nothing_is_told(
    state: Any,
    message: str,
    server: Served,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetching, "_TICK", 0.05)
    queue = Queue(server.store)
    one = queue.submit("export", "tiny", {"candidate": winner(server.store)}, by="ada")
    threading.Timer(0.3, lambda: queue.change(one.id, state=state, error="no room")).start()
    end = evomerge_("export", "tiny", "-o", tmp_path / "out", "--server", address)
    assert (end.code, end.out) == (1, "")
    assert f"export {one.id} of search 'tiny' {message}" in end.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_interrupted_while_it_waits_an_export_goes_on(
    server: Served, address: str, tmp_path: Path
) -> None:
    out, queue = tmp_path / "out", Queue(server.store)
    process = start("export", "tiny", "-o", out, "--server", address)
    assert wait_for(process, lambda: any(one.state == "queued" for one in queue.exports("tiny")))
    assert process.stderr is not None
    assert process.stderr.readline().endswith(": queued\n")
    process.send_signal(signal.SIGINT)
    end = ended(process)
    (one,) = (one for one in queue.exports("tiny") if one.state == "queued")
    queue.change(one.id, state="cancelled")
    assert (end.code, end.out) == (130, "")
    assert end.err == (
        f"export {one.id} of search 'tiny' is the server's; fetch it with: evomerge export tiny "
        f"-o {out} --server {address}\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_interrupted_while_files_are_fetched_nothing_is_left(
    exporting: Exporting, tmp_path: Path
) -> None:
    with line_to(exporting.address) as line:
        line.cut_after = with_large_file(exporting)
        process = start("export", "tiny", "-o", tmp_path / "out", "--server", line.address)
        assert wait_for(process, lambda: line.is_cut)
        assert [path.name for path in tmp_path.iterdir()] == [f".out.{process.pid}.partial"]
        process.send_signal(signal.SIGINT)
        end = ended(process)
    assert (end.code, end.out) == (130, "")
    assert end.err.endswith(f"evomerge export tiny -o {tmp_path / 'out'} --server {line.address}\n")
    assert list(tmp_path.iterdir()) == []


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
        ("export tiny --csv a --server http://a", "--csv: a server does not write it"),
        ("export tiny --optuna a --server http://a", "name its store with --store"),
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
