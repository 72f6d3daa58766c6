"""The kernels of every op by backend: the one place of the tests that knows where they are."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

OPERATORS = {
    "selective_scan": ("selective_scan", "scan_forward", "scan_backward"),
    "causal_conv": ("causal_conv", "forward", "backward"),
    "depthwise_conv": ("depthwise_conv", "forward", "backward"),
    "pool_directions": ("combine", "pool_forward", "pool_backward"),
    "combine_directions": ("combine", "combine_forward", "combine_backward"),
    "scattn_weights": ("combine", "weights_forward", "weights_backward"),
    "scattn_combine": ("combine", "combine_forward", "scattn_backward"),
    "residual_norm": ("residual_norm", "forward", "backward"),
}
"""The folder of each op, and the names of its host functions in `reference`, `cpu` and `cuda`."""


@cache
def kernels_of(op: str, backend: str) -> SimpleNamespace:
    """Returns the host functions `forward` and `backward` of an op.

    Both take their inputs by name; `backward` takes the gradient of the output first.

    Args:
        op: A key of `OPERATORS`.
        backend: `reference`, `cpu` or `cuda`; for the scan also `triton` and `cuda_cpp`.
    """
    folder, forward, backward = OPERATORS[op]
    if backend in ("triton", "cuda_cpp"):
        prefix = {"triton": "triton_", "cuda_cpp": "warp_scan"}[backend]
        modules = [m for m in _modules(folder) if m.__name__.split(".")[-1].startswith(prefix)]
    else:
        modules = [importlib.import_module(f"localmamba.ops.{folder}.{backend}")]

    def host(name: str) -> Callable:
        # A module imports host functions of another one: the own one comes first.
        found = [m for m in modules if hasattr(m, name)]
        found.sort(key=lambda m: getattr(m, name).__module__ != m.__name__)
        return by_name(getattr(found[0], name))

    kernels = SimpleNamespace(forward=host(forward), backward=host(backward))
    if backend == "cuda_cpp":
        kernels.backward = _with_gate(kernels.backward)
    return kernels


def _with_gate(backward: Callable) -> Callable:
    """Gives the gradients of scan.cu, which takes no gate, a None for it where they have none."""

    def call(*gradient: Any, **values: Any) -> list[Any]:
        found = list(backward(*gradient, **values))
        return found if len(found) == 8 else [*found[:6], None, *found[6:]]

    return call


def by_name(function: Callable) -> Callable:
    """Lets a host function take its inputs by name, those of a NamedTuple among them."""

    def call(*gradient: Any, **values: Any) -> Any:
        arguments: list[Any] = []
        for parameter in list(inspect.signature(function).parameters.values())[len(gradient) :]:
            name, kind = parameter.name, parameter.annotation
            if name in values:
                arguments.append(values.pop(name))
            elif hasattr(kind, "_fields"):
                arguments.append(kind(*(values.pop(field) for field in kind._fields)))
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                arguments.extend(values.values())
                values.clear()
            else:
                assert parameter.default is not inspect.Parameter.empty, name
        assert all(x is None for x in values.values()), f"{function} does not take {list(values)}"
        return function(*gradient, *arguments)

    return call


@cache
def _modules(folder: str) -> tuple[ModuleType, ...]:
    package = importlib.import_module(f"localmamba.ops.{folder}")
    found = []
    for module in pkgutil.iter_modules(package.__path__):
        try:
            found.append(importlib.import_module(f"{package.__name__}.{module.name}"))
        except ModuleNotFoundError as error:
            if error.name not in ("triton", "numba"):
                raise
    return tuple(found)


def having(folder: str, name: str) -> Iterator[ModuleType]:
    """The modules of a folder of `localmamba.ops` that have a name."""
    return (module for module in _modules(folder) if hasattr(module, name))


def private(folder: str, name: str) -> Any:
    """Returns what the modules of a folder of `localmamba.ops` call by a private name."""
    found = next(having(folder, name), None)
    assert found is not None, f"no module of localmamba.ops.{folder} has {name}"
    return getattr(found, name)


def patch(monkeypatch: pytest.MonkeyPatch, folder: str, **values: Any) -> None:
    """Replaces private names in every module of a folder of `localmamba.ops` that has them."""
    for name, value in values.items():
        private(folder, name)
        for module in having(folder, name):
            monkeypatch.setattr(module, name, value)


def align_weights() -> Callable:
    """Returns the GPU's kernel that casts and pads the projections of the S6 branches."""
    return importlib.import_module("localmamba.ops.selective_scan.cuda").align_weights


def few_programs(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Makes a GPU look small: a program has several tiles, as with large batches."""
    programs = {"causal_conv": 8, "residual_norm": 2}.get(op, 1)
    patch(monkeypatch, op, wave_size=lambda _: programs)
    if op == "causal_conv":
        patch(monkeypatch, op, _WAVES=1)


def warp_scan_wave(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """Sets how many programs of scan.cu a GPU runs at once, by which it cuts a pass."""
    module = importlib.import_module("localmamba.ops.selective_scan.warp_scan")
    monkeypatch.setattr(module, "wave_size", lambda _: programs)
