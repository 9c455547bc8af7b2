"""kill -9 at random moments, of one search and of eight in one store."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGKILL

import pytest

from evomerge.seeds import generator
from tests.faults.searching import Stores, assert_whole, conduct, finish, rows, sized
from tests.running import Log, log

pytestmark = pytest.mark.faults

SEARCHES = 8


@pytest.fixture(scope="module")
def seconds(job: Path, stores: Stores) -> float:
    """How long a search takes here, from its first write on."""
    process = conduct(job, stores.fresh())
    assert process.writes()
    started = time.monotonic()
    assert process.end().code == 0
    return time.monotonic() - started


def conduct_and_kill(
    job: Path, store: str, name: str, delay: Callable[[], float], kills: int
) -> list[str]:
    """Conduct a search whose processes are killed some time after their first write; when it has
    ended, another one, until that many were killed. Gives the names of all of them."""
    names = [f"{name}-1"]
    while kills > 0:
        process = conduct(job, store, name=names[-1])
        if process.writes():
            time.sleep(delay())
            process.send(SIGKILL)
        end = process.end()
        if end.code == 0:
            names.append(f"{name}-{len(names) + 1}")
        else:
            assert end.code == -SIGKILL, end.err
            kills -= 1
    finish(job, store, name=names[-1])
    return names


def test_search_killed_at_random_moments_comes_to_the_same_end(
    job: Path, stores: Stores, undisturbed: Log, seconds: float
) -> None:
    store, random = stores.fresh(), generator(1, "moments")
    names = conduct_and_kill(
        job, store, "tiny", lambda: random.uniform(0, 0.6 * seconds), sized(200, 40)
    )
    for name in names:
        assert log(store, name) == undisturbed


def test_eight_searches_of_one_store_killed_at_random_moments_come_to_the_same_ends(
    job: Path, stores: Stores, undisturbed: Log, seconds: float
) -> None:
    store = stores.fresh()

    def lane(number: int) -> list[str]:
        random = generator(2, "moments", number)
        kills = -(-sized(500, 80) // SEARCHES)
        return conduct_and_kill(
            job, store, f"tiny-{number}", lambda: random.uniform(0, SEARCHES / 2 * seconds), kills
        )

    with ThreadPoolExecutor(SEARCHES) as lanes:
        names = [name for found in lanes.map(lane, range(SEARCHES)) for name in found]
    assert_whole(store)
    assert len(rows(store, "SELECT id FROM search")) == len(names)
    for name in names:
        assert log(store, name) == undisturbed
