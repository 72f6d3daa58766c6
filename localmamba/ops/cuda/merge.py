"""The weighed sum over directions, with optional layer norm and gate (Triton).

Reads every output once. The backward pass is in join_backward.py.
"""

import torch
import triton
import triton.language as tl

from .common import cdiv, device_of, program_of_two, sigmoid, store, unit_stride
from .launch import Kernel
from .tiles import (
    WIDTH,
    channel_offsets,
    direction_offsets,
    load,
    normalised_rows,
    sum_directions,
    tiling,
    token_offsets,
)


@triton.jit
def weighed(
    b_y, channel_weights, token_weights, o_bk, o_t, o_d, m, length, channels,
    HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr,
):  # fmt: skip
    """Outputs times their weights, a tile."""
    if HAS_CHANNEL:
        # As a tile: every lane reads what it needs, and nothing is exchanged.
        b_y *= load(channel_weights + o_bk * channels + o_d + o_t * 0, m)
    if HAS_TOKEN:
        b_y *= load(token_weights + o_bk * length + o_t + o_d * 0, m)
    return b_y


@triton.jit
def weighed_sum(
    y, channel_weights, token_weights, i_b, o_t, o_d, m, K, length, channels,
    HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr,
    BK: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Over all directions, [1, PARTS, BT, WIDTH]."""
    b_sum = tl.zeros([1, PARTS, BT, WIDTH], tl.float32)
    for k in range(0, K, BK):
        o_k = k + direction_offsets(BK)
        m_y = m & (o_k < K)
        o_bk = i_b * K + o_k
        b_y = load(y + (o_bk * length + o_t) * channels + o_d, m_y)
        b_sum += sum_directions(
            weighed(
                b_y, channel_weights, token_weights, o_bk, o_t, o_d, m_y, length, channels,
                HAS_CHANNEL, HAS_TOKEN,
            )
        )  # fmt: skip
    return b_sum


@Kernel
@triton.jit
def merge_forward_kernel(
    y, channel_weights, token_weights, z, norm_weight, norm_bias, out,
    z_b, z_t, K, length, channels, eps,
    HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_NORM: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    i_t, i_b = program_of_two(tl.cdiv(length, BT))
    o_d = channel_offsets(PARTS)
    o_t = i_t * BT + token_offsets(BT)
    m_d = o_d < channels
    m = (o_t < length) & m_d
    b_z = tl.zeros([1, 1, 1, 1], tl.float32)
    if HAS_Z:
        b_z = load(z + i_b * z_b + o_t.to(tl.int64) * z_t + o_d, m)
    b_out = weighed_sum(
        y, channel_weights, token_weights, i_b, o_t, o_d, m, K, length, channels,
        HAS_CHANNEL, HAS_TOKEN, BK, PARTS, BT,
    )  # fmt: skip
    if HAS_NORM:
        b_out, _ = normalised_rows(b_out, m_d, channels, eps)
        b_out *= load(norm_weight + o_d + o_t * 0, m)
        b_out += load(norm_bias + o_d + o_t * 0, m)
    if HAS_Z:
        b_out *= b_z * sigmoid(b_z)
    store(out + (i_b * length + o_t) * channels + o_d, b_out, m)


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
        tile = tiling(directions, channels)
        with device_of(y):
            merge_forward_kernel[(cdiv(length, tile.tokens) * batch,)](
                y, channel_weights, token_weights, z, norm_weight, norm_bias, out,
                *((0, 0) if z is None else z.stride()[:2]), directions, length, channels, eps,
                HAS_CHANNEL=channel_weights is not None, HAS_TOKEN=token_weights is not None,
                HAS_Z=z is not None, HAS_NORM=norm_weight is not None, **tile.arguments(),
            )  # fmt: skip
    return out
