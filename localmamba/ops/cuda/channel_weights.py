"""The gradient of the channel weights, from that of the weighed sum over directions (Triton)."""

import torch
import triton
import triton.language as tl

from .common import cdiv, program_of_three
from .launch import Kernel
from .tiles import load, token_strides

_TOKENS, _CHANNELS = 64, 64
"""Of a program."""


@Kernel
@triton.jit
def channel_weights_backward_kernel(
    dsum, y, token_weights, dchannel, sum_b, sum_t, K, length, channels, blocks,
    HAS_TOKEN: tl.constexpr, TOKENS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums over some tokens of output times the gradient of the sum."""
    i_d, i_t, i_bk = program_of_three(tl.cdiv(channels, BD), blocks)
    o_d = i_d * BD + tl.arange(0, BD)[None, :]
    b_product = tl.zeros([BT, BD], tl.float32)
    p_sum = dsum + i_bk // K * sum_b
    for i in range(0, TOKENS, BT):
        o_t = i_t * TOKENS + i + tl.arange(0, BT)[:, None]
        m = (o_t < length) & (o_d < channels)
        b_y = load(y + (i_bk * length + o_t) * channels + o_d, m)
        b_y *= load(p_sum + o_t.to(tl.int64) * sum_t + o_d, m)
        if HAS_TOKEN:
            b_y *= load(token_weights + i_bk * length + o_t, o_t < length)
        b_product += b_y
    p_part = dchannel + (i_bk * blocks + i_t) * channels + o_d
    tl.store(p_part, tl.sum(b_product, axis=0, keep_dims=True), mask=o_d < channels)


def channel_weights_parts(dsum, y, token_weights):
    """The gradient of the channel weights in parts, [B, K, parts, D]."""
    batch, directions, length, channels = y.shape
    blocks = cdiv(length, _TOKENS)
    dchannel = torch.empty((batch, directions, blocks, channels), device=y.device)
    programs = cdiv(channels, _CHANNELS) * blocks * batch * directions
    channel_weights_backward_kernel[(programs,)](
        dsum, y, token_weights, dchannel, *token_strides(dsum),
        directions, length, channels, blocks,
        HAS_TOKEN=token_weights is not None, TOKENS=_TOKENS, BT=16, BD=_CHANNELS,
        num_warps=1,
    )  # fmt: skip
    return dchannel
