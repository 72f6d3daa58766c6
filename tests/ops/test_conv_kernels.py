"""The kernels of both convolutions on every backend."""

import pytest
import torch
from kernel_cases import (
    DTYPES,
    check_kernels,
    conv_arguments,
    depthwise_arguments,
    each_dtype,
    each_layout,
    expanded,
    run_kernels,
)
from ops.backends import COMPILE, COMPUTE, CUDA, TRITON, each, on
from ops.kernels import few_programs, kernels_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")

F32, BF16, F16 = DTYPES


@each(
    "directions grid channels taps dtype",
    {
        COMPUTE: [
            *(
                (("h", "w2_flip"), grid, 6, taps, F32)
                for taps in (1, 2, 3, 4)
                for grid in ((1, 1), (3, 5), (9, 7))
            ),
            (("v",), (2, 2), 200, 4, F32),
        ],
        CUDA: [
            (("h", "v_flip", "w7"), *size, dtype)
            for dtype in DTYPES
            for size in (((1, 1), 5, 4), ((3, 5), 40, 3), ((14, 15), 384, 4))
        ],
        COMPILE: [(("h", "w2"), (3, 5), *size, BF16) for size in ((1, 4), (40, 3), (384, 4))],
    },
)
def test_causal(backend, directions, grid, channels, taps, dtype):
    arguments = conv_arguments(directions, grid, channels, taps, dtype, backend.device)
    check_kernels("causal_conv", backend, arguments, dtype)


@on(*COMPUTE)
def test_causal_along_an_index_of_another_integer_type_and_layout(backend):
    arguments = conv_arguments(("v", "w2"), (3, 3), 6, 4, F32, backend.device)
    index = arguments.rest["index"].long().t().contiguous().t()
    check_kernels("causal_conv", backend, arguments._replace(rest={"index": index}), F32)


@on(*TRITON)
def test_causal_of_few_programs(backend, monkeypatch):
    """As with large batches: a program has many tiles, the last one fewer."""
    few_programs(monkeypatch, "causal_conv")
    arguments = conv_arguments(("h", "w2_flip"), (9, 7), 6, 4, F32, backend.device)
    check_kernels("causal_conv", backend, arguments, F32)


@each_layout
@each(
    "grid channels dtype",
    {COMPUTE: [((3, 3), 5, dtype) for dtype in DTYPES], CUDA: [((9, 11), 40, BF16)]},
)
def test_causal_of_hostile_memory(backend, grid, channels, dtype, layout):
    arguments = conv_arguments(
        ("v_flip", "w2"), grid, channels, 4, dtype, backend.device, layout=layout
    )
    check_kernels("causal_conv", backend, arguments, dtype)


@each(
    "images grid channels size bias dtype",
    {
        COMPUTE: [
            (2, (1, 1), 1, 3, True, F32),
            (2, (1, 9), 6, 3, False, F32),
            (2, (8, 1), 5, 5, True, F32),
            (2, (7, 9), 70, 3, True, F32),
            (2, (15, 4), 6, 3, True, F32),
            (2, (3, 5), 6, 1, False, F32),
            (2, (2, 17), 6, 5, False, F32),
            (0, (3, 4), 5, 3, True, F32),
        ],
        CUDA: [
            (*size, dtype)
            for dtype in DTYPES
            for size in (
                (2, (1, 1), 5, 3, True),
                (1, (1, 9), 40, 3, False),
                (2, (9, 11), 70, 5, True),
                (1, (56, 56), 192, 3, True),
                (8, (56, 56), 192, 3, True),
                (3, (28, 30), 384, 3, False),
                (128, (14, 14), 96, 3, True),
                (64, (7, 7), 1536, 3, True),
            )
        ],
        COMPILE: [
            (1, (1, 1), 1, 3, True, F32),
            (1, (7, 9), 40, 5, False, F16),
            # With many images, a unit has several rows of a map.
            (1200, (1, 1), 1, 3, True, BF16),
            (600, (7, 9), 40, 3, False, F32),
            (600, (8, 9), 192, 3, True, BF16),
        ],
    },
)
def test_depthwise(backend, images, grid, channels, size, bias, dtype, monkeypatch):
    if backend.name == "interpreter":
        few_programs(monkeypatch, "depthwise_conv")
    arguments = depthwise_arguments(
        grid, channels, size, dtype, backend.device, bias=bias, images=images
    )
    check_kernels("depthwise_conv", backend, arguments, dtype)


@on("interpreter")
@pytest.mark.parametrize("bias", [False, True])
def test_depthwise_of_few_units(backend, bias):
    arguments = depthwise_arguments((3, 9), 5, 3, F32, backend.device, bias=bias)
    check_kernels("depthwise_conv", backend, arguments, F32)


@each_dtype
@each_layout
@each(
    "images grid channels",
    {COMPUTE: [(2, (8, 9), 5)], CUDA: [(1, (9, 17), 192), (64, (9, 17), 192)]},
)
def test_depthwise_of_hostile_memory(backend, images, grid, channels, layout, dtype, monkeypatch):
    if backend.name == "interpreter":
        few_programs(monkeypatch, "depthwise_conv")
    arguments = depthwise_arguments(
        grid, channels, 3, dtype, backend.device, layout=layout, images=images
    )
    check_kernels("depthwise_conv", backend, arguments, dtype)


@on(*COMPUTE)
def test_depthwise_of_expanded_memory(backend):
    arguments = depthwise_arguments((3, 4), 5, 3, F32, backend.device, layout=expanded)
    check_kernels("depthwise_conv", backend, arguments, F32)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@on(*COMPUTE)
def test_depthwise_saturates_in_float16(backend):
    arguments = depthwise_arguments((3, 4), 5, 3, F16, backend.device)
    arguments.tensors["x"].mul_(2e4).clamp_(-65504, 65504)
    results = run_kernels("depthwise_conv", backend.kernels, arguments)
    assert results["output"].isfinite().all()
    assert results["output"].max() == 65504
    assert not any(x.isnan().any() for x in results.values())


@on(*COMPUTE)
def test_gradients_in_float16_overflow(backend):
    """An infinity tells a gradient scaler to take a smaller scale; the largest number would not."""
    device = backend.device
    large = torch.full((1, 3, 4, 5), 6e4, dtype=F16, device=device)
    ones, weight = torch.ones_like(large), torch.full((5, 1, 3, 3), 3.0, device=device)
    host = kernels_of("depthwise_conv", backend.kernels)
    dx, *_ = host.backward(large, x=ones, weight=weight, bias=None)
    assert dx.isinf().all()
    index = torch.arange(4, dtype=torch.int32, device=device)[None]
    weight, bias = torch.full((1, 5, 2), 4.0, device=device), torch.full((1, 5), 9.0, device=device)
    host = kernels_of("causal_conv", backend.kernels)
    dx, *_ = host.backward(large[:, :1], x=ones[:, 0], weight=weight, bias=bias, index=index)
    assert dx.isinf().all()
