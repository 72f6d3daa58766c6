"""Residual add, rotary turn and norm in one pass (Triton), forward and backward."""

import torch
import triton
import triton.language as tl

from .common import cdiv, device_of, next_power_of_2, store
from .launch import Kernel
from .partials import sum_partials

PROGRAMS = 1024
"""Programs of the backward kernel: each adds up the weight's gradient over a share of the rows."""


@triton.jit
def _turn(b_x, p_cos, p_sin, m, SIGN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Turns neighbouring pairs of channels, forward (SIGN 1) or back (SIGN -1)."""
    b_cos = tl.load(p_cos, mask=m, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin, mask=m, other=0.0).to(tl.float32) * SIGN
    x_even, x_odd = tl.split(tl.reshape(b_x, [BT, BD // 2, 2]))
    cos_even, cos_odd = tl.split(tl.reshape(b_cos, [BT, BD // 2, 2]))
    sin_even, sin_odd = tl.split(tl.reshape(b_sin, [BT, BD // 2, 2]))
    turned = tl.join(x_even * cos_even - x_odd * sin_even, x_odd * cos_odd + x_even * sin_odd)
    return tl.reshape(turned, [BT, BD])


@triton.jit
def _scale_images(b_x, scale, o_t, rows, image):
    """Multiplies each row by the factor of its image, of `image` rows."""
    b_scale = tl.load(scale + o_t // image, mask=o_t < rows, other=0.0).to(tl.float32)
    return b_x * b_scale[:, None]


@Kernel
@triton.jit
def norm_forward_kernel(
    hidden, residual, weight, bias, cos, sin, scale, normed, stream,
    rows, length, image, channels, eps,
    HAS_RESIDUAL: tl.constexpr, CENTRED: tl.constexpr, ROTARY: tl.constexpr,
    SCALED: tl.constexpr, KEEP_STREAM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m = (o_t < rows)[:, None] & (o_d < channels)[None, :]
    o_x = o_t[:, None] * channels + o_d[None, :]
    b_x = tl.load(hidden + o_x, mask=m, other=0.0).to(tl.float32)
    if SCALED:
        b_x = _scale_images(b_x, scale, o_t, rows, image)
    if HAS_RESIDUAL:
        b_x += tl.load(residual + o_x, mask=m, other=0.0).to(tl.float32)
    if ROTARY:
        o_table = (o_t % length)[:, None] * channels + o_d[None, :]
        b_x = _turn(b_x, cos + o_table, sin + o_table, m, 1.0, BT, BD)
    if KEEP_STREAM:
        store(stream + o_x, b_x, m)
    if CENTRED:
        mean = tl.sum(b_x, axis=1) / channels
        b_x = tl.where(m, b_x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=1) / channels + eps)
    b_weight = tl.load(weight + o_d, mask=o_d < channels, other=0.0).to(tl.float32)
    b_x *= rstd[:, None] * b_weight[None, :]
    if CENTRED:
        b_x += tl.load(bias + o_d, mask=o_d < channels, other=0.0).to(tl.float32)[None, :]
    store(normed + o_x, b_x, m)


@Kernel
@triton.jit
def norm_backward_kernel(
    dnormed, dstream, stream, weight, cos, sin, scale, dhidden, dresidual, dweight, dbias,
    rows, length, image, channels, share, eps,
    HAS_DSTREAM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CENTRED: tl.constexpr,
    ROTARY: tl.constexpr, SCALED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    o_d = tl.arange(0, BD)
    b_weight = tl.load(weight + o_d, mask=o_d < channels, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BD], tl.float32)
    b_dbias = tl.zeros([BD], tl.float32)
    for i in range(0, share, BT):
        o_t = i_p.to(tl.int64) * share + i + tl.arange(0, BT)
        m = ((o_t < rows) & (o_t < (i_p + 1) * share))[:, None] & (o_d < channels)[None, :]
        o_x = o_t[:, None] * channels + o_d[None, :]
        b_x = tl.load(stream + o_x, mask=m, other=0.0).to(tl.float32)
        b_g = tl.load(dnormed + o_x, mask=m, other=0.0).to(tl.float32)
        if CENTRED:
            mean = tl.sum(b_x, axis=1) / channels
            b_x = tl.where(m, b_x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=1) / channels + eps)
        b_x *= rstd[:, None]
        b_dbias += tl.sum(b_g, axis=0)
        b_dweight += tl.sum(b_g * b_x, axis=0)
        b_g *= b_weight[None, :]
        along = tl.sum(b_g * b_x, axis=1) / channels
        if CENTRED:
            b_g -= (tl.sum(b_g, axis=1) / channels)[:, None]
        b_g = rstd[:, None] * (b_g - b_x * along[:, None])
        if HAS_DSTREAM:
            b_g += tl.load(dstream + o_x, mask=m, other=0.0).to(tl.float32)
        if ROTARY:
            o_table = (o_t % length)[:, None] * channels + o_d[None, :]
            b_g = _turn(b_g, cos + o_table, sin + o_table, m, -1.0, BT, BD)
        if HAS_RESIDUAL:
            tl.store(dresidual + o_x, b_g, mask=m)
        if SCALED:
            b_g = _scale_images(b_g, scale, o_t, rows, image)
        tl.store(dhidden + o_x, b_g, mask=m)
    tl.store(dweight + i_p * channels + o_d, b_dweight, mask=o_d < channels)
    if CENTRED:
        tl.store(dbias + i_p * channels + o_d, b_dbias, mask=o_d < channels)


def _row_block(channels: int) -> tuple[int, int]:
    """Channels rounded up to a power of two, and rows of a tile for one warp."""
    block = max(2, next_power_of_2(channels))
    return block, max(1, 512 // block)


def norm_forward(hidden, residual, weight, bias, cos, sin, scale, eps, dtype, keep_stream):
    hidden, weight = hidden.contiguous(), weight.contiguous()
    residual, bias, cos, sin, scale = (
        x if x is None else x.contiguous() for x in (residual, bias, cos, sin, scale)
    )
    length, channels = hidden.shape[-2:]
    rows = hidden.numel() // channels
    normed = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    stream = torch.empty_like(normed, dtype=torch.float32) if keep_stream else None
    if rows > 0:
        block, tile = _row_block(channels)
        with device_of(hidden):
            norm_forward_kernel[(cdiv(rows, tile),)](
                hidden, residual, weight, bias, cos, sin, scale, normed, stream,
                rows, length, hidden.shape[1:-1].numel(), channels, eps,
                HAS_RESIDUAL=residual is not None, CENTRED=bias is not None,
                ROTARY=cos is not None, SCALED=scale is not None, KEEP_STREAM=keep_stream,
                BT=tile, BD=block, num_warps=max(1, block // 2048),
            )  # fmt: skip
    return normed, stream


def norm_backward(
    dnormed, dstream, stream, weight, bias, cos, sin, scale, eps, hidden_dtype, has_residual
):
    dnormed, stream, weight = dnormed.contiguous(), stream.contiguous(), weight.contiguous()
    dstream, cos, sin, scale = (
        x if x is None else x.contiguous() for x in (dstream, cos, sin, scale)
    )
    length, channels = stream.shape[-2:]
    rows = stream.numel() // channels
    dhidden = torch.empty(stream.shape, dtype=hidden_dtype, device=stream.device)
    dresidual = torch.empty_like(stream) if has_residual else None
    block, tile = _row_block(channels)
    share = max(cdiv(cdiv(rows, PROGRAMS), tile) * tile, 1)
    programs = cdiv(rows, share)
    sums = (1 if bias is None else 2, programs, channels)  # of the weight, then of the bias
    sums = torch.empty(sums, dtype=torch.float32, device=stream.device)
    if rows > 0:
        with device_of(stream):
            norm_backward_kernel[(programs,)](
                dnormed, dstream, stream, weight, cos, sin, scale,
                dhidden, dresidual, sums[0], sums[-1],
                rows, length, stream.shape[1:-1].numel(), channels, share, eps,
                HAS_DSTREAM=dstream is not None, HAS_RESIDUAL=has_residual,
                CENTRED=bias is not None, ROTARY=cos is not None, SCALED=scale is not None,
                BT=tile, BD=block, num_warps=max(1, block // 2048),
            )  # fmt: skip
    dweight, *dbias = sum_partials(sums, 1, torch.float32)
    dbias = None if bias is None else dbias[0].to(bias.dtype)
    return dhidden, dresidual, dweight.to(weight.dtype), dbias
