"""SCAttn's pooling (Triton): the mean over tokens of the layer-normalised, gated outputs.

A program reads whole rows (all channels of a token). Sums over tokens leave as one partial per
program and are added in a fixed order afterwards.
"""

import torch
import triton
import triton.language as tl

from .common import device_of, sigmoid, store, unit_stride

TOKENS = 32
"""Tokens of a program."""


@triton.jit
def normalised_rows(b_y, m_d, channels, eps):
    """xhat and 1 / std of rows [BT, BD]."""
    mean = tl.sum(b_y, axis=1) / channels
    b_y = tl.where(m_d[None, :], b_y - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(b_y * b_y, axis=1) / channels + eps)
    return b_y * rstd[:, None], rstd


@triton.jit
def pool_forward_kernel(
    y, z, sums, z_b, z_t, K, length, channels, blocks, eps,
    HAS_Z: tl.constexpr, TOKENS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_t, i_bk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < channels
    b_sum = tl.zeros([BD], tl.float32)
    for i in range(0, TOKENS, BT):
        o_t = i_t * TOKENS + i + tl.arange(0, BT)
        m = (o_t < length)[:, None] & m_d[None, :]
        p_y = y + (i_bk * length + o_t[:, None]) * channels + o_d[None, :]
        b_y = tl.load(p_y, mask=m, other=0.0).to(tl.float32)
        if HAS_Z:
            p_z = z + (i_bk // K) * z_b + o_t[:, None] * z_t + o_d[None, :]
            b_z = tl.load(p_z, mask=m, other=0.0).to(tl.float32)
            b_y *= b_z * sigmoid(b_z)
        b_xhat, _ = normalised_rows(b_y, m_d, channels, eps)
        b_sum += tl.sum(tl.where((o_t < length)[:, None], b_xhat, 0.0), axis=0)
    tl.store(sums + (i_bk * blocks + i_t) * channels + o_d, b_sum, mask=m_d)


@triton.jit
def pool_backward_kernel(
    dmeans, y, z, onto, dy, dz, z_b, z_t, K, length, channels, eps,
    HAS_Z: tl.constexpr, HAS_ONTO: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dy of every direction (added to `onto`), and dz."""
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < channels
    o_t = i_t * BT + tl.arange(0, BT)
    m = (o_t < length)[:, None] & m_d[None, :]
    b_act = tl.full([BT, BD], 1.0, tl.float32)
    b_dact = tl.zeros([BT, BD], tl.float32)
    b_dz = tl.zeros([BT, BD], tl.float32)
    if HAS_Z:
        p_z = z + i_b * z_b + o_t[:, None] * z_t + o_d[None, :]
        b_z = tl.load(p_z, mask=m, other=0.0).to(tl.float32)
        b_gate = sigmoid(b_z)
        b_act = b_z * b_gate
        b_dact = b_gate * (1.0 + b_z * (1.0 - b_gate))
    for i_k in range(K):
        i_bk = i_b * K + i_k
        o_y = (i_bk * length + o_t[:, None]) * channels + o_d[None, :]
        b_y = tl.load(y + o_y, mask=m, other=0.0).to(tl.float32)
        b_xhat, b_rstd = normalised_rows(b_y * b_act, m_d, channels, eps)
        b_g = tl.load(dmeans + i_bk * channels + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_g /= length
        along = tl.sum(b_xhat * b_g[None, :], axis=1) / channels
        b_g = (b_g - tl.sum(b_g, axis=0) / channels)[None, :] - b_xhat * along[:, None]
        b_g *= b_rstd[:, None]
        b_dz += b_g * b_y
        b_g *= b_act
        if HAS_ONTO:
            b_g += tl.load(onto + o_y, mask=m, other=0.0).to(tl.float32)
        store(dy + o_y, b_g, m)
    if HAS_Z:
        p_dz = dz + (i_b * length + o_t[:, None]) * channels + o_d[None, :]
        store(p_dz, b_dz * b_dact, m)


def row_block(channels: int) -> tuple[int, int, int]:
    """Channels rounded up to a power of two, rows of a tile, warps.

    One warp as long as a row fits its registers: sums over a row then never leave it.
    """
    block = triton.next_power_of_2(channels)
    return block, max(1, 1024 // block), max(1, block // 2048)


def pool_forward(y, z, eps):
    y = y.contiguous()
    z = z if z is None else unit_stride(z)
    batch, directions, length, channels = y.shape
    blocks = triton.cdiv(length, TOKENS)
    sums = torch.empty((batch, directions, blocks, channels), dtype=torch.float32, device=y.device)
    if y.numel() > 0:
        block, rows, warps = row_block(channels)
        with device_of(y):
            pool_forward_kernel[(blocks, batch * directions)](
                y, z, sums, *((0, 0) if z is None else z.stride()[:2]),
                directions, length, channels, blocks, eps,
                HAS_Z=z is not None, TOKENS=TOKENS, BT=min(rows, TOKENS), BD=block,
                num_warps=warps,
            )  # fmt: skip
    return sums.sum(2).div_(length)


def pool_backward(dmeans, y, z, eps, onto=None):
    y, dmeans = y.contiguous(), dmeans.contiguous()
    z, onto = z if z is None else unit_stride(z), onto if onto is None else onto.contiguous()
    batch, directions, length, channels = y.shape
    block, rows, warps = row_block(channels)
    dy = torch.empty_like(y)
    dz = None
    if z is not None:
        dz = torch.empty((batch, length, channels), dtype=z.dtype, device=y.device)
    if y.numel() > 0:
        with device_of(y):
            pool_backward_kernel[(triton.cdiv(length, rows), batch)](
                dmeans, y, z, onto, dy, dz, *((0, 0) if z is None else z.stride()[:2]),
                directions, length, channels, eps,
                HAS_Z=z is not None, HAS_ONTO=onto is not None, BT=rows, BD=block,
                num_warps=warps,
            )  # fmt: skip
    return dy, dz
