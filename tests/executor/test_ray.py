"""The pool on Ray when workers, devices and nodes fail: nobody's score suffers from it."""

import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

import evomerge
from evomerge.errors import EvomergeError, JobError, TaskError
from evomerge.executor import Request, Stopped
from evomerge.executor.ray import RayExecutor
from evomerge.fitness.results import Evaluation, Failed, Scored
from evomerge.job import Executor as Section
from tests.clusters import (
    Misbehaving,
    Nodes,
    answer,
    by_candidate,
    eventually,
    giving,
    is_running,
    misbehaving,
    notes,
    requests,
    section,
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("nodes")]

HUNG = 12  # seconds, for which nothing else takes on a busy machine either


def evaluated(
    spec: Misbehaving, count: int = 6, executor: Section | None = None
) -> dict[int, Evaluation]:
    """What an executor finds of that many candidates."""
    with closing(RayExecutor(executor or section(), spec)) as pool:
        return by_candidate(list(pool.evaluate(giving(requests(count)))))


def right(found: dict[int, Evaluation], but: Sequence[int] = ()) -> bool:
    """Whether everything is answered as by a worker that nothing happens to."""
    return all(
        isinstance(found[request.candidate], Scored)
        and str(found[request.candidate]) == str(answer(request))
        for request in requests(len(found))
        if request.candidate not in but
    )


def all_open(pool: RayExecutor, folder: Path, count: int) -> bool:
    """Whether that many workers are open in the end."""

    def happens() -> bool:
        return right(by_candidate(list(pool.evaluate(giving(requests(2)))))) and (
            len(notes(folder, "opened")) == count
        )

    return eventually(happens)


def test_a_worker_is_opened_once_and_kept(tmp_path: Path) -> None:
    with closing(RayExecutor(section(), misbehaving(tmp_path))) as pool:
        assert all_open(pool, tmp_path, 2)
        for _ in range(3):
            assert right(by_candidate(list(pool.evaluate(giving(requests(6))))))
        assert len(notes(tmp_path, "opened")) == 2
    assert eventually(lambda: not any(map(is_running, notes(tmp_path, "opened"))))


def test_results_come_as_they_land_and_a_free_worker_has_the_next_at_once(tmp_path: Path) -> None:
    spec = misbehaving(tmp_path, _0=("hang", 1))
    with closing(RayExecutor(section(time_limit=600), spec)) as pool:
        found = pool.evaluate(giving(requests(6)))
        landed = [next(found).request.candidate for _ in range(5)]
    assert landed == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("fault", ["kill", "illegal memory access"])
def test_what_a_broken_worker_was_at_is_done_by_another(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = evaluated(misbehaving(tmp_path, _2=(fault, 1)))
    assert right(found)
    first, second = notes(tmp_path, "2")
    assert first != second
    assert "is replaced" in caplog.text


def test_a_hung_worker_is_ended_and_replaced(tmp_path: Path) -> None:
    found = evaluated(misbehaving(tmp_path, _2=("hang", 1)), executor=section(time_limit=HUNG))
    assert right(found)
    assert len(notes(tmp_path, "2")) == 2
    assert eventually(lambda: not any(map(is_running, notes(tmp_path, "2"))))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (
            "kill",
            r"failed on [3-5] workers, the last time: its process ended: SYSTEM_ERROR: see .*",
        ),
        (
            "no device",
            r"failed on [3-5] workers, the last time: RuntimeError: CUDA error: no dev.*",
        ),
        ("memory", r"failed on 2 workers, the last time: 9 tokens do not fit"),
    ],
)
def test_a_candidate_that_no_worker_survives_has_failed_and_the_others_have_not(
    tmp_path: Path, fault: str, reason: str
) -> None:
    found = evaluated(misbehaving(tmp_path, _2=(fault, 99)))
    assert right(found, but=[2])
    failed = found[2]
    assert isinstance(failed, Failed)
    assert re.fullmatch(reason, failed.reason)


def test_too_little_memory_on_one_device_is_tried_on_another(tmp_path: Path) -> None:
    spec = misbehaving(tmp_path, _9=("memory", 1))
    with closing(RayExecutor(section(), spec)) as pool:
        assert all_open(pool, tmp_path, 2)
        assert right(by_candidate(list(pool.evaluate(giving(requests(10))))))
    first, second = notes(tmp_path, "9")
    assert first != second
    assert len(notes(tmp_path, "opened")) == 2  # it is no reason to start another worker


def test_workers_that_die_while_they_are_idle_are_no_candidates_fault(tmp_path: Path) -> None:
    with closing(RayExecutor(section(workers=4), misbehaving(tmp_path))) as pool:
        assert all_open(pool, tmp_path, 4)
        for process in notes(tmp_path, "opened"):
            os.kill(process, signal.SIGKILL)
        one = [request for request in requests(4) if request.candidate == 3]
        (landed,) = pool.evaluate(giving(one))
    assert isinstance(landed.evaluation, Scored)


def test_a_node_that_is_lost_at_work_is_replaced_by_others(nodes: Nodes, tmp_path: Path) -> None:
    spec = misbehaving(tmp_path, seconds=0.3)
    with nodes.another() as lose, closing(RayExecutor(section(workers=4, cpus=2), spec)) as pool:
        assert all_open(pool, tmp_path, 4)
        found = []
        for landed in pool.evaluate(giving(requests(24))):
            found.append(landed)
            if len(found) == 6:
                lose()
        assert right(by_candidate(found))
    met = Counter(candidate for candidate in range(24) for _ in notes(tmp_path, str(candidate)))
    again = [candidate for candidate in range(2, 24) if met[candidate] > 1]
    assert 1 <= len(again) <= 4  # what was scored is not scored again


def test_without_nodes_the_search_can_only_be_resumed(nodes: Nodes, tmp_path: Path) -> None:
    spec = misbehaving(tmp_path, seconds=0.2)
    there = section(resources={"there": 0.5}, start_limit=10)
    with nodes.another(there=1) as lose, closing(RayExecutor(there, spec)) as pool:
        found = pool.evaluate(giving(requests(40)))
        next(found)
        lose()
        with pytest.raises(EvomergeError, match=r"no room for 2 of 2 .* resume the search") as end:
            list(found)
    assert not isinstance(end.value, JobError)


def test_too_much_to_ask_for_is_told_with_what_there_is(tmp_path: Path) -> None:
    asking = section(gpus=2, resources={"tape": 1}, start_limit=1)
    with pytest.raises(JobError) as refused:
        RayExecutor(asking, misbehaving(tmp_path))
    assert re.fullmatch(
        r"executor: no room for 2 of 2 workers after executor.start_limit, 1 s: each asks for "
        r"0.5 CPU, 2 GPU, 1 tape, the cluster has 4 CPU and [\d.]+ CPU of it free: ask for less, "
        r"or add nodes",
        str(refused.value),
    )


def test_fewer_workers_than_asked_for_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = misbehaving(tmp_path, seconds=4)
    assert right(evaluated(spec, executor=section(workers=3, cpus=2, start_limit=10)))
    # Two where the machine is so busy that the second worker's process has not started by then.
    assert re.search(r"no room for [12] of 3 workers .*: the others go on", caplog.text)


def test_there_are_as_many_workers_as_the_nodes_hold(tmp_path: Path) -> None:
    auto = section(workers="auto", cpus=1.5)
    with closing(RayExecutor(auto, misbehaving(tmp_path))) as pool:
        assert all_open(pool, tmp_path, 2)


def test_a_node_may_be_asked_for_by_its_own_name(nodes: Nodes, tmp_path: Path) -> None:
    head = section(resources={"node:__internal_head__": 0.001}, start_limit=10)
    with nodes.another():
        assert right(evaluated(misbehaving(tmp_path), executor=head))


@pytest.mark.parametrize("fault", ["kill", "no device"])
def test_workers_that_never_start_are_told_of(tmp_path: Path, fault: str) -> None:
    with pytest.raises(EvomergeError, match="a worker does not start"):
        RayExecutor(section(), misbehaving(tmp_path, opening=(fault, 99)))


def test_a_worker_that_starts_at_the_second_attempt_is_one(tmp_path: Path) -> None:
    assert right(evaluated(misbehaving(tmp_path, opening=("kill", 2))))


def test_an_engine_that_hangs_as_it_starts_is_replaced(tmp_path: Path) -> None:
    spec = misbehaving(tmp_path, opening=("hang", 2))
    assert right(evaluated(spec, executor=section(time_limit=HUNG)))


def test_what_no_worker_could_help_is_raised(tmp_path: Path) -> None:
    executor = RayExecutor(section(), misbehaving(tmp_path, _2=("refuse", 1)))
    with closing(executor), pytest.raises(TaskError, match=r"^task 'task': train is not what"):
        list(executor.evaluate(giving(requests(6))))


def test_a_node_with_other_data_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert right(evaluated(misbehaving(tmp_path, opening=("refuse", 1))))
    assert "one place less for workers: node '" in caplog.text


def test_data_that_no_node_has_are_told_with_a_node(tmp_path: Path) -> None:
    message = rf"^node '{socket.gethostname()}': task 'task': train is not what it is where"
    with pytest.raises(TaskError, match=message):
        RayExecutor(section(), misbehaving(tmp_path, opening=("refuse", 99)))


def test_a_node_with_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = evomerge.__version__
    monkeypatch.setattr(evomerge, "__version__", "9.9")
    message = rf"node '.*' has evomerge {re.escape(there)}: install 9.9 there, as it is here"
    with pytest.raises(JobError, match=message):
        RayExecutor(section(), misbehaving(tmp_path))


def test_a_device_is_not_named_on_a_cluster(tmp_path: Path) -> None:
    spec = misbehaving(tmp_path)
    named = Misbehaving(
        **vars(spec) | {"engine": spec.engine.model_copy(update={"device": "cuda:1"})}
    )
    with pytest.raises(
        JobError, match=r"engine.device: 'cuda:1': on Ray .*: give cuda, cpu or auto"
    ):
        RayExecutor(section(), named)


def told(folder: Path, process: int) -> list[tuple[int, int | None]]:
    """What a worker met, in order, and what it was told is upcoming."""
    return [
        (int(path.suffix[1:]), int(upcoming) if (upcoming := path.read_text()) else None)
        for path in sorted(folder.glob(f"*-{process}.[0-9]*"))
    ]


def test_a_worker_that_merges_ahead_is_sent_what_it_was_told_is_upcoming(tmp_path: Path) -> None:
    spec = misbehaving(tmp_path, seconds=0.2, ahead=True)
    with closing(RayExecutor(section(), spec)) as pool:
        assert all_open(pool, tmp_path, 2)
        for note in tmp_path.glob("*-*.[0-9]*"):
            note.unlink()
        assert right(by_candidate(list(pool.evaluate(giving(requests(12))))))
        found = [told(tmp_path, process) for process in notes(tmp_path, "opened")]
    for met in found:
        assert len(met) > 3
        for (_, upcoming), (following, _) in pairwise(met[:-1]):  # the last may be stolen
            assert upcoming == following
    assert sorted(candidate for met in found for candidate, _ in met) == list(range(12))


def test_a_worker_that_does_not_is_told_nothing(tmp_path: Path) -> None:
    with closing(RayExecutor(section(workers=1), misbehaving(tmp_path))) as pool:
        assert right(by_candidate(list(pool.evaluate(giving(requests(4))))))
    (process,) = notes(tmp_path, "opened")
    assert told(tmp_path, process) == [(i, None) for i in range(4)]


def test_whoever_has_nothing_to_do_takes_what_another_was_told_of(tmp_path: Path) -> None:
    spec = misbehaving(tmp_path, seconds=0.1, ahead=True, _0=("hang", 1))
    with closing(RayExecutor(section(time_limit=600), spec)) as pool:
        found = pool.evaluate(giving(requests(6)))
        landed = [next(found).request.candidate for _ in range(5)]
    assert sorted(landed) == [1, 2, 3, 4, 5]


def test_what_was_reserved_for_a_worker_that_died_is_done_once_by_another(tmp_path: Path) -> None:
    spec = misbehaving(tmp_path, seconds=0.1, ahead=True, _0=("kill", 1), _5=("kill", 1))
    assert right(evaluated(spec, 12))
    met = [len(notes(tmp_path, str(candidate))) for candidate in range(12)]
    assert met == [2, 1, 1, 1, 1, 2, *[1] * 6]


def test_what_was_reserved_is_not_begun_once_a_search_stops(tmp_path: Path) -> None:
    left, stopped = requests(2), False

    def take() -> Request | None:
        if stopped:
            raise Stopped
        return left.pop(0) if left else None

    landed = []
    with closing(RayExecutor(section(workers=1), misbehaving(tmp_path, ahead=True))) as pool:
        for found in pool.evaluate(take):
            landed.append(found.request.candidate)
            stopped = True
    assert landed == [0]
    assert not notes(tmp_path, "1")


def test_devices_keep_their_names_and_what_was_lost_when_a_worker_is_replaced(
    tmp_path: Path,
) -> None:
    spec = misbehaving(tmp_path, seconds=0.2, _3=("kill", 1))
    with closing(RayExecutor(section(), spec)) as pool:
        assert all_open(pool, tmp_path, 2)
        before = pool.devices()
        assert right(by_candidate(list(pool.evaluate(giving(requests(6))))))
        assert all_open(pool, tmp_path, 3)
        after = pool.devices()
    host = socket.gethostname()
    assert {device.name for device in before} == {f"{host}/cpu 0", f"{host}/cpu 1"}
    assert [device.name for device in after] == [device.name for device in before]
    assert sorted(device.lost > 0 for device in after) == [False, True]
    for one, other in zip(before, after, strict=True):
        assert (other.opening > one.opening) == (other.lost > 0)  # it was opened again
    scored = len([path for path in tmp_path.glob("*-*.[0-9]*") if path.suffix != ".json"])
    assert sum(device.evaluations for device in after) == scored - 1  # all but the one lost


def test_requests_are_taken_when_there_is_a_worker_for_them(tmp_path: Path) -> None:
    taken: list[int] = []

    def given() -> Iterator[Request]:
        for request in requests(8):
            taken.append(request.candidate)
            yield request

    with closing(RayExecutor(section(workers=1), misbehaving(tmp_path))) as pool:
        for done, _ in enumerate(pool.evaluate(giving(given())), 1):
            assert len(taken) <= done
            time.sleep(0.01)
    assert taken == list(range(8))
