"""SCAttn's pooling (Triton): the mean over tokens of the layer-normalised, gated outputs.

Sums over tokens leave as one partial per program and are added in a fixed order afterwards.
"""

import torch
import triton
import triton.language as tl

from .._common.partials import sum_partials
from .._common.tiles import (
    SMALL_TILE,
    TILE,
    add_rows,
    centered_rows,
    channel_offsets,
    float_rows,
    load_directions,
    load_rows,
    multiply_rows,
    scale_rows,
    silu_rows,
    store_sums,
    tiling,
    token_offsets,
    token_strides,
    zero_rows,
)
from .._common.triton_common import Kernel, cdiv, device_of, program_2d, unit_stride

_TOKENS = 16
"""Tokens of a program."""


@Kernel
@triton.jit
def pool_forward_kernel(
    y, z, sums, z_b, z_t, length, blocks, eps,
    K: tl.constexpr, D: tl.constexpr, HAS_Z: tl.constexpr, TOKENS: tl.constexpr,
    BK: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """What the tokens of a program add to the means of its directions."""
    i_t, i_b = program_2d(blocks)
    k = tl.program_id(1) * BK
    o_d = channel_offsets(TILES, PARTS)
    totals = ()
    for _ in tl.static_range(BK):
        totals += (zero_rows(TILES, PARTS, BT),)
    o_first = i_t * TOKENS + token_offsets(BT)
    end = tl.minimum(length, (i_t + 1) * TOKENS)
    following = load_directions(y, i_b, k, o_first, o_d, o_first < end, length, K, D, BK)
    for i in range(0, TOKENS, BT):
        o_t = o_first + i
        m_t = o_t < length
        directions = following
        # The next tile's loads are under way while this one is added up.
        o_next = o_t + BT
        following = load_directions(y, i_b, k, o_next, o_d, o_next < end, length, K, D, BK)
        if HAS_Z:
            act = silu_rows(load_rows(z + i_b * z_b + o_t.to(tl.int64) * z_t, o_d, m_t, D))
        added = ()
        for j in tl.static_range(BK):
            rows = float_rows(directions[j])
            if HAS_Z:
                rows = multiply_rows(rows, act)
            centred, b_rstd = centered_rows(rows, o_d, m_t, D, eps)
            added += (add_rows(totals[j], scale_rows(centred, b_rstd)),)
        totals = added
    for j in tl.static_range(BK):
        if k + j < K:
            p_sums = sums + ((i_b * K + k + j) * blocks + i_t) * D
            store_sums(p_sums, scale_rows(totals[j], 1.0 / length), o_d, D)


def pool_forward(y, z, eps):
    y = y.contiguous()
    z = z if z is None else unit_stride(z)
    batch, directions, length, channels = y.shape
    # Two directions of a program share the gate; without one, they have nothing to share.
    at_once, size = (1, TILE) if z is None else (2, SMALL_TILE)
    tile = tiling(directions, channels, at_once, size)
    tokens = max(_TOKENS, tile.tokens)
    blocks = cdiv(length, tokens)
    sums = torch.empty((batch, directions, blocks, channels), dtype=torch.float32, device=y.device)
    if y.numel() > 0:
        with device_of(y):
            pool_forward_kernel[(blocks * batch, cdiv(directions, tile.directions))](
                y, z, sums, *token_strides(z), length, blocks, eps, K=directions, D=channels,
                HAS_Z=z is not None, TOKENS=tokens, **tile.arguments(),
            )  # fmt: skip
    return sum_partials(sums, 2, torch.float32)
