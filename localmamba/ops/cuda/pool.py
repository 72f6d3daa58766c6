"""SCAttn's pooling (Triton): the mean over tokens of the layer-normalised, gated outputs.

Sums over tokens leave as one partial per program and are added in a fixed order afterwards.
"""

import torch
import triton
import triton.language as tl

from .common import cdiv, device_of, program_of_two, sigmoid, unit_stride
from .launch import Kernel
from .partials import sum_partials
from .tiles import (
    WIDTH,
    channel_offsets,
    direction_offsets,
    load,
    normalised_rows,
    sum_tokens,
    tiling,
    token_offsets,
)

_TOKENS = 16
"""Tokens of a program."""


@Kernel
@triton.jit
def pool_forward_kernel(
    y, z, sums, z_b, z_t, K, length, channels, blocks, eps,
    HAS_Z: tl.constexpr, TOKENS: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    i_t, i_b = program_of_two(blocks)
    i_k = tl.program_id(1)
    o_d = channel_offsets(PARTS)
    o_k = i_k * BK + direction_offsets(BK)
    m_d, m_k = o_d < channels, o_k < K
    b_sum = tl.zeros([BK, PARTS, BT, WIDTH], tl.float32)
    p_y = y + (i_b * K + o_k) * length * channels + o_d
    for i in range(0, TOKENS, BT):
        o_t = i_t * TOKENS + i + token_offsets(BT)
        m = (o_t < length) & m_d
        b_y = load(p_y + o_t * channels, m & m_k)
        if HAS_Z:
            b_z = load(z + i_b * z_b + o_t.to(tl.int64) * z_t + o_d, m)
            b_y *= b_z * sigmoid(b_z)
        b_xhat, _ = normalised_rows(b_y, m_d, channels, eps)
        b_sum += tl.where(m, b_xhat, 0.0)  # with eps = 0, rows past the end are not numbers
    p_sums = sums + ((i_b * K + o_k) * blocks + i_t) * channels + o_d
    tl.store(p_sums, sum_tokens(b_sum) / length, mask=m_k & m_d)


def pool_forward(y, z, eps):
    y = y.contiguous()
    z = z if z is None else unit_stride(z)
    batch, directions, length, channels = y.shape
    blocks = cdiv(length, _TOKENS)
    sums = torch.empty((batch, directions, blocks, channels), dtype=torch.float32, device=y.device)
    if y.numel() > 0:
        tile = tiling(directions, channels, at_once=2)
        with device_of(y):
            pool_forward_kernel[(blocks * batch, cdiv(directions, tile.directions))](
                y, z, sums, *((0, 0) if z is None else z.stride()[:2]),
                directions, length, channels, blocks, eps,
                HAS_Z=z is not None, TOKENS=_TOKENS, **tile.arguments(),
            )  # fmt: skip
    return sum_partials(sums, 2, torch.float32)
