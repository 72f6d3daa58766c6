"""Residual add, rotary turn and norm in one pass (Triton), forward and backward.

Everything of a tile is loaded before its sums over rows, which wait for one another.
"""

import torch
import triton
import triton.language as tl

from .._common.partials import sum_partials
from .._common.triton_common import WAVE, Kernel, cdiv, device_of, store
from .row_pieces import (
    load_parameter,
    load_pieces,
    mean_of_products,
    mean_of_rows,
    piece_mask,
    row_offsets,
    row_tile,
)

_PROGRAMS = WAVE
"""Of the backward kernel at most: four a multiprocessor, as many as run at a time. Each adds up the
parameters' gradients over a share of the rows."""


@triton.jit
def _turn(
    b_x, cos, sin, o_row, piece: tl.constexpr, m, SIGN: tl.constexpr,
    C: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Turns a piece's neighbouring channels pair by pair, forward (SIGN 1) or back (SIGN -1)."""
    o_table = o_row[:, None] * C + piece * BD + tl.arange(0, BD)[None, :]
    p_cos, p_sin = cos + o_table, sin + o_table
    b_cos = tl.load(p_cos, mask=m, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin, mask=m, other=0.0).to(tl.float32) * SIGN
    x_even, x_odd = tl.split(tl.reshape(b_x, [BT, BD // 2, 2]))
    cos_even, cos_odd = tl.split(tl.reshape(b_cos, [BT, BD // 2, 2]))
    sin_even, sin_odd = tl.split(tl.reshape(b_sin, [BT, BD // 2, 2]))
    turned = tl.join(x_even * cos_even - x_odd * sin_even, x_odd * cos_odd + x_even * sin_odd)
    return tl.reshape(turned, [BT, BD])


@triton.jit
def _factors(scale, o_t, m_t, image):
    """Of each row, [BT]: that of its image, of `image` rows."""
    return tl.load(scale + o_t // image, mask=m_t, other=0.0).to(tl.float32)


@triton.jit
def _centred(pieces, m_t, CENTRED: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """Rows without their mean; 0 past the last channel, as before."""
    if not CENTRED:
        return pieces
    b_mean = mean_of_rows(pieces, C)
    centred = ()
    for piece in tl.static_range(len(pieces)):
        b_x = pieces[piece] - b_mean[:, None]
        if (piece + 1) * BD > C:
            b_x = tl.where(piece_mask(piece, m_t, C, BD), b_x, 0.0)
        centred += (b_x,)
    return centred


@triton.jit
def _rstd(pieces, m_t, eps, C: tl.constexpr):
    """1 / std of centred rows, [BT]; finite past the last row too, without eps."""
    b_variance = mean_of_products(pieces, pieces, C) + eps
    return tl.rsqrt(tl.where(m_t, b_variance, 1.0))


@Kernel
@triton.jit
def norm_forward_kernel(
    hidden, residual, weight, bias, cos, sin, scale, normed, stream, rows, length, image, eps,
    HAS_RESIDUAL: tl.constexpr, CENTRED: tl.constexpr, ROTARY: tl.constexpr,
    SCALED: tl.constexpr, KEEP_STREAM: tl.constexpr,
    C: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BT
    o_t = first + tl.arange(0, BT)
    m_t = o_t < rows
    hiddens = load_pieces(hidden + first * C, m_t, C, TILES, BT, BD)
    if HAS_RESIDUAL:
        residuals = load_pieces(residual + first * C, m_t, C, TILES, BT, BD)
    if SCALED:
        b_factor = _factors(scale, o_t, m_t, image)
    o_x = row_offsets(C, BT, BD)
    pieces = ()
    for piece in tl.static_range(TILES):
        o_piece, m = first * C + piece * BD, piece_mask(piece, m_t, C, BD)
        b_x = hiddens[piece]
        if SCALED:
            b_x *= b_factor[:, None]
        if HAS_RESIDUAL:
            b_x += residuals[piece]
        if ROTARY:
            b_x = _turn(b_x, cos, sin, o_t % length, piece, m, 1.0, C, BT, BD)
        if KEEP_STREAM:
            store(stream + o_piece + o_x, b_x, m)
        pieces += (b_x,)
    pieces = _centred(pieces, m_t, CENTRED, C, BD)
    b_rstd = _rstd(pieces, m_t, eps, C)
    weights = load_parameter(weight, C, TILES, BT, BD)
    if CENTRED:
        biases = load_parameter(bias, C, TILES, BT, BD)
    for piece in tl.static_range(TILES):
        m = piece_mask(piece, m_t, C, BD)
        b_y = pieces[piece] * b_rstd[:, None] * weights[piece]
        if CENTRED:
            b_y += biases[piece]
        store(normed + first * C + piece * BD + o_x, b_y, m)


@Kernel
@triton.jit
def norm_backward_kernel(
    dnormed, dstream, stream, weight, cos, sin, scale, dhidden, dresidual, dweight, dbias,
    rows, length, image, share, eps,
    HAS_DSTREAM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CENTRED: tl.constexpr,
    ROTARY: tl.constexpr, SCALED: tl.constexpr,
    C: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    weights = load_parameter(weight, C, TILES, BT, BD)
    o_x = row_offsets(C, BT, BD)
    dweights = ()
    for _ in tl.static_range(TILES):
        dweights += (tl.zeros([BT, BD], tl.float32),)
    dbiases = dweights
    for i in range(0, share, BT):
        first = i_p.to(tl.int64) * share + i
        o_t = first + tl.arange(0, BT)
        m_t = o_t < rows
        streams = load_pieces(stream + first * C, m_t, C, TILES, BT, BD)
        gradients = load_pieces(dnormed + first * C, m_t, C, TILES, BT, BD)
        if HAS_DSTREAM:
            dstreams = load_pieces(dstream + first * C, m_t, C, TILES, BT, BD)
        if SCALED:
            b_factor = _factors(scale, o_t, m_t, image)
        centred = _centred(streams, m_t, CENTRED, C, BD)
        weighed = ()
        for piece in tl.static_range(TILES):
            weighed += (gradients[piece] * weights[piece],)
        b_rstd = _rstd(centred, m_t, eps, C)
        b_along = mean_of_products(centred, weighed, C) * b_rstd * b_rstd
        if CENTRED:
            b_mean = mean_of_rows(weighed, C)
        dweights_here, dbiases_here = (), ()
        for piece in tl.static_range(TILES):
            o_piece, m = first * C + piece * BD, piece_mask(piece, m_t, C, BD)
            b_xhat = centred[piece] * b_rstd[:, None]
            dweights_here += (dweights[piece] + gradients[piece] * b_xhat,)
            dbiases_here += (dbiases[piece] + gradients[piece],)
            b_g = weighed[piece] - centred[piece] * b_along[:, None]
            if CENTRED:
                b_g -= b_mean[:, None]
            b_g *= b_rstd[:, None]
            if HAS_DSTREAM:
                b_g += dstreams[piece]
            if ROTARY:
                b_g = _turn(b_g, cos, sin, o_t % length, piece, m, -1.0, C, BT, BD)
            if HAS_RESIDUAL:
                tl.store(dresidual + o_piece + o_x, b_g, mask=m)
            if SCALED:
                b_g *= b_factor[:, None]
            tl.store(dhidden + o_piece + o_x, b_g, mask=m)
        dweights, dbiases = dweights_here, dbiases_here
    for piece in tl.static_range(TILES):
        o_d = piece * BD + tl.arange(0, BD)
        tl.store(dweight + i_p * C + o_d, tl.sum(dweights[piece], axis=0), mask=o_d < C)
        if CENTRED:
            tl.store(dbias + i_p * C + o_d, tl.sum(dbiases[piece], axis=0), mask=o_d < C)


def forward(hidden, residual, weight, bias, cos, sin, scale, eps, dtype, keep_stream):
    hidden, weight = hidden.contiguous(), weight.contiguous()
    residual, bias, cos, sin, scale = (
        x if x is None else x.contiguous() for x in (residual, bias, cos, sin, scale)
    )
    length, channels = hidden.shape[-2:]
    rows = hidden.numel() // channels
    normed = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    stream = torch.empty_like(normed, dtype=torch.float32) if keep_stream else None
    if rows > 0:
        tile = row_tile(channels)
        with device_of(hidden):
            norm_forward_kernel[(cdiv(rows, tile.rows),)](
                hidden, residual, weight, bias, cos, sin, scale, normed, stream,
                rows, length, hidden.shape[1:-1].numel(), eps,
                HAS_RESIDUAL=residual is not None, CENTRED=bias is not None,
                ROTARY=cos is not None, SCALED=scale is not None, KEEP_STREAM=keep_stream,
                **tile.arguments(channels),
            )  # fmt: skip
    return normed, stream


def backward(
    dnormed, dstream, stream, weight, bias, cos, sin, scale, eps, hidden_dtype, has_residual
):
    dnormed, stream, weight = dnormed.contiguous(), stream.contiguous(), weight.contiguous()
    dstream, cos, sin, scale = (
        x if x is None else x.contiguous() for x in (dstream, cos, sin, scale)
    )
    length, channels = stream.shape[-2:]
    rows = stream.numel() // channels
    dhidden = torch.empty(stream.shape, dtype=hidden_dtype, device=stream.device)
    dresidual = torch.empty_like(stream) if has_residual else None
    tile = row_tile(channels)
    share = max(cdiv(cdiv(rows, _PROGRAMS), tile.rows), 1) * tile.rows
    programs = cdiv(rows, share)
    sums = (1 if bias is None else 2, programs, channels)  # of the weight, then of the bias
    sums = torch.empty(sums, dtype=torch.float32, device=stream.device)
    if rows > 0:
        with device_of(stream):
            norm_backward_kernel[(programs,)](
                dnormed, dstream, stream, weight, cos, sin, scale,
                dhidden, dresidual, sums[0], sums[-1],
                rows, length, stream.shape[1:-1].numel(), share, eps,
                HAS_DSTREAM=dstream is not None, HAS_RESIDUAL=has_residual,
                CENTRED=bias is not None, ROTARY=cos is not None, SCALED=scale is not None,
                **tile.arguments(channels),
            )  # fmt: skip
    dweight, *dbias = sum_partials(sums, 1, torch.float32)
    dbias = None if bias is None else dbias[0].to(bias.dtype)
    return dhidden, dresidual, dweight.to(weight.dtype), dbias
