"""Triton kernels of the norm of the residual stream: scale, add, rotate, normalize in one pass.

A row, all channels of a token, is held as a tuple of three or four tiles [BT, BD], for the reasons
given in tiles.py: with three of 32 channels, no lane idles over a row of 96. Everything of a tile
is loaded before its sums over rows, which wait for one another.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.partials import sum_partials
from .._common.tiles import add_tiles, multiply_rows
from .._common.triton_common import (
    Kernel,
    cdiv,
    device_of,
    next_power_of_2,
    optional_contiguous,
    store,
    wave_size,
)

_VALUES = 512
"""Values per tile: four for each lane of four warps, 16 bytes in float32."""


class RowTile(NamedTuple):
    """Division of rows into tiles; rows and channels (width) per tile are powers of two."""

    rows: int
    tiles: int
    width: int
    warps: int

    def arguments(self, channels: int) -> dict[str, int]:
        """Returns the sizes as the kernels take them."""
        tile = {"TILES": self.tiles, "BT": self.rows, "BD": self.width}
        return {"C": channels, **tile, "num_warps": self.warps}


@lru_cache(maxsize=256)
def row_tile(channels: int) -> RowTile:
    """Three or four tiles per row, so that little is padding; up to eight that one warp can read.

    Rows of more than 1024 channels take several warps, which then exchange their sums.
    """
    width = max(2, next_power_of_2(channels) // 4)
    width = width if channels > 1024 else min(width, 128)
    rows = max(1, _VALUES // width)
    return RowTile(rows, cdiv(channels, width), width, min(max(4, width // 128), 32))


@triton.jit
def _offsets(C: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Offsets of a row's first tile; those of tile i are i * BD further."""
    return tl.arange(0, BT)[:, None] * C + tl.arange(0, BD)[None, :]


@triton.jit
def _mask(i: tl.constexpr, m_t, C: tl.constexpr, BD: tl.constexpr):
    """Mask of tile i."""
    return m_t[:, None] & (i * BD + tl.arange(0, BD) < C)[None, :]


@triton.jit
def _load_rows(
    p_x, m_t, C: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Loads contiguous rows from a pointer on, in float32; 0 outside the mask."""
    o_x, rows = _offsets(C, BT, BD), ()
    for i in tl.static_range(TILES):
        b_x = tl.load(p_x + i * BD + o_x, mask=_mask(i, m_t, C, BD), other=0.0)
        rows += (b_x.to(tl.float32),)
    return rows


@triton.jit
def _load_parameter(x, C: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Loads a value per channel, as rows: every lane reads what it needs, nothing is exchanged."""
    o_x = tl.zeros([BT, 1], tl.int32) + tl.arange(0, BD)[None, :]
    rows = ()
    for i in tl.static_range(TILES):
        b_x = tl.load(x + i * BD + o_x, mask=i * BD + o_x < C, other=0.0)
        rows += (b_x.to(tl.float32),)
    return rows


@triton.jit
def _mean(rows, C: tl.constexpr):
    """Mean over channels, [BT]."""
    return tl.sum(add_tiles(rows), axis=1) * (1.0 / C)


@triton.jit
def _mean_of_products(rows, others, C: tl.constexpr):
    """Mean over channels of the product of two rows, [BT]."""
    return _mean(multiply_rows(rows, others), C)


@triton.jit
def _rotate(
    b_x, cos, sin, o_row, i: tl.constexpr, m, SIGN: tl.constexpr,
    C: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rotates pairs of neighboring channels of tile i, forward (SIGN 1) or back (SIGN -1)."""
    o_table = o_row[:, None] * C + i * BD + tl.arange(0, BD)[None, :]
    p_cos, p_sin = cos + o_table, sin + o_table
    b_cos = tl.load(p_cos, mask=m, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin, mask=m, other=0.0).to(tl.float32) * SIGN
    x_even, x_odd = tl.split(tl.reshape(b_x, [BT, BD // 2, 2]))
    cos_even, cos_odd = tl.split(tl.reshape(b_cos, [BT, BD // 2, 2]))
    sin_even, sin_odd = tl.split(tl.reshape(b_sin, [BT, BD // 2, 2]))
    rotated = tl.join(x_even * cos_even - x_odd * sin_even, x_odd * cos_odd + x_even * sin_odd)
    return tl.reshape(rotated, [BT, BD])


@triton.jit
def _factors(scale, o_t, m_t, image):
    """Loads the factor of each row's image, of `image` rows: [BT]."""
    return tl.load(scale + o_t // image, mask=m_t, other=0.0).to(tl.float32)


@triton.jit
def _center(rows, m_t, CENTERED: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """Subtracts the mean of each row; zeros past the last channel stay."""
    if not CENTERED:
        return rows
    b_mean = _mean(rows, C)
    centered = ()
    for j in tl.static_range(len(rows)):
        b_x = rows[j] - b_mean[:, None]
        if (j + 1) * BD > C:
            b_x = tl.where(_mask(j, m_t, C, BD), b_x, 0.0)
        centered += (b_x,)
    return centered


@triton.jit
def _rstd(rows, m_t, eps, C: tl.constexpr):
    """1 / std of centered rows, [BT]; finite past the last row too, without eps."""
    b_variance = _mean_of_products(rows, rows, C) + eps
    return tl.rsqrt(tl.where(m_t, b_variance, 1.0))


@Kernel
@triton.jit
def norm_forward_kernel(
    hidden, residual, weight, bias, cos, sin, scale, normed, stream, rows, length, image, eps,
    HAS_RESIDUAL: tl.constexpr, CENTERED: tl.constexpr, ROTARY: tl.constexpr,
    SCALED: tl.constexpr, KEEP_STREAM: tl.constexpr,
    C: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BT
    o_t = first + tl.arange(0, BT)
    m_t = o_t < rows
    hiddens = _load_rows(hidden + first * C, m_t, C, TILES, BT, BD)
    if HAS_RESIDUAL:
        residuals = _load_rows(residual + first * C, m_t, C, TILES, BT, BD)
    if SCALED:
        b_factor = _factors(scale, o_t, m_t, image)
    o_x = _offsets(C, BT, BD)
    sums = ()
    for j in tl.static_range(TILES):
        o_tile, m = first * C + j * BD, _mask(j, m_t, C, BD)
        b_x = hiddens[j]
        if SCALED:
            b_x *= b_factor[:, None]
        if HAS_RESIDUAL:
            b_x += residuals[j]
        if ROTARY:
            b_x = _rotate(b_x, cos, sin, o_t % length, j, m, 1.0, C, BT, BD)
        if KEEP_STREAM:
            store(stream + o_tile + o_x, b_x, m)
        sums += (b_x,)
    centered = _center(sums, m_t, CENTERED, C, BD)
    b_rstd = _rstd(centered, m_t, eps, C)
    weights = _load_parameter(weight, C, TILES, BT, BD)
    if CENTERED:
        biases = _load_parameter(bias, C, TILES, BT, BD)
    for j in tl.static_range(TILES):
        m = _mask(j, m_t, C, BD)
        b_y = centered[j] * b_rstd[:, None] * weights[j]
        if CENTERED:
            b_y += biases[j]
        store(normed + first * C + j * BD + o_x, b_y, m)


@Kernel
@triton.jit
def norm_backward_kernel(
    dnormed, dstream, stream, weight, cos, sin, scale, dhidden, dresidual, dweight, dbias,
    rows, length, image, share, eps,
    HAS_DSTREAM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CENTERED: tl.constexpr,
    ROTARY: tl.constexpr, SCALED: tl.constexpr,
    C: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    weights = _load_parameter(weight, C, TILES, BT, BD)
    o_x = _offsets(C, BT, BD)
    dweights = ()
    for _ in tl.static_range(TILES):
        dweights += (tl.zeros([BT, BD], tl.float32),)
    dbiases = dweights
    for i in range(0, share, BT):
        first = i_p.to(tl.int64) * share + i
        o_t = first + tl.arange(0, BT)
        m_t = o_t < rows
        streams = _load_rows(stream + first * C, m_t, C, TILES, BT, BD)
        gradients = _load_rows(dnormed + first * C, m_t, C, TILES, BT, BD)
        if HAS_DSTREAM:
            dstreams = _load_rows(dstream + first * C, m_t, C, TILES, BT, BD)
        if SCALED:
            b_factor = _factors(scale, o_t, m_t, image)
        centered = _center(streams, m_t, CENTERED, C, BD)
        weighted = ()
        for j in tl.static_range(TILES):
            weighted += (gradients[j] * weights[j],)
        b_rstd = _rstd(centered, m_t, eps, C)
        b_along = _mean_of_products(centered, weighted, C) * b_rstd * b_rstd
        if CENTERED:
            b_mean = _mean(weighted, C)
        dweights_here, dbiases_here = (), ()
        for j in tl.static_range(TILES):
            o_tile, m = first * C + j * BD, _mask(j, m_t, C, BD)
            b_xhat = centered[j] * b_rstd[:, None]
            dweights_here += (dweights[j] + gradients[j] * b_xhat,)
            dbiases_here += (dbiases[j] + gradients[j],)
            b_g = weighted[j] - centered[j] * b_along[:, None]
            if CENTERED:
                b_g -= b_mean[:, None]
            b_g *= b_rstd[:, None]
            if HAS_DSTREAM:
                b_g += dstreams[j]
            if ROTARY:
                b_g = _rotate(b_g, cos, sin, o_t % length, j, m, -1.0, C, BT, BD)
            if HAS_RESIDUAL:
                tl.store(dresidual + o_tile + o_x, b_g, mask=m)
            if SCALED:
                b_g *= b_factor[:, None]
            tl.store(dhidden + o_tile + o_x, b_g, mask=m)
        dweights, dbiases = dweights_here, dbiases_here
    for j in tl.static_range(TILES):
        o_d = j * BD + tl.arange(0, BD)
        tl.store(dweight + i_p * C + o_d, tl.sum(dweights[j], axis=0), mask=o_d < C)
        if CENTERED:
            tl.store(dbias + i_p * C + o_d, tl.sum(dbiases[j], axis=0), mask=o_d < C)


def forward(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, scale: Tensor | None, eps: float, dtype: torch.dtype,
    keep_stream: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    hidden, weight = hidden.contiguous(), weight.contiguous()
    residual, bias, cos, sin, scale = optional_contiguous(residual, bias, cos, sin, scale)
    length, channels = hidden.shape[-2:]
    rows = hidden.numel() // channels
    normed = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    stream = torch.empty_like(normed, dtype=torch.float32) if keep_stream else None
    if rows > 0:
        tile = row_tile(channels)
        with device_of(hidden):
            norm_forward_kernel[(cdiv(rows, tile.rows),)](
                hidden, residual, weight, bias, cos, sin, scale, normed, stream,
                rows, length, hidden.shape[1:-1].numel(), eps,
                HAS_RESIDUAL=residual is not None, CENTERED=bias is not None,
                ROTARY=cos is not None, SCALED=scale is not None, KEEP_STREAM=keep_stream,
                **tile.arguments(channels),
            )  # fmt: skip
    return normed, stream


def backward(
    dnormed: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, scale: Tensor | None, eps: float,
    hidden_dtype: torch.dtype, has_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    dnormed, stream, weight = dnormed.contiguous(), stream.contiguous(), weight.contiguous()
    dstream, cos, sin, scale = optional_contiguous(dstream, cos, sin, scale)
    length, channels = stream.shape[-2:]
    rows = stream.numel() // channels
    dhidden = torch.empty(stream.shape, dtype=hidden_dtype, device=stream.device)
    dresidual = torch.empty_like(stream) if has_residual else None
    tile = row_tile(channels)
    # A wave: four programs per SM, as many as run at a time.
    share = max(cdiv(cdiv(rows, wave_size(stream)), tile.rows), 1) * tile.rows
    programs = cdiv(rows, share)
    parts = (1 if bias is None else 2, programs, channels)  # of the weight, then of the bias
    sums = torch.empty(parts, dtype=torch.float32, device=stream.device)
    if rows > 0:
        with device_of(stream):
            norm_backward_kernel[(programs,)](
                dnormed, dstream, stream, weight, cos, sin, scale,
                dhidden, dresidual, sums[0], sums[-1],
                rows, length, stream.shape[1:-1].numel(), share, eps,
                HAS_DSTREAM=dstream is not None, HAS_RESIDUAL=has_residual,
                CENTERED=bias is not None, ROTARY=cos is not None, SCALED=scale is not None,
                **tile.arguments(channels),
            )  # fmt: skip
    dweight, *dbiases = sum_partials(sums, 1, torch.float32)
    dbias = None if bias is None else dbiases[0].to(bias.dtype)
    return dhidden, dresidual, dweight.to(weight.dtype), dbias
