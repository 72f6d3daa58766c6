"""Tiles of whole rows: what the kernels over SCAttn and the sum over directions share (Triton).

A tile holds all channels of some tokens, of one or some directions, as [directions, parts, tokens,
WIDTH]. Eight lanes read a part of a row in half precision, so that a sum over a row, the costly
step, leaves them in few exchanges.
"""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from .common import cdiv, next_power_of_2

WIDTH = tl.constexpr(64)
"""Channels of a part."""

_TILE = 512
"""Elements of one direction in a warp's tile: 16 of a lane."""


class Tiling(NamedTuple):
    """How rows are cut into tiles, in powers of two."""

    directions: int
    parts: int
    """Parts of a row."""
    tokens: int
    warps: int

    def arguments(self) -> dict[str, int]:
        """As the kernels take them."""
        return {"BK": self.directions, "PARTS": self.parts, "BT": self.tokens} | {
            "num_warps": self.warps
        }


@lru_cache(maxsize=256)
def tiling(directions: int, channels: int, at_once: int = 1) -> Tiling:
    """Tiles of a warp's size, of so many directions at most; longer rows take more warps.

    One direction at a time mostly pays: the registers that two need cost more warps than the loads
    under way gain.
    """
    width = WIDTH.value
    parts = next_power_of_2(cdiv(channels, width))
    at_once = min(next_power_of_2(directions), at_once)
    tokens, warps = _TILE // (parts * width), parts * width // _TILE
    return Tiling(at_once, parts, max(tokens, 1), min(max(warps, 1), 32))


@triton.jit
def channel_offsets(PARTS: tl.constexpr):
    """[1, PARTS, 1, WIDTH]."""
    o_part = (tl.arange(0, PARTS) * WIDTH)[None, :, None, None]
    return o_part + tl.arange(0, WIDTH)[None, None, None, :]


@triton.jit
def token_offsets(BT: tl.constexpr):
    """[1, 1, BT, 1]."""
    return tl.arange(0, BT)[None, None, :, None]


@triton.jit
def direction_offsets(BK: tl.constexpr):
    """[BK, 1, 1, 1]."""
    return tl.arange(0, BK)[:, None, None, None]


@triton.jit
def load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_directions(y, i_b, o_k, o_t, o_d, mask, K, length, channels):
    """Outputs of some directions as they lie in memory; 0 past the last direction."""
    p_y = y + ((i_b * K + o_k) * length + o_t) * channels + o_d
    return tl.load(p_y, mask=mask & (o_k < K), other=0.0)


@triton.jit
def sum_rows(b_x):
    """Over channels: [*, PARTS, BT, WIDTH] -> [*, 1, BT, 1]."""
    return tl.sum(tl.sum(b_x, axis=3, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def sum_tokens(b_x):
    """[*, PARTS, BT, WIDTH] -> [*, PARTS, 1, WIDTH]."""
    return tl.sum(b_x, axis=2, keep_dims=True)


@triton.jit
def sum_directions(b_x):
    """[BK, PARTS, BT, WIDTH] -> [1, PARTS, BT, WIDTH]."""
    return tl.sum(b_x, axis=0, keep_dims=True)


@triton.jit
def normalised_rows(b_y, m_d, channels, eps):
    """xhat and 1 / std of rows that are 0 outside the mask."""
    b_y = tl.where(m_d, b_y - sum_rows(b_y) / channels, 0.0)
    rstd = 1.0 / tl.sqrt(sum_rows(b_y * b_y) / channels + eps)
    return b_y * rstd, rstd


@triton.jit
def norm_gradient(b_g, b_xhat, b_rstd, channels):
    """Of rows, from the gradient of what `normalised_rows` made of them."""
    along = sum_rows(b_g * b_xhat) / channels
    return (b_g - sum_rows(b_g) / channels - b_xhat * along) * b_rstd


def token_strides(*tensors):
    """Of image and token."""
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])]
