"""Tiles of whole rows: what the kernels over SCAttn and the sum over directions share (Triton).

A row is all channels of a token of a direction. Triton's tiles are powers of two, and the models'
rows are three times one: a row is held as a tuple of three pieces, or of one, each a tile
[PARTS, BT, WIDTH] of BT tokens. Few lanes read a part of a row, and its pieces are added before
lanes exchange anything, so that a sum over a row, the costly step, takes few exchanges. K, the
directions, and D, the channels, are known when a kernel is compiled: rows that fill their pieces
then need no masks.
"""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from .triton_common import cdiv, next_power_of_2, sigmoid, silu_grad, store

WIDTH = tl.constexpr(64)
"""Channels of a part."""

TILE = 768
"""Elements of a warp's tile at most: 24 of a lane."""

SMALL_TILE = 384
"""The same for kernels that keep more of a row in registers."""


class Tiling(NamedTuple):
    """How rows are cut into tiles; parts, tokens and warps in powers of two."""

    directions: int
    """Whose loads are under way at once."""
    pieces: int
    """Of a row."""
    parts: int
    """Of a piece."""
    tokens: int
    warps: int

    def arguments(self) -> dict[str, int]:
        """As the kernels take them."""
        sizes = {"TILES": self.pieces, "PARTS": self.parts, "BT": self.tokens}
        return {"BK": self.directions, **sizes, "num_warps": self.warps}


@lru_cache(maxsize=256)
def tiling(directions: int, channels: int, at_once: int = 4, tile: int = TILE) -> Tiling:
    """Tiles of a warp's size, of so many directions at most; longer rows take more warps."""
    parts = cdiv(channels, WIDTH.value)
    whole, third = next_power_of_2(parts), next_power_of_2(cdiv(parts, 3))
    pieces, parts = (3, third) if 3 * third < whole else (1, whole)
    row = pieces * parts * WIDTH.value
    tokens, warps = max(tile // row, 1), next_power_of_2(cdiv(row, tile))
    tokens = 1 << (tokens.bit_length() - 1)
    return Tiling(min(directions, at_once), pieces, parts, tokens, min(warps, 32))


@triton.jit
def channel_offsets(TILES: tl.constexpr, PARTS: tl.constexpr):
    """Of every piece, [PARTS, 1, WIDTH]."""
    o_part = (tl.arange(0, PARTS) * WIDTH)[:, None, None]
    o_piece = o_part + tl.arange(0, WIDTH)[None, None, :]
    offsets = ()
    for i in tl.static_range(TILES):
        offsets += (o_piece + i * PARTS * WIDTH,)
    return offsets


@triton.jit
def token_offsets(BT: tl.constexpr):
    """[1, BT, 1]."""
    return tl.arange(0, BT)[None, :, None]


@triton.jit
def load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_rows(pointers, o_d, m_t, D: tl.constexpr):
    """Rows as they lie in memory, from pointers to their first channels; 0 outside the mask."""
    rows = ()
    for i in tl.static_range(len(o_d)):
        rows += (tl.load(pointers + o_d[i], mask=m_t & (o_d[i] < D), other=0.0),)
    return rows


@triton.jit
def load_directions(
    y, i_b, k, o_t, o_d, m_t, length, K: tl.constexpr, D: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Rows of BK directions from the k-th on: all are under way before one is used."""
    directions = ()
    for j in tl.static_range(BK):
        p_y = y + ((i_b * K + k + j) * length + o_t) * D
        directions += (load_rows(p_y, o_d, m_t & (k + j + o_t * 0 < K), D),)
    return directions


@triton.jit
def store_rows(pointers, rows, o_d, m_t, D: tl.constexpr, SATURATES: tl.constexpr):
    """Outputs saturate in float16, gradients do not: see `store`."""
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
    """Rows times one number each."""
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
    slopes = ()
    for i in tl.static_range(len(rows)):
        b_x = rows[i].to(tl.float32)
        slopes += (silu_grad(b_x, sigmoid(b_x)),)
    return slopes


@triton.jit
def add_tiles(rows):
    """The pieces of every row, added up inside the lanes."""
    b_sum = rows[0]
    for i in tl.static_range(1, len(rows)):
        b_sum += rows[i]
    return b_sum


@triton.jit
def sum_rows(rows):
    """Over channels: [1, BT, 1]."""
    b_sum = tl.sum(add_tiles(rows), axis=2, keep_dims=True)
    return tl.sum(b_sum, axis=0, keep_dims=True)


@triton.jit
def centered_rows(rows, o_d, m_t, D: tl.constexpr, eps):
    """Rows less their means, and 1 / std, of rows that are 0 outside the mask; so are both."""
    b_mean = sum_rows(rows) * (1.0 / D)
    centred = ()
    for i in tl.static_range(len(rows)):
        centred += (tl.where(o_d[i] < D, rows[i] - b_mean, 0.0),)
    b_var = sum_rows(multiply_rows(centred, centred)) * (1.0 / D)
    # With eps = 0, rows past the end would not be numbers.
    return centred, tl.where(m_t, tl.rsqrt(b_var + eps), 0.0)


@triton.jit
def norm_grad(rows, centred, b_rstd, factor, D: tl.constexpr):
    """Of rows, from the gradient of what is normalised; times a factor.

    That is (g - mean(g) - xhat mean(g xhat)) / std: what is one number a row is multiplied first.
    """
    b_along = b_rstd * sum_rows(multiply_rows(rows, centred)) * (1.0 / D)
    b_scale = b_rstd * factor
    b_slope = b_scale * (b_rstd * b_along)
    b_mean = b_scale * (sum_rows(rows) * (1.0 / D))
    gradients = ()
    for i in tl.static_range(len(rows)):
        gradients += (rows[i] * b_scale - (centred[i] * b_slope + b_mean),)
    return gradients


@triton.jit
def store_sums(pointer, rows, o_d, D: tl.constexpr):
    """Sums over the tokens of a tile."""
    for i in tl.static_range(len(rows)):
        tl.store(pointer + o_d[i], tl.sum(rows[i], axis=1, keep_dims=True), mask=o_d[i] < D)


def token_strides(*tensors):
    """Of image and token."""
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])]
