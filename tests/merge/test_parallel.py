"""Work on several threads: all of it is done, errors come out, torch is given back as it was."""

import os
import threading

import pytest
import torch

from evomerge.merge.parallel import default_threads, each, one_thread
from tests.merge.conftest import threads_of_torch


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_item_is_worked_on_once(threads: int) -> None:
    done: list[int] = []
    each(lambda item, stopped: done.append(item), range(100), threads)
    assert sorted(done) == list(range(100))


@pytest.mark.parametrize("threads", [1, 3])
def test_work_runs_on_one_thread_of_torchs(threads: int) -> None:
    counts: list[int] = []
    with threads_of_torch(2):
        each(lambda item, stopped: counts.append(torch.get_num_threads()), range(10), threads)
        assert torch.get_num_threads() == 2
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    assert counts == [1] * 10


@pytest.mark.parametrize("threads", [1, 3])
def test_sums_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    sums: list[float] = []
    with threads_of_torch(threads):
        each(lambda item, stopped: sums.append(float(values.norm())), range(3), threads)
    with one_thread():
        assert sums == [float(values.norm())] * 3


class Stop(BaseException):
    """As KeyboardInterrupt, but not for pytest."""


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("error", [ValueError("wrong"), Stop()], ids=repr)
def test_the_first_error_comes_out_and_stops_the_others(error: BaseException, threads: int) -> None:
    begun: list[int] = []
    gave_up: list[int] = []

    def work(item: int, stopped: threading.Event) -> None:
        begun.append(item)
        if item == 0:
            raise error
        if stopped.wait(10):
            gave_up.append(item)

    with threads_of_torch(2):
        with pytest.raises(type(error)) as raised:
            each(work, range(100), threads)
        assert torch.get_num_threads() == 2
    assert raised.value is error
    assert len(begun) <= threads
    assert gave_up == sorted(set(begun) - {0})


def test_a_gpu_is_given_no_more_threads_than_its_memory_has_room_for() -> None:
    cores = len(os.sched_getaffinity(0))
    assert default_threads(torch.device("cpu")) == cores
    assert default_threads(torch.device("cuda")) == min(cores, 4)
