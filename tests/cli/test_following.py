"""Commands for a search that another process conducts, on its store and on its server."""

import re
import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from evomerge.cli import places
from evomerge.cli.places import Place, Stored
from evomerge.cli.remote import Remote
from evomerge.job import Job
from evomerge.service.folders import log_file
from evomerge.store import Queue
from tests.running import ended, evomerge_, start
from tests.service.serving import Served


@pytest.fixture(params=["store", "server"])
def place(request: pytest.FixtureRequest, server: Served, address: str) -> tuple[str, str]:
    """The option that names where the searches are, and its value."""
    where = {"store": server.settings.store, "server": address}
    return f"--{request.param}", where[request.param]


def submitted(server: Served, job: Path, name: str) -> int:
    """A search in the queue; gives its submission."""
    document = Job.from_file(job, [f"name={name}"]).document()
    return Queue(server.store).submit("search", name, document, by="ada").id


def test_finished_search_is_watched_to_its_end_at_once(
    place: tuple[str, str], server: Served
) -> None:
    end = evomerge_("watch", "tiny", *place)
    assert end.code == 0, end.err
    assert end.out == evomerge_("show", "tiny", "--store", server.settings.store).out
    lines = end.err.splitlines()
    assert lines[0] == "search   tiny: finished"
    assert sum(line.startswith("baseline ") for line in lines) == 6
    assert re.findall(r"^generation (\d+)", end.err, re.M) == ["1", "2"]
    assert re.findall(r"candidates (\d+)", end.err) == ["4", "8"]
    assert lines[-1] == "stopped: the budget of 8 candidates is spent"


def test_watching_ends_with_the_exit_code_of_the_search(
    place: tuple[str, str], server: Served, job: Path, name: str
) -> None:
    queue, number = Queue(server.store), submitted(server, job, name)
    queue.pause(name, "ada")
    end = evomerge_("watch", name, *place)
    assert (end.code, end.out) == (130, "")
    assert end.err.endswith(f"go on with: evomerge resume {name} {' '.join(place)}\n")
    queue.change(number, state="failed", error="no model 'x': make it")
    end = evomerge_("watch", name, *place)
    assert (end.code, end.out) == (1, "")
    assert f"search '{name}' has failed: no model 'x': make it: see evomerge logs" in end.err
    submitted(server, job, f"{name}b")
    queue.cancel(f"{name}b")
    end = evomerge_("watch", f"{name}b", *place)
    assert (end.code, end.out) == (1, "")
    assert "was taken out of the queue before it began" in end.err


def test_whoever_watches_is_told_of_every_change(
    place: tuple[str, str], server: Served, job: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_TICK", 0.05)
    number, queue = submitted(server, job, name), Queue(server.store)

    def check(found: Place) -> None:
        with closing(found.pulses(name)) as pulses:
            assert next(pulses).queued == "queued"
            queue.change(number, state="running")
            assert next(pulses).queued == "running"
            queue.change(number, state="finished")
            assert next(pulses).queued == "finished"

    if place[0] == "--store":
        check(Stored(server.store))
    else:
        with Remote(place[1], print) as found:
            check(found)


@pytest.mark.slow
def test_end_of_watching_is_not_the_end_of_the_search(
    server: Served, address: str, job: Path, name: str
) -> None:
    number = submitted(server, job, name)
    process = start("watch", name, "--server", address)
    assert process.stderr is not None
    assert process.stderr.readline().startswith(f"search   {name}: queued, number ")
    process.send_signal(signal.SIGINT)
    end = ended(process)
    assert (end.code, end.out) == (130, "")
    look = f"evomerge watch {name} --server {address}"
    assert end.err.strip() == f"search '{name}' goes on; look again with: {look}"
    assert Queue(server.store).get(number).state == "queued"


def test_search_in_the_queue_is_paused_wherever_it_is_asked_for(
    place: tuple[str, str], server: Served, job: Path, name: str
) -> None:
    number = submitted(server, job, name)
    end = evomerge_("pause", name, *place)
    assert (end.code, end.out) == (0, "")
    assert f"search '{name}' is paused; go on with: evomerge resume {name}" in end.err
    assert Queue(server.store).get(number).state == "paused"


def test_what_cannot_be_asked_for_is_refused_in_one_line(
    place: tuple[str, str], server: Served, job: Path, name: str
) -> None:
    submitted(server, job, name)
    for command, message in {
        "pause tiny": "'tiny' is finished",
        "stop tiny": "'tiny' is finished",
        f"stop {name}": "has not begun: cancel it instead",
        "pause nothing": "has no search 'nothing'",
        "stop nothing": "has no search 'nothing'",
        "logs nothing": "has no search 'nothing'",
        "watch nothing": "has no search 'nothing'",
    }.items():
        end = evomerge_(*command.split(), *place)
        assert (end.code, end.out) == (2, "")
        assert re.fullmatch(r"evomerge: .*\n", end.err)
        assert message in end.err


def test_log_of_a_store_has_every_evaluation_in_its_order(server: Served) -> None:
    store = ("--store", server.settings.store)
    end = evomerge_("logs", "tiny", *store)
    assert (end.code, end.err) == (0, "")
    lines = end.out.splitlines()
    assert lines == sorted(lines)
    made = [line for line in lines if re.search(r"candidate \d+: train, stage 0: scored", line)]
    assert len(made) == 8
    assert "(ja): full, stage 0: scored in " in end.out
    assert evomerge_("logs", "tiny", "-f", *store).out == end.out


def test_log_of_a_server_is_what_its_processes_say(server: Served, address: str) -> None:
    file = log_file(server.settings.data, "tiny")
    file.parent.mkdir(parents=True)
    long = "".join(f"{number}: {200 * 'x'}\n" for number in range(2000))  # in several parts
    file.write_text(f"{long}\x1b[2Jhostile\nhalf a li", encoding="utf-8")
    end = evomerge_("logs", "tiny", "--follow", "--server", address)
    assert (end.code, end.err) == (0, "")
    assert end.out == f"{long}?[2Jhostile\n"


def test_search_that_is_killed_can_be_watched_and_steered(searched: Path, tmp_path: Path) -> None:
    """Nobody conducts it, and it is no server's."""
    path = shutil.copyfile(searched, tmp_path / "store.db")
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE search SET state = 'open', verdict = NULL, stop_reason = NULL")
    where = ("--store", f"sqlite:///{path}")
    end = evomerge_("watch", "tiny", *where)
    assert (end.code, end.out) == (130, "")
    assert "search 'tiny' is paused; go on with: evomerge resume tiny" in end.err
    end = evomerge_("stop", "tiny", *where)
    assert end.code == 0, end.err
    assert end.err.endswith("its winner is chosen once it is resumed\n")
