"""What every test shares: one thread a worker, and scratch memory that is poisoned on demand."""

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's kernels run in its interpreter, which is decided when they are decorated."""

MARKERS = {
    "cuda": "needs a CUDA GPU; runs with `pytest -m cuda`",
    "interpreter": "runs Triton's interpreter; `TRITON_INTERPRET=1 pytest` runs these alone",
}


def pytest_configure(config: pytest.Config) -> None:
    """Registers markers; under pytest-xdist the workers share the cores, one thread each."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # convolutions keep the digits of float32


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what needs a GPU without one; selects by whether Triton interprets."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    chosen, others = [], []
    for item in items:
        fits = bool(item.get_closest_marker("interpreter")) == INTERPRETED
        (chosen if fits else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills uninitialized memory with NaN (integers: the largest), so that an unwritten cell shows.

    Kernels allocate their results and scratch with `torch.empty` and its like, or `numpy.empty`.
    """

    def poison_tensor(make):
        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.is_floating_point() or x.is_complex():
                return x.fill_(float("nan"))
            return x if x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).max)

        return empty

    def poison_array(make):
        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            if np.issubdtype(x.dtype, np.inexact):
                x.fill(np.nan)
            return x

        return empty

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison_tensor(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poison_tensor(getattr(torch.Tensor, name)))
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(np, name, poison_array(getattr(np, name)))
