"""SCAttn's two small linear layers on a GPU (Triton), from the means to the channel weights.

Rows are the B * K means. There is a kernel per layer: one for both would be too few programs (32
for 512 rows), each waiting for memory most of the time. The sum over channels between the layers,
of the first one forward and of the second one backward, is split among programs too; the next
kernel adds the partial sums. Products are three of TF32, which keep the precision of float32. A
last kernel computes the gradients of the parameters, each program a tile of both weights over all
rows, so that no partial sums are left.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.partials import sum_partials
from .._common.tiles import load
from .._common.triton_common import (
    Kernel,
    cdiv,
    device_of,
    next_power_of_2,
    program_2d,
    program_3d,
    sigmoid,
    wave_size,
)
from .reference import SCAttnParameters

_ROWS, _CHANNELS, _MAX_WIDTH = 16, 64, 64
"""Rows, channels and most reduced channels of a tile."""

_MAX_SPLITS = 8
"""Most partial sums of a sum over channels."""

_MIN_PROGRAMS = 64
"""Fewest programs of the parameters' kernel, while tiles can be smaller."""

_CHUNK, _MAX_BLOCKS = 8, 64
"""Most partial sums of the channel weights' gradient that are read together, and that the kernels
add at all."""


class _Layers(NamedTuple):
    """Sizes of the layers, and the launches of kernels over them."""

    sizes: tuple[int, int, int]
    """Rows, channels, reduced channels (the width)."""
    row_tiles: int
    splits: int
    """Partial sums of a sum over channels."""
    share: int
    """Channels of a partial sum."""
    writer: tuple[tuple[int], dict[str, int]]
    """Grid and constants of a kernel that writes partial sums over channels."""
    reader: tuple[tuple[int], dict[str, int]]
    """Grid and constants of a kernel that reads them, in steps of fewer reduced channels."""


def _layers(means: Tensor, reduce_weight: Tensor) -> _Layers:
    width, channels = reduce_weight.shape
    rows = means.numel() // channels
    tile_width = min(_MAX_WIDTH, max(16, next_power_of_2(width)))
    row_tiles, channel_tiles = cdiv(rows, _ROWS), cdiv(channels, _CHANNELS)
    programs = row_tiles * cdiv(width, tile_width)
    # Half a wave: two programs per SM.
    splits = cdiv(wave_size(means) // 2, max(programs, 1))
    share = cdiv(channel_tiles, min(splits, _MAX_SPLITS))
    splits = cdiv(channel_tiles, share)
    tile = {"BN": _ROWS, "BD": _CHANNELS, "BR": tile_width, "num_warps": 4}
    reader_tile = {**tile, "BR": min(tile_width, 32), "SPLITS": splits}
    return _Layers(
        sizes=(rows, channels, width),
        row_tiles=row_tiles,
        splits=splits,
        share=share * _CHANNELS,
        writer=((programs * splits,), tile),
        reader=((row_tiles * channel_tiles,), reader_tile),
    )


@triton.jit
def _dot(b_x, b_y, b_sum):
    """Computes b_sum + b_x @ b_y in the precision of float32."""
    return tl.dot(b_x, b_y, b_sum, input_precision="tf32x3")


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_grad(x):
    normal = tl.exp(-0.5 * x * x) * 0.3989422804014327
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * normal


@triton.jit
def _row_offsets(i_n, BN: tl.constexpr):
    """Returns the rows of a tile, [BN, 1], in 64 bits."""
    return i_n.to(tl.int64) * BN + tl.arange(0, BN)[:, None]


@triton.jit
def _sum_splits(partials, rows, width, o_n, o_r, m, SPLITS: tl.constexpr):
    """Computes a tile of a sum over channels from its partial sums [SPLITS, rows, width]."""
    b_sum = load(partials + o_n * width + o_r, m)
    for i_s in tl.static_range(1, SPLITS):
        b_sum += load(partials + (i_s * rows + o_n) * width + o_r, m)
    return b_sum


@Kernel
@triton.jit
def reduced_forward_kernel(
    means, pool_weight, pool_bias, reduce_weight, partials, rows, channels, width, share,
    BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Computes the affine part of the pooling's norm, and partial sums of the first layer."""
    i_n, i_r, i_s = program_3d(tl.cdiv(rows, BN), tl.cdiv(width, BR))
    o_n = _row_offsets(i_n, BN)
    o_r = i_r * BR + tl.arange(0, BR)[None, :]
    b_sum = tl.zeros([BN, BR], tl.float32)
    for i in range(0, share, BD):
        o_d = i_s * share + i + tl.arange(0, BD)
        m_d = o_d < channels
        m = (o_n < rows) & m_d[None, :]
        b_x = load(means + o_n * channels + o_d[None, :], m)
        b_x = b_x * load(pool_weight + o_d, m_d)[None, :] + load(pool_bias + o_d, m_d)[None, :]
        m_w = (o_r < width) & m_d[:, None]
        b_sum = _dot(b_x, load(reduce_weight + o_r * channels + o_d[:, None], m_w), b_sum)
    p_partials = partials + (i_s * rows + o_n) * width + o_r
    tl.store(p_partials, b_sum, mask=(o_n < rows) & (o_r < width))


@Kernel
@triton.jit
def weights_forward_kernel(
    partials, reduce_bias, select_weight, select_bias, reduced, weights, rows, channels, width,
    SPLITS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Computes GELU, the second layer and sigmoid; stores the output of the first layer."""
    i_d, i_n = program_2d(tl.cdiv(channels, BD))
    o_n = _row_offsets(i_n, BN)
    o_d = i_d * BD + tl.arange(0, BD)[None, :]
    b_sum = tl.zeros([BN, BD], tl.float32)
    for i in range(0, width, BR):
        o_r = i + tl.arange(0, BR)
        m_r = o_r < width
        m = (o_n < rows) & m_r[None, :]
        b_reduced = _sum_splits(partials, rows, width, o_n, o_r[None, :], m, SPLITS)
        b_reduced += load(reduce_bias + o_r, m_r)[None, :]
        if i_d == 0:
            tl.store(reduced + o_n * width + o_r[None, :], b_reduced, mask=m)
        m_w = (o_d < channels) & m_r[:, None]
        b_weight = load(select_weight + o_d * width + o_r[:, None], m_w)
        b_sum = _dot(_gelu(b_reduced), b_weight, b_sum)
    m_out = (o_n < rows) & (o_d < channels)
    b_sum += load(select_bias + o_d, o_d < channels)
    tl.store(weights + o_n * channels + o_d, sigmoid(b_sum), mask=m_out)


def weights_forward(means: Tensor, parameters: SCAttnParameters) -> tuple[Tensor, Tensor]:
    """Computes SCAttn's channel weights and the output of its first linear layer."""
    means, *contiguous = (x.contiguous() for x in (means, *parameters))
    *first, reduce_bias, select_weight, select_bias = contiguous
    layers = _layers(means, parameters.reduce_weight)
    rows, _, width = layers.sizes
    weights = torch.empty_like(means)
    reduced = means.new_empty((*means.shape[:-1], width))
    partials = means.new_empty((layers.splits, rows, width))
    if rows > 0:
        (writer, writer_tile), (reader, reader_tile) = layers.writer, layers.reader
        with device_of(means):
            reduced_forward_kernel[writer](
                means, *first, partials, *layers.sizes, layers.share, **writer_tile
            )
            weights_forward_kernel[reader](
                partials, reduce_bias, select_weight, select_bias, reduced, weights,
                *layers.sizes, **reader_tile,
            )  # fmt: skip
    return weights, reduced


@triton.jit
def _sum_blocks(x, o_n, o_d, m, blocks, channels, CHUNK: tl.constexpr):
    """Computes a tile [BN, BD] of the sum over axis 1 of x [rows, blocks, channels]."""
    b_sum = tl.zeros(m.shape, tl.float32)
    for i in range(0, blocks, CHUNK):
        o_b = i + tl.arange(0, CHUNK)[:, None, None]
        p_x = x + (o_n[None, :, :] * blocks + o_b) * channels + o_d[None, :, :]
        b_sum += tl.sum(load(p_x, m[None, :, :] & (o_b < blocks)), axis=0)
    return b_sum


@Kernel
@triton.jit
def logits_backward_kernel(
    dweights, weights, select_weight, dlogits, partials, rows, channels, width, share, blocks,
    CHUNK: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of the logits, and partial sums of that of GELU's output."""
    i_n, i_r, i_s = program_3d(tl.cdiv(rows, BN), tl.cdiv(width, BR))
    o_n = _row_offsets(i_n, BN)
    o_r = i_r * BR + tl.arange(0, BR)[None, :]
    b_sum = tl.zeros([BN, BR], tl.float32)
    for i in range(0, share, BD):
        o_d = i_s * share + i + tl.arange(0, BD)
        m = (o_n < rows) & (o_d < channels)[None, :]
        b_g = _sum_blocks(dweights, o_n, o_d[None, :], m, blocks, channels, CHUNK)
        b_weights = load(weights + o_n * channels + o_d[None, :], m)
        b_g *= b_weights * (1.0 - b_weights)
        if i_r == 0:
            tl.store(dlogits + o_n * channels + o_d[None, :], b_g, mask=m)
        m_w = (o_d < channels)[:, None] & (o_r < width)
        b_sum = _dot(b_g, load(select_weight + o_d[:, None] * width + o_r, m_w), b_sum)
    p_partials = partials + (i_s * rows + o_n) * width + o_r
    tl.store(p_partials, b_sum, mask=(o_n < rows) & (o_r < width))


@Kernel
@triton.jit
def means_backward_kernel(
    partials, reduced, reduce_weight, pool_weight, means, dreduced, dmeans, dpool,
    rows, channels, width,
    SPLITS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of the first layer's output and of the means.

    Stores partial sums over rows of those of the pooling's weight and bias, `dpool`, [2, tiles, D].
    """
    i_d, i_n = program_2d(tl.cdiv(channels, BD))
    o_n = _row_offsets(i_n, BN)
    o_d = i_d * BD + tl.arange(0, BD)[None, :]
    m_d = o_d < channels
    b_g = tl.zeros([BN, BD], tl.float32)
    for i in range(0, width, BR):
        o_r = i + tl.arange(0, BR)
        m_r = (o_n < rows) & (o_r < width)[None, :]
        p_r = o_n * width + o_r[None, :]
        b_dreduced = _sum_splits(partials, rows, width, o_n, o_r[None, :], m_r, SPLITS)
        b_dreduced *= _gelu_grad(load(reduced + p_r, m_r))
        if i_d == 0:
            tl.store(dreduced + p_r, b_dreduced, mask=m_r)
        m_w = (o_r < width)[:, None] & m_d
        b_g = _dot(b_dreduced, load(reduce_weight + o_r[:, None] * channels + o_d, m_w), b_g)
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
    """Computes tiles of the gradients of both weights; the first of a row or column, of the rest.

    Those are the gradients of the biases and of the pooling's weight and bias.
    """
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
        b_act = _gelu(load(reduced + o_n * width + o_r, m_nr))
        b_dreduce = _dot(tl.trans(b_dreduced), b_pooled, b_dreduce)
        b_dselect = _dot(tl.trans(b_dlogits), b_act, b_dselect)
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


def _parameters_tile(channels: int, width: int) -> tuple[int, int, int]:
    """Returns the channels and reduced channels of a tile of the weights' gradients, and tiles."""
    tile, tile_width = 64, 32
    while (tiles := cdiv(channels, tile) * cdiv(width, tile_width)) < _MIN_PROGRAMS and tile > 16:
        tile, tile_width = (tile // 2, tile_width) if tile > tile_width else (tile, tile_width // 2)
    return tile, tile_width, tiles


def weights_backward(
    dweights: Tensor, means: Tensor, weights: Tensor, reduced: Tensor, parameters: SCAttnParameters
) -> tuple[Tensor, list[Tensor]]:
    """Computes the gradients of the means and of the parameters.

    Args:
        dweights: Gradient of the channel weights, [B, K, D], or partial sums [B, K, blocks, D].
        means: The means, [B, K, D]; everything in float32.
        weights: The channel weights, [B, K, D].
        reduced: Output of the first linear layer, [B, K, D / r].
        parameters: Weights and biases.
    """
    dweights = (dweights if dweights.dim() == 4 else dweights[:, :, None]).contiguous()
    if dweights.shape[2] > _MAX_BLOCKS:
        dweights = sum_partials(dweights, 2, torch.float32)[:, :, None]
    means, weights, reduced = means.contiguous(), weights.contiguous(), reduced.contiguous()
    parameters = SCAttnParameters(*(x.contiguous() for x in parameters))
    pool_weight, pool_bias, reduce_weight, _, select_weight, _ = parameters
    layers, blocks = _layers(means, reduce_weight), dweights.shape[2]
    rows, channels, width = layers.sizes
    dlogits, dmeans, dreduced = (torch.empty_like(x) for x in (means, means, reduced))
    partials = means.new_empty((layers.splits, rows, width))
    dpool = means.new_empty((2, layers.row_tiles, channels))
    gradients = [torch.empty_like(x) for x in parameters]
    tile, tile_width, tiles = _parameters_tile(channels, width)
    (writer, writer_tile), (reader, reader_tile) = layers.writer, layers.reader
    with device_of(means):
        if rows > 0:
            logits_backward_kernel[writer](
                dweights, weights, select_weight, dlogits, partials, *layers.sizes, layers.share,
                blocks, CHUNK=min(_CHUNK, next_power_of_2(blocks)), **writer_tile,
            )  # fmt: skip
            means_backward_kernel[reader](
                partials, reduced, reduce_weight, pool_weight, means, dreduced, dmeans, dpool,
                *layers.sizes, **reader_tile,
            )  # fmt: skip
        parameters_backward_kernel[(tiles,)](
            means, reduced, dlogits, dreduced, dpool, pool_weight, pool_bias, *gradients,
            *layers.sizes, layers.row_tiles,
            BN=2 * _ROWS, BD=tile, BR=tile_width, num_warps=4, num_stages=4,
        )  # fmt: skip
    return dmeans, gradients
