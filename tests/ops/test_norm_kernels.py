"""The kernels of the norm of the residual stream on every backend."""

import pytest
import torch
from kernel_cases import DTYPES, EPS, each_dtype, each_layout, subsets
from norm_cases import NORM_OPTIONS, check_norm, norm_arguments
from ops.backends import COMPILE, COMPUTE, CUDA, TRITON, each, on
from ops.helpers import random
from ops.kernels import few_programs, kernels_of, private

pytestmark = pytest.mark.usefixtures("poisoned_memory")

F32, BF16, F16 = DTYPES


@each(
    "shape options dtype",
    {
        COMPUTE: [
            *(((2, 15, 6), options, F32) for options in subsets(NORM_OPTIONS)),
            *(
                (shape, NORM_OPTIONS, F32)
                for shape in (
                    (0, 5, 6), (1, 1, 2), (2, 300, 6), (3, 7, 96), (2, 5, 538), (2, 5, 1100)
                )
            ),
            ((2, 3, 4, 6), ("residual", "bias", "stream"), F32),
        ],
        CUDA: [
            (*case, dtype)
            for dtype in DTYPES
            for case in (
                ((2, 1, 6), NORM_OPTIONS),
                ((3, 197, 192), ("residual", "rotary", "stream")),
                ((3, 197, 384), ("rotary",)),
                ((2, 7, 9, 96), ("residual", "bias", "stream")),
                ((2, 70, 1536), ("bias",)),
                ((40, 196, 192), ("residual",)),
            )
        ],
        COMPILE: [
            *(((2, 15, 96), options, BF16) for options in subsets(NORM_OPTIONS)),
            *(((2, 15, channels), NORM_OPTIONS, F32) for channels in (2, 100, 768, 1536)),
        ],
    },
)  # fmt: skip
def test_residual_norm(backend, shape, options, dtype):
    check_norm(backend, norm_arguments(shape, options, dtype, backend.device), dtype)


@on(*TRITON)
@pytest.mark.parametrize("options", [(), NORM_OPTIONS], ids=["rms", "all"])
def test_few_programs(backend, options, monkeypatch):
    """As with large batches: a program has several tiles, the last one fewer."""
    few_programs(monkeypatch, "residual_norm")
    check_norm(backend, norm_arguments((2, 37, 96), options, F32, backend.device), F32)


@each_layout
@each(
    "shape dtype",
    {COMPUTE: [((2, 15, 6), dtype) for dtype in DTYPES], CUDA: [((2, 49, 96), BF16)]},
)
def test_hostile_memory(backend, shape, dtype, layout):
    tensors = norm_arguments(shape, NORM_OPTIONS, dtype, backend.device, layout=layout)
    check_norm(backend, tensors, dtype)


@each_dtype
@each_layout
@pytest.mark.parametrize("options", [(), ("bias",)], ids=["rms", "layer"])
@each("shape", {COMPUTE: [(2, 3, 5, 6)], CUDA: [(2, 7, 9, 96)]})
def test_norm_alone(backend, shape, options, layout, dtype):
    tensors = norm_arguments(shape, options, dtype, backend.device, layout=layout)
    check_norm(backend, tensors, dtype, alone=True)


@on(*COMPILE)
@pytest.mark.parametrize("options", [(), ("bias",)], ids=["rms", "layer"])
def test_norm_alone_compiles(backend, options):
    check_norm(backend, norm_arguments((2, 15, 96), options, BF16), BF16, alone=True)


@on(*COMPUTE)
def test_without_eps_rows_past_the_end_do_not_count(backend):
    x, weight = random(2, 15, 6).to(backend.device), random(6).to(backend.device)
    gradients = kernels_of("residual_norm", backend.kernels).backward(
        random(2, 15, 6, seed=1).to(backend.device),
        dstream=None, stream=x, weight=weight, bias=None, cos=None, sin=None, scale=None, eps=0.0,
        hidden_dtype=F32, has_residual=False,
    )  # fmt: skip
    assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@on(*TRITON)
def test_saturates_in_float16(backend):
    large = torch.full((1, 2, 3, 4), -4e4, dtype=F16, device=backend.device)
    weight = torch.full((4,), 1e5, device=backend.device)
    normed, _ = kernels_of("residual_norm", backend.kernels).forward(
        hidden=large, residual=None, weight=weight, bias=None, cos=None, sin=None, scale=None,
        eps=EPS, dtype=F16, keep_stream=False,
    )  # fmt: skip
    assert (normed == -65504).all()


@on(*TRITON)
def test_tiles_hold_rows_of_any_size(backend):
    del backend
    row_tile = private("residual_norm", "row_tile")
    for channels in (*range(1, 1100), 1536, 3072, 5000):
        tile = row_tile(channels)
        assert tile.tiles * tile.width >= channels
    for channels in (96, 192, 384, 768):  # of the models
        tile = row_tile(channels)
        assert tile.tiles * tile.width == channels
