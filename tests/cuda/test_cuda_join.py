"""Convolutions, pooling, merging and the residual norm on a GPU against the float64 reference."""

import pytest
import torch
from kernel_cases import (
    DTYPES,
    MERGE_OPTIONS,
    check_kernels,
    check_scattn_backward,
    check_weights,
    conv_arguments,
    depthwise_arguments,
    merge_arguments,
    pool_arguments,
    weights_arguments,
)
from norm_cases import (
    NORM_OPTIONS,
    check_norm,
    check_norm_alone,
    norm_arguments,
)
from ops.helpers import LAYOUTS, random

pytest.importorskip("triton")

from localmamba.ops._common.partials import sum_partials

pytestmark = pytest.mark.usefixtures("poisoned_memory")

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
each_size = pytest.mark.parametrize(
    ("tokens", "channels", "dtype"),
    [
        (1, 5, torch.float32),
        (49, 96, torch.bfloat16),
        (197, 384, torch.float16),
        (70, 1536, torch.float32),
        (9, 3072, torch.bfloat16),
    ],
    ids=str,
)


@each_dtype
@pytest.mark.parametrize(
    ("grid", "channels", "taps"), [((1, 1), 5, 4), ((3, 5), 40, 3), ((14, 15), 384, 4)], ids=str
)
def test_convolution(grid, channels, taps, dtype):
    arguments = conv_arguments(("h", "v_flip", "w7"), grid, channels, taps, dtype, "cuda")
    check_kernels("causal_conv", "cuda", *arguments, dtype)


@each_layout
def test_convolution_of_hostile_memory(layout):
    arguments = conv_arguments(
        ("v_flip", "w2"), (9, 11), 40, 4, torch.bfloat16, "cuda", layout=layout
    )
    check_kernels("causal_conv", "cuda", *arguments, torch.bfloat16)


@each_dtype
@pytest.mark.parametrize(
    ("images", "grid", "channels", "size", "bias"),
    [
        (2, (1, 1), 5, 3, True),
        (1, (1, 9), 40, 3, False),
        (2, (9, 11), 70, 5, True),
        (1, (56, 56), 192, 3, True),
        (8, (56, 56), 192, 3, True),
        (3, (28, 30), 384, 3, False),
        (128, (14, 14), 96, 3, True),
        (64, (7, 7), 1536, 3, True),
    ],
    ids=str,
)
def test_depthwise_convolution(images, grid, channels, size, bias, dtype):
    arguments = depthwise_arguments(grid, channels, size, dtype, "cuda", bias=bias, images=images)
    check_kernels("depthwise_conv", "cuda", *arguments, dtype)


@each_dtype
@each_layout
@pytest.mark.parametrize("images", [1, 64], ids=["one row", "seven rows"])
def test_depthwise_convolution_of_hostile_memory(images, layout, dtype):
    arguments = depthwise_arguments((9, 17), 192, 3, dtype, "cuda", layout=layout, images=images)
    check_kernels("depthwise_conv", "cuda", *arguments, dtype)


@each_size
@pytest.mark.parametrize("gated", [False, True])
def test_pooling(tokens, channels, gated, dtype):
    arguments = pool_arguments(tokens, channels, gated, dtype, "cuda")
    check_kernels("pool_directions", "cuda", *arguments, dtype)


@each_layout
def test_pooling_of_hostile_memory(layout):
    arguments = pool_arguments(49, 96, True, torch.bfloat16, "cuda", layout=layout)
    check_kernels("pool_directions", "cuda", *arguments, torch.bfloat16)


@each_size
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("gate_first", [False, True])
def test_both_gradients_of_scattn(tokens, channels, gate_first, norm, dtype):
    check_scattn_backward("cuda", tokens, channels, gate_first, norm, dtype, "cuda")


@pytest.mark.parametrize(
    ("rows", "channels", "width"),
    [
        ((3, 3), 1, 1),
        ((2, 4), 24, 3),
        ((9, 4), 100, 70),
        ((128, 4), 384, 48),
        ((33, 4), 768, 96),
        ((128, 4), 1536, 192),
    ],
    ids=str,
)
def test_linear_layers_of_scattn(rows, channels, width):
    check_weights("cuda", *weights_arguments(rows, channels, width, "cuda"))


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2, 965, 192), 1),
        ((256, 7680), 0),
        ((128, 4, 2, 6912), (0, 2)),
        ((4, 5, 6, 7), (1, 3)),
        ((4, 300, 1000), 0),
        ((2, 3, 12, 6304), 2),
    ],
    ids=str,
)
@each_dtype
def test_sums_of_partials(shape, axes, dtype):
    x = random(*shape, dtype=dtype).cuda()
    found = sum_partials(x, axes, torch.float32)
    torch.testing.assert_close(found, x.double().sum(axes).float(), rtol=1e-5, atol=1e-4)


@each_size
@pytest.mark.parametrize(
    "options",
    [(), ("channel", "z"), ("channel", "z", "norm"), MERGE_OPTIONS],
    ids=lambda chosen: "+".join(chosen),
)
def test_merging(tokens, channels, options, dtype):
    arguments = merge_arguments(tokens, channels, options, dtype, "cuda")
    check_kernels("combine_directions", "cuda", *arguments, dtype)


@each_layout
def test_merging_of_hostile_memory(layout):
    arguments = merge_arguments(
        49, 96, MERGE_OPTIONS, torch.bfloat16, "cuda", layout=layout, gradient_layout=layout
    )
    check_kernels("combine_directions", "cuda", *arguments, torch.bfloat16)


@pytest.mark.parametrize("options", [("channel", "z", "norm"), ("token", "channel")], ids=str)
@pytest.mark.parametrize("directions", [1, 2, 8, 13])
def test_merging_of_few_and_many_directions(directions, options):
    arguments = merge_arguments(9, 70, options, torch.bfloat16, "cuda", directions=directions)
    check_kernels("combine_directions", "cuda", *arguments, torch.bfloat16)


@each_dtype
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 1, 6), NORM_OPTIONS),
        ((3, 197, 192), ("residual", "rotary", "stream")),
        ((3, 197, 384), ("rotary",)),
        ((2, 7, 9, 96), ("residual", "bias", "stream")),
        ((2, 70, 1536), ("bias",)),
        ((40, 196, 192), ("residual",)),
    ],
    ids=str,
)
def test_residual_norm(shape, options, dtype):
    check_norm("cuda", norm_arguments(shape, options, dtype, "cuda"), dtype)


@each_layout
def test_residual_norm_of_hostile_memory(layout):
    tensors = norm_arguments((2, 49, 96), NORM_OPTIONS, torch.bfloat16, "cuda", layout=layout)
    check_norm("cuda", tensors, torch.bfloat16)


@each_dtype
@each_layout
@pytest.mark.parametrize("options", [(), ("bias",)], ids=["rms", "layer"])
def test_norm_alone(options, layout, dtype):
    tensors = norm_arguments((2, 7, 9, 96), options, dtype, "cuda", layout=layout)
    check_norm_alone("cuda", tensors, dtype)
