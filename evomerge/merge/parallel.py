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
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")

_ON_DEVICE = 4
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them


def each(work: Callable[[T, threading.Event], None], items: Sequence[T], threads: int) -> None:
    """Do the work on every item, in no order. An item's work gives up when the event is set.

    Raises what the first item to fail raised, after all threads have stopped.
    """
    _keep_freed_memory()
    stopped = threading.Event()

    def attempt(item: T) -> None:
        if stopped.is_set():
            return
        try:
            work(item, stopped)
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


@cache
def _keep_freed_memory() -> None:
    """Freed spans stay with the process. glibc would give them back to the operating system and
    take them again page by page, thousands of times a second, which costs as much as merging."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def default_threads(device: torch.device) -> int:
    """How many to merge on: one for each core. A few keep a GPU busy, and every one takes memory
    of it."""
    cores = len(os.sched_getaffinity(0))
    return cores if device.type == "cpu" else min(cores, _ON_DEVICE)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch splits no operation on the CPU over threads in here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
