"""Shares a kernel's tasks among threads.

Plain threads, not Numba's `prange`: its OpenMP team competes with PyTorch's for the cores and dies
in a forked child, its own team dies when two Python threads call it at once.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

_WORTH_SHARING = 200_000
"""Vector operations below which waking a thread costs more than it saves."""


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=256, thread_name_prefix="localmamba")


def run(kernel: Callable, tasks: int, operations: int, scratch: int, *arguments) -> None:
    """Calls a kernel until all its tasks are done, on up to `torch.get_num_threads()` threads.

    Args:
        kernel: Takes the address of a counter from which to draw tasks, their number, the address
            of scratch memory of its own, and `arguments`.
        tasks: Their number; no two of them write to the same place.
        operations: How much work they are together, in vector operations.
        scratch: Floats of scratch memory for each thread.
        arguments: Numbers and `Rows`; the caller keeps the memory behind them alive.
    """
    if tasks == 0:
        return
    counter = torch.zeros(1, dtype=torch.int64)

    def work() -> None:
        memory = torch.empty(scratch)
        kernel(counter.data_ptr(), tasks, memory.data_ptr(), *arguments)

    threads = min(torch.get_num_threads(), tasks) if operations > _WORTH_SHARING else 1
    if threads == 1:
        work()
        return
    pool = _pool(os.getpid())
    helpers = [pool.submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        # One that has not begun finds nothing left to do; the others still write to our memory.
        for helper in helpers:
            if not helper.cancel():
                helper.result()
