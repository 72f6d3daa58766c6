"""How the functions of this folder are compiled."""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numba

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
