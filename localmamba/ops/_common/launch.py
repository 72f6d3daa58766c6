"""Launches of Triton kernels in less of Python's time.

Before each launch Triton looks at every argument, to find what it compiled for such arguments: more
time than a short PyTorch call takes. A model calls a kernel with the same numbers step after step,
so that what was compiled is found by the numbers themselves.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

_VARIANTS = 1024
"""Kept for a kernel; then it begins anew."""

_ALIGNMENT = 16
"""Triton compiles apart what starts at a multiple of so many bytes."""


def variant(arguments: tuple, constants: dict[str, Any]) -> tuple:
    """What Triton may have compiled a kernel for: numbers by value, tensors by what it looks at."""
    found: list[Any] = []
    for x in arguments:
        if isinstance(x, Tensor):
            found += (x.get_device(), x.dtype, x.data_ptr() % _ALIGNMENT == 0)
        else:
            found += (type(x), x)
    return (*found, *constants.items())


class Kernel:
    """A function of `triton.jit` that is launched as before, `kernel[grid](...)`.

    Arguments that are not constants come first and by position, constants by name. Off a GPU (in
    Triton's interpreter, say), Triton launches.
    """

    def __init__(self, function: Any):
        self.function = function
        self.compiled: dict[tuple, tuple[Any, tuple]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: self._launch(grid, arguments, constants)

    def _launch(self, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any]) -> None:
        if not any(isinstance(x, Tensor) and x.is_cuda for x in arguments):
            self.function[grid](*arguments, **constants)
            return
        key = variant(arguments, constants)
        found = self.compiled.get(key)
        if found is not None:
            kernel, by_position = found
            kernel[(*grid, 1, 1)[:3]](*arguments, *by_position)
            return
        if len(self.compiled) >= _VARIANTS:
            self.compiled.clear()
        kernel = self.function[grid](*arguments, **constants)
        names = self.function.arg_names[len(arguments) :]
        self.compiled[key] = kernel, tuple(constants[name] for name in names)
