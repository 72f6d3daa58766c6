"""The kernels of every op by backend: the one place of the tests that knows where they are."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from localmamba.ops.combine.reference import CombineInputs, SCAttnInputs, SCAttnParameters

OPERATORS = {
    "selective_scan": ("selective_scan", "scan_forward", "scan_backward"),
    "causal_conv": ("causal_conv", "forward", "backward"),
    "depthwise_conv": ("depthwise_conv", "forward", "backward"),
    "pool_directions": ("combine", "pool_forward", "pool_backward"),
    "combine_directions": ("combine", "combine_forward", "combine_backward"),
    "scattn_weights": ("combine", "weights_forward", "weights_backward"),
    "scattn_combine": ("combine", "weights_forward", "scattn_backward"),
    "residual_norm": ("residual_norm", "forward", "backward"),
}
"""The folder of each op, and the names of its host functions in `reference`, `cpu` and `cuda`."""

PACKED = {
    "combine_directions": CombineInputs,
    "scattn_weights": SCAttnParameters,
    "scattn_combine": SCAttnInputs,
}
"""The type of the last argument of an op's host functions, where it holds several inputs."""


@cache
def kernels_of(op: str, backend: str) -> SimpleNamespace:
    """Returns the host functions `forward` and `backward` of an op.

    Args:
        op: A key of `OPERATORS`.
        backend: `reference`, `cpu` or `cuda`; for the scan also `triton` and `cuda_cpp`.
    """
    if backend in ("triton", "cuda_cpp"):
        return {"triton": _triton_scan, "cuda_cpp": _cuda_cpp_scan}[backend]()
    folder, forward, backward = OPERATORS[op]
    module = importlib.import_module(f"localmamba.ops.{folder}.{backend}")
    pack = _pack(PACKED[op]) if op in PACKED else lambda function: function
    return SimpleNamespace(
        forward=pack(getattr(module, forward)), backward=pack(getattr(module, backward))
    )


def _pack(fields: type) -> Callable[[Callable], Callable]:
    """Lets a host function take the fields of its last argument one by one."""
    count = len(fields._fields)
    return lambda function: lambda *args: function(*args[:-count], fields(*args[-count:]))


def _triton_scan() -> SimpleNamespace:
    forward = importlib.import_module("localmamba.ops.selective_scan.triton_scan_forward")
    backward = importlib.import_module("localmamba.ops.selective_scan.triton_scan_backward")
    return SimpleNamespace(forward=forward.scan_forward, backward=backward.scan_backward)


def _cuda_cpp_scan() -> SimpleNamespace:
    """The kernels of scan.cu, which take no gate."""
    module = importlib.import_module("localmamba.ops.selective_scan.warp_scan")

    def forward(u, dt, A, B, C, D, z, *rest):
        assert z is None
        return module.scan_forward(u, dt, A, B, C, D, *rest)

    def backward(dy, u, dt, A, B, C, D, z, *rest):
        *gradients, dbias = module.scan_backward(dy, u, dt, A, B, C, D, *rest)
        return *gradients, z, dbias

    return SimpleNamespace(forward=forward, backward=backward)


@cache
def _modules(folder: str) -> tuple[ModuleType, ...]:
    package = importlib.import_module(f"localmamba.ops.{folder}")
    found = [package]
    for module in pkgutil.iter_modules(package.__path__):
        try:
            found.append(importlib.import_module(f"{package.__name__}.{module.name}"))
        except ModuleNotFoundError as error:
            if error.name not in ("triton", "numba"):
                raise
    return tuple(found)


def private(folder: str, name: str) -> Any:
    """Returns what a module of a folder of `localmamba.ops` calls by a private name."""
    return getattr(next(_having(folder, name)), name)


def patch(monkeypatch: pytest.MonkeyPatch, folder: str, name: str, value: Any) -> None:
    """Replaces a private name in every module of a folder of `localmamba.ops` that has it."""
    modules = list(_having(folder, name))
    assert modules, f"no module of localmamba.ops.{folder} has {name}"
    for module in modules:
        monkeypatch.setattr(module, name, value)


def _having(folder: str, name: str) -> Iterator[ModuleType]:
    return (module for module in _modules(folder) if hasattr(module, name))
