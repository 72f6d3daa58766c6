"""Compiles CPU kernels with Numba and shares their tasks among threads.

Plain threads, not Numba's `prange`: its OpenMP team competes with PyTorch's for the cores and dies
in a forked child, its own team dies when two Python threads call it at once.
"""

import ctypes
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
import torch

_OPTIONS: dict[str, Any] = {"nopython": True, "nogil": True, "error_model": "numpy"}

inline: Callable[[Callable[..., Any]], Any] = numba.jit(forceinline=True, **_OPTIONS)
"""Decorates a function that becomes part of the kernels that call it."""

# forceinline=False: unset, it would be taken from the caller.
function: Callable[[Callable[..., Any]], Any] = numba.jit(forceinline=False, **_OPTIONS)
"""Decorates a function that kernels call."""


@cache
def _source_hash() -> str:
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


class Kernel:
    """A compiled function that Python calls; compiled at first use and cached on disk if possible.

    Numba invalidates a cached kernel when the kernel's own file changes, not the files of functions
    that it calls. It names cache files by the qualified name, which therefore ends in a hash of all
    sources.
    """

    def __init__(self, function: Callable[..., None]):
        self._name = function.__qualname__
        function.__qualname__ = f"{self._name}-{_source_hash()}"
        self._function = function
        try:
            self.compiled = numba.jit(cache=True, **_OPTIONS)(function)
            self._remove_cached(keep=_source_hash())
        except RuntimeError:  # no folder to write to
            self.compiled = numba.jit(**_OPTIONS)(function)

    def __call__(self, *arguments: Any) -> None:
        try:
            self.compiled(*arguments)
        except Exception as error:
            # A kernel raises nothing itself: a file of the cache is damaged or cannot be written.
            self._remove_cached()
            writable = not isinstance(error, OSError)
            self.compiled = numba.jit(cache=writable, **_OPTIONS)(self._function)
            self.compiled(*arguments)

    def _remove_cached(self, keep: str | None = None) -> None:
        """Removes the kernel's cache files, or those of other versions of the sources."""
        folder = self.compiled.stats.cache_path
        for file in Path(folder).glob(f"*.{self._name}-*.nb[ci]") if folder else ():
            if keep is None or keep not in file.name:
                with suppress(OSError):
                    file.unlink()


kernel = Kernel
"""Decorates a function that Python calls."""

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


def run(
    kernel: Callable[..., None], tasks: int, operations: int, scratch: int, *arguments: Any
) -> None:
    """Calls a kernel until all its tasks are done, on up to `torch.get_num_threads()` threads.

    Args:
        kernel: Takes the address of the task counter, the number of tasks, the address of scratch
            memory of its own, and `arguments`.
        tasks: Number of tasks; no two of them write to the same place.
        operations: Vector operations of all tasks together.
        scratch: Floats of scratch memory for each thread.
        arguments: Numbers and `Rows`; the caller keeps the memory behind them alive.
    """
    if tasks == 0:
        return
    _keep_freed_memory()
    counter = ctypes.c_int64()
    threads = min(torch.get_num_threads(), tasks) if operations > _WORTH_SHARING else 1
    # Made here for all: allocation lets the interpreter switch to a thread that has just woken.
    memory = torch.empty(threads, scratch, dtype=torch.float32)
    address, step = memory.data_ptr(), scratch * memory.element_size()

    def work(thread: int) -> None:
        kernel(ctypes.addressof(counter), tasks, address + thread * step, *arguments)

    if threads == 1:
        work(0)
        return
    pool = _pool(os.getpid())
    helpers = [pool.submit(work, thread) for thread in range(1, threads)]
    try:
        work(0)
    finally:
        # A helper that has not begun finds nothing left to do; others still write to our memory.
        for helper in helpers:
            if not helper.cancel():
                helper.result()
