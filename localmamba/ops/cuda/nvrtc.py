"""CUDA C++ compiled at run time by NVRTC, which PyTorch's own wheels bring: no compiler is needed.

`cuda.bindings` is NVIDIA's Python interface to NVRTC and the driver, a dependency of PyTorch itself.
"""

import ctypes
import struct
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("scan.cu")


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether kernels can be compiled and loaded here."""
    return torch.cuda.is_available() and find_spec("cuda") and find_spec("cuda.bindings") is not None


def _check(result):
    """The values of a cuda.bindings call; RuntimeError if it failed."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"CUDA call failed: {error}")
    return values[0] if values else None


@lru_cache(maxsize=256)
def _cubin(defines: tuple[tuple[str, int], ...], capability: tuple[int, int]) -> bytes:
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in defines]
    source = _SOURCE.read_bytes()
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
def _function(name: str, defines: tuple[tuple[str, int], ...], device: int):
    from cuda.bindings import driver

    cubin = _cubin(defines, torch.cuda.get_device_capability(device))
    module = _check(driver.cuModuleLoadData(cubin))
    return _check(driver.cuModuleGetFunction(module, name.encode()))


def launch(
    name: str, defines: tuple[tuple[str, int], ...], grid: tuple[int, int], threads: int, *arguments
) -> None:
    """Runs a kernel of scan.cu on the current device and stream.

    Args:
        name: The kernel.
        defines: The macros it is compiled with.
        grid: Blocks.
        threads: Threads of a block.
        arguments: Tensors (or None) for pointers, `Long` for 64-bit integers, int for 32-bit ones.
    """
    from cuda.bindings import driver

    stream = torch.cuda.current_stream()
    packed = struct.pack("".join(map(_format, arguments)), *map(_value, arguments))
    buffer = ctypes.create_string_buffer(packed, len(packed))
    size = ctypes.c_size_t(len(packed))
    extra = (ctypes.c_void_p * 5)(
        _PARAM_BUFFER, ctypes.addressof(buffer), _PARAM_SIZE, ctypes.addressof(size), _PARAM_END
    )
    _check(
        driver.cuLaunchKernel(
            _function(name, defines, stream.device_index), *grid, 1, threads, 1, 1, 0,
            stream.cuda_stream, 0, ctypes.addressof(extra),
        )
    )  # fmt: skip


# Tags of cuLaunchKernel's list of extra options: all arguments in one buffer.
_PARAM_END, _PARAM_BUFFER, _PARAM_SIZE = 0, 1, 2


def _format(argument) -> str:
    """The `struct` code of an argument; native alignment is the kernel's own."""
    if argument is None or isinstance(argument, Tensor):
        return "P"
    return "q" if isinstance(argument, Long) else "i"


def _value(argument) -> int:
    if argument is None:
        return 0
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


class Long(int):
    """An argument that the kernel takes as a 64-bit integer."""
