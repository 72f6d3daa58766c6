"""Causal depthwise convolution along scan orders with SiLU (Triton): gathers by index, forward and
backward. Any number of taps."""

import torch
import triton
import triton.language as tl

from ..causal_conv import scan_major
from .common import device_of, sigmoid, store, unit_stride

_STEPS = 32
"""Steps of a program of the backward kernel that sums over them."""


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


@triton.jit
def conv_forward_kernel(
    x, weight, bias, index, u, x_b, x_t, u_b, u_k, u_t, K, steps, channels,
    BT: tl.constexpr, BD: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    i_t, i_d, i_bk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_k = (i_bk // K).to(tl.int64), (i_bk % K).to(tl.int64)
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


@triton.jit
def conv_backward_kernel(
    du, x, weight, bias, index, dx, dweight, dbias, du_b, du_k, du_t, x_b, x_t,
    K, steps, length, channels, blocks,
    BT: tl.constexpr, BD: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Gradients that sum over time, and dx of each direction, from one pass over du.

    A program covers BT steps; the taps of the steps behind them, which belong to the next program,
    are computed again.
    """
    i_t, i_d, i_bk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_k = (i_bk // K).to(tl.int64), (i_bk % K).to(tl.int64)
    i_bk = i_bk.to(tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)
    o_t = i_t * BT + tl.arange(0, BT)
    m_d = o_d < channels
    p_x = x + i_b * x_b + o_d[None, :]
    p_index = index + i_k * steps
    p_weight = weight + (i_k * channels + o_d) * W
    p_du = du + i_b * du_b + i_k * du_k + o_d[None, :]
    b_bias = tl.load(bias + i_k * channels + o_d, mask=m_d, other=0.0).to(tl.float32)
    o_out = (i_bk * blocks + i_t) * channels + o_d
    b_dx = tl.zeros([BT, BD], tl.float32)
    for i_w in tl.static_range(W):
        # The steps that read o_t with tap W - 1 - i_w: for i_w = 0 the steps themselves.
        o_s = o_t + i_w
        b_u = _before_silu(p_x, x_t, p_index, p_weight, b_bias, o_s, m_d, steps, BT, BD, W)
        b_gate = sigmoid(b_u)
        m_s = (o_s < steps)[:, None] & m_d[None, :]
        b_g = tl.load(p_du + o_s[:, None] * du_t, mask=m_s, other=0.0).to(tl.float32)
        b_g *= b_gate * (1.0 + b_u * (1.0 - b_gate))
        b_w = tl.load(p_weight + (W - 1 - i_w), mask=m_d, other=0.0).to(tl.float32)
        b_dx += b_g * b_w[None, :]
        if i_w == 0:
            tl.store(dbias + o_out, tl.sum(b_g, axis=0), mask=m_d)
            for i_v in tl.static_range(W):
                o_r = o_t + i_v - (W - 1)
                token = tl.load(p_index + o_r, mask=(o_r >= 0) & (o_r < steps), other=-1)
                m_x = (token >= 0)[:, None] & m_d[None, :]
                b_x = tl.load(p_x + token[:, None] * x_t, mask=m_x, other=0.0).to(tl.float32)
                tl.store(dweight + o_out * W + i_v, tl.sum(b_g * b_x, axis=0), mask=m_d)
    token = tl.load(p_index + o_t, mask=o_t < steps, other=-1)
    m_x = (token >= 0)[:, None] & m_d[None, :]
    p_dx = dx + (i_bk * length + token[:, None]) * channels + o_d[None, :]
    store(p_dx, b_dx, m_x)


def conv_forward(x, weight, bias, index):
    x, weight, bias = unit_stride(x), weight.contiguous(), bias.contiguous()
    batch, _, channels = x.shape
    directions, steps = index.shape
    u = scan_major(batch, directions, steps, channels, like=x)
    if u.numel() == 0:
        return u
    block = min(128, triton.next_power_of_2(channels))
    grid = (triton.cdiv(steps, 16), triton.cdiv(channels, block), batch * directions)
    with device_of(x):
        conv_forward_kernel[grid](
            x, weight, bias, index, u, x.stride(0), x.stride(1), *u.stride()[:3],
            directions, steps, channels, BT=16, BD=block, W=weight.shape[2], num_warps=4,
        )  # fmt: skip
    return u


def conv_backward(du, x, weight, bias, index):
    inputs = (x, weight, bias)
    du, x, weight, bias = unit_stride(du), unit_stride(x), weight.contiguous(), bias.contiguous()
    batch, length, channels = x.shape
    directions, steps = index.shape
    width = weight.shape[2]
    blocks = triton.cdiv(steps, _STEPS)
    dx = torch.empty((batch, directions, length, channels), dtype=x.dtype, device=x.device)
    sums = dict(dtype=torch.float32, device=x.device)
    dweight = torch.empty((batch, directions, blocks, channels, width), **sums)
    dbias = torch.empty((batch, directions, blocks, channels), **sums)
    if du.numel() > 0:
        block = min(64, triton.next_power_of_2(channels))
        grid = (blocks, triton.cdiv(channels, block), batch * directions)
        with device_of(x):
            conv_backward_kernel[grid](
                du, x, weight, bias, index, dx, dweight, dbias,
                *du.stride()[:3], x.stride(0), x.stride(1),
                directions, steps, length, channels, blocks,
                BT=_STEPS, BD=block, W=width, num_warps=4,
            )  # fmt: skip
    gradients = (dx.sum(1), dweight.sum((0, 2)), dbias.sum((0, 2)))
    return tuple(g.to(i.dtype) for g, i in zip(gradients, inputs, strict=True))
