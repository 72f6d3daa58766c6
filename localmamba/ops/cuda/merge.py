"""The weighed sum over directions, with optional layer norm and gate (Triton).

Forward reads every output once. Backward first makes the gradient of the sum (through gate and
norm, whole rows), then, per direction, the gradients of the outputs and of their weights.
"""

import torch
import triton
import triton.language as tl

from .common import device_of, sigmoid, store, unit_stride
from .pool import TOKENS, normalised_rows, row_block


@triton.jit
def _weighed_sum(
    y, channel_weights, token_weights, i_b, o_t, o_d, m, K, length, channels,
    HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    b_sum = tl.zeros([BT, BD], tl.float32)
    for i_k in range(K):
        i_bk = i_b * K + i_k
        p_y = y + (i_bk * length + o_t[:, None]) * channels + o_d[None, :]
        b_y = tl.load(p_y, mask=m, other=0.0).to(tl.float32)
        if HAS_CHANNEL:
            p_w = channel_weights + i_bk * channels + o_d
            b_y *= tl.load(p_w, mask=o_d < channels, other=0.0).to(tl.float32)[None, :]
        if HAS_TOKEN:
            p_token = token_weights + i_bk * length + o_t
            b_y *= tl.load(p_token, mask=o_t < length, other=0.0).to(tl.float32)[:, None]
        b_sum += b_y
    return b_sum


@triton.jit
def merge_forward_kernel(
    y, channel_weights, token_weights, z, norm_weight, norm_bias, out,
    z_b, z_t, K, length, channels, eps,
    HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_NORM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BD)
    o_t = i_t * BT + tl.arange(0, BT)
    m_d = o_d < channels
    m = (o_t < length)[:, None] & m_d[None, :]
    b_out = _weighed_sum(
        y, channel_weights, token_weights, i_b, o_t, o_d, m, K, length, channels,
        HAS_CHANNEL, HAS_TOKEN, BT, BD,
    )  # fmt: skip
    if HAS_NORM:
        b_out, _ = normalised_rows(b_out, m_d, channels, eps)
        b_out *= tl.load(norm_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        b_out += tl.load(norm_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if HAS_Z:
        p_z = z + i_b * z_b + o_t[:, None] * z_t + o_d[None, :]
        b_z = tl.load(p_z, mask=m, other=0.0).to(tl.float32)
        b_out *= b_z * sigmoid(b_z)
    store(out + (i_b * length + o_t[:, None]) * channels + o_d[None, :], b_out, m)


@triton.jit
def sum_backward_kernel(
    dout, y, channel_weights, token_weights, z, norm_weight, norm_bias,
    dsum, dz, dnorm_weight, dnorm_bias, dout_b, dout_t, z_b, z_t, K, length, channels, blocks, eps,
    HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_NORM: tl.constexpr, TOKENS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Back through gate and norm to the sum over directions."""
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < channels
    b_dweight = tl.zeros([BD], tl.float32)
    b_dbias = tl.zeros([BD], tl.float32)
    b_weight = tl.full([BD], 1.0, tl.float32)
    b_bias = tl.zeros([BD], tl.float32)
    if HAS_NORM:
        b_weight = tl.load(norm_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_bias = tl.load(norm_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    for i in range(0, TOKENS, BT):
        o_t = i_t * TOKENS + i + tl.arange(0, BT)
        m = (o_t < length)[:, None] & m_d[None, :]
        o_out = (i_b * length + o_t[:, None]) * channels + o_d[None, :]
        p_dout = dout + i_b * dout_b + o_t[:, None] * dout_t + o_d[None, :]
        b_g = tl.load(p_dout, mask=m, other=0.0).to(tl.float32)
        b_xhat = _weighed_sum(
            y, channel_weights, token_weights, i_b, o_t, o_d, m, K, length, channels,
            HAS_CHANNEL, HAS_TOKEN, BT, BD,
        )  # fmt: skip
        b_rstd = tl.full([BT], 1.0, tl.float32)
        if HAS_NORM:
            b_xhat, b_rstd = normalised_rows(b_xhat, m_d, channels, eps)
        if HAS_Z:
            p_z = z + i_b * z_b + o_t[:, None] * z_t + o_d[None, :]
            b_z = tl.load(p_z, mask=m, other=0.0).to(tl.float32)
            b_gate = sigmoid(b_z)
            b_normed = b_xhat * b_weight[None, :] + b_bias[None, :]
            store(dz + o_out, b_g * b_normed * b_gate * (1.0 + b_z * (1.0 - b_gate)), m)
            b_g *= b_z * b_gate
        if HAS_NORM:
            b_dweight += tl.sum(b_g * b_xhat, axis=0)
            b_dbias += tl.sum(b_g, axis=0)
            b_g *= b_weight[None, :]
            mean = tl.sum(b_g, axis=1) / channels
            along = tl.sum(b_g * b_xhat, axis=1) / channels
            b_g = (b_g - mean[:, None] - b_xhat * along[:, None]) * b_rstd[:, None]
        store(dsum + o_out, b_g, m)
    if HAS_NORM:
        o_part = (i_b * blocks + i_t) * channels + o_d
        tl.store(dnorm_weight + o_part, b_dweight, mask=m_d)
        tl.store(dnorm_bias + o_part, b_dbias, mask=m_d)


@triton.jit
def branch_backward_kernel(
    dsum, y, channel_weights, token_weights, dy, dchannel, dtoken,
    dsum_b, dsum_t, K, length, channels, blocks,
    HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr, TOKENS: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """From the gradient of the sum to one direction's output and weights."""
    i_t, i_bk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b = i_bk // K
    o_d = tl.arange(0, BD)
    m_d = o_d < channels
    b_channel = tl.full([BD], 1.0, tl.float32)
    if HAS_CHANNEL:
        p_w = channel_weights + i_bk * channels + o_d
        b_channel = tl.load(p_w, mask=m_d, other=0.0).to(tl.float32)
    b_dchannel = tl.zeros([BD], tl.float32)
    for i in range(0, TOKENS, BT):
        o_t = i_t * TOKENS + i + tl.arange(0, BT)
        m_t = o_t < length
        m = m_t[:, None] & m_d[None, :]
        o_y = (i_bk * length + o_t[:, None]) * channels + o_d[None, :]
        p_g = dsum + i_b * dsum_b + o_t[:, None] * dsum_t + o_d[None, :]
        b_g = tl.load(p_g, mask=m, other=0.0).to(tl.float32)
        b_dy = b_g * b_channel[None, :]
        if HAS_CHANNEL or HAS_TOKEN:
            b_product = b_g * tl.load(y + o_y, mask=m, other=0.0).to(tl.float32)
            if HAS_TOKEN:
                p_token = token_weights + i_bk * length + o_t
                b_token = tl.load(p_token, mask=m_t, other=0.0).to(tl.float32)
                b_dtoken = tl.sum(b_product * b_channel[None, :], axis=1)
                tl.store(dtoken + i_bk * length + o_t, b_dtoken, mask=m_t)
                b_dy *= b_token[:, None]
                b_product *= b_token[:, None]
            b_dchannel += tl.sum(b_product, axis=0)
        store(dy + o_y, b_dy, m)
    if HAS_CHANNEL:
        tl.store(dchannel + (i_bk * blocks + i_t) * channels + o_d, b_dchannel, mask=m_d)


def _optional_contiguous(*tensors):
    return [x if x is None else x.contiguous() for x in tensors]


def merge_forward(y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    y, channel_weights, token_weights, norm_weight, norm_bias = _optional_contiguous(
        y, channel_weights, token_weights, norm_weight, norm_bias
    )
    z = z if z is None else unit_stride(z)
    batch, directions, length, channels = y.shape
    out = torch.empty((batch, length, channels), dtype=y.dtype, device=y.device)
    if out.numel() > 0:
        block, rows, warps = row_block(channels)
        with device_of(y):
            merge_forward_kernel[(triton.cdiv(length, rows), batch)](
                y, channel_weights, token_weights, z, norm_weight, norm_bias, out,
                *((0, 0) if z is None else z.stride()[:2]), directions, length, channels, eps,
                HAS_CHANNEL=channel_weights is not None, HAS_TOKEN=token_weights is not None,
                HAS_Z=z is not None, HAS_NORM=norm_weight is not None,
                BT=rows, BD=block, num_warps=warps,
            )  # fmt: skip
    return out


def _sum_backward(dout, y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    """Gradients of the sum over directions, of z, and of the norm's weight and bias."""
    if z is None and norm_weight is None:
        return dout, None, None, None
    batch, directions, length, channels = y.shape
    block, rows, warps = row_block(channels)
    rows = min(rows, TOKENS)
    blocks = triton.cdiv(length, TOKENS)
    dsum = torch.empty((batch, length, channels), dtype=y.dtype, device=y.device)
    dz = None if z is None else torch.empty_like(dsum, dtype=z.dtype)
    dweight = dbias = None
    if norm_weight is not None:
        shape = (batch * blocks, channels)
        dweight = torch.empty(shape, dtype=torch.float32, device=y.device)
        dbias = torch.empty_like(dweight)
    sum_backward_kernel[(blocks, batch)](
        dout, y, channel_weights, token_weights, z, norm_weight, norm_bias,
        dsum, dz, dweight, dbias, *dout.stride()[:2],
        *((0, 0) if z is None else z.stride()[:2]), directions, length, channels, blocks, eps,
        HAS_CHANNEL=channel_weights is not None, HAS_TOKEN=token_weights is not None,
        HAS_Z=z is not None, HAS_NORM=norm_weight is not None,
        TOKENS=TOKENS, BT=rows, BD=block, num_warps=warps,
    )  # fmt: skip
    if norm_weight is None:
        return dsum, dz, None, None
    return dsum, dz, dweight.sum(0), dbias.sum(0)


def merge_backward(dout, y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    inputs = (y, channel_weights, token_weights, z, norm_weight, norm_bias)
    y, channel_weights, token_weights, norm_weight, norm_bias = _optional_contiguous(
        y, channel_weights, token_weights, norm_weight, norm_bias
    )
    dout = unit_stride(dout)
    z = z if z is None else unit_stride(z)
    batch, directions, length, channels = y.shape
    block, rows, warps = row_block(channels)
    rows = min(rows, TOKENS)
    blocks = triton.cdiv(length, TOKENS)
    dy = torch.empty_like(y)
    dchannel = dtoken = None
    if channel_weights is not None:
        shape = (batch, directions, blocks, channels)
        dchannel = torch.empty(shape, dtype=torch.float32, device=y.device)
    if token_weights is not None:
        shape = (batch, directions, length)
        dtoken = torch.empty(shape, dtype=torch.float32, device=y.device)
    with device_of(y):
        dsum, dz, dweight, dbias = _sum_backward(
            dout, y, channel_weights, token_weights, z, norm_weight, norm_bias, eps
        )
        branch_backward_kernel[(blocks, batch * directions)](
            dsum, y, channel_weights, token_weights, dy, dchannel, dtoken,
            *dsum.stride()[:2], directions, length, channels, blocks,
            HAS_CHANNEL=channel_weights is not None, HAS_TOKEN=token_weights is not None,
            TOKENS=TOKENS, BT=rows, BD=block, num_warps=warps,
        )  # fmt: skip
    dchannel = dchannel if dchannel is None else dchannel.sum(2)
    gradients = (dy, dchannel, dtoken, dz, dweight, dbias)
    pairs = zip(gradients, inputs, strict=True)
    return tuple(g if g is None or x is None else g.to(x.dtype) for g, x in pairs)
