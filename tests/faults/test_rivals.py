"""Two processes that both believe they conduct a search: the one that comes late writes nothing."""

from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest

from evomerge.store import lease
from tests.faults.driver import AtWrite
from tests.faults.searching import Stores, assert_refused, assert_whole, conduct, rows, sized
from tests.running import Log, log

pytestmark = pytest.mark.faults

REFUSALS = "SELECT text FROM event WHERE kind = 'stale'"


@dataclass(frozen=True)
class ShortLease:
    """The process holds searches by leases that run out within a second."""

    def __call__(self) -> None:
        lease.LEASE, lease._HEARTBEAT, lease._POLL = 1.0, 0.3, 0.05


@dataclass(frozen=True)
class OnHost:
    """The process takes itself for one on another host, which sees nothing of ours."""

    name: str

    def __call__(self) -> None:
        lease._boot = lambda: self.name


@pytest.mark.parametrize("number", range(4, 48, sized(4, 15)))
def test_coordinator_that_was_thought_dead_is_refused(
    job: Path, stores: Stores, undisturbed: Log, number: int
) -> None:
    store = stores.fresh()
    # Held up before it sends anything of a write: nothing of it runs, its lease does.
    paused = AtWrite(number, "begun", SIGSTOP)
    late = conduct(job, store, ShortLease(), OnHost("one"), paused)
    assert late.stops()
    successor = conduct(job, store, ShortLease(), OnHost("two")).end()
    assert successor.code == 0, successor.err
    ended = log(store)
    late.send(SIGCONT)
    assert_refused(end := late.end(), "'tiny' was taken over by another process")
    assert end.code == 1
    assert log(store) == ended == undisturbed
    assert_whole(store)
    assert rows(store, REFUSALS) == [
        (f"a late write of epoch 1, from process {late.pid}, was refused",)
    ]


def test_coordinators_that_take_over_from_each_other_lose_and_double_nothing(
    job: Path, stores: Stores, undisturbed: Log
) -> None:
    store, late = stores.fresh(), []
    for number in range(sized(8, 4)):
        faults = ShortLease(), OnHost(str(number)), AtWrite(9, "begun", SIGSTOP)
        process = conduct(job, store, *faults)
        assert process.stops(), process.end().err
        late.append(process)
    for process in late:  # all of them at once, and the last one still holds its lease
        process.send(SIGCONT)
    *stale, last = (process.end() for process in late)
    assert [end.code for end in stale] == [1] * len(stale)
    assert last.code == 0, last.err
    assert log(store) == undisturbed
    assert len(rows(store, REFUSALS)) == len(stale)
    assert_whole(store)


def test_second_coordinator_is_refused_while_the_first_lives(
    job: Path, stores: Stores, undisturbed: Log
) -> None:
    store = stores.fresh()
    first = conduct(job, store, AtWrite(9, "begun", SIGSTOP))
    assert first.stops()
    second = conduct(job, store).end()
    assert_refused(second, "'tiny' is being conducted by process", str(first.pid), "wait for it")
    first.send(SIGCONT)
    assert first.end().code == 0
    assert log(store) == undisturbed
    assert_whole(store)


def test_killed_coordinator_is_replaced_at_once(
    job: Path, stores: Stores, undisturbed: Log
) -> None:
    store = stores.fresh()
    assert conduct(job, store, AtWrite(20, "written")).end().code == -SIGKILL
    successor = conduct(job, store).end()
    assert successor.code == 0
    assert "was held by" not in successor.err
    assert log(store) == undisturbed
