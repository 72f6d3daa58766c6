"""Tiles of whole rows, for the kernels over the directions' outputs (Triton).

A row is all channels of a token of a direction. Triton's tiles are powers of two, and the models'
rows are three times one: a row is held as a tuple of three tiles, or of one, each
[PARTS, BT, WIDTH] of BT tokens. Few lanes read a part of a row, and its tiles are added before
lanes exchange anything, so that a sum over a row, the costly step, takes few exchanges. K, the
directions, and D, the channels, are known when a kernel is compiled: rows that fill their tiles
then need no masks.
"""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .triton_common import cdiv, next_power_of_2, sigmoid, silu_grad, store

WIDTH = tl.constexpr(64)
"""Channels of a part."""

TILE = 768
"""Elements of a warp's row tuple at most: 24 registers of a lane."""

SMALL_TILE = 384
"""The same for kernels that keep more of a row in registers."""


class Tiling(NamedTuple):
    """Sizes of a row's tiles; parts, tokens and warps are powers of two."""

    directions: int
    """Directions prefetched per tile."""
    tiles: int
    """Tiles per row."""
    parts: int
    """Parts per tile."""
    tokens: int
    warps: int

    def arguments(self) -> dict[str, int]:
        """Returns the sizes as the kernels take them."""
        sizes = {"TILES": self.tiles, "PARTS": self.parts, "BT": self.tokens}
        return {"BK": self.directions, **sizes, "num_warps": self.warps}


@lru_cache(maxsize=256)
def tiling(directions: int, channels: int, prefetch: int = 4, tile: int = TILE) -> Tiling:
    """Returns tiles of a warp's size for `prefetch` directions; long rows take more warps."""
    parts = cdiv(channels, WIDTH.value)
    whole, third = next_power_of_2(parts), next_power_of_2(cdiv(parts, 3))
    tiles, parts = (3, third) if 3 * third < whole else (1, whole)
    row = tiles * parts * WIDTH.value
    tokens, warps = max(tile // row, 1), next_power_of_2(cdiv(row, tile))
    tokens = 1 << (tokens.bit_length() - 1)
    return Tiling(min(directions, prefetch), tiles, parts, tokens, min(warps, 32))


@triton.jit
def channel_offsets(TILES: tl.constexpr, PARTS: tl.constexpr):
    """The channels of each tile, [PARTS, 1, WIDTH]."""
    o_part = (tl.arange(0, PARTS) * WIDTH)[:, None, None]
    o_tile = o_part + tl.arange(0, WIDTH)[None, None, :]
    offsets = ()
    for i in tl.static_range(TILES):
        offsets += (o_tile + i * PARTS * WIDTH,)
    return offsets


@triton.jit
def token_offsets(BT: tl.constexpr):
    """The tokens of a tile, [1, BT, 1]."""
    return tl.arange(0, BT)[None, :, None]


@triton.jit
def load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_rows(pointers, o_d, m_t, D: tl.constexpr):
    """Loads rows in their dtype, from pointers to their first channels; 0 outside the mask."""
    rows = ()
    for i in tl.static_range(len(o_d)):
        rows += (tl.load(pointers + o_d[i], mask=m_t & (o_d[i] < D), other=0.0),)
    return rows


@triton.jit
def load_directions(
    y, i_b, k, o_t, o_d, m_t, length, K: tl.constexpr, D: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Loads rows of BK directions from the k-th on; all loads are issued before one is used."""
    directions = ()
    for j in tl.static_range(BK):
        p_y = y + ((i_b * K + k + j) * length + o_t) * D
        directions += (load_rows(p_y, o_d, m_t & (k + j + o_t * 0 < K), D),)  # * 0: broadcasts
    return directions


@triton.jit
def store_rows(pointers, rows, o_d, m_t, D: tl.constexpr, SATURATES: tl.constexpr):
    """Stores rows; float16 outputs saturate, gradients do not (`store`)."""
    for i in tl.static_range(len(o_d)):
        if SATURATES:
            store(pointers + o_d[i], rows[i], m_t & (o_d[i] < D))
        else:
            tl.store(pointers + o_d[i], rows[i], mask=m_t & (o_d[i] < D))


@triton.jit
def zero_rows(TILES: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr):
    rows = ()
    for _ in tl.static_range(TILES):
        rows += (tl.zeros([PARTS, BT, WIDTH], tl.float32),)
    return rows


@triton.jit
def float_rows(rows):
    floats = ()
    for i in tl.static_range(len(rows)):
        floats += (rows[i].to(tl.float32),)
    return floats


@triton.jit
def multiply_rows(a, b):
    rows = ()
    for i in tl.static_range(len(a)):
        rows += (a[i].to(tl.float32) * b[i],)
    return rows


@triton.jit
def add_rows(a, b):
    rows = ()
    for i in tl.static_range(len(a)):
        rows += (a[i] + b[i],)
    return rows


@triton.jit
def scale_rows(rows, b_scale):
    """Multiplies each row by a number."""
    scaled = ()
    for i in tl.static_range(len(rows)):
        scaled += (rows[i].to(tl.float32) * b_scale,)
    return scaled


@triton.jit
def silu_rows(rows):
    gated = ()
    for i in tl.static_range(len(rows)):
        b_x = rows[i].to(tl.float32)
        gated += (b_x * sigmoid(b_x),)
    return gated


@triton.jit
def silu_grad_rows(rows):
    grads = ()
    for i in tl.static_range(len(rows)):
        b_x = rows[i].to(tl.float32)
        grads += (silu_grad(b_x, sigmoid(b_x)),)
    return grads


@triton.jit
def add_tiles(rows):
    """Adds the tiles of every row inside the lanes."""
    b_sum = rows[0]
    for i in tl.static_range(1, len(rows)):
        b_sum += rows[i]
    return b_sum


@triton.jit
def sum_rows(rows):
    """Sums rows over channels, [1, BT, 1]."""
    b_sum = tl.sum(add_tiles(rows), axis=2, keep_dims=True)
    return tl.sum(b_sum, axis=0, keep_dims=True)


@triton.jit
def centered_rows(rows, o_d, m_t, D: tl.constexpr, eps):
    """Rows minus their means, and 1 / std; 0 outside the mask, as the rows must be."""
    b_mean = sum_rows(rows) * (1.0 / D)
    centered = ()
    for i in tl.static_range(len(rows)):
        centered += (tl.where(o_d[i] < D, rows[i] - b_mean, 0.0),)
    b_var = sum_rows(multiply_rows(centered, centered)) * (1.0 / D)
    # With eps = 0, rows past the end would not be numbers.
    return centered, tl.where(m_t, tl.rsqrt(b_var + eps), 0.0)


@triton.jit
def norm_grad(rows, centered, b_rstd, factor, D: tl.constexpr):
    """The gradient of rows from that of the normalized rows, times a factor.

    (g - mean(g) - xhat mean(g xhat)) / std; factors of one number per row are multiplied first.
    """
    b_along = b_rstd * sum_rows(multiply_rows(rows, centered)) * (1.0 / D)
    b_scale = b_rstd * factor
    b_project = b_scale * (b_rstd * b_along)
    b_mean = b_scale * (sum_rows(rows) * (1.0 / D))
    gradients = ()
    for i in tl.static_range(len(rows)):
        gradients += (rows[i] * b_scale - (centered[i] * b_project + b_mean),)
    return gradients


@triton.jit
def store_sums(pointer, rows, o_d, D: tl.constexpr):
    """Stores sums over the tokens of a tile."""
    for i in tl.static_range(len(rows)):
        tl.store(pointer + o_d[i], tl.sum(rows[i], axis=1, keep_dims=True), mask=o_d[i] < D)


def token_strides(*tensors: Tensor | None) -> list[int]:
    """Returns the strides of image and token of each tensor; zeros for None."""
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])]
