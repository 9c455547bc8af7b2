"""What is new in a store, of both kinds of database."""

from collections.abc import Iterator

import numpy as np
import pytest

from evomerge.fitness.results import Failed
from evomerge.store import Coordinator, NewCandidate, Queue, Store
from evomerge.store.feed import Feed, Mark


@pytest.fixture
def store(fresh_url: str) -> Iterator[Store]:
    with Store(fresh_url, create=True) as opened:
        yield opened


def launched(store: Store, name: str, submission: int | None = None) -> Coordinator:
    """A search with three candidates, which mean no models."""
    budget = {"budget": {"candidates": 3}}
    held = Coordinator.launch(store, name, 0, budget, {}, [], [], submission=submission)
    new = [NewCandidate(slot, None, np.zeros(1), None, None) for slot in range(3)]
    held.open_generation(1, "proposed", None, new)
    return held


def fail(coordinator: Coordinator, candidate: int) -> None:
    coordinator.record(candidate, "train", 0, Failed("broken"))
    coordinator.flush()


def test_each_search_has_its_own_news(store: Store) -> None:
    feed = Feed(store)
    with launched(store, "one") as one, launched(store, "two") as two:
        assert feed.mark("one") == Mark(0, 0)
        fail(one, 1)
        fail(two, 4)
        two.log("note", "of two")
        before = feed.mark("one")
        fail(one, 2)
        one.log("note", "of one")
        fail(one, 3)
        news = feed.since("one", before, limit=10)
    assert [(line.kind, line.text) for line in news.lines] == [("note", "of one")]
    assert [made.candidate for made in news.evaluations] == [2, 3]
    assert (news.more, len(news)) == (False, 3)
    assert news.end(before) == feed.mark("one")
    assert len(feed.since("one", news.end(before), 10)) == 0
    first = feed.since("one", before, limit=1)
    assert ([made.candidate for made in first.evaluations], first.more) == ([2], True)


def test_a_search_is_felt_from_the_queue_to_its_end(store: Store) -> None:
    feed, queue = Feed(store), Queue(store)
    submitted = queue.submit("search", "one", {}, by="anna")
    (waiting,) = feed.pulses().values()
    assert (waiting.search, waiting.state, waiting.queued) == ("one", None, "queued")
    queue.begin(submitted.id)
    with launched(store, "one", submitted.id) as one:
        fail(one, 1)
        pulse = feed.pulses()["one"]
        assert (pulse.state, pulse.queued, pulse.generations) == ("running", "running", 1)
        assert pulse.done == 3
    assert feed.pulses()["one"].state == "stopped"


def test_totals_are_of_everything(store: Store) -> None:
    Queue(store).submit("search", "new", {}, by="anna")
    with launched(store, "one") as one:
        fail(one, 1)
        found = Feed(store).totals()
    assert found.searches == {"running": 1}
    assert found.submissions == {"queued": 1}
    assert found.candidates == {"failed": 1, "infeasible": 2}
    assert (found.evaluations, found.gpu_seconds) == (1, 0.0)
