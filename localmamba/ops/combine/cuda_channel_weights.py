"""The gradient of the channel weights, from that of the weighed sum over directions (Triton)."""

import torch
import triton
import triton.language as tl

from .._common.tiles import load, token_strides
from .._common.triton_common import Kernel, cdiv, program_3d

_TOKENS, _CHANNELS = 64, 64
"""Of a program."""

_DIRECTIONS = 4
"""Of a program: they share the gradient of the sum."""


@Kernel
@triton.jit
def channel_weights_backward_kernel(
    dsum, y, token_weights, dchannel, sum_b, sum_t, length, channels, blocks,
    K: tl.constexpr, HAS_TOKEN: tl.constexpr, TOKENS: tl.constexpr, BK: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums over some tokens of output times the gradient of the sum."""
    i_d, i_t, i_b = program_3d(tl.cdiv(channels, BD), blocks)
    o_d = i_d * BD + tl.arange(0, BD)[None, :]
    i_bk = i_b * K + tl.program_id(1) * BK
    left = K - tl.program_id(1) * BK
    products = ()
    for _ in tl.static_range(BK):
        products += (tl.zeros([BT, BD], tl.float32),)
    for i in range(0, TOKENS, BT):
        o_t = i_t * TOKENS + i + tl.arange(0, BT)[:, None]
        m = (o_t < length) & (o_d < channels)
        b_sum = load(dsum + i_b * sum_b + o_t.to(tl.int64) * sum_t + o_d, m)
        added = ()
        for k in tl.static_range(BK):
            o_row = (i_bk + k) * length + o_t
            b_y = load(y + o_row * channels + o_d, m & (k + o_t * 0 < left))
            if HAS_TOKEN:
                m_token = (o_t < length) & (k + o_t * 0 < left)
                b_y *= load(token_weights + o_row, m_token)
            added += (products[k] + b_y * b_sum,)
        products = added
    for k in tl.static_range(BK):
        p_part = dchannel + ((i_bk + k) * blocks + i_t) * channels + o_d
        b_product = tl.sum(products[k], axis=0, keep_dims=True)
        tl.store(p_part, b_product, mask=(o_d < channels) & (k + o_d * 0 < left))


def channel_weights_parts(dsum, y, token_weights):
    """The gradient of the channel weights in parts, [B, K, parts, D]."""
    batch, directions, length, channels = y.shape
    blocks = cdiv(length, _TOKENS)
    dchannel = torch.empty(
        (batch, directions, blocks, channels), device=y.device, dtype=torch.float32
    )
    programs = cdiv(channels, _CHANNELS) * blocks * batch
    at_once = min(directions, _DIRECTIONS)
    channel_weights_backward_kernel[(programs, cdiv(directions, at_once))](
        dsum, y, token_weights, dchannel, *token_strides(dsum), length, channels, blocks,
        K=directions, HAS_TOKEN=token_weights is not None, TOKENS=_TOKENS, BK=at_once,
        BT=4, BD=_CHANNELS, num_warps=1,
    )  # fmt: skip
    return dchannel
