"""SCAttn's pooling (Triton): the mean over tokens of the layer-normalised, gated outputs.

Sums over tokens leave as one partial per program and are added in a fixed order afterwards.
"""

import torch
import triton
import triton.language as tl

from .common import device_of, sigmoid, unit_stride
from .tiles import WIDTH, channel_offsets, load_rows, normalised_rows, sum_tokens, tiling

_TOKENS = 32
"""Tokens of a program."""


@triton.jit
def pool_forward_kernel(
    y, z, sums, z_b, z_t, K, length, channels, blocks, eps,
    HAS_Z: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    i_t, i_bk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = channel_offsets(PARTS)
    m_d = o_d < channels
    o_rows = tl.arange(0, BT)[None, :, None]
    b_sum = tl.zeros([PARTS, BT, WIDTH], tl.float32)
    p_y = y + i_bk * length * channels
    p_z = z
    if HAS_Z:
        p_z = z + (i_bk // K) * z_b
    for i in range(0, TOKENS, BT):
        o_t = i_t * TOKENS + i + o_rows
        m = (o_t < length) & m_d
        b_y = load_rows(p_y, o_t * channels + o_d, m)
        if HAS_Z:
            b_z = load_rows(p_z, o_t * z_t + o_d, m)
            b_y *= b_z * sigmoid(b_z)
        b_xhat, _ = normalised_rows(b_y, m_d, channels, eps)
        b_sum += b_xhat
    tl.store(sums + (i_bk * blocks + i_t) * channels + o_d, sum_tokens(b_sum), mask=m_d)


def pool_forward(y, z, eps):
    y = y.contiguous()
    z = z if z is None else unit_stride(z)
    batch, directions, length, channels = y.shape
    blocks = triton.cdiv(length, _TOKENS)
    sums = torch.empty((batch, directions, blocks, channels), dtype=torch.float32, device=y.device)
    if y.numel() > 0:
        parts, tokens, warps = tiling(channels)
        with device_of(y):
            pool_forward_kernel[(blocks, batch * directions)](
                y, z, sums, *((0, 0) if z is None else z.stride()[:2]),
                directions, length, channels, blocks, eps,
                HAS_Z=z is not None, TOKENS=_TOKENS, PARTS=parts, BT=tokens,
                num_warps=warps,
            )  # fmt: skip
    return sums.sum(2).div_(length)
