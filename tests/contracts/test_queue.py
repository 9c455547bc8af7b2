"""What a queue of submissions, and wishes to searches, must do on any store."""

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from evomerge.errors import KeyReused, NameTaken, StoreError, Withdrawn
from evomerge.store import Coordinator, NewModel, NewSplit, Queue, Store, Submission, Wishes
from evomerge.store.queue import Head

JOB = {"name": "one", "guard": {"validation_looks": 5}}


@pytest.fixture
def store(fresh_url: str) -> Iterator[Store]:
    """A new, empty store."""
    with Store(fresh_url, create=True) as opened:
        yield opened


@pytest.fixture
def queue(store: Store) -> Queue:
    """Its queue."""
    return Queue(store)


def launched(store: Store, name: str, submission: int | None = None) -> Coordinator:
    """A search that is conducted."""
    models = [NewModel("ja", "/models/ja", "a" * 64, {"config.json": "b" * 64}, True)]
    splits = [NewSplit("task", "train", "c" * 64, "f" * 64, ["d" * 64, "e" * 64])]
    return Coordinator.launch(
        store, name, 7, JOB, {"torch": "2"}, models, splits, submission=submission
    )


def submitted(queue: Queue, name: str, **more: int) -> Submission:
    """A search that waits."""
    return queue.submit("search", name, JOB, by="ada", **more)


def begun(queue: Queue, name: str) -> Submission:
    """A search that a scheduler has begun."""
    found = queue.begin(submitted(queue, name).id)
    assert found is not None
    return found


def test_submission_is_kept_as_it_came(queue: Queue, store: Store) -> None:
    job = {"ü": [1.5, None, {"k": "v"}]}
    found = queue.submit("search", "one", job, by="ada", priority=3, webhook="https://x/y")
    assert (found.kind, found.search, found.document, found.overrides) == ("search", "one", job, ())
    assert (found.state, found.by, found.attempts) == ("queued", "ada", 0)
    assert (found.priority, found.webhook) == (3, "https://x/y")
    assert (found.error, found.result, found.started_at, found.ended_at) == (None,) * 4
    assert Queue(store).get(found.id) == found == queue.of("one")
    assert queue.all() == queue.all("queued") == [found]
    assert queue.all("running") == []
    with pytest.raises(StoreError, match="has no submission 99"):
        queue.get(99)


def test_what_waits_goes_by_priority_then_in_the_order_it_came_in(queue: Queue) -> None:
    names = {"a": 0, "b": 5, "c": 0, "d": 5}
    ids = {name: submitted(queue, name, priority=p).id for name, p in names.items()}
    assert [one.search for one in queue.waiting()] == ["b", "d", "a", "c"]
    queue.change(ids["c"], priority=9)
    assert [one.search for one in queue.waiting()] == ["c", "b", "d", "a"]


def test_the_place_of_what_waits_is_where_it_stands_there(queue: Queue) -> None:
    ids = [
        submitted(queue, name, priority=p).id
        for name, p in zip("abcde", (0, 5, 0, 5, 0), strict=True)
    ]
    queue.begin(ids[4])
    queue.change(ids[4], state="queued")  # begun before
    queue.change(ids[0], state="paused")
    assert queue.places() == {one.id: place for place, one in enumerate(queue.waiting(), 1)}
    assert list(queue.places()) == [ids[1], ids[3], ids[4], ids[2]]


def test_a_part_of_the_queue_is_read_by_number_kind_and_search(queue: Queue, store: Store) -> None:
    launched(store, "one")
    launched(store, "two")
    exports = [queue.submit(kind, "one", {"candidate": 1}, by="ada") for kind in ("export", "push")]
    other = queue.submit("export", "two", {"candidate": 2}, by="ada")
    search = submitted(queue, "three")
    assert queue.exports("one") == exports[::-1]
    assert queue.exports() == [other, *exports[::-1]]
    assert queue.some([search.id, other.id, 99]) == {search.id: search, other.id: other}
    assert queue.some([]) == {}
    (head,) = queue.heads().items()
    assert head == ("three", Head(search.id, "queued", search.submitted_at))


@pytest.mark.slow
def test_what_was_begun_before_goes_first_among_equals(queue: Queue) -> None:
    first, second = submitted(queue, "a"), submitted(queue, "b")
    queue.begin(second.id)
    queue.change(second.id, state="queued")
    assert [one.id for one in queue.waiting()] == [second.id, first.id]


def test_same_key_with_the_same_content_is_the_same_submission(queue: Queue) -> None:
    first = queue.submit("search", "one", JOB, by="ada", key="k")
    assert queue.submit("search", "one", JOB, by="ada", key="k") == first
    assert queue.all() == [first]


def test_same_key_with_other_content_is_refused(queue: Queue) -> None:
    queue.submit("search", "one", JOB, by="ada", key="k")
    for name, job, priority in (("two", JOB, 0), ("one", {}, 0), ("one", JOB, 1)):
        with pytest.raises(KeyReused, match="idempotency key 'k'"):
            queue.submit("search", name, job, by="ada", key="k", priority=priority)


def test_name_of_a_search_is_taken_as_long_as_it_is_in_use(queue: Queue, store: Store) -> None:
    submitted(queue, "one")
    with pytest.raises(NameTaken, match="'one' is taken"):
        submitted(queue, "one")
    with pytest.raises(NameTaken, match="by a search in its queue"):
        store.refuse_taken("one")
    queue.cancel("one")
    store.refuse_taken("one")
    again = submitted(queue, "one")
    queue.change(again.id, state="failed", error="its models do not fit")
    submitted(queue, "one")  # it never began
    with launched(store, "two"), pytest.raises(NameTaken, match="'two' is taken"):
        submitted(queue, "two")


def test_of_many_who_submit_one_name_at_once_one_succeeds(queue: Queue) -> None:
    found: list[Submission] = []
    start = threading.Barrier(4)

    def submit() -> None:
        start.wait()
        with contextlib.suppress(NameTaken):
            found.append(submitted(queue, "one"))

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert queue.all() == found
    assert len(found) == 1


def test_one_of_many_schedulers_begins_a_submission(queue: Queue) -> None:
    one = submitted(queue, "one")
    found: list[Submission | None] = []
    threads = [threading.Thread(target=lambda: found.append(queue.begin(one.id))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = [begun for begun in found if begun is not None]
    assert [begun.attempts for begun in taken] == [1]
    assert taken == queue.all("running")


def test_states_follow_on_one_another(queue: Queue) -> None:
    one = begun(queue, "one")
    ended = queue.change(one.id, state="finished", result={"winner": 3})
    assert (ended.state, ended.result) == ("finished", {"winner": 3})
    assert ended.ended_at is not None
    with pytest.raises(StoreError, match="is finished: it cannot become running"):
        queue.change(one.id, state="running")
    assert queue.begin(one.id) is None


def test_export_is_of_a_search_that_is_there(queue: Queue, store: Store) -> None:
    with pytest.raises(StoreError, match="no search 'one'"):
        queue.submit("export", "one", {"candidate": 3}, by="ada")
    with launched(store, "one"):
        first = queue.submit("export", "one", {"candidate": 3}, by="ada")
        second = queue.submit("export", "one", {"candidate": 4}, by="ada")
    assert [one.id for one in queue.waiting()] == [first.id, second.id]
    assert queue.of("one") is None


def test_search_that_waits_is_paused_resumed_and_cancelled(queue: Queue) -> None:
    submitted(queue, "one")
    queue.pause("one", "bob")
    assert [one.state for one in queue.all()] == ["paused"]
    queue.resume("one", "bob", ["budget.candidates=9"])
    assert [one.overrides for one in queue.waiting()] == [("budget.candidates=9",)]
    with pytest.raises(StoreError, match="queued: it needs no resuming"):
        queue.resume("one", "bob")
    with pytest.raises(StoreError, match="has not begun: cancel it"):
        queue.stop("one", "bob")
    queue.cancel("one")
    assert queue.all("cancelled")
    assert not queue.waiting()
    with pytest.raises(StoreError, match="is cancelled: it cannot become queued"):
        queue.resume("one", "bob")
    with pytest.raises(StoreError, match="'two' is not in its queue"):
        queue.cancel("two")


def test_running_search_hears_of_a_pause(queue: Queue, store: Store) -> None:
    one = begun(queue, "one")
    with launched(store, "one", one.id) as coordinator:
        with pytest.raises(StoreError, match="has begun: stop it, or pause it"):
            queue.cancel("one")
        assert coordinator.wished() is None
        queue.pause("one", "bob")
        wish = Wishes(store).latest(coordinator.search.id)
        assert wish is not None
        assert (wish.kind, wish.by) == ("pause", "bob")
    assert [one.state for one in queue.all()] == ["paused"]
    with Coordinator.take_over(store, "one") as coordinator:
        assert coordinator.wished() is None


def test_extended_search_is_paused_and_goes_on_by_itself(queue: Queue, store: Store) -> None:
    one = begun(queue, "one")
    with launched(store, "one", one.id) as coordinator:
        queue.extend("one", "bob", ["budget.candidates=9"])
        for _ in range(2):  # asked for again, it is not done again
            queue.extend("one", "bob", ["budget.hours=2"])
        found = queue.get(one.id)
        assert found.state == "running"
        assert found.overrides == ("budget.candidates=9", "budget.hours=2")
        wish = coordinator.wished()
        assert wish is not None
        assert wish.kind == "pause"
    queue.take_overrides(one.id, ["budget.candidates=9"])
    assert queue.get(one.id).overrides == ("budget.hours=2",)
    queue.change(one.id, state="finished")
    assert queue.extend("one", "bob", ["budget.candidates=99"]).state == "queued"


def test_paused_search_that_is_stopped_is_run_to_its_finals(queue: Queue, store: Store) -> None:
    one = begun(queue, "one")
    with launched(store, "one", one.id):
        queue.pause("one", "bob")
    queue.stop("one", "eve")
    assert queue.get(one.id).state == "queued"
    with Coordinator.take_over(store, "one") as coordinator:
        wish = coordinator.wished()
        assert wish is not None
        assert (wish.kind, wish.by) == ("stop", "eve")
        coordinator.stop(None)  # it goes on under other limits
        assert coordinator.wished() is None


def test_stop_outlasts_a_pause_that_came_later(store: Store) -> None:
    with launched(store, "one"):
        Wishes(store).add("one", "stop", "eve")
        Wishes(store).add("one", "pause", "bob")
    for _ in range(2):
        with Coordinator.take_over(store, "one") as coordinator:
            wish = coordinator.wished()
            assert wish is not None
            assert (wish.kind, wish.by) == ("stop", "eve")


def test_search_that_does_not_run_cannot_be_paused(queue: Queue, store: Store) -> None:
    with pytest.raises(StoreError, match="has no search 'one'"):
        queue.pause("one", "bob")
    with launched(store, "one") as coordinator:
        coordinator.log("note", "x")
    with pytest.raises(StoreError, match="'one' is paused: only one that runs can be asked to p"):
        queue.pause("one", "bob")
    with Coordinator.take_over(store, "one") as coordinator:
        coordinator.finish("finished", {"winner": 1})
    with pytest.raises(StoreError, match="'one' is finished: only one that runs"):
        queue.stop("one", "bob")


def test_search_that_was_begun_without_a_server_is_resumed_by_one(
    queue: Queue, store: Store
) -> None:
    with launched(store, "one"), pytest.raises(StoreError, match="running: it needs no resuming"):
        queue.resume("one", "bob")
    found = queue.resume("one", "bob", ["budget.hours=2"])
    assert (found.state, found.document, found.overrides) == ("queued", JOB, ("budget.hours=2",))
    with pytest.raises(StoreError, match="queued: it needs no resuming"):
        queue.resume("one", "bob")


def test_search_is_begun_for_its_submission_alone(queue: Queue, store: Store) -> None:
    one = begun(queue, "one")
    with pytest.raises(NameTaken, match="'one' is taken by a search in the queue"):
        launched(store, "one")
    assert store.searches() == []
    launched(store, "one", one.id).close()


@pytest.mark.parametrize("goes_on", [False, True])
def test_search_that_is_cancelled_on_its_way_is_not_begun(
    queue: Queue, store: Store, goes_on: bool
) -> None:
    one = begun(queue, "one")
    queue.pause("one", "bob")
    if goes_on:
        queue.resume("one", "bob")
    with pytest.raises(Withdrawn, match="by now: it is not begun"):
        launched(store, "one", one.id)
    assert queue.cancel("one").state == queue.cancel("one").state == "cancelled"
    with pytest.raises(Withdrawn, match="'one' is cancelled by now: it is not begun"):
        launched(store, "one", one.id)
    assert store.searches() == []
    again = begun(queue, "one")
    with launched(store, "one", again.id), pytest.raises(StoreError, match="has begun"):
        queue.cancel("one")


def test_search_of_somebody_else_is_not_that_of_a_submission_that_had_failed(
    queue: Queue, store: Store
) -> None:
    one = begun(queue, "one")
    queue.end(one.id, "failed", (), "its models do not fit")
    time.sleep(0.002)  # times are of milliseconds
    launched(store, "one").close()
    other = queue.resume("one", "bob")
    assert other.id != one.id
    assert queue.get(one.id).state == "failed"


def test_what_goes_on_has_no_result_any_more(queue: Queue) -> None:
    one = begun(queue, "one")
    queue.end(one.id, "finished", (), None, {"winner": 3})
    assert queue.resume("one", "bob").result is None
    queue.begin(one.id)
    assert queue.end(one.id, "failed", (), "the disk is full").result is None


def test_export_that_is_cancelled_stays_so_whatever_came_of_it(queue: Queue, store: Store) -> None:
    launched(store, "one").close()
    one = queue.submit("export", "one", {}, by="ada")
    queue.begin(one.id)
    cancelled = queue.change(one.id, state="cancelled")
    assert cancelled.ended_at is not None
    assert queue.end(one.id, "finished", (), None, {"folder": "out"}) == cancelled
    assert queue.change(one.id, state="queued", was="running") == cancelled


def test_more_is_said_of_the_end_that_it_is_about_alone(queue: Queue) -> None:
    one = begun(queue, "one")
    first = queue.end(one.id, "finished", (), None, {"winner": 3})
    queue.add_result(first, {"told": True})
    assert queue.get(one.id).result == {"winner": 3, "told": True}
    queue.resume("one", "bob")
    queue.begin(one.id)
    queue.add_result(first, {"told": True})
    assert queue.get(one.id).result is None
    time.sleep(0.002)
    queue.end(one.id, "finished", (), None, {"winner": 4})
    queue.add_result(first, {"told": True})
    assert queue.get(one.id).result == {"winner": 4}
