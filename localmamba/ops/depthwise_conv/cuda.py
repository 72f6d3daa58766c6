"""Triton kernels of the depthwise convolution over a map with SiLU, any odd kernel size.

The work is cut into units: some rows, columns and channels of an image. A unit reads each row of
the map once for each column of taps and keeps it for all the tokens that it reaches. The gradient
of x is the same convolution, with the taps in opposite order, of the gradient before SiLU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.partials import sum_partials
from .._common.registration import in_dtypes
from .._common.triton_common import (
    Kernel,
    cdiv,
    device_of,
    next_power_of_2,
    register_limit,
    sigmoid,
    silu_grad,
    store,
    unit_stride,
    wave_size,
)

_ROWS, _COLUMNS, _CHANNELS = 7, 8, 64
"""Sizes of a unit. From images of 224 pixels, every map has a multiple of 7 rows."""

_VALUES = 128
"""Values of one row of a unit that a warp holds."""

_PREFETCH = 3
"""Rows that the backward kernel loads ahead of the one that it computes."""

_NEVER_CONSTANT = ("strips", "bands")
"""Where both are 1, Triton would make constants of them, and then masks that fill the registers."""


class _Launch(NamedTuple):
    """Division of a batch of maps into units; rows and channels per unit."""

    rows: int
    channels: int
    strips: int
    """Units side by side on a map."""
    bands: int
    """Units one below the other on a map."""
    channel_blocks: int
    units: int
    """Units of all images, for one block of channels."""
    warps: int


def _launch(x: Tensor, size: int) -> _Launch:
    """Units of one row each where there are few, or where more taps would not fit registers."""
    batch, height, width, channels = x.shape
    block = min(_CHANNELS, next_power_of_2(channels))
    strips, channel_blocks = cdiv(width, _COLUMNS), cdiv(channels, block)
    units = batch * strips * cdiv(height, _ROWS)
    rows = _ROWS if size <= 3 and units * channel_blocks >= 2 * wave_size(x) else 1
    bands, warps = cdiv(height, rows), max(1, _COLUMNS * block // _VALUES)
    return _Launch(rows, block, strips, bands, channel_blocks, batch * strips * bands, warps)


@triton.jit
def _place(i_u, strips, bands, R: tl.constexpr, BW: tl.constexpr):
    """Image, first row and columns of a unit."""
    i_r, i_s = i_u // strips, i_u % strips
    return (i_r // bands).to(tl.int64), i_r % bands * R, i_s * BW + tl.arange(0, BW)


@triton.jit
def _columns(x, i_b, i_h, o_w, o_d, x_b, x_h, x_w, S: tl.constexpr):
    """Pointers to the first row that a unit reads, [BW, BD] for each column of taps."""
    p_row = x + i_b * x_b + (i_h - S // 2).to(tl.int64) * x_h
    pointers = ()
    for j in tl.static_range(S):
        o_s = (o_w + (j - S // 2)).to(tl.int64)
        pointers += (p_row + (o_s[:, None] * x_w + o_d[None, :]),)
    return pointers


@triton.jit
def _row(columns, i_s, x_h, o_w, height, width, m_d, S: tl.constexpr):
    """Loads what a unit reads of row i_s, S tiles [BW, BD]; moves the pointers to the next row."""
    right = tl.where((i_s >= 0) & (i_s < height), width, 0)
    tiles, below = (), ()
    for j in tl.static_range(S):
        o_s = o_w + (j - S // 2)
        m = (tl.where(o_s < 0, width, o_s) < right)[:, None] & m_d[None, :]
        tiles += (tl.load(columns[j], mask=m, other=0.0).to(tl.float32),)
        below += (columns[j] + x_h,)
    return tiles, below


@triton.jit
def _mask(i_h, o_w, height, width, m_d):
    """Where a unit has tokens in row i_h, [BW, BD]."""
    return (o_w < tl.where(i_h < height, width, 0))[:, None] & m_d[None, :]


@triton.jit
def _outputs(i_b, i_h, o_w, o_d, height, width, channels):
    """Offsets of a unit's first row in the convolution's output, [BW, BD]."""
    o_row = (i_b * height + i_h) * width * channels
    return o_row + (o_w[:, None] * channels + o_d[None, :])


@triton.jit
def _parameters(weight, bias, o_d, m_d, channels, S: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The taps of the channels, row by row, and the bias."""
    taps = ()
    for i in tl.static_range(S * S):
        taps += (tl.load(weight + i * channels + o_d, mask=m_d, other=0.0).to(tl.float32),)
    b_bias = tl.zeros([o_d.shape[0]], tl.float32)
    if HAS_BIAS:
        b_bias += tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    return taps, b_bias


@Kernel
@triton.jit(do_not_specialize=_NEVER_CONSTANT)
def depthwise_kernel(
    x, weight, bias, y, x_b, x_h, x_w, height, width, channels, strips, bands, channel_blocks,
    HAS_BIAS: tl.constexpr, TRANSPOSED: tl.constexpr,
    R: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The convolution with SiLU, or its transpose (taps in opposite order) without."""
    i_d, i_u = tl.program_id(0) % channel_blocks, tl.program_id(0) // channel_blocks
    i_b, i_h, o_w = _place(i_u, strips, bands, R, BW)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < channels
    taps, b_bias = _parameters(weight, bias, o_d, m_d, channels, S, HAS_BIAS)
    columns, rows = _columns(x, i_b, i_h, o_w, o_d, x_b, x_h, x_w, S), ()
    for i in tl.static_range(R + S - 1):
        tiles, columns = _row(columns, i_h + (i - S // 2), x_h, o_w, height, width, m_d, S)
        rows += tiles
    p_y = y + _outputs(i_b, i_h, o_w, o_d, height, width, channels)
    for i in tl.static_range(R):
        b_y = tl.zeros([BW, BD], tl.float32) + b_bias[None, :]
        for j in tl.static_range(S * S):
            b_y += taps[S * S - 1 - j if TRANSPOSED else j][None, :] * rows[i * S + j]
        if not TRANSPOSED:
            b_y *= sigmoid(b_y)
        m = _mask(i_h + i, o_w, height, width, m_d)
        if TRANSPOSED:
            tl.store(p_y, b_y, mask=m)
        else:
            store(p_y, b_y, m)
        p_y += width * channels


@Kernel
@triton.jit(do_not_specialize=_NEVER_CONSTANT)
def before_silu_backward_kernel(
    dy, x, weight, bias, dpre, dparameters, x_b, x_h, x_w, height, width, channels,
    strips, bands, channel_blocks, units, share,
    HAS_BIAS: tl.constexpr, PREFETCH: tl.constexpr,
    R: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The gradient before SiLU, and the sums of the parameters' gradients over a share of units.

    A program's sums are a row of `dparameters`, as the gradients lie: taps [D, S, S], bias [D].
    """
    i_d, i_p = tl.program_id(0) % channel_blocks, tl.program_id(0) // channel_blocks
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < channels
    taps, b_bias = _parameters(weight, bias, o_d, m_d, channels, S, HAS_BIAS)
    sums = ()
    for _ in tl.static_range(S * S + 1):
        sums += (tl.zeros([BW, BD], tl.float32),)
    for i_u in range(i_p * share, tl.minimum((i_p + 1) * share, units)):
        i_b, i_h, o_w = _place(i_u, strips, bands, R, BW)
        columns = _columns(x, i_b, i_h, o_w, o_d, x_b, x_h, x_w, S)
        o_y = _outputs(i_b, i_h, o_w, o_d, height, width, channels)
        p_dy, p_dpre, rows, gradients = dy + o_y, dpre + o_y, (), ()
        # Step i loads what step i + PREFETCH needs first, so that a warp seldom waits.
        for i in tl.static_range(-PREFETCH - S + 1, R):
            if i + PREFETCH < R:
                i_s = i_h + (i + PREFETCH + S // 2)
                tiles, columns = _row(columns, i_s, x_h, o_w, height, width, m_d, S)
                rows += tiles
                if i + PREFETCH >= 0:
                    m = _mask(i_h + (i + PREFETCH), o_w, height, width, m_d)
                    gradients += (tl.load(p_dy, mask=m, other=0.0),)
                    p_dy += width * channels
            if i >= 0:
                b_pre = tl.zeros([BW, BD], tl.float32) + b_bias[None, :]
                for j in tl.static_range(S * S):
                    b_pre += taps[j][None, :] * rows[i * S + j]
                b_g = gradients[i].to(tl.float32) * silu_grad(b_pre, sigmoid(b_pre))
                m = _mask(i_h + i, o_w, height, width, m_d)
                tl.store(p_dpre, b_g, mask=m)
                p_dpre += width * channels
                added = ()
                for j in tl.static_range(S * S):
                    added += (sums[j] + b_g * rows[i * S + j],)
                sums = added + (sums[S * S] + b_g,)
    p_sums = dparameters + i_p.to(tl.int64) * (S * S + 1) * channels
    for i in tl.static_range(S * S):
        tl.store(p_sums + o_d * (S * S) + i, tl.sum(sums[i], axis=0), mask=m_d)
    tl.store(p_sums + S * S * channels + o_d, tl.sum(sums[S * S], axis=0), mask=m_d)


def _taps_first(weight: Tensor) -> Tensor:
    """Returns [D, 1, S, S] as contiguous [S, S, D]: channels lie side by side."""
    return weight[:, 0].permute(1, 2, 0).contiguous()


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Launches `depthwise_kernel` for taps [S, S, D]."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    launch = _launch(x, weight.shape[0])
    with device_of(x):
        depthwise_kernel[(launch.units * launch.channel_blocks,)](
            x, weight, bias, y, *x.stride()[:3], *x.shape[1:],
            launch.strips, launch.bands, launch.channel_blocks,
            HAS_BIAS=bias is not None, TRANSPOSED=transposed, R=launch.rows, BW=_COLUMNS,
            BD=launch.channels, S=weight.shape[0], num_warps=launch.warps,
        )  # fmt: skip
    return y


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = bias if bias is None else bias.contiguous()
    return _convolve(unit_stride(x), _taps_first(weight), bias, False)


def backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    inputs, size = (x, weight, bias), weight.shape[-1]
    dy, x, weight = dy.contiguous(), unit_stride(x), _taps_first(weight)
    bias = bias if bias is None else bias.contiguous()
    channels = x.shape[3]
    launch = _launch(x, size)
    # Six programs per SM, of which two or three run at a time: their shares of the units end
    # together. Where three programs can hold the taps of half precision, they get the registers.
    share = max(1, cdiv(launch.units * launch.channel_blocks, 3 * wave_size(x) // 2))
    programs = cdiv(launch.units, share)
    three = x.element_size() == 2 and size <= 3
    registers = register_limit(x.get_device(), warps=4, programs=3) if three else None
    dpre = torch.empty(x.shape, dtype=dy.dtype, device=x.device)
    sums = torch.empty((programs, (size**2 + 1) * channels), dtype=torch.float32, device=x.device)
    if dpre.numel() > 0:
        with device_of(x):
            before_silu_backward_kernel[(programs * launch.channel_blocks,)](
                dy, x, weight, bias, dpre, sums, *x.stride()[:3], *x.shape[1:],
                launch.strips, launch.bands, launch.channel_blocks, launch.units, share,
                HAS_BIAS=bias is not None, PREFETCH=_PREFETCH, R=launch.rows, BW=_COLUMNS,
                BD=launch.channels, S=size, num_warps=launch.warps, maxnreg=registers,
            )  # fmt: skip
    dx = _convolve(dpre, weight, None, True)
    dweight, dbias = sum_partials(sums, 0, torch.float32).tensor_split([size**2 * channels])
    return in_dtypes((dx, dweight.view(channels, 1, size, size), dbias), inputs)
