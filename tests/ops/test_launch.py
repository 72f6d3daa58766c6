"""Launches of Triton kernels: what was compiled is found again for the same arguments alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from localmamba.ops._common import triton_common


class Compiled:
    """A compiled kernel that notes its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __getitem__(self, grid: tuple[int, int, int]):
        return lambda *arguments: self.launches.append((grid, *arguments))


class Function:
    """A function of `triton.jit` of x, n, FLAG and BLOCK, that notes what it compiles."""

    arg_names = ("x", "n", "FLAG", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]):
        def run(*_: Any, **__: Any) -> Compiled:
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return run


class OnGPU(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def on_gpu(x: Tensor) -> Tensor:
    return x.as_subclass(OnGPU)


@pytest.fixture
def function() -> Function:
    return Function()


def test_a_second_launch_compiles_nothing(function: Function) -> None:
    kernel = triton_common.Kernel(function)
    x, y = on_gpu(torch.zeros(32)), on_gpu(torch.zeros(32))
    kernel[(5,)](x, 3, BLOCK=8, FLAG=True, num_warps=4)
    kernel[(6, 2)](y, 3, BLOCK=8, FLAG=True, num_warps=4)
    (compiled,) = function.compiled
    ((grid, first, *rest),) = compiled.launches
    assert grid == (6, 2, 1)
    assert first is y
    assert rest == [3, True, 8]  # constants stand in the order of the parameters


aligned = torch.zeros(33)


@pytest.mark.parametrize(
    "other",
    [
        ((aligned[1:], 3), {"FLAG": True, "BLOCK": 8}),
        ((aligned.half(), 3), {"FLAG": True, "BLOCK": 8}),
        ((aligned, 1), {"FLAG": True, "BLOCK": 8}),
        ((aligned, 16), {"FLAG": True, "BLOCK": 8}),
        ((aligned, 3.0), {"FLAG": True, "BLOCK": 8}),
        ((aligned, None), {"FLAG": True, "BLOCK": 8}),
        ((aligned, 3), {"FLAG": False, "BLOCK": 8}),
        ((aligned, 3), {"FLAG": True, "BLOCK": 16}),
        ((aligned, 3), {"FLAG": True, "BLOCK": 8, "num_warps": 2}),
    ],
    ids=["start", "dtype", "one", "sixteen", "float", "None", "flag", "block", "warps"],
)
def test_other_arguments_compile_anew(function: Function, other: tuple) -> None:
    kernel = triton_common.Kernel(function)
    arguments, constants = other
    kernel[(1,)](on_gpu(aligned), 3, FLAG=True, BLOCK=8)
    kernel[(1,)](on_gpu(arguments[0]), *arguments[1:], **constants)
    assert len(function.compiled) == 2
    assert not any(compiled.launches for compiled in function.compiled)


def test_off_a_gpu_triton_launches(function: Function) -> None:
    kernel = triton_common.Kernel(function)
    for _ in range(2):
        kernel[(1,)](aligned, 3, FLAG=True, BLOCK=8)
    assert len(function.compiled) == 2


def test_variants_do_not_pile_up(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_common, "_VARIANTS", 4)
    kernel = triton_common.Kernel(function)
    for n in range(20):
        kernel[(1,)](on_gpu(aligned), n, FLAG=True, BLOCK=8)
    assert len(kernel.compiled) <= 4
