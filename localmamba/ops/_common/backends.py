"""Choice of the kernels that serve a tensor, by its device.

An operator's folder holds `cpu.py` (Numba) and `cuda.py` (Triton, CUDA C++), which are imported at
first use; both implement the operator's `Protocol`, stated in its `op.py`.
"""

from importlib import import_module
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

CHUNK = 64
"""Steps between two kept states of a scan."""

Kernels = TypeVar("Kernels")


def has_kernels(x: Tensor) -> bool:
    """Whether kernels, not the reference, serve a tensor; on a meta tensor, fakes do."""
    return x.dtype is not torch.float64 and (x.is_cuda or x.is_cpu or x.is_meta)


class Backends(Generic[Kernels]):
    """The kernels of an operator, one module a device.

    Args:
        package: The operator's package.
    """

    def __init__(self, package: str):
        self._package = package
        self._loaded: dict[str, Any] = {}

    def __call__(self, x: Tensor) -> Kernels:
        """The module whose kernels serve x; the reference's where there are none."""
        name = ".reference"
        if x.dtype is not torch.float64:
            name = ".cuda" if x.is_cuda else ".cpu" if x.is_cpu else name
        if name not in self._loaded:
            self._loaded[name] = import_module(name, self._package)
        kernels: Kernels = self._loaded[name]
        return kernels
