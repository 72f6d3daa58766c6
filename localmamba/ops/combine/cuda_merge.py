"""The weighed sum over directions, with optional layer norm and gate (Triton).

Reads every output once. The backward pass is in join_backward.py.
"""

import torch
import triton
import triton.language as tl

from .._common.tiles import (
    add_rows,
    centered_rows,
    channel_offsets,
    load,
    load_directions,
    load_rows,
    multiply_rows,
    scale_rows,
    silu_rows,
    store_rows,
    tiling,
    token_offsets,
    token_strides,
    zero_rows,
)
from .._common.triton_common import Kernel, cdiv, device_of, program_2d, unit_stride

_TOKENS = 4
"""Tokens of a program: they share the channel weights in the L1 cache."""


@triton.jit
def weighed(
    rows, channel_weights, token_weights, o_bk, o_t, o_d, m_t, length,
    D: tl.constexpr, HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr,
):  # fmt: skip
    """Rows of a direction times their weights."""
    if HAS_CHANNEL:
        # As a tile: every lane reads what it needs, and nothing is exchanged.
        rows = multiply_rows(rows, load_rows(channel_weights + o_bk * D + o_t * 0, o_d, m_t, D))
    if HAS_TOKEN:
        rows = scale_rows(rows, load(token_weights + o_bk * length + o_t, m_t))
    return rows


@triton.jit
def weighed_sum(
    y, channel_weights, token_weights, i_b, o_t, o_d, m_t, length,
    K: tl.constexpr, D: tl.constexpr, HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr,
    BK: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Rows summed over all directions."""
    total = zero_rows(TILES, PARTS, BT)
    for k in range(0, K, BK):
        directions = load_directions(y, i_b, k, o_t, o_d, m_t, length, K, D, BK)
        for j in tl.static_range(BK):
            rows = weighed(
                directions[j], channel_weights, token_weights, i_b * K + k + j, o_t, o_d,
                m_t & (k + j + o_t * 0 < K), length, D, HAS_CHANNEL, HAS_TOKEN,
            )  # fmt: skip
            total = add_rows(total, rows)
    return total


@Kernel
@triton.jit
def merge_forward_kernel(
    y, channel_weights, token_weights, z, norm_weight, norm_bias, out,
    z_b, z_t, length, blocks, eps,
    K: tl.constexpr, D: tl.constexpr, HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_NORM: tl.constexpr, TOKENS: tl.constexpr,
    BK: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    i_t, i_b = program_2d(blocks)
    o_d = channel_offsets(TILES, PARTS)
    for i in range(0, TOKENS, BT):
        o_t = i_t * TOKENS + i + token_offsets(BT)
        m_t = o_t < length
        if HAS_Z:
            b_z = load_rows(z + i_b * z_b + o_t.to(tl.int64) * z_t, o_d, m_t, D)
        rows = weighed_sum(
            y, channel_weights, token_weights, i_b, o_t, o_d, m_t, length,
            K, D, HAS_CHANNEL, HAS_TOKEN, BK, TILES, PARTS, BT,
        )  # fmt: skip
        if HAS_NORM:
            centred, b_rstd = centered_rows(rows, o_d, m_t, D, eps)
            rows = scale_rows(centred, b_rstd)
            rows = multiply_rows(rows, load_rows(norm_weight + o_t * 0, o_d, m_t, D))
            rows = add_rows(rows, load_rows(norm_bias + o_t * 0, o_d, m_t, D))
        if HAS_Z:
            rows = multiply_rows(rows, silu_rows(b_z))
        store_rows(out + (i_b * length + o_t) * D, rows, o_d, m_t, D, True)


def optional_contiguous(*tensors):
    return [x if x is None else x.contiguous() for x in tensors]


def combine_forward(y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    y, channel_weights, token_weights, norm_weight, norm_bias = optional_contiguous(
        y, channel_weights, token_weights, norm_weight, norm_bias
    )
    z = z if z is None else unit_stride(z)
    batch, directions, length, channels = y.shape
    out = torch.empty((batch, length, channels), dtype=y.dtype, device=y.device)
    if out.numel() > 0:
        tile = tiling(directions, channels)
        tokens = max(_TOKENS, tile.tokens)
        blocks = cdiv(length, tokens)
        with device_of(y):
            merge_forward_kernel[(blocks * batch,)](
                y, channel_weights, token_weights, z, norm_weight, norm_bias, out,
                *token_strides(z), length, blocks, eps, K=directions, D=channels,
                HAS_CHANNEL=channel_weights is not None, HAS_TOKEN=token_weights is not None,
                HAS_Z=z is not None, HAS_NORM=norm_weight is not None,
                TOKENS=tokens, **tile.arguments(),
            )  # fmt: skip
    return out
