"""Backward passes of the weighed sum over directions and of SCAttn's pooling (Triton).

Three kernels read the directions' outputs once each: back through gate and norm to the gradient of
the sum; to the gradients of the channel weights (channel_weights.py); and to those of the outputs.
Before the last, SCAttn's linear layers lead from the channel weights to the means: both ways to the
outputs then end in one store.
"""

import torch
import triton
import triton.language as tl

from ..registration import in_dtypes
from .channel_weights import channel_weights_parts
from .common import (
    cdiv,
    device_of,
    program_of_two,
    sigmoid,
    silu_slope,
    unit_stride,
)
from .launch import Kernel
from .merge import optional_contiguous, weighed, weighed_sum
from .partials import sum_partials
from .select_layers_backward import backward_of_parts
from .tiles import (
    WIDTH,
    channel_offsets,
    direction_offsets,
    load,
    load_directions,
    norm_gradient,
    normalised_rows,
    sum_directions,
    sum_rows,
    sum_tokens,
    tiling,
    token_offsets,
    token_strides,
)

_TOKENS = 16
"""Tokens of a program that makes the gradient of the sum through a norm."""


@triton.jit
def _gate_and_norm_gradient(
    b_sum, b_g, b_z, norm_weight, norm_bias, dz, o_out, o_t, o_d, m, m_d, channels, eps,
    HAS_Z: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """The gradient of the sum, and what it adds to those of the norm's weight and bias."""
    b_weight = tl.full([1, 1, 1, 1], 1.0, tl.float32)
    b_xhat, b_normed, b_rstd = b_sum, b_sum, b_weight
    if HAS_NORM:
        b_xhat, b_rstd = normalised_rows(b_sum, m_d, channels, eps)
        b_weight = load(norm_weight + o_d + o_t * 0, m)
        b_normed = b_xhat * b_weight + load(norm_bias + o_d + o_t * 0, m)
    if HAS_Z:
        b_gate = sigmoid(b_z)
        b_dz = b_g * b_normed * silu_slope(b_z, b_gate)
        tl.store(dz + o_out, b_dz, mask=m)
        b_g *= b_z * b_gate
    b_dbias, b_dweight = b_g, b_g * b_xhat
    if HAS_NORM:
        b_g = norm_gradient(b_g * b_weight, b_xhat, b_rstd, channels)
    return b_g, b_dweight, b_dbias


@Kernel
@triton.jit
def sum_backward_kernel(
    dout, y, channel_weights, token_weights, z, norm_weight, norm_bias,
    dsum, dz, dnorm_weight, dnorm_bias, dout_b, dout_t, z_b, z_t, K, length, channels, blocks, eps,
    HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_NORM: tl.constexpr, TOKENS: tl.constexpr,
    BK: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The gradient of the sum over directions, and partial sums of those of the norm."""
    i_t, i_b = program_of_two(blocks)
    o_d = channel_offsets(PARTS)
    m_d = o_d < channels
    b_dweight = tl.zeros([1, PARTS, BT, WIDTH], tl.float32)
    b_dbias = tl.zeros([1, PARTS, BT, WIDTH], tl.float32)
    for i in range(0, TOKENS, BT):
        o_t = i_t * TOKENS + i + token_offsets(BT)
        m = (o_t < length) & m_d
        o_out = (i_b * length + o_t) * channels + o_d
        b_g = load(dout + i_b * dout_b + o_t.to(tl.int64) * dout_t + o_d, m)
        b_z = tl.zeros([1, 1, 1, 1], tl.float32)
        if HAS_Z:
            b_z = load(z + i_b * z_b + o_t.to(tl.int64) * z_t + o_d, m)
        b_sum = weighed_sum(
            y, channel_weights, token_weights, i_b, o_t, o_d, m, K, length, channels,
            HAS_CHANNEL, HAS_TOKEN, BK, PARTS, BT,
        )  # fmt: skip
        b_g, b_w, b_b = _gate_and_norm_gradient(
            b_sum, b_g, b_z, norm_weight, norm_bias, dz, o_out, o_t, o_d, m, m_d,
            channels, eps, HAS_Z, HAS_NORM,
        )  # fmt: skip
        b_dweight += tl.where(m, b_w, 0.0)
        b_dbias += b_b
        tl.store(dsum + o_out, b_g, mask=m)
    if HAS_NORM:
        o_norm = (i_b * blocks + i_t) * channels + o_d
        tl.store(dnorm_weight + o_norm, sum_tokens(b_dweight), mask=m_d)
        tl.store(dnorm_bias + o_norm, sum_tokens(b_dbias), mask=m_d)


@Kernel
@triton.jit
def branch_backward_kernel(
    dsum, y, channel_weights, token_weights, dmeans, z, dy, dtoken, dz,
    sum_b, sum_t, z_b, z_t, K, length, channels, eps,
    HAS_SUM: tl.constexpr, HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr,
    HAS_POOL: tl.constexpr, HAS_Z: tl.constexpr, ADDS_DZ: tl.constexpr,
    BK: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The gradients of every direction's output, of its token weights and of the pooling's gate."""
    i_t, i_b = program_of_two(tl.cdiv(length, BT))
    o_d = channel_offsets(PARTS)
    o_t = i_t * BT + token_offsets(BT)
    m_d = o_d < channels
    m = (o_t < length) & m_d
    o_next = direction_offsets(BK)
    b_next = load_directions(y, i_b, o_next, o_t, o_d, m, K, length, channels)
    b_sum = tl.zeros([1, 1, 1, 1], tl.float32)
    if HAS_SUM:
        b_sum = load(dsum + i_b * sum_b + o_t.to(tl.int64) * sum_t + o_d, m)
    b_act = tl.full([1, 1, 1, 1], 1.0, tl.float32)
    b_dact = tl.zeros([1, PARTS, BT, WIDTH], tl.float32)
    if HAS_Z:
        b_z = load(z + i_b * z_b + o_t.to(tl.int64) * z_t + o_d, m)
        b_act = b_z * sigmoid(b_z)
    for k in range(0, K, BK):
        b_y = b_next.to(tl.float32)
        o_k = k + direction_offsets(BK)
        b_next = load_directions(y, i_b, o_k + BK, o_t, o_d, m, K, length, channels)
        o_bk = i_b * K + o_k
        m_y = m & (o_k < K)
        b_dy = tl.zeros([BK, PARTS, BT, WIDTH], tl.float32)
        if HAS_SUM:
            b_dy += b_sum
            b_dy = weighed(
                b_dy, channel_weights, token_weights, o_bk, o_t, o_d, m_y, length, channels,
                HAS_CHANNEL, False,
            )  # fmt: skip
            if HAS_TOKEN:
                m_token = (o_t < length) & (o_k < K)
                tl.store(dtoken + o_bk * length + o_t, sum_rows(b_dy * b_y), mask=m_token)
                b_dy *= load(token_weights + o_bk * length + o_t, m_token)
        if HAS_POOL:
            b_g = load(dmeans + o_bk * channels + o_d + o_t * 0, m_y) / length
            b_xhat, b_rstd = normalised_rows(b_y * b_act, m_d, channels, eps)
            b_g = norm_gradient(b_g, b_xhat, b_rstd, channels)
            b_dact += sum_directions(b_g * b_y)
            b_dy += b_g * b_act
        tl.store(dy + (o_bk * length + o_t) * channels + o_d, b_dy, mask=m_y)
    if HAS_Z:
        # z is read again rather than kept, for its registers.
        b_z = load(z + i_b * z_b + o_t.to(tl.int64) * z_t + o_d, m)
        b_dz = b_dact * silu_slope(b_z, sigmoid(b_z))
        p_dz = dz + (i_b * length + o_t) * channels + o_d
        if ADDS_DZ:
            b_dz += load(p_dz, m)
        tl.store(p_dz, b_dz, mask=m)


def _sum_backward(dout, y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    """Gradients of the sum over directions, of z, and of the norm's weight and bias."""
    if z is None and norm_weight is None:
        return dout, None, None, None
    batch, directions, length, channels = y.shape
    tile = tiling(directions, channels)
    # Partial sums of the norm's gradients are why a program takes more than a tile.
    tokens = tile.tokens if norm_weight is None else max(_TOKENS, tile.tokens)
    blocks = cdiv(length, tokens)
    dsum = torch.empty((batch, length, channels), dtype=y.dtype, device=y.device)
    dz = None if z is None else torch.empty_like(dsum, dtype=z.dtype)
    dnorm = None
    if norm_weight is not None:
        dnorm = torch.empty((2, batch * blocks, channels), device=y.device)
    sum_backward_kernel[(blocks * batch,)](
        dout, y, channel_weights, token_weights, z, norm_weight, norm_bias,
        dsum, dz, *((None, None) if dnorm is None else dnorm), *token_strides(dout, z),
        directions, length, channels, blocks, eps,
        HAS_CHANNEL=channel_weights is not None, HAS_TOKEN=token_weights is not None,
        HAS_Z=z is not None, HAS_NORM=norm_weight is not None,
        TOKENS=tokens, **tile.arguments(),
    )  # fmt: skip
    return dsum, dz, *((None, None) if dnorm is None else sum_partials(dnorm, 1, torch.float32))


def _branch_backward(y, dsum, channel_weights, token_weights, dmeans, z, dz, eps):
    """Gradients of the outputs, the token weights and z (added to dz, if that is there)."""
    batch, directions, length, channels = y.shape
    tile = tiling(directions, channels)
    dy, dtoken, adds = torch.empty_like(y), None, dz is not None
    if token_weights is not None:
        dtoken = torch.empty((batch, directions, length), device=y.device)
    if z is not None and dz is None:
        dz = torch.empty((batch, length, channels), dtype=z.dtype, device=y.device)
    branch_backward_kernel[(cdiv(length, tile.tokens) * batch,)](
        dsum, y, channel_weights, token_weights, dmeans, z, dy, dtoken, dz, *token_strides(dsum, z),
        directions, length, channels, eps,
        HAS_SUM=dsum is not None, HAS_CHANNEL=channel_weights is not None,
        HAS_TOKEN=token_weights is not None, HAS_POOL=dmeans is not None, HAS_Z=z is not None,
        ADDS_DZ=adds, **tile.arguments(),
    )  # fmt: skip
    return dy, dtoken, dz


def _rows(x):
    return x if x is None else unit_stride(x)


def pool_backward(dmeans, y, z, eps):
    y, dmeans, z = y.contiguous(), dmeans.contiguous(), _rows(z)
    if y.numel() == 0:
        return torch.empty_like(y), None if z is None else torch.empty_like(z)
    with device_of(y):
        dy, _, dz = _branch_backward(y, None, None, None, dmeans, z, None, eps)
    return dy, dz


def merge_backward(dout, y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    inputs = (y, channel_weights, token_weights, z, norm_weight, norm_bias)
    dout, z = unit_stride(dout), _rows(z)
    y, channel, token, weight, bias = optional_contiguous(
        y, channel_weights, token_weights, norm_weight, norm_bias
    )
    with device_of(y):
        dsum, dz, dweight, dbias = _sum_backward(dout, y, channel, token, z, weight, bias, eps)
        dchannel = None
        if channel is not None:
            dchannel = sum_partials(channel_weights_parts(dsum, y, token), 2, torch.float32)
        dy, dtoken, _ = _branch_backward(y, dsum, channel, token, None, None, None, eps)
    return in_dtypes((dy, dchannel, dtoken, dz, dweight, dbias), inputs)


def attend_backward(
    dout, y, means, weights, reduced, parameters, z, norm_weight, norm_bias,
    gate_first, pool_eps, norm_eps,
):  # fmt: skip
    inputs = (y, z, norm_weight, norm_bias)
    dout, z = unit_stride(dout), _rows(z)
    y, means, weights, reduced, weight, bias, *parameters = optional_contiguous(
        y, means, weights, reduced, norm_weight, norm_bias, *parameters
    )
    with device_of(y):
        dsum, dz, dweight, dbias = _sum_backward(dout, y, weights, None, z, weight, bias, norm_eps)
        dweights = channel_weights_parts(dsum, y, None)
        dmeans, dparameters = backward_of_parts(dweights, means, weights, reduced, parameters)
        gate = z if gate_first else None
        dy, _, added = _branch_backward(
            y, dsum, weights, None, dmeans, gate, dz if gate_first else None, pool_eps
        )
    gradients = in_dtypes((dy, added if gate_first else dz, dweight, dbias), inputs)
    return (*gradients, dparameters)
