"""Sums of partial results, shared by the GPU kernels."""

import pytest
import torch
from kernel_cases import DTYPES
from ops.backends import COMPILE, CUDA, TRITON, each
from ops.helpers import random

pytest.importorskip("triton")

F32, BF16, F16 = DTYPES


@each(
    "shape axes dtype",
    {
        TRITON: [
            (*case, dtype)
            for dtype in DTYPES
            for case in (
                ((5, 3), 0),
                ((3, 600, 7), 1),
                ((2, 3, 5, 4), 2),
                ((4, 2, 1500), 0),
                ((300, 33), (0,)),
                ((9, 3, 5, 40), (0, 2)),
                ((2, 3, 4, 3, 5, 6), (1, 4)),
                ((2, 3, 4), (1, 2)),
                ((0, 3), 0),
                ((3, 0), 0),
            )
        ],
        CUDA: [
            (*case, dtype)
            for dtype in DTYPES
            for case in (
                ((2, 965, 192), 1),
                ((256, 7680), 0),
                ((128, 4, 2, 6912), (0, 2)),
                ((4, 5, 6, 7), (1, 3)),
                ((4, 300, 1000), 0),
                ((2, 3, 12, 6304), 2),
            )
        ],
        COMPILE: [
            ((1000, 2, 192), 0, F32),
            ((9, 4, 7, 40), (0, 2), F32),
            ((4, 16, 5000), 0, BF16),
        ],
    },
)
@pytest.mark.usefixtures("poisoned_memory")
def test_sums(backend, shape, axes, dtype):
    from localmamba.ops._common.partials import sum_partials

    x = random(*shape, dtype=dtype).to(backend.device)
    found = sum_partials(x, axes, F32 if backend.computes else dtype)
    assert found.shape == x.sum(axes).shape
    if backend.computes:
        close = {"rtol": 1e-5, "atol": 1e-4} if backend.name == "cuda" else {}
        torch.testing.assert_close(found, x.double().sum(axes).float(), **close)
        assert sum_partials(x, axes, dtype).dtype == dtype
