"""Tiles of whole rows in parts side by side, for the norm (Triton).

A tile is a tuple of parts [BT, BD]: with three of 32 channels, no lane idles over a row of 96. The
parts are added up before a sum over a row leaves a lane.
"""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from .common import cdiv, next_power_of_2

_VALUES = 512
"""Of a part: four for each lane of four warps, 16 bytes in float32."""


class RowTile(NamedTuple):
    """How rows are cut."""

    rows: int
    """Of a tile (a power of two)."""
    parts: int
    """Of a row."""
    width: int
    """Channels of a part (a power of two)."""
    warps: int

    def arguments(self, channels: int) -> dict[str, int]:
        """As the kernels take them."""
        return {
            "C": channels, "PARTS": self.parts, "BT": self.rows, "BD": self.width,
            "num_warps": self.warps,
        }  # fmt: skip


@lru_cache(maxsize=256)
def row_tile(channels: int) -> RowTile:
    """Three or four parts a row, so that little is padding; up to eight that one warp can read.

    Rows of more than 1024 channels take several warps, which then exchange their sums.
    """
    width = max(2, next_power_of_2(channels) // 4)
    width = width if channels > 1024 else min(width, 128)
    rows = max(1, _VALUES // width)
    return RowTile(rows, cdiv(channels, width), width, min(max(4, width // 128), 32))


@triton.jit
def row_offsets(C: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Of a tile's first part from its first value; the next part's are the same from BD on."""
    return tl.arange(0, BT)[:, None] * C + tl.arange(0, BD)[None, :]


@triton.jit
def part_mask(part: tl.constexpr, m_t, C: tl.constexpr, BD: tl.constexpr):
    """Where the rows of a part are."""
    return m_t[:, None] & (part * BD + tl.arange(0, BD) < C)[None, :]


@triton.jit
def load_rows(p_x, m_t, C: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Rows from a pointer on, in float32; 0 outside the mask."""
    o_x, parts = row_offsets(C, BT, BD), ()
    for part in tl.static_range(PARTS):
        b_x = tl.load(p_x + part * BD + o_x, mask=part_mask(part, m_t, C, BD), other=0.0)
        parts += (b_x.to(tl.float32),)
    return parts


@triton.jit
def load_vector(x, C: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """A value for each channel, as rows: every lane reads what it needs, nothing is exchanged."""
    o_x = tl.zeros([BT, 1], tl.int32) + tl.arange(0, BD)[None, :]
    parts = ()
    for part in tl.static_range(PARTS):
        b_x = tl.load(x + part * BD + o_x, mask=part * BD + o_x < C, other=0.0)
        parts += (b_x.to(tl.float32),)
    return parts


@triton.jit
def mean_of_rows(parts, C: tl.constexpr, PARTS: tl.constexpr):
    """[BT]."""
    b_sum = parts[0]
    for part in tl.static_range(1, PARTS):
        b_sum += parts[part]
    return tl.sum(b_sum, axis=1) * (1.0 / C)


@triton.jit
def mean_of_products(parts, others, C: tl.constexpr, PARTS: tl.constexpr):
    """The same of the products of two tiles."""
    b_sum = parts[0] * others[0]
    for part in tl.static_range(1, PARTS):
        b_sum += parts[part] * others[part]
    return tl.sum(b_sum, axis=1) * (1.0 / C)
