"""The weighed sum over directions, with optional layer norm and gate (Triton).

Reads every output once. The backward pass is in join_backward.py.
"""

import torch
import triton
import triton.language as tl

from .common import device_of, sigmoid, store, unit_stride
from .tiles import (
    WIDTH,
    channel_offsets,
    load_channels,
    load_next,
    load_rows,
    normalised_rows,
    tiling,
)


@triton.jit
def weighed_sum(
    p_y, p_channel, p_token, o_t, o_d, m_d, K, length, channels,
    HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Of one image, whose first direction the pointers point to: a tile [PARTS, BT, WIDTH]."""
    m = (o_t < length) & m_d
    b_sum = tl.zeros([PARTS, BT, WIDTH], tl.float32)
    o_y = o_t * channels + o_d
    b_next = tl.load(p_y + o_y, mask=m, other=0.0)
    for i_k in range(K):
        b_y = b_next.to(tl.float32)
        p_y += length * channels
        b_next = load_next(p_y + o_y, m, i_k, K)
        if HAS_CHANNEL:
            b_y *= load_channels(p_channel + i_k * channels, o_d, o_t, m)
        if HAS_TOKEN:
            b_y *= load_rows(p_token, i_k * length + o_t, o_t < length)
        b_sum += b_y
    return b_sum


@triton.jit
def merge_forward_kernel(
    y, channel_weights, token_weights, z, norm_weight, norm_bias, out,
    z_b, z_t, K, length, channels, eps,
    HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_NORM: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = channel_offsets(PARTS)
    o_t = i_t * BT + tl.arange(0, BT)[None, :, None]
    m_d = o_d < channels
    m = (o_t < length) & m_d
    b_out = weighed_sum(
        y + i_b * K * length * channels, channel_weights + i_b * K * channels,
        token_weights + i_b * K * length, o_t, o_d, m_d, K, length, channels,
        HAS_CHANNEL, HAS_TOKEN, PARTS, BT,
    )  # fmt: skip
    if HAS_NORM:
        b_out, _ = normalised_rows(b_out, m_d, channels, eps)
        b_out *= load_channels(norm_weight, o_d, o_t, m)
        b_out += load_channels(norm_bias, o_d, o_t, m)
    if HAS_Z:
        b_z = load_rows(z + i_b * z_b, o_t * z_t + o_d, m)
        b_out *= b_z * sigmoid(b_z)
    store(out + i_b * length * channels + o_t * channels + o_d, b_out, m)


def optional_contiguous(*tensors):
    return [x if x is None else x.contiguous() for x in tensors]


def merge_forward(y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    y, channel_weights, token_weights, norm_weight, norm_bias = optional_contiguous(
        y, channel_weights, token_weights, norm_weight, norm_bias
    )
    z = z if z is None else unit_stride(z)
    batch, directions, length, channels = y.shape
    out = torch.empty((batch, length, channels), dtype=y.dtype, device=y.device)
    if out.numel() > 0:
        parts, tokens, warps = tiling(channels)
        with device_of(y):
            merge_forward_kernel[(triton.cdiv(length, tokens), batch)](
                y, *(y if x is None else x for x in (channel_weights, token_weights)),
                z, norm_weight, norm_bias, out,
                *((0, 0) if z is None else z.stride()[:2]), directions, length, channels, eps,
                HAS_CHANNEL=channel_weights is not None, HAS_TOKEN=token_weights is not None,
                HAS_Z=z is not None, HAS_NORM=norm_weight is not None,
                PARTS=parts, BT=tokens, num_warps=warps,
            )  # fmt: skip
    return out
