"""Convolutions, pooling, merging and the residual norm in Triton's interpreter.

test_triton_interpreter.py runs this file.
"""

from itertools import chain, combinations

import pytest
import torch
from kernel_cases import (
    DTYPES,
    EPS,
    MERGE_OPTIONS,
    check_kernels,
    check_scattn_backward,
    check_weights,
    conv_arguments,
    depthwise_arguments,
    expanded,
    merge_arguments,
    pool_arguments,
    run_kernels,
    weights_arguments,
)
from norm_cases import (
    NORM_OPTIONS,
    check_norm,
    check_norm_alone,
    norm_arguments,
)
from ops.helpers import LAYOUTS, random
from ops.kernels import kernels_of

from localmamba.ops._common.partials import sum_partials
from localmamba.ops._common.tiles import WIDTH, tiling
from localmamba.ops.causal_conv import cuda as conv
from localmamba.ops.depthwise_conv import cuda as depthwise_conv
from localmamba.ops.residual_norm import cuda as norm
from localmamba.ops.residual_norm.row_pieces import row_tile

pytestmark = pytest.mark.usefixtures("poisoned_memory")

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def subsets(options):
    found = chain.from_iterable(combinations(options, n) for n in range(len(options) + 1))
    return pytest.mark.parametrize("options", list(found), ids=lambda chosen: "+".join(chosen))


@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (9, 7)], ids=str)
def test_convolution(grid, taps):
    arguments = conv_arguments(("h", "w2_flip"), grid, 6, taps, torch.float32)
    check_kernels("causal_conv", "cuda", *arguments, torch.float32)


def test_convolution_of_many_channels():
    arguments = conv_arguments(("v",), (2, 2), 200, 4, torch.float32)
    check_kernels("causal_conv", "cuda", *arguments, torch.float32)


def test_convolution_along_an_index_of_another_integer_type_and_layout():
    *arguments, (index,) = conv_arguments(("v", "w2"), (3, 3), 6, 4, torch.float32)
    other = index.long().t().contiguous().t()
    check_kernels("causal_conv", "cuda", *arguments, (other,), torch.float32)


def test_convolution_of_few_programs(monkeypatch):
    """As with large batches: a program has many tiles, the last one fewer."""
    monkeypatch.setattr(conv, "_PROGRAMS", 8)
    arguments = conv_arguments(("h", "w2_flip"), (9, 7), 6, 4, torch.float32)
    check_kernels("causal_conv", "cuda", *arguments, torch.float32)


@each_dtype
@each_layout
def test_convolution_of_hostile_memory(layout, dtype):
    arguments = conv_arguments(("v_flip", "w2"), (3, 3), 5, 4, dtype, layout=layout)
    check_kernels("causal_conv", "cuda", *arguments, dtype)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
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
    ],
    ids=str,
)
@each_dtype
def test_sums_of_partials(shape, axes, dtype):
    x = random(*shape, dtype=dtype)
    found = sum_partials(x, axes, torch.float32)
    assert found.shape == x.sum(axes).shape
    torch.testing.assert_close(found, x.double().sum(axes).float())
    assert sum_partials(x, axes, dtype).dtype == dtype


@pytest.fixture
def many_units(monkeypatch):
    """As where there are enough for a GPU: one has several rows, and a program several of them."""
    monkeypatch.setattr(depthwise_conv, "WAVE", 1)


@pytest.mark.parametrize(
    ("grid", "channels", "size", "bias"),
    [
        ((1, 1), 1, 3, True),
        ((1, 9), 6, 3, False),
        ((8, 1), 5, 5, True),
        ((7, 9), 70, 3, True),
        ((15, 4), 6, 3, True),
        ((3, 5), 6, 1, False),
        ((2, 17), 6, 5, False),
    ],
    ids=str,
)
@pytest.mark.usefixtures("many_units")
def test_depthwise_convolution(grid, channels, size, bias):
    arguments = depthwise_arguments(grid, channels, size, torch.float32, bias=bias)
    check_kernels("depthwise_conv", "cuda", *arguments, torch.float32)


@pytest.mark.parametrize("bias", [False, True])
def test_depthwise_convolution_of_few_units(bias):
    arguments = depthwise_arguments((3, 9), 5, 3, torch.float32, bias=bias)
    check_kernels("depthwise_conv", "cuda", *arguments, torch.float32)


@each_dtype
@each_layout
@pytest.mark.usefixtures("many_units")
def test_depthwise_convolution_of_hostile_memory(layout, dtype):
    arguments = depthwise_arguments((8, 9), 5, 3, dtype, layout=layout)
    check_kernels("depthwise_conv", "cuda", *arguments, dtype)


def test_depthwise_convolution_of_expanded_memory():
    arguments = depthwise_arguments((3, 4), 5, 3, torch.float32, layout=expanded)
    check_kernels("depthwise_conv", "cuda", *arguments, torch.float32)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_depthwise_convolution_saturates_in_float16():
    gradient, tensors, rest = depthwise_arguments((3, 4), 5, 3, torch.float16)
    tensors["x"] *= 2e4
    results = run_kernels("depthwise_conv", "cuda", gradient, tensors, rest)
    assert results["output"].isfinite().all()
    assert results["output"].max() == 65504
    assert not any(x.isnan().any() for x in results.values())


def test_depthwise_convolution_of_no_images():
    arguments = depthwise_arguments((3, 4), 5, 3, torch.float32, images=0)
    check_kernels("depthwise_conv", "cuda", *arguments, torch.float32)


def test_tiles_hold_rows_of_any_size():
    for channels in (*range(1, 1100), 1536, 3072, 5000):
        norm_row, rows = row_tile(channels), tiling(4, channels)
        assert norm_row.pieces * norm_row.width >= channels
        assert rows.pieces * rows.parts * WIDTH.value >= channels


@pytest.mark.parametrize("channels", [96, 192, 384, 768])
def test_the_models_rows_fill_their_tiles(channels):
    norm_row, rows = row_tile(channels), tiling(4, 2 * channels)
    assert norm_row.pieces * norm_row.width == channels
    assert rows.pieces * rows.parts * WIDTH.value == 2 * channels


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 6), (15, 6), (70, 33), (5, 1100)])
def test_pooling(tokens, channels, gated):
    arguments = pool_arguments(tokens, channels, gated, torch.float32)
    check_kernels("pool_directions", "cuda", *arguments, torch.float32)


@each_dtype
@each_layout
def test_pooling_of_hostile_memory(layout, dtype):
    arguments = pool_arguments(15, 6, True, dtype, layout=layout)
    check_kernels("pool_directions", "cuda", *arguments, dtype)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 6), (15, 6), (70, 150)])
def test_both_gradients_of_scattn(tokens, channels, gate_first, norm):
    check_scattn_backward("cuda", tokens, channels, gate_first, norm, torch.float32)


@pytest.mark.parametrize(
    ("rows", "channels", "width"),
    [
        ((3, 3), 1, 1),
        ((2, 4), 24, 3),
        ((5, 7), 96, 12),
        ((9, 4), 100, 70),
        ((3, 4), 384, 48),
        ((25, 8), 384, 48),
        ((3, 3), 768, 96),
        ((17, 1), 1536, 192),
        ((131, 4), 24, 3),
    ],
    ids=str,
)
def test_linear_layers_of_scattn(rows, channels, width):
    check_weights("cuda", *weights_arguments(rows, channels, width))


@each_layout
def test_linear_layers_of_scattn_of_hostile_memory(layout):
    check_weights("cuda", *weights_arguments((3, 2), 24, 3, layout=layout))


@pytest.mark.parametrize("parts", [3, 11])
def test_linear_layers_of_scattn_add_up_a_gradient_in_parts(parts):
    gradient, tensors = weights_arguments((5, 4), 100, 12)
    kernels = kernels_of("scattn_weights", "cuda")
    means, *parameters = tensors.values()
    weights, reduced = kernels.forward(means, *parameters)
    split = random(5, 4, parts, 100)
    split[:, :, 0] += gradient - split.sum(2)
    dmeans, _ = kernels.backward(split, means, weights, reduced, *parameters)
    truth, _ = kernels.backward(gradient, means, weights, reduced, *parameters)
    torch.testing.assert_close(dmeans, truth)


def test_linear_layers_of_scattn_of_no_images():
    check_weights("cuda", *weights_arguments((0, 4), 24, 3))


@subsets(MERGE_OPTIONS)
def test_merging(options):
    check_kernels(
        "combine_directions", "cuda", *merge_arguments(15, 6, options, torch.float32), torch.float32
    )


@pytest.mark.parametrize(("tokens", "channels"), [(1, 6), (70, 33), (5, 1100)])
def test_merging_of_other_sizes(tokens, channels):
    arguments = merge_arguments(tokens, channels, MERGE_OPTIONS, torch.float32)
    check_kernels("combine_directions", "cuda", *arguments, torch.float32)


@each_dtype
@each_layout
def test_merging_of_hostile_memory(layout, dtype):
    arguments = merge_arguments(15, 6, MERGE_OPTIONS, dtype, layout=layout, gradient_layout=layout)
    check_kernels("combine_directions", "cuda", *arguments, dtype)


@pytest.mark.parametrize("options", [("channel", "z", "norm"), ("token", "channel")], ids=str)
@pytest.mark.parametrize("directions", [1, 2, 8, 13])
def test_merging_of_few_and_many_directions(directions, options):
    arguments = merge_arguments(9, 70, options, torch.float32, directions=directions)
    check_kernels("combine_directions", "cuda", *arguments, torch.float32)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("directions", [1, 5])
def test_pooling_of_few_and_many_directions(directions, gated):
    arguments = pool_arguments(9, 70, gated, torch.float32, directions=directions)
    check_kernels("pool_directions", "cuda", *arguments, torch.float32)


def test_pooling_and_merging_of_no_images():
    for op, arguments in (
        ("pool_directions", pool_arguments(15, 6, True, torch.float32)),
        ("combine_directions", merge_arguments(15, 6, MERGE_OPTIONS, torch.float32)),
    ):
        gradient, tensors, rest = arguments
        none = {name: x if x.dim() == 1 else x[:0] for name, x in tensors.items()}
        check_kernels(op, "cuda", gradient[:0], none, rest, torch.float32)


def test_without_eps_rows_past_the_end_do_not_count():
    gradient, tensors, _ = merge_arguments(15, 6, ("channel", "norm"), torch.float32)
    pool = kernels_of("pool_directions", "cuda")
    assert pool.forward(tensors["y"], None, 0.0).isfinite().all()
    backward = kernels_of("combine_directions", "cuda").backward
    gradients = backward(gradient, *tensors.values(), 0.0)
    assert all(g is None or g.isfinite().all() for g in gradients)
    gradients = pool.backward(random(2, 3, 6), tensors["y"], None, 0.0)
    assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_sums_and_norms_saturate_in_float16():
    large = torch.full((1, 2, 3, 4), 4e4, dtype=torch.float16)
    forward = kernels_of("combine_directions", "cuda").forward
    total = forward(large, None, None, None, None, None, EPS)
    assert (total == 65504).all()
    weight = torch.full((4,), 1e5)
    normed, _ = norm.forward(
        -large, None, weight, None, None, None, None, EPS, torch.float16, False
    )
    assert (normed == -65504).all()


def test_gradients_in_float16_overflow():
    """An infinity tells a gradient scaler to take a smaller scale; the largest number would not."""
    large = torch.full((1, 3, 4, 5), 6e4, dtype=torch.float16)
    weights, ones = torch.full((1, 3, 5), 4.0), torch.ones_like(large)
    backward = kernels_of("combine_directions", "cuda").backward
    dy, *_ = backward(large[:, 0], ones, weights, None, None, None, None, 1e-5)
    assert dy.isinf().all()
    dx, *_ = depthwise_conv.backward(large, ones, torch.full((5, 1, 3, 3), 3.0), None)
    assert dx.isinf().all()
    index = torch.arange(4, dtype=torch.int32)[None]
    weight, bias = torch.full((1, 5, 2), 4.0), torch.full((1, 5), 9.0)
    dx, *_ = conv.backward(large[:, :1], ones[:, 0], weight, bias, index)
    assert dx.isinf().all()


@subsets(NORM_OPTIONS)
def test_residual_norm(options):
    check_norm("cuda", norm_arguments((2, 15, 6), options, torch.float32), torch.float32)


@pytest.mark.parametrize(
    "shape", [(0, 5, 6), (1, 1, 2), (2, 300, 6), (3, 7, 96), (2, 5, 538), (2, 5, 1100)], ids=str
)
def test_residual_norm_of_other_sizes(shape):
    check_norm("cuda", norm_arguments(shape, NORM_OPTIONS, torch.float32), torch.float32)


@pytest.mark.parametrize("options", [(), NORM_OPTIONS], ids=["rms", "all"])
def test_residual_norm_of_few_programs(monkeypatch, options):
    """As with large batches: a program has several tiles, the last one fewer."""
    monkeypatch.setattr(norm, "_PROGRAMS", 2)
    check_norm("cuda", norm_arguments((2, 37, 96), options, torch.float32), torch.float32)


def test_gradients_of_the_norm_without_eps_do_not_count_rows_past_the_end():
    _, _, weight, *_, dnormed, _ = norm_arguments((2, 15, 6), (), torch.float32).values()
    x = random(2, 15, 6)
    gradients = norm.backward(
        dnormed, None, x, weight, None, None, None, None, 0.0, torch.float32, False
    )
    assert all(g is None or g.isfinite().all() for g in gradients)


def test_residual_norm_of_maps():
    options = ("residual", "bias", "stream")
    check_norm("cuda", norm_arguments((2, 3, 4, 6), options, torch.float32), torch.float32)


@each_dtype
@each_layout
def test_residual_norm_of_hostile_memory(layout, dtype):
    check_norm("cuda", norm_arguments((2, 15, 6), NORM_OPTIONS, dtype, layout=layout), dtype)


@each_dtype
@each_layout
@pytest.mark.parametrize("options", [(), ("bias",)], ids=["rms", "layer"])
def test_norm_alone_of_hostile_memory(options, layout, dtype):
    tensors = norm_arguments((2, 3, 5, 6), options, dtype, layout=layout)
    check_norm_alone("cuda", tensors, dtype)
