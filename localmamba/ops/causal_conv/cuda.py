"""Triton kernels of the causal convolution along scan orders with SiLU, any number of taps.

Forward and backward gather by index.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.partials import sum_partials
from .._common.registration import in_dtypes
from .._common.tokens import scan_major
from .._common.triton_common import (
    Kernel,
    cdiv,
    device_of,
    next_power_of_2,
    program_3d,
    sigmoid,
    silu_grad,
    store,
    unit_stride,
    wave_size,
)

_STEPS = 16
"""Steps of a program."""

_TILE = 2
"""Steps of a tile of the backward kernel; one warp holds it with all its taps."""

_MIN_TILES = 16
"""Tiles of a program of the backward kernel, at least."""

_WAVES = 12
"""Waves of programs of the backward kernel, at most: more would only leave more partial sums."""


@triton.jit
def _before_silu(
    p_x, x_t, p_index, p_weight, b_bias, o_t, m_d, steps,
    BT: tl.constexpr, BD: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """bias + sum over taps of weight * token, [BT, BD]."""
    b_u = tl.zeros([BT, BD], tl.float32) + b_bias[None, :]
    for i_w in tl.static_range(W):
        o_s = o_t + i_w - (W - 1)
        token = tl.load(p_index + o_s, mask=(o_s >= 0) & (o_s < steps), other=-1)
        m_x = (token >= 0)[:, None] & m_d[None, :]
        b_x = tl.load(p_x + token[:, None] * x_t, mask=m_x, other=0.0).to(tl.float32)
        b_u += b_x * tl.load(p_weight + i_w, mask=m_d, other=0.0).to(tl.float32)[None, :]
    return b_u


@Kernel
@triton.jit
def conv_forward_kernel(
    x, weight, bias, index, u, x_b, x_t, u_b, u_k, u_t, K, steps, channels,
    BT: tl.constexpr, BD: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    i_t, i_d, i_bk = program_3d(tl.cdiv(steps, BT), tl.cdiv(channels, BD))
    i_b, i_k = i_bk // K, i_bk % K
    o_d = i_d * BD + tl.arange(0, BD)
    o_t = i_t * BT + tl.arange(0, BT)
    m_d = o_d < channels
    b_bias = tl.load(bias + i_k * channels + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_u = _before_silu(
        x + i_b * x_b + o_d[None, :], x_t, index + i_k * steps,
        weight + (i_k * channels + o_d) * W, b_bias, o_t, m_d, steps, BT, BD, W,
    )  # fmt: skip
    p_u = u + i_b * u_b + i_k * u_k + o_t[:, None] * u_t + o_d[None, :]
    store(p_u, b_u * sigmoid(b_u), (o_t < steps)[:, None] & m_d[None, :])


@Kernel
@triton.jit
def before_silu_backward_kernel(
    du, x, weight, bias, index, dpre, dparameters, du_b, du_k, du_t, x_b, x_t,
    K, steps, channels, blocks, tiles,
    BT: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """The gradient before SiLU, and the sums over steps of the parameters' gradients.

    The taps of a tile of steps are one tile [BW, BT, BD], read once for both. The sums over a block
    of an image's steps are a row of `dparameters`, laid out as the gradients: taps [K, D, W], bias
    [K, D].
    """
    i_t, i_d, i_bk = program_3d(blocks, tl.cdiv(channels, BD))
    i_b, i_k = i_bk // K, i_bk % K
    o_d = i_d * BD + tl.arange(0, BD)
    o_w = tl.arange(0, BW)
    m_d = o_d < channels
    m_w = o_w < W
    p_weight = weight + (i_k * channels + o_d[None, :]) * W + o_w[:, None]
    b_weight = tl.load(p_weight, mask=m_w[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    b_bias = tl.load(bias + i_k * channels + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BW, BT, BD], tl.float32)
    b_dbias = tl.zeros([BT, BD], tl.float32)
    for i in range(tiles):
        o_t = (i_t * tiles + i) * BT + tl.arange(0, BT)
        o_s = o_t[None, :] + o_w[:, None] - (W - 1)
        m_s = (o_s >= 0) & (o_s < steps) & m_w[:, None]
        token = tl.load(index + i_k * steps + o_s, mask=m_s, other=-1)
        p_x = x + i_b * x_b + token[:, :, None] * x_t + o_d[None, None, :]
        m_x = (token >= 0)[:, :, None] & m_d[None, None, :]
        b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
        b_u = tl.sum(b_x * b_weight[:, None, :], axis=0) + b_bias[None, :]
        b_gate = sigmoid(b_u)
        m = (o_t < steps)[:, None] & m_d[None, :]
        p_du = du + i_b * du_b + i_k * du_k + o_t[:, None] * du_t + o_d[None, :]
        b_g = tl.load(p_du, mask=m, other=0.0).to(tl.float32)
        b_g *= silu_grad(b_u, b_gate)
        tl.store(dpre + (i_bk * steps + o_t[:, None]) * channels + o_d[None, :], b_g, mask=m)
        b_dbias += b_g
        b_dweight += b_g[None, :, :] * b_x
    p_sums = dparameters + (i_b * blocks + i_t) * K * channels * (W + 1)
    o_k = i_k * channels + o_d
    p_dweight = p_sums + o_k[None, :] * W + o_w[:, None]
    tl.store(p_dweight, tl.sum(b_dweight, axis=1), mask=m_w[:, None] & m_d[None, :])
    tl.store(p_sums + K * channels * W + o_k, tl.sum(b_dbias, axis=0), mask=m_d)


@Kernel
@triton.jit
def taps_backward_kernel(
    dpre, weight, inverse, dx, K, steps, length, channels,
    BT: tl.constexpr, BD: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """dx of a block of tokens: each gathers from the W steps that read it, in all directions."""
    i_t, i_d, i_b = program_3d(tl.cdiv(length, BT), tl.cdiv(channels, BD))
    o_d = i_d * BD + tl.arange(0, BD)
    o_t = i_t * BT + tl.arange(0, BT)
    m_d = o_d < channels
    b_dx = tl.zeros([BT, BD], tl.float32)
    for i_k in range(K):
        step = tl.load(inverse + i_k * length + o_t, mask=o_t < length, other=0)
        for i_w in tl.static_range(W):
            o_s = step + i_w
            m = ((o_s < steps) & (o_t < length))[:, None] & m_d[None, :]
            p_dpre = dpre + ((i_b * K + i_k) * steps + o_s[:, None]) * channels + o_d[None, :]
            p_w = weight + (i_k * channels + o_d) * W + (W - 1 - i_w)
            b_w = tl.load(p_w, mask=m_d, other=0.0).to(tl.float32)
            b_dx += tl.load(p_dpre, mask=m, other=0.0).to(tl.float32) * b_w[None, :]
    m = (o_t < length)[:, None] & m_d[None, :]
    tl.store(dx + (i_b * length + o_t[:, None]) * channels + o_d[None, :], b_dx, mask=m)


@Kernel
@triton.jit
def invert_kernel(index, inverse, steps, length, BT: tl.constexpr):
    """The step at which each token is read."""
    i_k = tl.program_id(1)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    token = tl.load(index + i_k * steps + o_t, mask=o_t < steps, other=-1)
    tl.store(inverse + i_k * length + token, o_t, mask=token >= 0)


def forward(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
    index = index.to(torch.int32).contiguous()
    x, weight, bias = unit_stride(x), weight.contiguous(), bias.contiguous()
    batch, _, channels = x.shape
    directions, steps = index.shape
    u = scan_major(batch, directions, steps, channels, like=x)
    if u.numel() == 0:
        return u
    block = min(128, next_power_of_2(channels))
    blocks = cdiv(steps, _STEPS) * cdiv(channels, block)
    with device_of(x):
        conv_forward_kernel[(blocks * batch * directions,)](
            x, weight, bias, index, u, x.stride(0), x.stride(1), *u.stride()[:3],
            directions, steps, channels, BT=_STEPS, BD=block, W=weight.shape[2], num_warps=4,
        )  # fmt: skip
    return u


def backward(
    du: Tensor, x: Tensor, weight: Tensor, bias: Tensor, index: Tensor
) -> list[Tensor | None]:
    """Launches the backward kernels: before SiLU, then the transposed convolution, then sums."""
    inputs, index = (x, weight, bias), index.to(torch.int32).contiguous()
    du, x, weight, bias = unit_stride(du), unit_stride(x), weight.contiguous(), bias.contiguous()
    batch, length, channels = x.shape
    directions, steps = index.shape
    width = weight.shape[2]
    block = min(128, next_power_of_2(channels))
    channel_blocks = cdiv(channels, block)
    all_tiles = max(cdiv(steps, _TILE), 1)
    sequences = batch * directions * channel_blocks
    blocks = cdiv(_WAVES * wave_size(x), max(sequences, 1))
    tiles = cdiv(all_tiles, min(cdiv(all_tiles, _MIN_TILES), blocks))
    blocks = cdiv(steps, tiles * _TILE)
    dx = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    dpre = torch.empty((batch, directions, steps, channels), dtype=du.dtype, device=x.device)
    inverse = torch.empty((directions, length), dtype=torch.int32, device=x.device)
    rows = (batch * blocks, weight.numel() + bias.numel())
    sums = torch.empty(rows, dtype=torch.float32, device=x.device)
    if du.numel() > 0:
        with device_of(x):
            before_silu_backward_kernel[(blocks * sequences,)](
                du, x, weight, bias, index, dpre, sums,
                *du.stride()[:3], x.stride(0), x.stride(1),
                directions, steps, channels, blocks, tiles,
                BT=_TILE, BD=block, W=width, BW=next_power_of_2(width),
                num_warps=1,
            )  # fmt: skip
            invert_kernel[(cdiv(steps, 128), directions)](index, inverse, steps, length, BT=128)
            taps_backward_kernel[(cdiv(length, _STEPS) * channel_blocks * batch,)](
                dpre, weight, inverse, dx, directions, steps, length, channels,
                BT=_STEPS, BD=block, W=width, num_warps=4,
            )  # fmt: skip
    dweight, dbias = sum_partials(sums, 0, torch.float32).tensor_split([weight.numel()])
    return in_dtypes((dx, dweight.view_as(weight), dbias.view_as(bias)), inputs)
