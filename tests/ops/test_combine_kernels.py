"""The kernels of pooling, SCAttn's weights and the combination of directions on every backend."""

import importlib
from itertools import product

import pytest
import torch
from kernel_cases import (
    COMBINE_OPTIONS,
    DTYPES,
    EPS,
    Arguments,
    check_kernels,
    check_scattn_backward,
    check_weights,
    combine_arguments,
    each_layout,
    expanded,
    pool_arguments,
    run_weights,
    subsets,
    weights_arguments,
)
from ops.backends import COMPILE, COMPUTE, CUDA, TRITON, each, on
from ops.helpers import random
from ops.kernels import kernels_of, private

pytestmark = pytest.mark.usefixtures("poisoned_memory")

F32, BF16, F16 = DTYPES
LARGE = [(1, 5, F32), (49, 96, BF16), (197, 384, F16), (70, 1536, F32), (9, 3072, BF16)]
"""Tokens, channels and dtype."""


@each(
    "gated tokens channels dtype directions",
    {
        COMPUTE: [
            *(
                (gated, *size, F32, 3)
                for gated in (False, True)
                for size in ((1, 6), (15, 6), (70, 33), (5, 1100))
            ),
            *((gated, 9, 70, F32, directions) for gated in (False, True) for directions in (1, 5)),
        ],
        CUDA: [(gated, *size, 3) for gated in (False, True) for size in LARGE],
        COMPILE: [(gated, 15, n, BF16, 3) for gated in (False, True) for n in (1, 96, 3072)],
    },
)
def test_pooling(backend, gated, tokens, channels, dtype, directions):
    arguments = pool_arguments(
        tokens, channels, gated, dtype, backend.device, directions=directions
    )
    check_kernels("pool_directions", backend, arguments, dtype)


@each_layout
@each(
    "tokens channels dtype",
    {COMPUTE: [(15, 6, dtype) for dtype in DTYPES], CUDA: [(49, 96, BF16)]},
)
def test_pooling_of_hostile_memory(backend, tokens, channels, dtype, layout):
    arguments = pool_arguments(tokens, channels, True, dtype, backend.device, layout=layout)
    check_kernels("pool_directions", backend, arguments, dtype)


@each(
    "tokens channels gate_first norm dtype",
    {
        COMPUTE: [
            (*size, *flags, F32)
            for size in ((1, 6), (15, 6), (70, 150))
            for flags in product((False, True), repeat=2)
        ],
        CUDA: [
            (tokens, channels, *flags, dtype)
            for tokens, channels, dtype in LARGE
            for flags in product((False, True), repeat=2)
        ],
        COMPILE: [
            (15, channels, gate_first, not gate_first, BF16)
            for channels in (1, 96, 3072)
            for gate_first in (False, True)
        ],
    },
)
def test_gradients_of_scattn(backend, tokens, channels, gate_first, norm, dtype):
    check_scattn_backward(backend, tokens, channels, gate_first, norm, dtype)


@each(
    "rows channels width",
    {
        COMPUTE: [
            ((3, 3), 1, 1),
            ((2, 4), 24, 3),
            ((5, 7), 96, 12),
            ((9, 4), 100, 70),
            ((3, 4), 384, 48),
            ((25, 8), 384, 48),
            ((3, 3), 768, 96),
            ((17, 1), 1536, 192),
            ((131, 4), 24, 3),
            ((0, 4), 24, 3),
        ],
        CUDA: [((128, 4), 384, 48), ((33, 4), 768, 96), ((128, 4), 1536, 192)],
        COMPILE: [
            ((1, 1), 1, 1),
            ((16, 4), 96, 12),
            ((128, 4), 384, 48),
            ((128, 4), 1536, 192),
        ],
    },
)
def test_weights(backend, rows, channels, width):
    check_weights(backend, *weights_arguments(rows, channels, width, backend.device))


@on(*COMPUTE)
@each_layout
def test_weights_of_hostile_memory(backend, layout):
    check_weights(backend, *weights_arguments((3, 2), 24, 3, backend.device, layout=layout))


@on(*TRITON)
@pytest.mark.parametrize("parts", [3, 11])
def test_weights_add_up_a_gradient_in_parts(backend, parts):
    gradient, tensors = weights_arguments((5, 4), 100, 12, backend.device)
    means, *parameters = tensors.values()
    truth = run_weights(backend.kernels, gradient, tensors)
    split = random(5, 4, parts, 100).to(backend.device)
    split[:, :, 0] += gradient - split.sum(2)
    backward = importlib.import_module("localmamba.ops.combine.scattn_cuda").weights_backward
    parameters = private("combine", "SCAttnParameters")(*parameters)
    dmeans, _ = backward(split, means, truth["weights"], truth["reduced"], parameters)
    torch.testing.assert_close(dmeans, truth["dmeans"])


CHOSEN = [(), ("channel", "z"), ("channel", "z", "norm"), COMBINE_OPTIONS]


@each(
    "tokens channels options dtype directions",
    {
        COMPUTE: [
            *((15, 6, options, F32, 3) for options in subsets(COMBINE_OPTIONS)),
            *((*size, COMBINE_OPTIONS, F32, 3) for size in ((1, 6), (70, 33), (5, 1100))),
            *(
                (9, 70, options, F32, directions)
                for options in (("channel", "z", "norm"), ("token", "channel"))
                for directions in (1, 2, 8, 13)
            ),
        ],
        CUDA: [
            *(
                (tokens, channels, options, dtype, 3)
                for tokens, channels, dtype in LARGE
                for options in CHOSEN
            ),
            *(
                (9, 70, options, BF16, directions)
                for options in (("channel", "z", "norm"), ("token", "channel"))
                for directions in (1, 2, 8, 13)
            ),
        ],
        COMPILE: [
            *((15, 96, options, BF16, 3) for options in subsets(COMBINE_OPTIONS)),
            *((15, channels, COMBINE_OPTIONS, F16, 3) for channels in (1, 3072)),
        ],
    },
)
def test_combination(backend, tokens, channels, options, dtype, directions):
    arguments = combine_arguments(
        tokens, channels, options, dtype, backend.device, directions=directions
    )
    check_kernels("combine_directions", backend, arguments, dtype)


@each_layout
@each(
    "tokens channels dtype",
    {COMPUTE: [(15, 6, dtype) for dtype in DTYPES], CUDA: [(49, 96, BF16)]},
)
def test_combination_of_hostile_memory(backend, tokens, channels, dtype, layout):
    arguments = combine_arguments(
        tokens, channels, COMBINE_OPTIONS, dtype, backend.device, layout, gradient_layout=layout
    )
    check_kernels("combine_directions", backend, arguments, dtype)


@on(*COMPUTE)
def test_no_images(backend):
    for op, (gradient, tensors, rest) in (
        ("pool_directions", pool_arguments(15, 6, True, F32, backend.device)),
        ("combine_directions", combine_arguments(15, 6, COMBINE_OPTIONS, F32, backend.device)),
    ):
        none = {name: x if x.dim() == 1 else x[:0] for name, x in tensors.items()}
        check_kernels(op, backend, Arguments(gradient[:0], none, rest), F32)


@on(*COMPUTE)
def test_without_eps_rows_past_the_end_do_not_count(backend):
    gradient, tensors, _ = combine_arguments(
        15, 6, ("channel", "norm"), F32, backend.device, gradient_layout=expanded
    )
    pool, y = kernels_of("pool_directions", backend.kernels), tensors["y"]
    assert pool.forward(y=y, z=None, eps=0.0).isfinite().all()
    combine = kernels_of("combine_directions", backend.kernels)
    gradients = combine.backward(gradient, **tensors, eps=0.0)
    assert all(g is None or g.isfinite().all() for g in gradients)
    gradients = pool.backward(random(2, 3, 6).to(backend.device), y=y, z=None, eps=0.0)
    assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@on(*TRITON)
def test_the_sum_saturates_in_float16(backend):
    large = torch.full((1, 2, 3, 4), 4e4, dtype=F16, device=backend.device)
    names = ("channel_weights", "token_weights", "z", "norm_weight", "norm_bias")
    host = kernels_of("combine_directions", backend.kernels)
    assert (host.forward(y=large, **dict.fromkeys(names), eps=EPS) == 65504).all()


@on(*COMPUTE)
def test_gradients_in_float16_overflow(backend):
    """An infinity tells a gradient scaler to take a smaller scale; the largest number would not."""
    large = torch.full((1, 3, 4, 5), 6e4, dtype=F16, device=backend.device)
    weights = torch.full((1, 3, 5), 4.0, device=backend.device)
    names = ("token_weights", "z", "norm_weight", "norm_bias")
    dy, *_ = kernels_of("combine_directions", backend.kernels).backward(
        large[:, 0],
        y=torch.ones_like(large),
        channel_weights=weights,
        **dict.fromkeys(names),
        eps=EPS,
    )
    assert dy.isinf().all()


@on(*TRITON)
def test_tiles_hold_rows_of_any_size(backend):
    del backend
    tiling, width = private("_common", "tiling"), private("_common", "WIDTH").value
    for channels in (*range(1, 1100), 1536, 3072, 5000):
        rows = tiling(4, channels)
        assert rows.tiles * rows.parts * width >= channels
    for channels in (96, 192, 384, 768):  # of the models
        rows = tiling(4, 2 * channels)
        assert rows.tiles * rows.parts * width == 2 * channels
