"""Backends of the kernels as a parameter of tests: a case is written once and runs on all of them.

`cpu` computes with Numba, `interpreter` runs the Triton kernels on a CPU, `cuda` on a GPU;
`compile-only` compiles them for a GPU that need not be there, since the interpreter lets pass what
the compiler refuses.
"""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

COMPUTE = ("cpu", "interpreter", "cuda")
TRITON = ("interpreter", "cuda")
CUDA = ("cuda",)
COMPILE = ("compile-only",)
EVERY = (*COMPUTE, *COMPILE)

_MARKS = {"cuda": pytest.mark.cuda, "interpreter": pytest.mark.interpreter}


class Backend(NamedTuple):
    """Where the kernels of a case come from and what is done with them."""

    name: str
    kernels: str
    """A backend of `ops.kernels.kernels_of`."""
    device: str
    computes: bool


def each(names: str, rows: dict[tuple[str, ...], Sequence[Any]]) -> pytest.MarkDecorator:
    """Parametrizes a test with backends, and with cases for each group of them.

    Args:
        names: Names of the test's arguments after `backend`, separated by blanks.
        rows: Values of these arguments for each group of backends; where there is one name, a value
            stands alone.
    """
    single = len(names.split()) == 1
    parameters = [
        pytest.param(
            backend,
            *((row,) if single else row),
            id="-".join(map(str, (backend, row) if single else (backend, *row))),
            marks=_MARKS.get(backend, ()),
        )
        for backends, cases in rows.items()
        for backend in backends
        for row in cases
    ]
    return pytest.mark.parametrize(("backend", *names.split()), parameters, indirect=["backend"])


def on(*backends: str) -> pytest.MarkDecorator:
    """Parametrizes a test with backends."""
    parameters = [pytest.param(backend, marks=_MARKS.get(backend, ())) for backend in backends]
    return pytest.mark.parametrize("backend", parameters, indirect=True)


def prepare(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Makes a backend ready; afterwards `compile-only` fails where nothing was compiled."""
    if name == "cpu":
        yield Backend(name, "cpu", "cpu", True)
        return
    pytest.importorskip("triton")
    if name != "compile-only":
        yield Backend(name, "cuda", "cuda" if name == "cuda" else "cpu", True)
        return
    compiled = _compile_only(monkeypatch)
    yield Backend(name, "cuda", "cpu", False)
    assert compiled, "nothing was compiled"
    assert all(kernel.asm["cubin"] for kernel in compiled)


def _compile_only(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets a launch compile its kernel for an H100; returns the list of what was compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    no_device = -1  # no launch finds what is compiled for it
    pretended = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: no_device,
        get_current_stream=lambda device: device,
    )
    run, compiled = JITFunction.run, []

    def compile_kernel(self, *args, **kwargs):
        compiled.append(run(self, *args, **{**kwargs, "warmup": True}))
        return compiled[-1]

    monkeypatch.setattr(driver, "_active", pretended)
    monkeypatch.setattr(JITFunction, "run", compile_kernel)
    return compiled
