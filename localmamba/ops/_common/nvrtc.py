"""CUDA C++ compiled at run time by NVRTC, which PyTorch's wheels bring: no compiler is needed.

`cuda.bindings`, a dependency of PyTorch, is NVIDIA's Python interface to NVRTC and the driver. A
variant of scan.cu takes seconds to compile, so the result is cached on disk (disk_cache.py).
"""

import ctypes
import struct
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .disk_cache import cached

_SOURCE = Path(__file__).parents[1] / "selective_scan" / "scan.cu"

_CAPABILITY = (8, 0)
"""Compute capability that scan.cu needs, for its asynchronous copies to shared memory."""

# Tags of cuLaunchKernel's list of extra options: all arguments in one buffer.
_PARAM_END, _PARAM_BUFFER, _PARAM_SIZE = 0, 1, 2


def _public_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


try:
    _current_stream = torch._C._cuda_getCurrentRawStream
    """The address of the current stream; makes no object of it, unlike the public function."""
except AttributeError:  # also in a PyTorch without CUDA
    _current_stream = _public_stream

Defines = tuple[tuple[str, int], ...]
"""Macros of a variant of scan.cu."""


@lru_cache(maxsize=64)
def available(device: int) -> bool:
    """Returns whether kernels can be compiled and loaded for a GPU."""
    return (
        torch.cuda.get_device_capability(device) >= _CAPABILITY
        and find_spec("cuda") is not None
        and find_spec("cuda.bindings") is not None
    )


def _check(result: tuple[Any, ...]) -> Any:
    """Returns the value of a cuda.bindings call, or raises RuntimeError if it failed."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"CUDA call failed: {error}")
    return values[0] if values else None


@lru_cache(maxsize=256)
def _cubin(defines: Defines, capability: tuple[int, int]) -> bytes:
    """Returns scan.cu compiled for a compute capability, from the disk if it is there."""
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in defines]
    source = _SOURCE.read_bytes()
    key = repr((nvrtc.nvrtcVersion()[1:], options, source))
    return cached(key, lambda: _compile(source, options))


def _compile(source: bytes, options: list[str]) -> bytes:
    from cuda.bindings import nvrtc

    program = _check(nvrtc.nvrtcCreateProgram(source, b"scan.cu", 0, [], []))
    encoded = [option.encode() for option in options]
    error = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]
    if int(error) != 0:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"scan.cu does not compile for {options}:\n{log.decode()}")
    cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    return cubin


@lru_cache(maxsize=256)
def _function(name: str, defines: Defines, device: int) -> Any:
    from cuda.bindings import driver

    cubin = _cubin(defines, torch.cuda.get_device_capability(device))
    module = _check(driver.cuModuleLoadData(cubin))
    return _check(driver.cuModuleGetFunction(module, name.encode()))


def launch(
    name: str, defines: Defines, grid: tuple[int, int], threads: int, code: str,
    *arguments: Tensor | int | None,
) -> None:  # fmt: skip
    """Launches a kernel of scan.cu on the current device and stream.

    Args:
        name: The kernel.
        defines: The macros it is compiled with.
        grid: CTAs.
        threads: Threads per CTA.
        code: The `struct` codes of the arguments: `P` pointer, `q` 64-bit and `i` 32-bit integer.
            Native alignment is the kernel's own.
        arguments: Tensors or None for pointers, integers.
    """
    from cuda.bindings import driver

    device = torch.cuda.current_device()
    values = [0 if x is None else x if isinstance(x, int) else x.data_ptr() for x in arguments]
    buffer = ctypes.create_string_buffer(struct.pack(code, *values))
    size = ctypes.c_size_t(struct.calcsize(code))
    extra = (ctypes.c_void_p * 5)(
        _PARAM_BUFFER, ctypes.addressof(buffer), _PARAM_SIZE, ctypes.addressof(size), _PARAM_END
    )
    _check(
        driver.cuLaunchKernel(
            _function(name, defines, device), *grid, 1, threads, 1, 1, 0,
            _current_stream(device), 0, ctypes.addressof(extra),
        )
    )  # fmt: skip
