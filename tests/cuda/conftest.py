"""What the GPU tests share: they skip without a GPU, and matrix products keep all their digits."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def gpu() -> Iterator[None]:
    """Skips what has no GPU; convolutions keep float32's digits (PyTorch drops some by default)."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield
