"""Few long sequences: time is cut into segments that run side by side (Triton).

First each segment is run from zero for what it ends in, then these ends are combined over the
segments into what each starts from, then the scan proper runs from there; backward the same from
the far end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.backends import CHUNK
from .._common.triton_common import (
    Kernel,
    Launch,
    cdiv,
    load_decay,
    load_vector,
    sequence_of,
    sequence_strides,
    sigmoid,
    state_tile,
    step_size,
)


@Kernel
@triton.jit
def segment_end_kernel(
    u, dt, A, B, dt_bias, index, ends, sums,
    u_b, u_k, u_t, dt_b, dt_k, dt_t, B_b, B_k, B_t,
    K, steps, channels, n_states, segment_steps, segments,
    GRID_ORDER: tl.constexpr, PADDED: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The state that a segment reaches from zero, and the sum of its step sizes."""
    i_d, i_bk, i_b, i_k = sequence_of(K, channels, BD)
    i_s = tl.program_id(1)
    o_d, o_n, o_state, m_d, m_n, m_dn = state_tile(i_d, channels, n_states, BD, BN)
    b_A = load_decay(A, i_k, o_state, m_dn, channels, n_states)
    b_bias = load_vector(dt_bias, i_k, o_d, m_d, channels, HAS_BIAS, BD)
    p_u = u + i_b * u_b + i_k * u_k + o_d
    p_dt = dt + i_b * dt_b + i_k * dt_k + o_d
    p_B = B + i_b * B_b + i_k * B_k + o_n
    b_h = tl.zeros([BN, BD], tl.float32)
    b_sum = tl.zeros([BD], tl.float32)
    for i_t in range(i_s * segment_steps, tl.minimum((i_s + 1) * segment_steps, steps)):
        source = i_t
        m_u, m_bc = m_d, m_n
        if GRID_ORDER:
            source = tl.load(index + i_k * steps + i_t)
            if PADDED:
                m_u = tl.where(source >= 0, m_d, False)
                m_bc = tl.where(source >= 0, m_n, False)
        b_u = tl.load(p_u + source * u_t, mask=m_u, other=0.0).to(tl.float32)
        b_dt = tl.load(p_dt + source * dt_t, mask=m_u, other=0.0).to(tl.float32)
        b_B = tl.load(p_B + source * B_t, mask=m_bc, other=0.0).to(tl.float32)
        b_delta = step_size(b_dt, b_bias, SOFTPLUS)
        b_h = tl.exp2(b_delta[None, :] * b_A) * b_h + (b_delta * b_u)[None, :] * b_B[:, None]
        b_sum += b_delta
    i_out = i_bk * segments + i_s
    tl.store(ends + i_out * n_states * channels + o_state, b_h, mask=m_dn)
    tl.store(sums + i_out * channels + o_d, b_sum, mask=m_d)


@Kernel
@triton.jit
def combine_segments_kernel(
    A, ends, sums, starts, K, channels, n_states, segments,
    REVERSE: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What each segment starts from: a scan over segments (from the last one if REVERSE)."""
    i_d, i_bk, _i_b, i_k = sequence_of(K, channels, BD)
    o_d, _o_n, o_state, m_d, _m_n, m_dn = state_tile(i_d, channels, n_states, BD, BN)
    b_A = load_decay(A, i_k, o_state, m_dn, channels, n_states)
    b_h = tl.zeros([BN, BD], tl.float32)
    for i in range(segments):
        i_s = i
        if REVERSE:
            i_s = segments - 1 - i
        i_in = i_bk * segments + i_s
        tl.store(starts + i_in * n_states * channels + o_state, b_h, mask=m_dn)
        b_end = tl.load(ends + i_in * n_states * channels + o_state, mask=m_dn, other=0.0)
        b_sum = tl.load(sums + i_in * channels + o_d, mask=m_d, other=0.0)
        b_h = tl.exp2(b_sum[None, :] * b_A) * b_h + b_end


def segment_starts(u, dt, A, B, dt_bias, index, softplus, launch: Launch, steps: int) -> Tensor:
    """The states from which the segments start, float32 [B, K, S, N, D]. A is [K, N, D]."""
    batch, (directions, states, channels) = u.shape[0], A.shape
    shape = (batch, directions, launch.segments)
    ends = torch.empty((*shape, states, channels), dtype=torch.float32, device=u.device)
    sums = torch.empty((*shape, channels), dtype=torch.float32, device=u.device)
    grid_order = u.dim() == 3
    blocks = cdiv(channels, launch.channels)
    segment_end_kernel[(blocks * batch * directions, launch.segments)](
        u, dt, A, B, dt_bias, index, ends, sums,
        *sequence_strides(u), *sequence_strides(dt), *sequence_strides(B),
        directions, steps, channels, states, launch.segment_chunks * CHUNK, launch.segments,
        GRID_ORDER=grid_order, PADDED=grid_order and steps != u.shape[1],
        HAS_BIAS=dt_bias is not None, SOFTPLUS=softplus, BD=launch.channels, BN=launch.states,
        num_warps=launch.warps,
    )  # fmt: skip
    return combine_segments(A, ends, sums, launch, reverse=False)


def combine_segments(
    A: Tensor, ends: Tensor, sums: Tensor, launch: Launch, reverse: bool
) -> Tensor:
    """Runs `combine_segments_kernel`: what enters each segment, shaped like `ends`."""
    starts = torch.empty_like(ends)
    batch, directions, segments, states, channels = ends.shape
    combine_segments_kernel[(cdiv(channels, launch.channels) * batch * directions,)](
        A, ends, sums, starts, directions, channels, states, segments,
        REVERSE=reverse, BD=launch.channels, BN=launch.states, num_warps=launch.warps,
    )  # fmt: skip
    return starts


@Kernel
@triton.jit
def segment_carry_kernel(
    dy, dt, A, C, z, dt_bias, index, ends, sums,
    dy_b, dy_k, dy_t, dt_b, dt_k, dt_t, C_b, C_k, C_t, z_b, z_t,
    K, steps, channels, n_states, segment_steps, segments,
    GRID_ORDER: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What a segment passes back to the one before it when nothing reaches it from behind."""
    i_d, i_bk, i_b, i_k = sequence_of(K, channels, BD)
    i_s = tl.program_id(1)
    o_d, o_n, o_state, m_d, m_n, m_dn = state_tile(i_d, channels, n_states, BD, BN)
    b_A = load_decay(A, i_k, o_state, m_dn, channels, n_states)
    b_bias = load_vector(dt_bias, i_k, o_d, m_d, channels, HAS_BIAS, BD)
    p_dt = dt + i_b * dt_b + i_k * dt_k + o_d
    p_C = C + i_b * C_b + i_k * C_k + o_n
    p_dy = dy + i_b * dy_b + i_k * dy_k + o_d
    b_carry = tl.zeros([BN, BD], tl.float32)
    b_sum = tl.zeros([BD], tl.float32)
    first, last = i_s * segment_steps, tl.minimum((i_s + 1) * segment_steps, steps)
    for i_back in range(first, last):
        i_t = last - 1 - (i_back - first)
        token = i_t
        if HAS_INDEX:
            token = tl.load(index + i_k * steps + i_t)
        row = i_t
        m_row, m_state = m_d, m_n
        if GRID_ORDER:
            row = token
            m_row, m_state = tl.where(token >= 0, m_d, False), tl.where(token >= 0, m_n, False)
        m_token = tl.where(token >= 0, m_d, False)
        b_dt = tl.load(p_dt + row * dt_t, mask=m_row, other=0.0).to(tl.float32)
        b_C = tl.load(p_C + row * C_t, mask=m_state, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + token * dy_t, mask=m_token, other=0.0).to(tl.float32)
        if HAS_Z:
            b_z = tl.load(z + i_b * z_b + token * z_t + o_d, mask=m_token, other=0.0)
            b_dy *= b_z.to(tl.float32) * sigmoid(b_z.to(tl.float32))
        b_delta = step_size(b_dt, b_bias, SOFTPLUS)
        b_carry = tl.exp2(b_delta[None, :] * b_A) * (b_carry + b_C[:, None] * b_dy[None, :])
        b_sum += b_delta
    i_out = i_bk * segments + i_s
    tl.store(ends + i_out * n_states * channels + o_state, b_carry, mask=m_dn)
    tl.store(sums + i_out * channels + o_d, b_sum, mask=m_d)


def segment_carries(dy, dt, A, C, z, dt_bias, index, softplus, launch, steps, grid_order):
    """What enters each segment from the one behind it, float32 [B, K, S, N, D]."""
    batch, (directions, states, channels) = dy.shape[0], A.shape
    shape = (batch, directions, launch.segments)
    ends = torch.empty((*shape, states, channels), dtype=torch.float32, device=dy.device)
    sums = torch.empty((*shape, channels), dtype=torch.float32, device=dy.device)
    grid = (cdiv(channels, launch.channels) * batch * directions, launch.segments)
    segment_carry_kernel[grid](
        dy, dt, A, C, z, dt_bias, index, ends, sums,
        *sequence_strides(dy), *sequence_strides(dt), *sequence_strides(C),
        *((0, 0) if z is None else z.stride()[:2]),
        directions, steps, channels, states, launch.segment_chunks * CHUNK, launch.segments,
        GRID_ORDER=grid_order, HAS_INDEX=index is not None, HAS_Z=z is not None,
        HAS_BIAS=dt_bias is not None, SOFTPLUS=softplus, BD=launch.channels, BN=launch.states,
        num_warps=launch.warps,
    )  # fmt: skip
    return combine_segments(A, ends, sums, launch, reverse=True)
