"""Tiles of whole rows: what the kernels over SCAttn and the sum over directions share (Triton).

A tile holds all channels of some tokens as [parts, tokens, WIDTH]. Eight lanes read a part of a row
in half precision, so that a sum over a row, the costly step here, leaves them in three exchanges.
"""

from typing import NamedTuple

import triton
import triton.language as tl

WIDTH = tl.constexpr(64)
"""Channels of a part."""

_TILE = 512
"""Elements of a warp's tile: 16 of a lane."""


class Tiling(NamedTuple):
    """How rows are cut into tiles."""

    parts: int
    """Parts of a row, a power of two."""
    tokens: int
    """Tokens of a tile, a power of two."""
    warps: int


def tiling(channels: int, most_tokens: int = 16) -> Tiling:
    """Tiles of a warp's size; longer rows take more warps."""
    width = WIDTH.value
    parts = triton.next_power_of_2(triton.cdiv(channels, width))
    tokens = min(max(_TILE // (parts * width), 1), most_tokens)
    return Tiling(parts, tokens, max(1, parts * width // _TILE))


@triton.jit
def channel_offsets(PARTS: tl.constexpr):
    """[PARTS, 1, WIDTH]."""
    return (tl.arange(0, PARTS) * WIDTH)[:, None, None] + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def load_rows(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_channels(pointer, o_d, o_t, mask):
    """A vector over channels, as a tile: every lane reads what it needs, nothing is exchanged."""
    return tl.load(pointer + o_d + o_t * 0, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_next(pointers, mask, i, count):
    """What the next turn of a loop needs, loaded before this one works; nothing in the last."""
    there = (tl.zeros([1, 1, 1], tl.int32) + i + 1) < count
    return tl.load(pointers, mask=mask & there, other=0.0)


@triton.jit
def sum_rows(b_x):
    """[PARTS, BT, WIDTH] -> [1, BT, 1]."""
    return tl.sum(tl.sum(b_x, axis=2, keep_dims=True), axis=0, keep_dims=True)


@triton.jit
def sum_tokens(b_x):
    """[PARTS, BT, WIDTH] -> [PARTS, 1, WIDTH]."""
    return tl.sum(b_x, axis=1, keep_dims=True)


@triton.jit
def normalised_rows(b_y, m_d, channels, eps):
    """xhat and 1 / std of rows that are 0 outside the mask."""
    b_y = tl.where(m_d, b_y - sum_rows(b_y) / channels, 0.0)
    rstd = 1.0 / tl.sqrt(sum_rows(b_y * b_y) / channels + eps)
    return b_y * rstd, rstd
