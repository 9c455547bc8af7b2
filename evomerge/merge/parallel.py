"""Work on many tensors at once, each on one thread of torch's: as fast as splitting every operation
over all threads, and with sums whose bits do not depend on how many there are.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

_HOARD = 400 << 20  # bytes of private memory
_PAGE = os.sysconf("SC_PAGE_SIZE")


def each(work: Callable[[T, threading.Event], None], items: Sequence[T], threads: int) -> None:
    """Do the work on every item, in no order. An item's work gives up when the event is set.

    Raises what the first item to fail raised, after all threads have stopped.
    """
    stopped = threading.Event()

    def attempt(item: T) -> None:
        if stopped.is_set():
            return
        try:
            work(item, stopped)
            _give_back()
        except BaseException:
            stopped.set()
            raise

    with one_thread():
        if threads == 1:
            for item in items:
                attempt(item)
            return
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(attempt, item) for item in items]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stopped.set()
    for future in futures:
        future.result()


def _give_back() -> None:
    """Freed memory back to the operating system, where its allocator keeps too much for later: the
    more threads, the more pieces that fit nothing."""
    if sys.platform != "linux":
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    if (resident - shared) * _PAGE > _HOARD:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc's alone
        if trim is not None:
            trim(0)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch splits no operation on the CPU over threads in here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
