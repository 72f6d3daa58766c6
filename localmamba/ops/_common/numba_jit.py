"""Compiles CPU kernels with Numba and shares their tasks among threads.

Plain threads, not Numba's `prange`: its OpenMP team competes with PyTorch's for the cores and dies
in a forked child, its own team dies when two Python threads call it at once.
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path

import numba
import torch

_OPTIONS = {"nopython": True, "nogil": True, "error_model": "numpy"}

inline = numba.jit(forceinline=True, **_OPTIONS)
"""Decorates a function that becomes part of the kernels that call it."""

# forceinline=False: unset, it would be taken from the caller.
function = numba.jit(forceinline=False, **_OPTIONS)
"""Decorates a function that kernels call."""


@lru_cache(maxsize=1)
def _sources() -> str:
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def kernel(function: Callable) -> Callable:
    """Decorates a function that Python calls: compiled at first use, kept on disk if possible."""
    try:
        compiled = numba.jit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no folder to write to
        return numba.jit(**_OPTIONS)(function)
    # Numba compares the kernel's own file with what it kept, not the files of functions called.
    file = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if file is not None:
        file._source_stamp = (file._source_stamp, _sources())
    return compiled


_WORTH_SHARING = 1_000_000
"""Vector operations below which waking a thread costs more than it saves."""


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=256, thread_name_prefix="localmamba")


@cache
def _keep_freed_memory() -> None:
    """Lets glibc keep the memory of one block's tensors for the next.

    Its `free` gives the top of the heap back to the system when more of it is free than twice the
    largest single allocation it has yet seen freed. A block's tensors are many and of one size, so
    that each block would pay for fresh pages: a third of LocalVim-T's time. One large allocation,
    never touched, raises that limit; 32 MB is the most that glibc takes note of.
    """
    torch.empty(2**23 - 2**12, dtype=torch.float32)


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
    _keep_freed_memory()
    counter = torch.zeros(1, dtype=torch.int64)

    threads = min(torch.get_num_threads(), tasks) if operations > _WORTH_SHARING else 1
    # Made here for all: allocation lets the interpreter switch to a thread that has just woken.
    memory = torch.empty(threads, scratch, dtype=torch.float32)
    address, step = memory.data_ptr(), scratch * memory.element_size()

    def work(thread: int) -> None:
        kernel(counter.data_ptr(), tasks, address + thread * step, *arguments)

    if threads == 1:
        work(0)
        return
    pool = _pool(os.getpid())
    helpers = [pool.submit(work, thread) for thread in range(1, threads)]
    try:
        work(0)
    finally:
        # One that has not begun finds nothing left to do; the others still write to our memory.
        for helper in helpers:
            if not helper.cancel():
                helper.result()
