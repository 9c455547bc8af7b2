"""The pool when workers, devices and nodes fail, and who is to blame: on a cluster that is nowhere,
so that anything can happen at once and in any order. See test_ray for a real one."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ray.exceptions
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import EvomergeError, JobError, OutOfMemory, TaskError
from evomerge.executor import Landed, Request, Stopped, board, pool
from evomerge.executor.actor import Ready
from evomerge.executor.ray import RayExecutor
from evomerge.executor.shares import Claim
from evomerge.fitness.results import Failed, Scored
from tests.clusters import answer, by_candidate, giving, misbehaving, requests, section
from tests.executor.fake import NEVER, Answers, FakeCluster, behaves

NOWHERE = Path()
DIED = ray.exceptions.RayActorError


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks follow each other at once."""
    monkeypatch.setattr(board, "_BEAT", 0.02)
    monkeypatch.setattr(pool, "_LOOK", 0.01)


@contextmanager
def opened(cluster: FakeCluster, **keys: Any) -> Iterator[RayExecutor]:
    """An executor there."""
    asked = section(**{"workers": "auto", "cpus": 1} | keys)
    with (
        mock.patch.object(pool, "Cluster", return_value=cluster),
        closing(RayExecutor(asked, misbehaving(NOWHERE))) as executor,
    ):
        yield executor


def let(executor: RayExecutor, happen: Callable[[], bool]) -> None:
    """Go on until something has happened, which it does."""
    deadline = time.monotonic() + 20
    while not happen():
        assert time.monotonic() < deadline
        executor._pool.step()


def open_on(executor: RayExecutor) -> Counter[str | None]:
    """How many workers wait for something to do, by node."""
    return Counter(slot.node for slot in executor._pool.idle)


def evaluated(executor: RayExecutor, count: int) -> dict[int, Any]:
    """What it finds of so many candidates."""
    return by_candidate(list(executor.evaluate(giving(requests(count)))))


def failed(found: dict[int, Any]) -> list[int]:
    """The candidates that have; all others are right."""
    for request in requests(len(found)):
        evaluation = found[request.candidate]
        assert isinstance(evaluation, Failed) or str(evaluation) == str(answer(request))
    return [candidate for candidate, each in found.items() if isinstance(each, Failed)]


def on(bad: Sequence[str], method: str, value: Any) -> Answers:
    """On these nodes something else comes of this method."""

    def answers(node: str, called: str, *arguments: Any) -> Any:
        given = arguments[0] if called == "evaluate" else None
        if node in bad and called == method:
            return value(given) if callable(value) else value
        return behaves(node, called, *arguments)

    return answers


def poison(*candidates: int, value: Any) -> Answers:
    """Wherever these are evaluated."""

    def answers(node: str, called: str, *arguments: Any) -> Any:
        if called == "evaluate" and arguments[0].candidate in candidates:
            return value
        return behaves(node, called, *arguments)

    return answers


BROKEN = RuntimeError("CUDA error: device lost")


# -- devices that fail -----------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "seed"), [(BROKEN, 1), (BROKEN, 2), (DIED(), 3)])
def test_devices_that_end_every_evaluation_are_given_up_and_no_candidate_suffers(
    value: Exception, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = dict.fromkeys("abcdefgh", 1.0)
    cluster = FakeCluster(on("abc", "evaluate", value), random.Random(seed), **nodes)
    with opened(cluster) as executor:
        let(executor, lambda: sum(open_on(executor).values()) == 8)
        assert failed(evaluated(executor, 100)) == []
        assert failed(evaluated(executor, 100)) == []
        assert {*open_on(executor)} == {*"defgh"}
    for node in "abc":
        assert cluster.calls[node, "evaluate"] == 3
        assert cluster.calls[node, "open"] == 3
    assert caplog.text.count("no evaluation comes to an end, 3 times in a row") == 3


def test_devices_that_break_in_mid_search_are_given_up_and_no_candidate_suffers() -> None:
    broken: list[str] = []

    def answers(node: str, method: str, *arguments: Any) -> Any:
        return on(broken, "evaluate", BROKEN)(node, method, *arguments)

    cluster = FakeCluster(answers, random.Random(1), **dict.fromkeys("abcdef", 1.0))
    with opened(cluster) as executor:
        let(executor, lambda: sum(open_on(executor).values()) == 6)
        assert failed(evaluated(executor, 30)) == []
        broken += "abcd"
        assert failed(evaluated(executor, 60)) == []
        assert {*open_on(executor)} == {*"ef"}


@pytest.mark.parametrize("workers", [1, 3])
def test_a_cluster_on_which_nothing_comes_to_an_end_fails_and_not_the_candidates(
    workers: int,
) -> None:
    cluster = FakeCluster(on("ab", "evaluate", BROKEN), a=2, b=2)
    message = r"on node '.' no evaluation comes to an end.*: no worker is left: .* resume"
    with opened(cluster, workers=workers) as executor:
        with pytest.raises(EvomergeError, match=message) as raised:
            evaluated(executor, 30)
        assert not isinstance(raised.value, JobError)


@pytest.mark.parametrize(
    ("value", "times"), [(BROKEN, 3), (DIED(), 3), (OutOfMemory("9 tokens do not fit"), 2)]
)
def test_a_candidate_that_no_worker_survives_has_failed_and_costs_no_place(
    value: Exception, times: int
) -> None:
    cluster = FakeCluster(poison(7, 11, 12, value=value), a=2, b=2)
    with opened(cluster) as executor:
        let(executor, lambda: sum(open_on(executor).values()) == 4)
        for _ in range(5):
            found = evaluated(executor, 40)
            assert sorted(failed(found)) == [7, 11, 12]
        assert found[7].reason.startswith(f"failed on {times} workers, the last time: ")
        let(executor, lambda: open_on(executor) == {"a": 2, "b": 2})


@pytest.mark.parametrize("count", [1, 2])
def test_a_candidate_that_ends_the_only_worker_has_failed_in_the_end(count: int) -> None:
    cluster = FakeCluster(poison(0, value=DIED()), a=1)
    with opened(cluster) as executor:
        assert failed(evaluated(executor, count)) == [0]
        assert failed(evaluated(executor, 5)) == [0]
    assert cluster.calls["a", "evaluate"] <= 5 + count + 3 + 5


def test_a_worker_that_takes_too_long_is_replaced() -> None:
    met = Counter[int]()

    def answers(node: str, method: str, *arguments: Any) -> Any:
        if method == "evaluate":
            met[arguments[0].candidate] += 1
            if arguments[0].candidate == 2 and met[2] < 3:
                return NEVER
        return behaves(node, method, *arguments)

    with opened(FakeCluster(answers, a=1, b=1), time_limit=0.2) as executor:
        let(executor, lambda: len(open_on(executor)) == 2)
        assert failed(evaluated(executor, 9)) == []
    assert met[2] == 3


def test_a_candidate_that_hangs_everywhere_has_failed_with_the_limit() -> None:
    with opened(FakeCluster(poison(5, value=NEVER), a=4), time_limit=0.1) as executor:
        let(executor, lambda: open_on(executor) == {"a": 4})
        found = evaluated(executor, 12)
    assert failed(found) == [5]
    reason = "failed on 3 workers, the last time: an evaluation took longer than "
    assert found[5].reason == f"{reason}executor.time_limit, 0.1 s"
    assert found[5].seconds >= 0.3


def test_workers_that_die_before_they_evaluate_anything_are_not_replaced_for_ever() -> None:
    def answers(node: str, method: str, *arguments: Any) -> Any:
        return DIED() if method in ("begin", "evaluate") else behaves(node, method, *arguments)

    cluster = FakeCluster(answers, a=1)
    with (
        mock.patch.object(pool, "_JUST", -1),
        opened(cluster) as executor,
        pytest.raises(EvomergeError, match="3 times in a row"),
    ):
        evaluated(executor, 1)
    assert cluster.calls["a", "open"] == 3


# -- nodes that are of no use ----------------------------------------------------------------------

REFUSED = TaskError("task 'task': train is not what it is where the search was started")


@pytest.mark.parametrize("value", [DIED(), REFUSED])
@pytest.mark.parametrize("workers", [1, 4, "auto"])
def test_workers_go_where_they_start(
    value: Exception, workers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = FakeCluster(on("a", "open", value), a=4, b=4)
    count = 4 if workers == "auto" else workers
    with opened(cluster, workers=workers) as executor:
        let(executor, lambda: open_on(executor) == {"b": count})
        assert failed(evaluated(executor, 20)) == []
        let(executor, lambda: executor.workers().count == count)
    assert cluster.calls["a", "open"] <= 12
    assert ("one place less for workers" in caplog.text) == (cluster.calls["a", "open"] > 0)


@pytest.mark.parametrize("workers", [2, "auto"])
def test_what_no_node_has_is_told_with_a_node(workers: Any) -> None:
    cluster = FakeCluster(on("ab", "open", REFUSED), a=8, b=8)
    with (
        pytest.raises(TaskError, match=r"^node '[ab]': task 'task': train is not what it is where"),
        opened(cluster, workers=workers),
    ):
        raise AssertionError("it is open")
    assert cluster.calls["a", "open"] <= 8
    assert cluster.calls["b", "open"] <= 8


def test_workers_that_never_start_are_told_of() -> None:
    cluster = FakeCluster(on("a", "open", RuntimeError("no such device")), a=8)
    with (
        pytest.raises(EvomergeError, match="a worker does not start, 3 times in a row: RuntimeErr"),
        opened(cluster, workers=2),
    ):
        raise AssertionError("it is open")
    assert cluster.calls["a", "open"] <= 6


def test_a_broken_place_takes_none_of_the_others_on_its_node() -> None:
    starts = Counter[str]()

    def answers(node: str, method: str, *arguments: Any) -> Any:
        starts[method] += 1
        bad = method == "open" and starts["open"] in (2, 5, 6)
        return RuntimeError("ECC error") if bad else behaves(node, method, *arguments)

    with opened(FakeCluster(answers, a=4)) as executor:
        let(executor, lambda: open_on(executor) == {"a": 3})
        assert failed(evaluated(executor, 20)) == []


def test_a_lost_node_is_replaced_by_another() -> None:
    cluster = FakeCluster(behaves, a=2, b=2)
    landed = []
    with opened(cluster, workers=2) as executor:
        let(executor, lambda: open_on(executor) == {"a": 1, "b": 1})
        cluster.answers = on("a", "evaluate", lambda request: DIED())
        cluster.lost.add("a")
        landed = list(executor.evaluate(giving(requests(12))))
        let(executor, lambda: open_on(executor) == {"b": 2})
    assert failed(by_candidate(landed)) == []


# -- waiting for room ------------------------------------------------------------------------------


def test_a_node_on_which_nothing_can_be_scheduled_is_not_tried_for_ever() -> None:
    value = ray.exceptions.ActorUnschedulableError("drained")
    cluster = FakeCluster(on("a", "place", value), a=8)
    with (
        pytest.raises(JobError, match=r"no room for 2 of 2 workers after executor.start_limit"),
        opened(cluster, workers=2, start_limit=0.3),
    ):
        raise AssertionError("it is open")
    assert cluster.calls["a", "place"] > 2


@pytest.mark.slow
def test_workers_without_room_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with opened(FakeCluster(behaves, a=8), workers=60, start_limit=0.3) as executor:
        let(executor, lambda: "no room" in caplog.text)
        until = time.monotonic() + 0.5
        let(executor, lambda: time.monotonic() > until)
    assert caplog.text.count("no room for") == 1
    assert "no room for 52 of 60 workers after executor.start_limit, 0.3 s" in caplog.text
    assert "the others go on" in caplog.text


def another(workers: int, *held: str, priority: int = 0) -> Callable[[], dict[str, bytes]]:
    """A search that was there before and has these places; it posts what it has."""
    looks = iter(range(10**6))
    claim = asdict(Claim("another", priority, 1.0, {"CPU": 1.0}, workers, held))

    def posts() -> dict[str, bytes]:
        return {"another": json.dumps(claim | {"looks": next(looks)}).encode()}

    return posts


@pytest.mark.slow
def test_who_waits_for_a_worker_of_another_search_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def answers(node: str, method: str, *arguments: Any) -> Any:
        waits = method == "place" and cluster.calls[node, "place"] > 1
        return NEVER if waits else behaves(node, method, *arguments)

    cluster = FakeCluster(answers, a=4)
    cluster.others = another(1, "a")
    with opened(cluster, workers=3, start_limit=0.3) as executor:
        let(executor, lambda: caplog.text.count("no room for") == 2)  # every 0.3 s, once
    assert "no room for 2 of 3 workers" in caplog.text
    assert "other searches have not ended what they are at" in caplog.text


def test_who_has_a_smaller_share_than_it_asks_for_says_so(caplog: pytest.LogCaptureFixture) -> None:
    cluster = FakeCluster(behaves, a=4)
    cluster.others = another(4, "a", "a")
    with opened(cluster, workers=4, start_limit=0.3) as executor:
        let(executor, lambda: "no room for 2 of 4 workers" in caplog.text)
    assert "other searches have the rest" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["auto", 3])
def test_who_has_waited_for_others_has_all_its_time_for_a_place(
    workers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    end = time.monotonic() + 1.9  # shortly before its time would run out for the second time

    class Slow(FakeCluster):
        """Its actors take half a second to begin."""

        def check(self) -> None:
            if time.monotonic() > end + 0.5:
                super().check()

    before = another(4, *"aaaa", priority=1)
    cluster = Slow(behaves, a=4)
    cluster.others = lambda: before() if time.monotonic() < end else {}
    with opened(cluster, workers=workers, start_limit=1) as executor:
        let(executor, lambda: bool(open_on(executor)))
    assert "other searches go first and leave no room" in caplog.text
    assert "no room for" not in caplog.text


def test_workers_that_have_to_leave_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    cluster = FakeCluster(behaves, a=2, b=2)
    with opened(cluster) as executor:
        let(executor, lambda: open_on(executor) == {"a": 2, "b": 2})
        cluster.lost.add("b")
        let(executor, lambda: open_on(executor) == {"a": 2})
    assert "workers leave, 2 of 4: their share is smaller" in caplog.text


# -- anything --------------------------------------------------------------------------------------

FAULTS: list[Callable[[], Any]] = [DIED, lambda: BROKEN, lambda: OutOfMemory("it does not fit")]


def unlucky(
    cluster: FakeCluster, chance: random.Random, often: float, ready: Ready, answered: list[Request]
) -> Answers:
    """So often something happens to an actor that is idle or evaluates; seldom node c is lost. What
    is evaluated nevertheless is written down."""

    def answers(node: str, method: str, *arguments: Any) -> Any:
        if method == "begin" and chance.random() < often:
            return DIED()
        if method != "evaluate":
            return ready if method == "open" else behaves(node, method, *arguments)
        if chance.random() < often / 20:
            cluster.lost.add("c")
        if chance.random() < often or node in cluster.lost:
            return chance.choice(FAULTS)()
        answered.append(arguments[0])
        return behaves(node, method, *arguments)

    return answers


@pytest.mark.slow
@given(
    chance=st.integers(0, 2**32).map(random.Random),
    often=st.sampled_from([0.0, 0.02, 0.1]),
    ahead=st.booleans(),
    workers=st.sampled_from([1, 3, "auto"]),
    count=st.integers(1, 30),
    stop=st.integers(1, 40),
)
@settings(derandomize=True, deadline=None, max_examples=80)
def test_each_request_lands_once_or_is_stopped(
    chance: random.Random, often: float, ahead: bool, workers: Any, count: int, stop: int
) -> None:
    answered: list[Request] = []
    landed: list[Landed] = []
    left = requests(count)

    def take() -> Request | None:
        if len(landed) >= stop:
            raise Stopped
        return left.pop(0) if left else None

    cluster = FakeCluster(behaves, chance, a=2, b=1, c=1)
    cluster.answers = unlucky(cluster, chance, often, Ready(ahead), answered)
    ended = False
    with opened(cluster, workers=workers) as executor, suppress(EvomergeError):
        for done in executor.evaluate(take):
            landed.append(done)
        ended = True  # not because no worker is left
    assert len({done.request.candidate for done in landed}) == len(landed)
    scored = [done.request for done in landed if isinstance(done.evaluation, Scored)]
    assert {*map(id, scored)} <= {*map(id, answered)}
    if ended:
        assert Counter(map(id, scored)) == Counter(map(id, answered))
    if ended and len(landed) < stop:
        assert len(landed) == count
