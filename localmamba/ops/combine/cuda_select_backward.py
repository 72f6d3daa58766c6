"""Backward pass of SCAttn's two small linear layers (Triton).

Three kernels: from the gradient of the channel weights through the second layer; through the first
to that of the means; and the gradients of the parameters, each program a tile of both weights over
all rows, so that nothing is left to add up.
"""

import torch
import triton
import triton.language as tl

from .._common.partials import sum_partials
from .._common.tiles import load
from .._common.triton_common import Kernel, cdiv, device_of, next_power_of_2, program_2d, program_3d
from .cuda_select import ROWS, gelu, product, row_offsets, sizes_of, sum_of_parts

_PROGRAMS = 64
"""Of the kernel for the parameters, at least, while tiles can be smaller."""

_AT_ONCE = 8
"""Parts of the channel weights' gradient that are read together, at most."""

_PARTS = 64
"""More parts, of large images, are added up before."""


@triton.jit
def _gelu_slope(x):
    """d GELU / dx."""
    normal = tl.exp(-0.5 * x * x) * 0.3989422804014327
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * normal


@triton.jit
def _sum_of_blocks(x, o_n, o_d, m, blocks, channels, AT_ONCE: tl.constexpr):
    """A tile [BN, BD] of the sum over axis 1 of x [rows, blocks, channels]."""
    b_sum = tl.zeros(m.shape, tl.float32)
    for i in range(0, blocks, AT_ONCE):
        o_b = i + tl.arange(0, AT_ONCE)[:, None, None]
        p_x = x + (o_n[None, :, :] * blocks + o_b) * channels + o_d[None, :, :]
        b_sum += tl.sum(load(p_x, m[None, :, :] & (o_b < blocks)), axis=0)
    return b_sum


@Kernel
@triton.jit
def logits_backward_kernel(
    dweights, weights, select_weight, dlogits, parts, rows, channels, width, share, blocks,
    AT_ONCE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits, and a part of the sum that leads it through the second layer."""
    i_n, i_r, i_s = program_3d(tl.cdiv(rows, BN), tl.cdiv(width, BR))
    o_n = row_offsets(i_n, BN)
    o_r = i_r * BR + tl.arange(0, BR)[None, :]
    b_sum = tl.zeros([BN, BR], tl.float32)
    for i in range(0, share, BD):
        o_d = i_s * share + i + tl.arange(0, BD)
        m = (o_n < rows) & (o_d < channels)[None, :]
        b_g = _sum_of_blocks(dweights, o_n, o_d[None, :], m, blocks, channels, AT_ONCE)
        b_weights = load(weights + o_n * channels + o_d[None, :], m)
        b_g *= b_weights * (1.0 - b_weights)
        if i_r == 0:
            tl.store(dlogits + o_n * channels + o_d[None, :], b_g, mask=m)
        m_w = (o_d < channels)[:, None] & (o_r < width)
        b_sum = product(b_g, load(select_weight + o_d[:, None] * width + o_r, m_w), b_sum)
    p_parts = parts + (i_s * rows + o_n) * width + o_r
    tl.store(p_parts, b_sum, mask=(o_n < rows) & (o_r < width))


@Kernel
@triton.jit
def means_backward_kernel(
    parts, reduced, reduce_weight, pool_weight, means, dreduced, dmeans, dpool,
    rows, channels, width,
    SPLITS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The gradients of the first layer's answer and of the means, and partial sums over rows.

    The sums, `dpool`, are of the gradients of the pooling's weight and bias, [2, tiles, channels].
    """
    i_d, i_n = program_2d(tl.cdiv(channels, BD))
    o_n = row_offsets(i_n, BN)
    o_d = i_d * BD + tl.arange(0, BD)[None, :]
    m_d = o_d < channels
    b_g = tl.zeros([BN, BD], tl.float32)
    for i in range(0, width, BR):
        o_r = i + tl.arange(0, BR)
        m_r = (o_n < rows) & (o_r < width)[None, :]
        p_r = o_n * width + o_r[None, :]
        b_dreduced = sum_of_parts(parts, rows, width, o_n, o_r[None, :], m_r, SPLITS)
        b_dreduced *= _gelu_slope(load(reduced + p_r, m_r))
        if i_d == 0:
            tl.store(dreduced + p_r, b_dreduced, mask=m_r)
        m_w = (o_r < width)[:, None] & m_d
        b_g = product(b_dreduced, load(reduce_weight + o_r[:, None] * channels + o_d, m_w), b_g)
    m = (o_n < rows) & m_d
    tl.store(dmeans + o_n * channels + o_d, b_g * load(pool_weight + o_d, m_d), mask=m)
    b_means = load(means + o_n * channels + o_d, m)
    p_pool = dpool + i_n * channels + o_d
    tl.store(p_pool, tl.sum(b_g * b_means, axis=0, keep_dims=True), mask=m_d)
    p_pool += tl.cdiv(rows, BN) * channels
    tl.store(p_pool, tl.sum(b_g, axis=0, keep_dims=True), mask=m_d)


@triton.jit
def _sum_rows(x, out, rows, channels, o_d, BN: tl.constexpr):
    """Stores the sum over rows of some columns [1, BD] of x."""
    b_sum = tl.zeros([BN, o_d.shape[1]], tl.float32)
    for i in range(0, rows, BN):
        o_n = i + tl.arange(0, BN)[:, None]
        b_sum += load(x + o_n * channels + o_d, (o_n < rows) & (o_d < channels))
    tl.store(out + o_d, tl.sum(b_sum, axis=0, keep_dims=True), mask=o_d < channels)


@Kernel
@triton.jit
def parameters_backward_kernel(
    means, reduced, dlogits, dreduced, dpool, pool_weight, pool_bias,
    dpool_weight, dpool_bias, dreduce_weight, dreduce_bias, dselect_weight, dselect_bias,
    rows, channels, width, pool_rows,
    BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A tile of the gradients of both weights; the first programs of a row or column, the rest."""
    i_d, i_r = program_2d(tl.cdiv(channels, BD))
    o_d = i_d * BD + tl.arange(0, BD)[None, :]
    o_r = i_r * BR + tl.arange(0, BR)[None, :]
    m_d, m_r = o_d < channels, o_r < width
    b_pool_weight, b_pool_bias = load(pool_weight + o_d, m_d), load(pool_bias + o_d, m_d)
    b_dreduce = tl.zeros([BR, BD], tl.float32)
    b_dselect = tl.zeros([BD, BR], tl.float32)
    b_dreduce_bias = tl.zeros([BN, BR], tl.float32)
    b_dselect_bias = tl.zeros([BN, BD], tl.float32)
    for i in range(0, rows, BN):
        o_n = (i + tl.arange(0, BN)[:, None]).to(tl.int64)
        m_nd, m_nr = (o_n < rows) & m_d, (o_n < rows) & m_r
        b_pooled = load(means + o_n * channels + o_d, m_nd) * b_pool_weight + b_pool_bias
        b_dlogits = load(dlogits + o_n * channels + o_d, m_nd)
        b_dreduced = load(dreduced + o_n * width + o_r, m_nr)
        b_act = gelu(load(reduced + o_n * width + o_r, m_nr))
        b_dreduce = product(tl.trans(b_dreduced), b_pooled, b_dreduce)
        b_dselect = product(tl.trans(b_dlogits), b_act, b_dselect)
        b_dreduce_bias += b_dreduced
        b_dselect_bias += b_dlogits
    o_d_down, o_r_down = tl.trans(o_d), tl.trans(o_r)
    m_w = (o_r_down < width) & m_d
    tl.store(dreduce_weight + o_r_down * channels + o_d, b_dreduce, mask=m_w)
    tl.store(dselect_weight + o_d_down * width + o_r, b_dselect, mask=(o_d_down < channels) & m_r)
    if i_d == 0:
        tl.store(dreduce_bias + o_r, tl.sum(b_dreduce_bias, axis=0, keep_dims=True), mask=m_r)
    if i_r == 0:
        tl.store(dselect_bias + o_d, tl.sum(b_dselect_bias, axis=0, keep_dims=True), mask=m_d)
        _sum_rows(dpool, dpool_weight, pool_rows, channels, o_d, BN)
        _sum_rows(dpool + pool_rows * channels, dpool_bias, pool_rows, channels, o_d, BN)


def _parameters_tile(channels, width):
    """Channels and reduced channels of a tile of the weights' gradients."""
    tile, tile_width = 64, 32

    def programs():
        return cdiv(channels, tile) * cdiv(width, tile_width)

    while tile > 16 and programs() < _PROGRAMS:
        tile, tile_width = (tile // 2, tile_width) if tile > tile_width else (tile, tile_width // 2)
    return tile, tile_width


def backward_of_parts(dweights, means, weights, reduced, parameters):
    """`select_backward` of a gradient in parts, [B, K, parts, D]; all in float32, contiguous."""
    pool_weight, pool_bias, reduce_weight, _, select_weight, _ = parameters
    if dweights.shape[2] > _PARTS:
        dweights = sum_partials(dweights, 2, torch.float32)[:, :, None]
    sizes, blocks = sizes_of(means, reduce_weight), dweights.shape[2]
    dlogits, dmeans, dreduced = (torch.empty_like(x) for x in (means, means, reduced))
    parts = means.new_empty((sizes.splits, sizes.rows, sizes.width))
    dpool = means.new_empty((2, sizes.row_tiles, sizes.channels))
    gradients = [torch.empty_like(x) for x in parameters]
    tile, tile_width = _parameters_tile(sizes.channels, sizes.width)
    programs = cdiv(sizes.channels, tile) * cdiv(sizes.width, tile_width)
    (summing, summing_tile), (reading, reading_tile) = sizes.summing(), sizes.reading()
    with device_of(means):
        if sizes.rows > 0:
            logits_backward_kernel[summing](
                dweights, weights, select_weight, dlogits, parts, *sizes.numbers(), sizes.share,
                blocks, AT_ONCE=min(_AT_ONCE, next_power_of_2(blocks)), **summing_tile,
            )  # fmt: skip
            means_backward_kernel[reading](
                parts, reduced, reduce_weight, pool_weight, means, dreduced, dmeans, dpool,
                *sizes.numbers(), **reading_tile,
            )  # fmt: skip
        parameters_backward_kernel[(programs,)](
            means, reduced, dlogits, dreduced, dpool, pool_weight, pool_bias, *gradients,
            *sizes.numbers(), sizes.row_tiles,
            BN=2 * ROWS, BD=tile, BR=tile_width, num_warps=4, num_stages=4,
        )  # fmt: skip
    return dmeans, gradients


def weights_backward(dweights, means, weights, reduced, *parameters):
    dweights, means, weights, reduced, *parameters = (
        x.contiguous() for x in (dweights, means, weights, reduced, *parameters)
    )
    return backward_of_parts(dweights[:, :, None], means, weights, reduced, parameters)
