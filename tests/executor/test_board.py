"""Several searches on one cluster, and nodes that come and go: no work is lost."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from evomerge.executor import Landed, Request, board
from evomerge.executor.cluster import Cluster
from evomerge.executor.ray import RayExecutor
from evomerge.job import Executor as Section
from tests.clusters import (
    Growing,
    Misbehaving,
    Nodes,
    answer,
    eventually,
    is_running,
    misbehaving,
    notes,
    requests,
    section,
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("nodes")]


def auto(**keys: object) -> Section:
    """For a search that takes all cores there are."""
    return section(workers="auto", cpus=1, **keys)


def spec_of(tmp_path: Path, name: str, seconds: float = 0.5) -> Misbehaving:
    """Of workers that behave; they write down what they do in a folder of this name."""
    folder = tmp_path / name
    folder.mkdir()
    return misbehaving(folder, seconds)


def at_work(spec: Misbehaving) -> int:
    """How many workers a search has that are open."""
    return sum(map(is_running, notes(Path(spec.folder), "opened")))


@contextmanager
def searching(executor: Section, spec: Misbehaving) -> Iterator[list[Landed]]:
    """A search with something to do for as long as it is wanted. What has landed of it; in the end
    each candidate was evaluated once, and rightly."""
    landed: list[Landed] = []
    left = iter(requests(10_000))
    wanted = True

    def take() -> Request | None:
        return next(left) if wanted else None

    def search() -> None:
        with closing(RayExecutor(executor, spec)) as pool:
            landed.extend(pool.evaluate(take))

    with ThreadPoolExecutor(1) as thread:
        end = thread.submit(search)
        try:
            yield landed
        finally:
            wanted = False
            end.result()
    for done in landed:
        assert str(done.evaluation) == str(answer(done.request))
        assert len(notes(Path(spec.folder), str(done.request.candidate))) == 1


def soon(happens: Callable[[], bool]) -> None:
    """It does, within a minute."""
    assert eventually(happens)


def test_a_higher_priority_has_room_first_and_what_it_leaves_is_taken_up_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    low, high = spec_of(tmp_path, "low"), spec_of(tmp_path, "high")
    with searching(auto(), low):
        soon(lambda: at_work(low) == 4)
        with searching(auto(priority=1), high):
            soon(lambda: (at_work(low), at_work(high)) == (0, 4))
            soon(lambda: "leave no room: this one waits" in caplog.text)
        soon(lambda: at_work(low) == 4)
    assert caplog.text.count("this one waits") == 1


def test_only_what_is_asked_for_is_given_up(tmp_path: Path) -> None:
    low, high = spec_of(tmp_path, "low"), spec_of(tmp_path, "high")
    with searching(auto(), low):
        soon(lambda: at_work(low) == 4)
        with searching(section(workers=1, cpus=1, priority=1), high):
            soon(lambda: (at_work(low), at_work(high)) == (3, 1))
    assert len(notes(Path(low.folder), "opened")) in (4, 5)  # the fifth as the other one ended


def test_a_lower_priority_that_comes_later_waits_for_longer_than_it_would_for_nodes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    low, high = spec_of(tmp_path, "low"), spec_of(tmp_path, "high")
    with ExitStack() as both:
        with searching(auto(priority=1), high) as first:
            soon(lambda: at_work(high) == 4)
            landed = both.enter_context(searching(auto(start_limit=15), low))
            soon(lambda: "this one waits" in caplog.text)
            seen = len(first)
            soon(lambda: len(first) > seen + 130)
        soon(lambda: len(landed) > 0)
    assert "no room for" not in caplog.text


def test_equal_searches_share_equally(tmp_path: Path) -> None:
    first, second = spec_of(tmp_path, "first"), spec_of(tmp_path, "second")
    with searching(auto(), first):
        soon(lambda: at_work(first) == 4)
        with searching(auto(), second):
            soon(lambda: (at_work(first), at_work(second)) == (2, 2))
        soon(lambda: at_work(first) == 4)
    assert len(notes(Path(second.folder), "opened")) == 2
    assert len(notes(Path(first.folder), "opened")) == 6


DRIVER = """
import sys
from pathlib import Path
from evomerge.executor.ray import RayExecutor
from tests.clusters import giving, misbehaving, requests, section

address, folder, workers = sys.argv[1:]
asked = section(address=address, workers=int(workers), cpus=1, priority=1)
pool = RayExecutor(asked, misbehaving(Path(folder), 0.5))
list(pool.evaluate(giving(requests(10_000))))
"""


@contextmanager
def elsewhere(address: str, spec: Misbehaving, workers: int) -> Iterator[None]:
    """A search of priority 1 in a process of its own, which is killed in the end."""
    command = [sys.executable, "-c", DRIVER, address, spec.folder, str(workers)]
    driver = subprocess.Popen(command)
    try:
        yield
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()


def test_what_a_killed_search_had_is_given_to_others(nodes: Nodes, tmp_path: Path) -> None:
    low, high = spec_of(tmp_path, "low"), spec_of(tmp_path, "high")
    with searching(auto(), low):
        soon(lambda: at_work(low) == 4)
        with elsewhere(nodes.address, high, 4):
            soon(lambda: (at_work(low), at_work(high)) == (0, 4))
        soon(lambda: at_work(low) == 4)


def test_workers_on_a_node_that_is_drained_end_what_they_are_at_and_go_elsewhere(
    nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_of(tmp_path, "only", seconds=3)
    opened = partial(notes, Path(spec.folder), "opened")
    four = section(workers=4, cpus=2)
    with nodes.another(here=1), nodes.another(there=1), searching(four, spec) as landed:
        soon(lambda: at_work(spec) == 4 and len(landed) >= 4)
        nodes.drain("there")
        soon(lambda: not nodes.has("there"))  # it ends as soon as nobody is at work there
        # Its worker's process may outlive it by a moment.
        soon(lambda: len(opened()) == 5 and at_work(spec) == 4)
    assert len(opened()) == 5
    assert "workers leave, 1 of 4" in caplog.text
    assert "is replaced" not in caplog.text


def test_a_node_that_comes_later_is_used(nodes: Nodes, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "only")
    with searching(auto(), spec):
        soon(lambda: at_work(spec) == 4)
        with nodes.another(later=1):
            soon(lambda: at_work(spec) == 8)
            nodes.drain("later")
            soon(lambda: not nodes.has("later"))


def test_what_strangers_hold_is_nobodys_share(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "_STRANGE", 6.0)
    first, second = spec_of(tmp_path, "first"), spec_of(tmp_path, "second")
    with ExitStack() as searches:
        with nodes.held(cpus=2):
            searches.enter_context(searching(auto(), first))
            soon(lambda: at_work(first) == 2)
            searches.enter_context(searching(auto(), second))
            soon(lambda: (at_work(first), at_work(second)) == (1, 1))
        soon(lambda: (at_work(first), at_work(second)) == (2, 2))


def test_a_cluster_without_nodes_grows_by_what_is_asked_for(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "only")
    with closing(Growing(tmp_path)) as head, elsewhere(head.address, spec, 3):
        soon(lambda: at_work(spec) == 3)


def test_a_search_that_cannot_see_the_others_keeps_what_it_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_of(tmp_path, "only")
    cluster = Cluster(None)
    with searching(auto(), spec) as landed, caplog.at_level(logging.WARNING):
        soon(lambda: at_work(spec) == 4)
        cluster.post("a search of another kind", b"{}")
        soon(lambda: "other searches cannot be seen" in caplog.text)
        seen = len(landed)
        soon(lambda: len(landed) > seen + 8)
        assert at_work(spec) == 4
    cluster.take_down("a search of another kind")
    assert caplog.text.count("cannot be seen") == 1
