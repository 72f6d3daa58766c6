"""SCAttn's two small linear layers (Triton): from the means of the outputs to channel weights.

A kernel a layer: one for both would be too few programs (32 for 512 rows), each waiting for memory
most of the time. The first layer's sum over channels is split over programs too; who reads it next
adds up the parts. Rows are the B * K means. Products are three of TF32, which keep float32's
digits. The backward pass is in select_layers_backward.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.tiles import load
from .._common.triton_common import (
    WAVE,
    Kernel,
    cdiv,
    device_of,
    next_power_of_2,
    program_2d,
    program_3d,
    sigmoid,
)

ROWS = 16
"""Rows of a program."""

_CHANNELS, _WIDTH, _SPLITS = 64, 64, 8
"""Channels of a tile, reduced channels of a tile at most, parts of a sum at most."""


class Sizes(NamedTuple):
    """Sizes of the layers, and how their sums over channels are cut up."""

    rows: int
    channels: int
    width: int
    """Reduced channels."""
    row_tiles: int
    channel_tiles: int
    width_tiles: int
    tile_width: int
    """Reduced channels of a tile (a power of two)."""
    splits: int
    """Parts of a sum over channels."""
    share: int
    """Channels of a part."""

    def numbers(self) -> tuple[int, int, int]:
        """As the kernels take them."""
        return self.rows, self.channels, self.width

    def summing(self) -> tuple[tuple[int], dict[str, int]]:
        """Grid and tile of a kernel that leaves parts of sums over channels."""
        return (self.row_tiles * self.width_tiles * self.splits,), _tile(self.tile_width)

    def reading(self) -> tuple[tuple[int], dict[str, int]]:
        """Grid and tile of a kernel that reads them, in steps of fewer reduced channels."""
        tile = _tile(min(self.tile_width, 32)) | {"SPLITS": self.splits}
        return (self.row_tiles * self.channel_tiles,), tile


def _tile(width: int) -> dict[str, int]:
    """As the kernels take it."""
    return {"BN": ROWS, "BD": _CHANNELS, "BR": width, "num_warps": 4}


def sizes_of(means: Tensor, reduce_weight: Tensor) -> Sizes:
    width, channels = reduce_weight.shape
    rows = means.numel() // channels
    tile_width = min(_WIDTH, max(16, next_power_of_2(width)))
    row_tiles, width_tiles = cdiv(rows, ROWS), cdiv(width, tile_width)
    channel_tiles = cdiv(channels, _CHANNELS)
    # Half a wave: two programs a multiprocessor.
    splits = cdiv(WAVE // 2, max(row_tiles * width_tiles, 1))
    share = cdiv(channel_tiles, min(splits, _SPLITS))
    splits = cdiv(channel_tiles, share)
    return Sizes(
        rows, channels, width, row_tiles, channel_tiles, width_tiles, tile_width, splits,
        share * _CHANNELS,
    )  # fmt: skip


@triton.jit
def product(b_x, b_y, b_sum):
    """b_sum + b_x @ b_y with float32's digits."""
    return tl.dot(b_x, b_y, b_sum, input_precision="tf32x3")


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def row_offsets(i_n, BN: tl.constexpr):
    """[BN, 1], in 64 bits."""
    return i_n.to(tl.int64) * BN + tl.arange(0, BN)[:, None]


@triton.jit
def sum_of_parts(parts, rows, width, o_n, o_r, m, SPLITS: tl.constexpr):
    """A tile of a sum over channels that was left in parts [SPLITS, rows, width]."""
    b_sum = load(parts + o_n * width + o_r, m)
    for i_s in tl.static_range(1, SPLITS):
        b_sum += load(parts + (i_s * rows + o_n) * width + o_r, m)
    return b_sum


@Kernel
@triton.jit
def reduce_kernel(
    means, pool_weight, pool_bias, reduce_weight, parts, rows, channels, width, share,
    BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The affine part of the pooling's norm, and a part of the first layer's sum over channels."""
    i_n, i_r, i_s = program_3d(tl.cdiv(rows, BN), tl.cdiv(width, BR))
    o_n = row_offsets(i_n, BN)
    o_r = i_r * BR + tl.arange(0, BR)[None, :]
    b_sum = tl.zeros([BN, BR], tl.float32)
    for i in range(0, share, BD):
        o_d = i_s * share + i + tl.arange(0, BD)
        m_d = o_d < channels
        m = (o_n < rows) & m_d[None, :]
        b_x = load(means + o_n * channels + o_d[None, :], m)
        b_x = b_x * load(pool_weight + o_d, m_d)[None, :] + load(pool_bias + o_d, m_d)[None, :]
        m_w = (o_r < width) & m_d[:, None]
        b_sum = product(b_x, load(reduce_weight + o_r * channels + o_d[:, None], m_w), b_sum)
    p_parts = parts + (i_s * rows + o_n) * width + o_r
    tl.store(p_parts, b_sum, mask=(o_n < rows) & (o_r < width))


@Kernel
@triton.jit
def select_kernel(
    parts, reduce_bias, select_weight, select_bias, reduced, weights, rows, channels, width,
    SPLITS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """GELU, the second layer and sigmoid; keeps what the first layer answers."""
    i_d, i_n = program_2d(tl.cdiv(channels, BD))
    o_n = row_offsets(i_n, BN)
    o_d = i_d * BD + tl.arange(0, BD)[None, :]
    b_sum = tl.zeros([BN, BD], tl.float32)
    for i in range(0, width, BR):
        o_r = i + tl.arange(0, BR)
        m_r = o_r < width
        m = (o_n < rows) & m_r[None, :]
        b_reduced = sum_of_parts(parts, rows, width, o_n, o_r[None, :], m, SPLITS)
        b_reduced += load(reduce_bias + o_r, m_r)[None, :]
        if i_d == 0:
            tl.store(reduced + o_n * width + o_r[None, :], b_reduced, mask=m)
        m_w = (o_d < channels) & m_r[:, None]
        b_weight = load(select_weight + o_d * width + o_r[:, None], m_w)
        b_sum = product(gelu(b_reduced), b_weight, b_sum)
    m_out = (o_n < rows) & (o_d < channels)
    b_sum += load(select_bias + o_d, o_d < channels)
    tl.store(weights + o_n * channels + o_d, sigmoid(b_sum), mask=m_out)


def weights_forward(
    means, pool_weight, pool_bias, reduce_weight, reduce_bias, select_weight, select_bias
):
    means, *parameters = (
        x.contiguous()
        for x in (
            means, pool_weight, pool_bias, reduce_weight, reduce_bias, select_weight, select_bias
        )
    )  # fmt: skip
    *first, reduce_bias, select_weight, select_bias = parameters
    sizes = sizes_of(means, reduce_weight)
    weights = torch.empty_like(means)
    reduced = means.new_empty((*means.shape[:-1], sizes.width))
    parts = means.new_empty((sizes.splits, sizes.rows, sizes.width))
    if sizes.rows > 0:
        (summing, summing_tile), (reading, reading_tile) = sizes.summing(), sizes.reading()
        with device_of(means):
            reduce_kernel[summing](
                means, *first, parts, *sizes.numbers(), sizes.share, **summing_tile
            )
            select_kernel[reading](
                parts, reduce_bias, select_weight, select_bias, reduced, weights,
                *sizes.numbers(), **reading_tile,
            )  # fmt: skip
    return weights, reduced
