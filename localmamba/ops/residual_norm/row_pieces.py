"""Tiles of whole rows for the norm (Triton), whose rows lie one after the other in memory.

A row is held in pieces as in tiles.py, for the same reasons; here a piece is a tile [BT, BD], of
three or four: with three of 32 channels, no lane idles over a row of 96.
"""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from .._common.tiles import add_tiles, multiply_rows
from .._common.triton_common import cdiv, next_power_of_2

_VALUES = 512
"""Of a piece: four for each lane of four warps, 16 bytes in float32."""


class RowTile(NamedTuple):
    """How rows are cut."""

    rows: int
    """Of a tile (a power of two)."""
    pieces: int
    """Of a row."""
    width: int
    """Channels of a piece (a power of two)."""
    warps: int

    def arguments(self, channels: int) -> dict[str, int]:
        """As the kernels take them."""
        return {
            "C": channels, "TILES": self.pieces, "BT": self.rows, "BD": self.width,
            "num_warps": self.warps,
        }  # fmt: skip


@lru_cache(maxsize=256)
def row_tile(channels: int) -> RowTile:
    """Three or four pieces a row, so that little is padding; up to eight that one warp can read.

    Rows of more than 1024 channels take several warps, which then exchange their sums.
    """
    width = max(2, next_power_of_2(channels) // 4)
    width = width if channels > 1024 else min(width, 128)
    rows = max(1, _VALUES // width)
    return RowTile(rows, cdiv(channels, width), width, min(max(4, width // 128), 32))


@triton.jit
def row_offsets(C: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Of a tile's first piece from its first value; the next piece's are the same from BD on."""
    return tl.arange(0, BT)[:, None] * C + tl.arange(0, BD)[None, :]


@triton.jit
def piece_mask(piece: tl.constexpr, m_t, C: tl.constexpr, BD: tl.constexpr):
    """Where the rows of a piece are."""
    return m_t[:, None] & (piece * BD + tl.arange(0, BD) < C)[None, :]


@triton.jit
def load_pieces(
    p_x, m_t, C: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Rows from a pointer on, in float32; 0 outside the mask."""
    o_x, pieces = row_offsets(C, BT, BD), ()
    for piece in tl.static_range(TILES):
        b_x = tl.load(p_x + piece * BD + o_x, mask=piece_mask(piece, m_t, C, BD), other=0.0)
        pieces += (b_x.to(tl.float32),)
    return pieces


@triton.jit
def load_parameter(x, C: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """A value for each channel, as rows: every lane reads what it needs, nothing is exchanged."""
    o_x = tl.zeros([BT, 1], tl.int32) + tl.arange(0, BD)[None, :]
    pieces = ()
    for piece in tl.static_range(TILES):
        b_x = tl.load(x + piece * BD + o_x, mask=piece * BD + o_x < C, other=0.0)
        pieces += (b_x.to(tl.float32),)
    return pieces


@triton.jit
def mean_of_rows(rows, C: tl.constexpr):
    """[BT]."""
    return tl.sum(add_tiles(rows), axis=1) * (1.0 / C)


@triton.jit
def mean_of_products(rows, others, C: tl.constexpr):
    """The same of the products of two tiles."""
    return mean_of_rows(multiply_rows(rows, others), C)
