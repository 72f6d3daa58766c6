"""Pooling, weighted sum over directions, norm and gate on a GPU (Triton), forward and backward.

Each kernel reads the directions' outputs once. Sums over tokens leave a program as partial sums,
which are added in a fixed order afterwards. Backward, three kernels read the outputs: through gate
and norm to the gradient of the sum; to the gradients of the channel weights; and to those of the
outputs. Before the last, SCAttn's linear layers (scattn_cuda.py) lead from the gradients of the
channel weights to those of the means: both gradients of the outputs then end in one store.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.partials import sum_partials
from .._common.registration import in_dtypes
from .._common.tiles import (
    SMALL_TILE,
    TILE,
    add_rows,
    centered_rows,
    channel_offsets,
    float_rows,
    load,
    load_directions,
    load_rows,
    multiply_rows,
    norm_grad,
    scale_rows,
    silu_grad_rows,
    silu_rows,
    store_rows,
    store_sums,
    sum_rows,
    tiling,
    token_offsets,
    token_strides,
    zero_rows,
)
from .._common.triton_common import (
    Kernel,
    cdiv,
    device_of,
    program_2d,
    program_3d,
    sigmoid,
    silu_grad,
    unit_stride,
)
from .reference import CombineInputs, SCAttnInputs
from .scattn_cuda import weights_backward
from .scattn_cuda import weights_forward as weights_forward

_POOL_TOKENS, _COMBINE_TOKENS, _SUM_BACKWARD_TOKENS, _Y_BACKWARD_TOKENS = 16, 4, 16, 4
"""Tokens per program: 16 where it stores partial sums over them; where it stores only rows, 4,
which share the channel weights in the L1 cache."""

_WEIGHTS_TOKENS, _WEIGHTS_CHANNELS, _WEIGHTS_DIRECTIONS = 64, 64, 4
"""Tokens, channels and directions per program of the channel weights' gradient; its directions
share the gradient of the sum."""


@lru_cache(maxsize=256)
def _blocks(
    directions: int, length: int, channels: int, tokens: int, prefetch: int, tile: int
) -> tuple[int, dict[str, int]]:
    """Returns the blocks of tokens per image, and the constants of a kernel over them.

    Args:
        directions: K.
        length: L.
        channels: D.
        tokens: Tokens per program, unless a tile has more.
        prefetch: Directions prefetched per tile.
        tile: Elements of a tile.
    """
    tiles = tiling(directions, channels, prefetch, tile)
    tokens = max(tokens, tiles.tokens)
    constants = {"K": directions, "D": channels, "TOKENS": tokens, **tiles.arguments()}
    return cdiv(length, tokens), constants


def _contiguous(inputs: CombineInputs) -> CombineInputs:
    """Makes all tensors contiguous but z, of which only the rows need to be."""
    y, channel, token, z, weight, bias, eps = inputs
    channel, token, weight, bias = (
        x if x is None else x.contiguous() for x in (channel, token, weight, bias)
    )
    z = z if z is None else unit_stride(z)
    return CombineInputs(y.contiguous(), channel, token, z, weight, bias, eps)


@triton.jit
def _per_token(x, o_t):
    """Broadcasts a scalar to a tile like o_t by `+ o_t * 0`: no lane waits for another's load."""
    return x + o_t * 0


@Kernel
@triton.jit
def pool_forward_kernel(
    y, z, sums, z_b, z_t, length, blocks, eps,
    K: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
    BK: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Computes a program's share of the means of its directions, [B, K, blocks, D]."""
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
        # Prefetches the next tile while this one is added.
        o_next = o_t + BT
        following = load_directions(y, i_b, k, o_next, o_d, o_next < end, length, K, D, BK)
        if z is not None:
            act = silu_rows(load_rows(z + i_b * z_b + o_t.to(tl.int64) * z_t, o_d, m_t, D))
        added = ()
        for j in tl.static_range(BK):
            rows = float_rows(directions[j])
            if z is not None:
                rows = multiply_rows(rows, act)
            centered, b_rstd = centered_rows(rows, o_d, m_t, D, eps)
            added += (add_rows(totals[j], scale_rows(centered, b_rstd)),)
        totals = added
    for j in tl.static_range(BK):
        if k + j < K:
            p_sums = sums + ((i_b * K + k + j) * blocks + i_t) * D
            store_sums(p_sums, scale_rows(totals[j], 1.0 / length), o_d, D)


def pool_forward(y: Tensor, z: Tensor | None, eps: float) -> Tensor:
    y = y.contiguous()
    z = z if z is None else unit_stride(z)
    batch, directions, length, channels = y.shape
    # Two directions of a program share the gate; without one, they have nothing to share.
    prefetch, tile = (1, TILE) if z is None else (2, SMALL_TILE)
    blocks, constants = _blocks(directions, length, channels, _POOL_TOKENS, prefetch, tile)
    sums = torch.empty((batch, directions, blocks, channels), dtype=torch.float32, device=y.device)
    if y.numel() > 0:
        with device_of(y):
            pool_forward_kernel[(blocks * batch, cdiv(directions, constants["BK"]))](
                y, z, sums, *token_strides(z), length, blocks, eps, **constants
            )
    return sum_partials(sums, 2, torch.float32)


@triton.jit
def _weighted_rows(
    rows, channel_weights, token_weights, o_bk, o_t, o_d, m_t, length, D: tl.constexpr
):  # fmt: skip
    """Computes rows of a direction times their weights."""
    if channel_weights is not None:
        p_weights = _per_token(channel_weights + o_bk * D, o_t)
        rows = multiply_rows(rows, load_rows(p_weights, o_d, m_t, D))
    if token_weights is not None:
        rows = scale_rows(rows, load(token_weights + o_bk * length + o_t, m_t))
    return rows


@triton.jit
def _weighted_sum(
    y, channel_weights, token_weights, i_b, o_t, o_d, m_t, length, K: tl.constexpr, D: tl.constexpr,
    BK: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Computes the weighted sum of rows over all directions."""
    total = zero_rows(TILES, PARTS, BT)
    for k in range(0, K, BK):
        directions = load_directions(y, i_b, k, o_t, o_d, m_t, length, K, D, BK)
        for j in tl.static_range(BK):
            rows = _weighted_rows(
                directions[j], channel_weights, token_weights, i_b * K + k + j, o_t, o_d,
                m_t & (_per_token(k + j, o_t) < K), length, D,
            )  # fmt: skip
            total = add_rows(total, rows)
    return total


@Kernel
@triton.jit
def combine_forward_kernel(
    y, channel_weights, token_weights, z, norm_weight, norm_bias, out,
    z_b, z_t, length, blocks, eps, K: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
    BK: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Computes the weighted sum over directions, normalized and gated."""
    i_t, i_b = program_2d(blocks)
    o_d = channel_offsets(TILES, PARTS)
    for i in range(0, TOKENS, BT):
        o_t = i_t * TOKENS + i + token_offsets(BT)
        m_t = o_t < length
        if z is not None:
            b_z = load_rows(z + i_b * z_b + o_t.to(tl.int64) * z_t, o_d, m_t, D)
        rows = _weighted_sum(
            y, channel_weights, token_weights, i_b, o_t, o_d, m_t, length,
            K, D, BK, TILES, PARTS, BT,
        )  # fmt: skip
        if norm_weight is not None:
            centered, b_rstd = centered_rows(rows, o_d, m_t, D, eps)
            rows = scale_rows(centered, b_rstd)
            rows = multiply_rows(rows, load_rows(_per_token(norm_weight, o_t), o_d, m_t, D))
            rows = add_rows(rows, load_rows(_per_token(norm_bias, o_t), o_d, m_t, D))
        if z is not None:
            rows = multiply_rows(rows, silu_rows(b_z))
        store_rows(out + (i_b * length + o_t) * D, rows, o_d, m_t, D, True)


def combine_forward(inputs: CombineInputs) -> Tensor:
    y, channel, token, z, norm_weight, norm_bias, eps = _contiguous(inputs)
    batch, directions, length, channels = y.shape
    out = torch.empty((batch, length, channels), dtype=y.dtype, device=y.device)
    if out.numel() > 0:
        blocks, constants = _blocks(directions, length, channels, _COMBINE_TOKENS, 4, TILE)
        with device_of(y):
            combine_forward_kernel[(blocks * batch,)](
                y, channel, token, z, norm_weight, norm_bias, out,
                *token_strides(z), length, blocks, eps, **constants,
            )  # fmt: skip
    return out


@triton.jit
def _gate_backward(b_g, b_normed, b_z, p_dz, m):
    """Computes the gradient of the gated rows; stores that of the gate."""
    b_gate = sigmoid(b_z)
    tl.store(p_dz, b_g * b_normed * silu_grad(b_z, b_gate), mask=m)
    return b_g * (b_z * b_gate)


@triton.jit
def _gate_and_norm_backward(
    b_sum, b_g, b_z, norm_weight, norm_bias, p_dz, o_t, o_d, m_t, D: tl.constexpr, eps
):  # fmt: skip
    """Computes rows of the gradients of the sum and the norm's parameters; stores that of z."""
    if norm_weight is not None:
        centered, b_rstd = centered_rows(b_sum, o_d, m_t, D, eps)
    gradients, dweight, dbias = (), (), ()
    for i in tl.static_range(len(o_d)):
        m = m_t & (o_d[i] < D)
        b_tile, b_xhat = b_g[i].to(tl.float32), b_sum[i]
        b_normed, b_weight = b_xhat, 1.0
        if norm_weight is not None:
            b_xhat = centered[i] * b_rstd
            b_weight = load(_per_token(norm_weight + o_d[i], o_t), m)
            b_normed = b_xhat * b_weight + load(_per_token(norm_bias + o_d[i], o_t), m)
        if p_dz is not None:
            b_tile = _gate_backward(b_tile, b_normed, b_z[i].to(tl.float32), p_dz + o_d[i], m)
        dweight += (b_tile * b_xhat,)
        dbias += (b_tile,)
        gradients += (b_tile * b_weight,)
    if norm_weight is not None:
        gradients = norm_grad(gradients, centered, b_rstd, 1.0, D)
    return gradients, dweight, dbias


@Kernel
@triton.jit
def sum_backward_kernel(
    dout, y, channel_weights, token_weights, z, norm_weight, norm_bias,
    dsum, dz, dnorm_weight, dnorm_bias, dout_b, dout_t, z_b, z_t, length, blocks, eps,
    K: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
    BK: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of the sum and the gate, and partial sums of those of the norm."""
    i_t, i_b = program_2d(blocks)
    o_d = channel_offsets(TILES, PARTS)
    dweight = zero_rows(TILES, PARTS, BT)
    dbias = zero_rows(TILES, PARTS, BT)
    for i in range(0, TOKENS, BT):
        o_t = i_t * TOKENS + i + token_offsets(BT)
        m_t = o_t < length
        o_out = (i_b * length + o_t) * D
        b_g = load_rows(dout + i_b * dout_b + o_t.to(tl.int64) * dout_t, o_d, m_t, D)
        b_z = b_g
        if z is not None:
            b_z = load_rows(z + i_b * z_b + o_t.to(tl.int64) * z_t, o_d, m_t, D)
        b_sum = _weighted_sum(
            y, channel_weights, token_weights, i_b, o_t, o_d, m_t, length,
            K, D, BK, TILES, PARTS, BT,
        )  # fmt: skip
        p_dz = dz + o_out if dz is not None else None
        b_dsum, b_dweight, b_dbias = _gate_and_norm_backward(
            b_sum, b_g, b_z, norm_weight, norm_bias, p_dz, o_t, o_d, m_t, D, eps
        )
        dweight = add_rows(dweight, b_dweight)
        dbias = add_rows(dbias, b_dbias)
        store_rows(dsum + o_out, b_dsum, o_d, m_t, D, False)
    if norm_weight is not None:
        o_norm = (i_b * blocks + i_t) * D
        store_sums(dnorm_weight + o_norm, dweight, o_d, D)
        store_sums(dnorm_bias + o_norm, dbias, o_d, D)


def _sum_backward(
    dout: Tensor, inputs: CombineInputs
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Computes the gradients of the sum over directions, z, and the norm's weight and bias."""
    y, channel, token, z, norm_weight, norm_bias, eps = inputs
    if z is None and norm_weight is None:
        return dout, None, None, None
    batch, directions, length, channels = y.shape
    blocks, constants = _blocks(directions, length, channels, _SUM_BACKWARD_TOKENS, 4, SMALL_TILE)
    dsum = torch.empty((batch, length, channels), dtype=y.dtype, device=y.device)
    dz = None if z is None else torch.empty_like(dsum, dtype=z.dtype)
    partials = None
    if norm_weight is not None:
        partials = torch.empty((2, batch * blocks, channels), device=y.device, dtype=torch.float32)
    dweight, dbias = (None, None) if partials is None else partials
    sum_backward_kernel[(blocks * batch,)](
        dout, y, channel, token, z, norm_weight, norm_bias, dsum, dz, dweight, dbias,
        *token_strides(dout, z), length, blocks, eps, **constants,
    )  # fmt: skip
    if partials is not None:
        dweight, dbias = sum_partials(partials, 1, torch.float32)
    return dsum, dz, dweight, dbias


@Kernel
@triton.jit
def channel_weights_backward_kernel(
    dsum, y, token_weights, dchannel, sum_b, sum_t, length, channels, blocks,
    K: tl.constexpr, TOKENS: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Computes partial sums over tokens of output times the gradient of the sum."""
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
            b_y = load(y + o_row * channels + o_d, m & (_per_token(k, o_t) < left))
            if token_weights is not None:
                m_token = (o_t < length) & (_per_token(k, o_t) < left)
                b_y *= load(token_weights + o_row, m_token)
            added += (products[k] + b_y * b_sum,)
        products = added
    for k in tl.static_range(BK):
        p_part = dchannel + ((i_bk + k) * blocks + i_t) * channels + o_d
        b_product = tl.sum(products[k], axis=0, keep_dims=True)
        tl.store(p_part, b_product, mask=(o_d < channels) & (_per_token(k, o_d) < left))


def _channel_weights_backward(dsum: Tensor, y: Tensor, token_weights: Tensor | None) -> Tensor:
    """Computes partial sums of the gradient of the channel weights, [B, K, blocks, D]."""
    batch, directions, length, channels = y.shape
    blocks = cdiv(length, _WEIGHTS_TOKENS)
    shape = (batch, directions, blocks, channels)
    dchannel = torch.empty(shape, device=y.device, dtype=torch.float32)
    programs = cdiv(channels, _WEIGHTS_CHANNELS) * blocks * batch
    prefetch = min(directions, _WEIGHTS_DIRECTIONS)
    channel_weights_backward_kernel[(programs, cdiv(directions, prefetch))](
        dsum, y, token_weights, dchannel, *token_strides(dsum), length, channels, blocks,
        K=directions, TOKENS=_WEIGHTS_TOKENS, BK=prefetch, BT=4, BD=_WEIGHTS_CHANNELS,
        num_warps=1,
    )  # fmt: skip
    return dchannel


@triton.jit
def _sum_to_y_backward(
    b_dsum, b_y, channel_weights, token_weights, dtoken, o_bk, o_t, o_d, m_t, length,
    D: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of y through the weighted sum; stores that of the token weights."""
    b_dy = _weighted_rows(b_dsum, channel_weights, None, o_bk, o_t, o_d, m_t, length, D)
    if token_weights is not None:
        p_dtoken = dtoken + o_bk * length + o_t
        tl.store(p_dtoken, sum_rows(multiply_rows(b_dy, b_y)), mask=m_t)
        b_dy = scale_rows(b_dy, load(token_weights + o_bk * length + o_t, m_t))
    return float_rows(b_dy)


@triton.jit
def _means_to_y_backward(gated, dmeans, o_bk, o_t, o_d, m_t, length, D: tl.constexpr, eps):
    """Computes the gradient of the gated y through the pooling."""
    b_g = float_rows(load_rows(_per_token(dmeans + o_bk * D, o_t), o_d, m_t, D))
    centered, b_rstd = centered_rows(gated, o_d, m_t, D, eps)
    return norm_grad(b_g, centered, b_rstd, 1.0 / length, D)


@Kernel
@triton.jit
def y_backward_kernel(
    dsum, y, channel_weights, token_weights, dmeans, z, dy, dtoken, dz,
    sum_b, sum_t, z_b, z_t, length, blocks, eps,
    K: tl.constexpr, D: tl.constexpr, ADDS_DZ: tl.constexpr, TOKENS: tl.constexpr,
    BK: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of y, of the token weights and of the pooling's gate."""
    i_t, i_b = program_2d(blocks)
    o_d = channel_offsets(TILES, PARTS)
    for i in range(0, TOKENS, BT):
        o_t = i_t * TOKENS + i + token_offsets(BT)
        m_t = o_t < length
        o_z, o_dz = i_b * z_b + o_t.to(tl.int64) * z_t, (i_b * length + o_t) * D
        b_dact = zero_rows(TILES, PARTS, BT)
        if dsum is not None:
            b_dsum = load_rows(dsum + i_b * sum_b + o_t.to(tl.int64) * sum_t, o_d, m_t, D)
        if z is not None:
            b_act = silu_rows(load_rows(z + o_z, o_d, m_t, D))
        for k in range(0, K, BK):
            directions = load_directions(y, i_b, k, o_t, o_d, m_t, length, K, D, BK)
            for j in tl.static_range(BK):
                o_bk = i_b * K + k + j
                m_y = m_t & (_per_token(k + j, o_t) < K)
                b_y = float_rows(directions[j])
                b_dy = zero_rows(TILES, PARTS, BT)
                if dsum is not None:
                    b_dy = _sum_to_y_backward(
                        b_dsum, b_y, channel_weights, token_weights, dtoken, o_bk, o_t, o_d, m_y,
                        length, D,
                    )  # fmt: skip
                if dmeans is not None:
                    gated = multiply_rows(b_y, b_act) if z is not None else b_y
                    b_g = _means_to_y_backward(gated, dmeans, o_bk, o_t, o_d, m_y, length, D, eps)
                    if z is not None:
                        b_dact = add_rows(b_dact, multiply_rows(b_g, b_y))
                        b_g = multiply_rows(b_g, b_act)
                    b_dy = add_rows(b_dy, b_g)
                store_rows(dy + (o_bk * length + o_t) * D, b_dy, o_d, m_y, D, False)
        if z is not None:
            # z is read again rather than kept, for its registers.
            b_dz = multiply_rows(b_dact, silu_grad_rows(load_rows(z + o_z, o_d, m_t, D)))
            if ADDS_DZ:
                b_dz = add_rows(b_dz, load_rows(dz + o_dz, o_d, m_t, D))
            store_rows(dz + o_dz, b_dz, o_d, m_t, D, False)


def _y_backward(
    y: Tensor,
    dsum: Tensor | None,
    channel_weights: Tensor | None,
    token_weights: Tensor | None,
    dmeans: Tensor | None,
    z: Tensor | None,
    dz: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Computes the gradients of y, the token weights and the pooling's gate z.

    Args:
        y: Outputs of the directions.
        dsum: Gradient of their weighted sum.
        channel_weights: Channel weights of the sum.
        token_weights: Token weights of the sum.
        dmeans: Gradient of the pooling's means.
        z: The pooling's gate.
        dz: If given, the gradient of z is added to it.
        eps: The pooling's.
    """
    batch, directions, length, channels = y.shape
    tile = TILE if z is None else SMALL_TILE
    blocks, constants = _blocks(directions, length, channels, _Y_BACKWARD_TOKENS, 4, tile)
    dy, dtoken, adds = torch.empty_like(y), None, dz is not None
    if token_weights is not None:
        dtoken = torch.empty((batch, directions, length), device=y.device, dtype=torch.float32)
    if z is not None and dz is None:
        dz = torch.empty((batch, length, channels), dtype=z.dtype, device=y.device)
    y_backward_kernel[(blocks * batch,)](
        dsum, y, channel_weights, token_weights, dmeans, z, dy, dtoken, dz, *token_strides(dsum, z),
        length, blocks, eps, ADDS_DZ=adds, **constants,
    )  # fmt: skip
    return dy, dtoken, dz


def pool_backward(dmeans: Tensor, y: Tensor, z: Tensor | None, eps: float) -> list[Tensor | None]:
    y, dmeans = y.contiguous(), dmeans.contiguous()
    z = z if z is None else unit_stride(z)
    if y.numel() == 0:
        return [torch.empty_like(y), None if z is None else torch.empty_like(z)]
    with device_of(y):
        dy, _, dz = _y_backward(y, None, None, None, dmeans, z, None, eps)
    return [dy, dz]


def combine_backward(dout: Tensor, inputs: CombineInputs) -> list[Tensor | None]:
    dout, contiguous = unit_stride(dout), _contiguous(inputs)
    y, channel, token, *_ = contiguous
    with device_of(y):
        dsum, dz, *dnorm = _sum_backward(dout, contiguous)
        dchannel = None
        if channel is not None:
            dchannel = sum_partials(_channel_weights_backward(dsum, y, token), 2, torch.float32)
        dy, dtoken, _ = _y_backward(y, dsum, channel, token, None, None, None, inputs.eps)
    return in_dtypes((dy, dchannel, dtoken, dz, *dnorm), inputs[:6])


def scattn_backward(
    dout: Tensor, means: Tensor, weights: Tensor, reduced: Tensor, inputs: SCAttnInputs
) -> list[Tensor | None]:
    dout, contiguous = unit_stride(dout), _contiguous(inputs.combine_inputs(weights))
    y, channel, _, z, *_ = contiguous
    with device_of(y):
        dsum, dz, *dnorm = _sum_backward(dout, contiguous)
        dweights = _channel_weights_backward(dsum, y, None)
        parameters = inputs.parameters()
        dmeans, dparameters = weights_backward(dweights, means, weights, reduced, parameters)
        gate, dgate = (z, dz) if inputs.gate_first else (None, None)
        dy, _, dgate = _y_backward(y, dsum, channel, None, dmeans, gate, dgate, inputs.pool_eps)
    dz = dgate if inputs.gate_first else dz
    return in_dtypes((dy, dz, *dparameters, *dnorm), inputs[:10])
