"""Backward passes of the weighed sum over directions and of SCAttn's pooling (Triton).

Three kernels read the directions' outputs once each: back through gate and norm to the gradient of
the sum; to the gradients of the channel weights (channel_weights.py); and to those of the outputs.
Before the last, SCAttn's linear layers lead from the channel weights to the means: both ways to the
outputs then end in one store.
"""

import torch
import triton
import triton.language as tl

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
    sigmoid,
    silu_grad,
    unit_stride,
)
from .cuda_channel_weights import channel_weights_parts
from .cuda_merge import optional_contiguous, weighed, weighed_sum
from .cuda_select_backward import backward_of_parts

_SUM_TOKENS = 16
"""Tokens of a program that makes the gradient of the sum: it stores partial sums of the norm's."""

_BRANCH_TOKENS = 4
"""Of one that makes those of the outputs: they share what is of a channel in the L1 cache."""


@triton.jit
def _gate_gradient(b_g, b_normed, b_z, p_dz, m):
    """The gradient of what is gated; stores that of the gate."""
    b_gate = sigmoid(b_z)
    tl.store(p_dz, b_g * b_normed * silu_grad(b_z, b_gate), mask=m)
    return b_g * (b_z * b_gate)


@triton.jit
def _gate_and_norm_gradient(
    b_sum, b_g, b_z, norm_weight, norm_bias, p_dz, o_t, o_d, m_t, D: tl.constexpr, eps,
    HAS_Z: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """The gradient of the sum, and what it adds to those of the norm's weight and bias."""
    if HAS_NORM:
        centred, b_rstd = centered_rows(b_sum, o_d, m_t, D, eps)
    gradients, dweight, dbias = (), (), ()
    for i in tl.static_range(len(o_d)):
        m = m_t & (o_d[i] < D)
        b_piece, b_xhat = b_g[i].to(tl.float32), b_sum[i]
        b_normed, b_weight = b_xhat, 1.0
        if HAS_NORM:
            b_xhat = centred[i] * b_rstd
            b_weight = load(norm_weight + o_d[i] + o_t * 0, m)
            b_normed = b_xhat * b_weight + load(norm_bias + o_d[i] + o_t * 0, m)
        if HAS_Z:
            b_piece = _gate_gradient(b_piece, b_normed, b_z[i].to(tl.float32), p_dz + o_d[i], m)
        dweight += (b_piece * b_xhat,)
        dbias += (b_piece,)
        gradients += (b_piece * b_weight,)
    if HAS_NORM:
        gradients = norm_grad(gradients, centred, b_rstd, 1.0, D)
    return gradients, dweight, dbias


@Kernel
@triton.jit
def sum_backward_kernel(
    dout, y, channel_weights, token_weights, z, norm_weight, norm_bias,
    dsum, dz, dnorm_weight, dnorm_bias, dout_b, dout_t, z_b, z_t, length, blocks, eps,
    K: tl.constexpr, D: tl.constexpr, HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_NORM: tl.constexpr, TOKENS: tl.constexpr,
    BK: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The gradient of the sum over directions, and partial sums of those of the norm."""
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
        if HAS_Z:
            b_z = load_rows(z + i_b * z_b + o_t.to(tl.int64) * z_t, o_d, m_t, D)
        b_sum = weighed_sum(
            y, channel_weights, token_weights, i_b, o_t, o_d, m_t, length,
            K, D, HAS_CHANNEL, HAS_TOKEN, BK, TILES, PARTS, BT,
        )  # fmt: skip
        b_dsum, b_dweight, b_dbias = _gate_and_norm_gradient(
            b_sum, b_g, b_z, norm_weight, norm_bias, dz + o_out if HAS_Z else dz,
            o_t, o_d, m_t, D, eps, HAS_Z, HAS_NORM,
        )  # fmt: skip
        dweight = add_rows(dweight, b_dweight)
        dbias = add_rows(dbias, b_dbias)
        store_rows(dsum + o_out, b_dsum, o_d, m_t, D, False)
    if HAS_NORM:
        o_norm = (i_b * blocks + i_t) * D
        store_sums(dnorm_weight + o_norm, dweight, o_d, D)
        store_sums(dnorm_bias + o_norm, dbias, o_d, D)


@triton.jit
def _weighed_gradient(
    b_dsum, b_y, channel_weights, token_weights, dtoken, o_bk, o_t, o_d, m_t, length,
    D: tl.constexpr, HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr,
):  # fmt: skip
    """Of a direction's outputs, through the sum; stores that of their token weights."""
    b_dy = weighed(
        b_dsum, channel_weights, token_weights, o_bk, o_t, o_d, m_t, length, D, HAS_CHANNEL, False
    )
    if HAS_TOKEN:
        p_dtoken = dtoken + o_bk * length + o_t
        tl.store(p_dtoken, sum_rows(multiply_rows(b_dy, b_y)), mask=m_t)
        b_dy = scale_rows(b_dy, load(token_weights + o_bk * length + o_t, m_t))
    return float_rows(b_dy)


@triton.jit
def _pooling_gradient(gated, dmeans, o_bk, o_t, o_d, m_t, length, D: tl.constexpr, eps):
    """Of the gated outputs of a direction."""
    b_g = float_rows(load_rows(dmeans + o_bk * D + o_t * 0, o_d, m_t, D))
    centred, b_rstd = centered_rows(gated, o_d, m_t, D, eps)
    return norm_grad(b_g, centred, b_rstd, 1.0 / length, D)


@Kernel
@triton.jit
def branch_backward_kernel(
    dsum, y, channel_weights, token_weights, dmeans, z, dy, dtoken, dz,
    sum_b, sum_t, z_b, z_t, length, blocks, eps, K: tl.constexpr, D: tl.constexpr,
    HAS_SUM: tl.constexpr, HAS_CHANNEL: tl.constexpr, HAS_TOKEN: tl.constexpr,
    HAS_POOL: tl.constexpr, HAS_Z: tl.constexpr, ADDS_DZ: tl.constexpr, TOKENS: tl.constexpr,
    BK: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The gradients of every direction's output, of its token weights and of the pooling's gate."""
    i_t, i_b = program_2d(blocks)
    o_d = channel_offsets(TILES, PARTS)
    for i in range(0, TOKENS, BT):
        o_t = i_t * TOKENS + i + token_offsets(BT)
        m_t = o_t < length
        o_z, o_dz = i_b * z_b + o_t.to(tl.int64) * z_t, (i_b * length + o_t) * D
        b_dact = zero_rows(TILES, PARTS, BT)
        if HAS_SUM:
            b_dsum = load_rows(dsum + i_b * sum_b + o_t.to(tl.int64) * sum_t, o_d, m_t, D)
        if HAS_Z:
            b_act = silu_rows(load_rows(z + o_z, o_d, m_t, D))
        for k in range(0, K, BK):
            directions = load_directions(y, i_b, k, o_t, o_d, m_t, length, K, D, BK)
            for j in tl.static_range(BK):
                o_bk = i_b * K + k + j
                m_y = m_t & (k + j + o_t * 0 < K)
                b_y = float_rows(directions[j])
                b_dy = zero_rows(TILES, PARTS, BT)
                if HAS_SUM:
                    b_dy = _weighed_gradient(
                        b_dsum, b_y, channel_weights, token_weights, dtoken, o_bk, o_t, o_d, m_y,
                        length, D, HAS_CHANNEL, HAS_TOKEN,
                    )  # fmt: skip
                if HAS_POOL:
                    gated = multiply_rows(b_y, b_act) if HAS_Z else b_y
                    b_g = _pooling_gradient(gated, dmeans, o_bk, o_t, o_d, m_y, length, D, eps)
                    if HAS_Z:
                        b_dact = add_rows(b_dact, multiply_rows(b_g, b_y))
                        b_g = multiply_rows(b_g, b_act)
                    b_dy = add_rows(b_dy, b_g)
                store_rows(dy + (o_bk * length + o_t) * D, b_dy, o_d, m_y, D, False)
        if HAS_Z:
            # z is read again rather than kept, for its registers.
            b_dz = multiply_rows(b_dact, silu_grad_rows(load_rows(z + o_z, o_d, m_t, D)))
            if ADDS_DZ:
                b_dz = add_rows(b_dz, load_rows(dz + o_dz, o_d, m_t, D))
            store_rows(dz + o_dz, b_dz, o_d, m_t, D, False)


def _sum_backward(dout, y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    """Gradients of the sum over directions, of z, and of the norm's weight and bias."""
    if z is None and norm_weight is None:
        return dout, None, None, None
    batch, directions, length, channels = y.shape
    tile = tiling(directions, channels, tile=SMALL_TILE)
    tokens = max(_SUM_TOKENS, tile.tokens)
    blocks = cdiv(length, tokens)
    dsum = torch.empty((batch, length, channels), dtype=y.dtype, device=y.device)
    dz = None if z is None else torch.empty_like(dsum, dtype=z.dtype)
    dnorm = None
    if norm_weight is not None:
        dnorm = torch.empty((2, batch * blocks, channels), device=y.device, dtype=torch.float32)
    sum_backward_kernel[(blocks * batch,)](
        dout, y, channel_weights, token_weights, z, norm_weight, norm_bias,
        dsum, dz, *((None, None) if dnorm is None else dnorm), *token_strides(dout, z),
        length, blocks, eps, K=directions, D=channels,
        HAS_CHANNEL=channel_weights is not None, HAS_TOKEN=token_weights is not None,
        HAS_Z=z is not None, HAS_NORM=norm_weight is not None,
        TOKENS=tokens, **tile.arguments(),
    )  # fmt: skip
    return dsum, dz, *((None, None) if dnorm is None else sum_partials(dnorm, 1, torch.float32))


def _branch_backward(y, dsum, channel_weights, token_weights, dmeans, z, dz, eps):
    """Gradients of the outputs, the token weights and z (added to dz, if that is there)."""
    batch, directions, length, channels = y.shape
    tile = tiling(directions, channels, tile=TILE if z is None else SMALL_TILE)
    tokens = max(_BRANCH_TOKENS, tile.tokens)
    blocks = cdiv(length, tokens)
    dy, dtoken, adds = torch.empty_like(y), None, dz is not None
    if token_weights is not None:
        dtoken = torch.empty((batch, directions, length), device=y.device, dtype=torch.float32)
    if z is not None and dz is None:
        dz = torch.empty((batch, length, channels), dtype=z.dtype, device=y.device)
    branch_backward_kernel[(blocks * batch,)](
        dsum, y, channel_weights, token_weights, dmeans, z, dy, dtoken, dz, *token_strides(dsum, z),
        length, blocks, eps, K=directions, D=channels,
        HAS_SUM=dsum is not None, HAS_CHANNEL=channel_weights is not None,
        HAS_TOKEN=token_weights is not None, HAS_POOL=dmeans is not None, HAS_Z=z is not None,
        ADDS_DZ=adds, TOKENS=tokens, **tile.arguments(),
    )  # fmt: skip
    return dy, dtoken, dz


def _rows(x):
    return x if x is None else unit_stride(x)


def pool_backward(dmeans, y, z, eps):
    y, dmeans, z = y.contiguous(), dmeans.contiguous(), _rows(z)
    if y.numel() == 0:
        return torch.empty_like(y), None if z is None else torch.empty_like(z)
    with device_of(y):
        dy, _, dz = _branch_backward(y, None, None, None, dmeans, z, None, eps)
    return dy, dz


def combine_backward(dout, y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    inputs = (y, channel_weights, token_weights, z, norm_weight, norm_bias)
    dout, z = unit_stride(dout), _rows(z)
    y, channel, token, weight, bias = optional_contiguous(
        y, channel_weights, token_weights, norm_weight, norm_bias
    )
    with device_of(y):
        dsum, dz, dweight, dbias = _sum_backward(dout, y, channel, token, z, weight, bias, eps)
        dchannel = None
        if channel is not None:
            dchannel = sum_partials(channel_weights_parts(dsum, y, token), 2, torch.float32)
        dy, dtoken, _ = _branch_backward(y, dsum, channel, token, None, None, None, eps)
    return in_dtypes((dy, dchannel, dtoken, dz, dweight, dbias), inputs)


def scattn_backward(
    dout, y, z, pool_weight, pool_bias, reduce_weight, reduce_bias, select_weight, select_bias,
    norm_weight, norm_bias, means, weights, reduced, gate_first, pool_eps, norm_eps,
):  # fmt: skip
    inputs = (
        y, z, pool_weight, pool_bias, reduce_weight, reduce_bias, select_weight, select_bias,
        norm_weight, norm_bias,
    )  # fmt: skip
    dout, z = unit_stride(dout), _rows(z)
    y, means, weights, reduced, weight, bias, *parameters = optional_contiguous(
        y,
        means,
        weights,
        reduced,
        norm_weight,
        norm_bias,
        *(x.to(means.dtype) for x in inputs[2:8]),
    )
    with device_of(y):
        dsum, dz, dweight, dbias = _sum_backward(dout, y, weights, None, z, weight, bias, norm_eps)
        dweights = channel_weights_parts(dsum, y, None)
        dmeans, dparameters = backward_of_parts(dweights, means, weights, reduced, parameters)
        gate = z if gate_first else None
        dy, _, added = _branch_backward(
            y, dsum, weights, None, dmeans, gate, dz if gate_first else None, pool_eps
        )
    dz = added if gate_first else dz
    return in_dtypes((dy, dz, *dparameters, dweight, dbias), inputs)
