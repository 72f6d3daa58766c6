"""What every test shares: one thread a worker, and scratch memory that is poisoned on demand."""

import os

import numpy as np
import pytest
import torch


def pytest_configure() -> None:
    """Under pytest-xdist the workers share the cores: more threads would only get in their way."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills uninitialised memory with NaN (integers: the largest), so that an unwritten cell shows.

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
