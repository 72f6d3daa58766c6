"""Selective scan, backward (Triton).

A program walks its sequence from the last chunk to the first. In each chunk it first recomputes the
states from the kept one and notes them every 4 steps, then goes back over those groups of 4 with
their states in registers. Sums over channels (dB, dC) leave as one partial per channel block, sums
over time (dA, dD, ddt_bias) as one per program, and are added in a fixed order afterwards.
"""

import torch
import triton
import triton.language as tl

from .._common.backends import CHUNK
from .._common.registration import in_dtypes
from .._common.triton_common import (
    LOG2E,
    Kernel,
    cdiv,
    device_of,
    load_decay,
    load_vector,
    scan_launch,
    sequence_of,
    sequence_strides,
    sigmoid,
    silu_grad,
    softplus,
    state_tile,
    unit_stride,
)
from .reference import side_by_side
from .triton_segments import segment_carries

GROUP = 4
"""Steps whose states are held in registers at once."""


@triton.jit
def _locate(index, i_t, steps, m_d, GRID_ORDER: tl.constexpr, PADDED: tl.constexpr):
    """Where step i_t reads, and whether it reads anything there: (row, row mask as a scalar)."""
    row = i_t
    reads = i_t < steps
    if GRID_ORDER:
        row = tl.load(index + i_t, mask=reads, other=-1)
        reads = row >= 0
    return row, reads


@triton.jit
def _load_inputs(
    p_u, p_dt, p_B, u_t, dt_t, B_t, index, b_bias, i_t, steps, m_d, m_n,
    GRID_ORDER: tl.constexpr, PADDED: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """u, raw dt, delta and B of one step; past the end delta is 0, which leaves the state alone."""
    row, reads = _locate(index, i_t, steps, m_d, GRID_ORDER, PADDED)
    m_u = tl.where(reads, m_d, False)
    b_u = tl.load(p_u + row * u_t, mask=m_u, other=0.0).to(tl.float32)
    b_x = tl.load(p_dt + row * dt_t, mask=m_u, other=0.0).to(tl.float32) + b_bias
    b_B = tl.load(p_B + row * B_t, mask=tl.where(reads, m_n, False), other=0.0).to(tl.float32)
    b_delta = b_x
    if SOFTPLUS:
        b_delta = softplus(b_x)
    return b_u, b_x, tl.where(i_t < steps, b_delta, 0.0), b_B


@triton.jit
def _advance(b_h, b_u, b_delta, b_B, b_A):
    return tl.exp2(b_delta[None, :] * b_A) * b_h + (b_delta * b_u)[None, :] * b_B[:, None]


@triton.jit
def _reverse_step(
    b_carry, b_dA, b_dD, b_dbias, b_before, b_after, b_u, b_x, b_delta, b_B, b_A, b_D,
    p_C, C_t, p_dy, dy_t, z, dz, o_dz, o_z, z_t, index,
    p_du, p_ddt, p_dB, p_dC, channels, n_states, i_t, steps, m_d, m_n,
    GRID_ORDER: tl.constexpr, HAS_INDEX: tl.constexpr, PADDED: tl.constexpr,
    HAS_Z: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One step back: stores the gradients of its inputs, returns what reaches the step before."""
    row, reads = _locate(index, i_t, steps, m_d, GRID_ORDER, PADDED)
    token = row
    writes = reads
    if HAS_INDEX and not GRID_ORDER:
        token = tl.load(index + i_t, mask=i_t < steps, other=-1)
        writes = token >= 0
    m_row, m_token = tl.where(reads, m_d, False), tl.where(writes, m_d, False)
    m_state = tl.where(reads, m_n, False)
    b_C = tl.load(p_C + row * C_t, mask=m_state, other=0.0).to(tl.float32)
    b_dy = tl.load(p_dy + token * dy_t, mask=m_token, other=0.0).to(tl.float32)
    if HAS_Z:
        b_z = tl.load(z + o_z + token * z_t, mask=m_token, other=0.0).to(tl.float32)
        b_gate = sigmoid(b_z)
        b_y = tl.sum(b_after * b_C[:, None], axis=0) + b_D * b_u
        b_dz = b_dy * b_y * silu_grad(b_z, b_gate)
        tl.store(dz + o_dz + token * channels, b_dz, mask=m_token)
        b_dy *= b_z * b_gate
    b_g = b_carry + b_C[:, None] * b_dy[None, :]
    b_drive = b_delta * b_u
    tl.store(p_dC + row * n_states, tl.sum(b_after * b_dy[None, :], axis=1), mask=m_state)
    tl.store(p_dB + row * n_states, tl.sum(b_g * b_drive[None, :], axis=1), mask=m_state)
    b_driven = tl.sum(b_g * b_B[:, None], axis=0)
    b_carry = tl.exp2(b_delta[None, :] * b_A) * b_g
    b_decayed = b_carry * b_before
    b_dA += b_decayed * b_delta[None, :]
    b_dD += b_u * b_dy
    b_ddelta = b_u * b_driven + tl.sum(b_decayed * b_A, axis=0) / LOG2E
    if SOFTPLUS:
        b_ddelta *= sigmoid(b_x)
    b_ddelta = tl.where(i_t < steps, b_ddelta, 0.0)
    b_dbias += b_ddelta
    tl.store(p_du + row * channels, b_delta * b_driven + b_D * b_dy, mask=m_row)
    tl.store(p_ddt + row * channels, b_ddelta, mask=m_row)
    return b_carry, b_dA, b_dD, b_dbias


@Kernel
@triton.jit
def scan_backward_kernel(
    dy, u, dt, A, B, C, D, z, dt_bias, index, states, carries, scratch,
    du, ddt, dA, dB, dC, dD, dz, dbias,
    dy_b, dy_k, dy_t, u_b, u_k, u_t, dt_b, dt_k, dt_t, B_b, B_k, B_t, C_b, C_k, C_t, z_b, z_t,
    K, steps, rows, length, channels, n_states, chunks, segment_chunks, segments,
    GRID_ORDER: tl.constexpr, HAS_INDEX: tl.constexpr, PADDED: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    SEGMENTED: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tl.static_assert(GROUP == 4)
    blocks = tl.cdiv(channels, BD)
    i_d, i_bk, i_b, i_k = sequence_of(K, channels, BD)
    i_s = tl.program_id(1)
    o_d, o_n, o_state, m_d, m_n, m_dn = state_tile(i_d, channels, n_states, BD, BN)
    b_A = load_decay(A, i_k, o_state, m_dn, channels, n_states)
    b_D = load_vector(D, i_k, o_d, m_d, channels, HAS_D, BD)
    b_bias = load_vector(dt_bias, i_k, o_d, m_d, channels, HAS_BIAS, BD)

    p_u = u + i_b * u_b + i_k * u_k + o_d
    p_dt = dt + i_b * dt_b + i_k * dt_k + o_d
    p_B = B + i_b * B_b + i_k * B_k + o_n
    p_C = C + i_b * C_b + i_k * C_k + o_n
    p_dy = dy + i_b * dy_b + i_k * dy_k + o_d
    o_z = i_b * z_b + o_d
    o_dz = i_bk * length * channels + o_d
    p_du = du + i_bk * rows * channels + o_d
    p_ddt = ddt + i_bk * rows * channels + o_d
    p_dB = dB + (i_bk * blocks + i_d) * rows * n_states + o_n
    p_dC = dC + (i_bk * blocks + i_d) * rows * n_states + o_n
    p_index = index
    if HAS_INDEX:
        p_index += i_k * steps

    i_program = (i_bk * segments + i_s) * blocks + i_d
    p_scratch = scratch + i_program * (CHUNK // GROUP) * BN * BD
    p_scratch += tl.arange(0, BN)[:, None] * BD + tl.arange(0, BD)[None, :]

    b_carry = tl.zeros([BN, BD], tl.float32)
    i_out = i_bk * segments + i_s
    if SEGMENTED:
        b_carry = tl.load(carries + i_out * n_states * channels + o_state, mask=m_dn, other=0.0)
    b_dA = tl.zeros([BN, BD], tl.float32)
    b_dD = tl.zeros([BD], tl.float32)
    b_dbias = tl.zeros([BD], tl.float32)
    last = tl.minimum((i_s + 1) * segment_chunks, chunks)
    for i_back in range(i_s * segment_chunks, last):
        i_c = last - 1 - (i_back - i_s * segment_chunks)
        p_state = states + (i_bk * chunks + i_c) * n_states * channels
        b_h = tl.load(p_state + o_state, mask=m_dn, other=0.0)
        groups = tl.cdiv(tl.minimum(CHUNK, steps - i_c * CHUNK), GROUP)
        for i_g in range(groups):
            tl.store(p_scratch + i_g * BN * BD, b_h)
            for i_j in tl.static_range(GROUP):
                b_u, _, b_delta, b_B = _load_inputs(
                    p_u, p_dt, p_B, u_t, dt_t, B_t, p_index, b_bias,
                    i_c * CHUNK + i_g * GROUP + i_j, steps, m_d, m_n, GRID_ORDER, PADDED, SOFTPLUS,
                )  # fmt: skip
                b_h = _advance(b_h, b_u, b_delta, b_B, b_A)
        tl.debug_barrier()
        for i_g_back in range(groups):
            i_g = groups - 1 - i_g_back
            t_0 = i_c * CHUNK + i_g * GROUP
            b_h0 = tl.load(p_scratch + i_g * BN * BD)
            b_u0, b_x0, b_delta0, b_B0 = _load_inputs(
                p_u, p_dt, p_B, u_t, dt_t, B_t, p_index, b_bias,
                t_0, steps, m_d, m_n, GRID_ORDER, PADDED, SOFTPLUS,
            )  # fmt: skip
            b_u1, b_x1, b_delta1, b_B1 = _load_inputs(
                p_u, p_dt, p_B, u_t, dt_t, B_t, p_index, b_bias,
                t_0 + 1, steps, m_d, m_n, GRID_ORDER, PADDED, SOFTPLUS,
            )  # fmt: skip
            b_u2, b_x2, b_delta2, b_B2 = _load_inputs(
                p_u, p_dt, p_B, u_t, dt_t, B_t, p_index, b_bias,
                t_0 + 2, steps, m_d, m_n, GRID_ORDER, PADDED, SOFTPLUS,
            )  # fmt: skip
            b_u3, b_x3, b_delta3, b_B3 = _load_inputs(
                p_u, p_dt, p_B, u_t, dt_t, B_t, p_index, b_bias,
                t_0 + 3, steps, m_d, m_n, GRID_ORDER, PADDED, SOFTPLUS,
            )  # fmt: skip
            b_h1 = _advance(b_h0, b_u0, b_delta0, b_B0, b_A)
            b_h2 = _advance(b_h1, b_u1, b_delta1, b_B1, b_A)
            b_h3 = _advance(b_h2, b_u2, b_delta2, b_B2, b_A)
            b_h4 = _advance(b_h3, b_u3, b_delta3, b_B3, b_A)
            b_carry, b_dA, b_dD, b_dbias = _reverse_step(
                b_carry, b_dA, b_dD, b_dbias, b_h3, b_h4, b_u3, b_x3, b_delta3, b_B3, b_A, b_D,
                p_C, C_t, p_dy, dy_t, z, dz, o_dz, o_z, z_t, p_index,
                p_du, p_ddt, p_dB, p_dC, channels, n_states, t_0 + 3, steps, m_d, m_n,
                GRID_ORDER, HAS_INDEX, PADDED, HAS_Z, SOFTPLUS,
            )  # fmt: skip
            b_carry, b_dA, b_dD, b_dbias = _reverse_step(
                b_carry, b_dA, b_dD, b_dbias, b_h2, b_h3, b_u2, b_x2, b_delta2, b_B2, b_A, b_D,
                p_C, C_t, p_dy, dy_t, z, dz, o_dz, o_z, z_t, p_index,
                p_du, p_ddt, p_dB, p_dC, channels, n_states, t_0 + 2, steps, m_d, m_n,
                GRID_ORDER, HAS_INDEX, PADDED, HAS_Z, SOFTPLUS,
            )  # fmt: skip
            b_carry, b_dA, b_dD, b_dbias = _reverse_step(
                b_carry, b_dA, b_dD, b_dbias, b_h1, b_h2, b_u1, b_x1, b_delta1, b_B1, b_A, b_D,
                p_C, C_t, p_dy, dy_t, z, dz, o_dz, o_z, z_t, p_index,
                p_du, p_ddt, p_dB, p_dC, channels, n_states, t_0 + 1, steps, m_d, m_n,
                GRID_ORDER, HAS_INDEX, PADDED, HAS_Z, SOFTPLUS,
            )  # fmt: skip
            b_carry, b_dA, b_dD, b_dbias = _reverse_step(
                b_carry, b_dA, b_dD, b_dbias, b_h0, b_h1, b_u0, b_x0, b_delta0, b_B0, b_A, b_D,
                p_C, C_t, p_dy, dy_t, z, dz, o_dz, o_z, z_t, p_index,
                p_du, p_ddt, p_dB, p_dC, channels, n_states, t_0, steps, m_d, m_n,
                GRID_ORDER, HAS_INDEX, PADDED, HAS_Z, SOFTPLUS,
            )  # fmt: skip
        tl.debug_barrier()
    tl.store(dA + i_out * n_states * channels + o_state, b_dA, mask=m_dn)
    if HAS_D:
        tl.store(dD + i_out * channels + o_d, b_dD, mask=m_d)
    if HAS_BIAS:
        tl.store(dbias + i_out * channels + o_d, b_dbias, mask=m_d)


def scan_backward(dy, u, dt, A, B, C, D, z, dt_bias, index, length, softplus, states, dBC=None):
    inputs = (u, dt, A, B, C, D, z, dt_bias)
    dy, u, dt, B, C = (unit_stride(x) for x in (dy, u, dt, B, C))
    z = z if z is None else unit_stride(z)
    D, dt_bias = (x if x is None else x.contiguous() for x in (D, dt_bias))
    batch, channels, rows = u.shape[0], u.shape[-1], u.shape[-2]
    directions, _, n_states = A.shape
    steps = rows if index is None else index.shape[1]
    chunks = cdiv(steps, CHUNK)
    A = A.float().transpose(1, 2).contiguous()  # [K, N, D]
    launch = scan_launch(batch, directions, channels, n_states, chunks)
    blocks = cdiv(channels, launch.channels)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=u.device)

    du = empty(batch, directions, rows, channels, dtype=u.dtype)
    ddt = empty(batch, directions, rows, channels, dtype=dt.dtype)
    dB = empty(batch, directions, blocks, rows, n_states)
    dC = empty(batch, directions, blocks, rows, n_states)
    dA = empty(batch, directions, launch.segments, n_states, channels)
    dD = None if D is None else empty(batch, directions, launch.segments, channels)
    dbias = None if dt_bias is None else empty(batch, directions, launch.segments, channels)
    dz = None if z is None else empty(batch, directions, length, channels, dtype=z.dtype)
    if u.numel() > 0:
        groups = CHUNK // GROUP
        programs = blocks * batch * directions * launch.segments
        scratch = empty(programs, groups, launch.states, launch.channels)
        with device_of(u):
            carries = None
            if launch.segments > 1:
                carries = segment_carries(
                    dy, dt, A, C, z, dt_bias, index, softplus, launch, steps, u.dim() == 3
                )
            scan_backward_kernel[(blocks * batch * directions, launch.segments)](
                dy, u, dt, A, B, C, D, z, dt_bias, index, states, carries, scratch,
                du, ddt, dA, dB, dC, dD, dz, dbias,
                *sequence_strides(dy), *sequence_strides(u), *sequence_strides(dt),
                *sequence_strides(B), *sequence_strides(C),
                *((0, 0) if z is None else z.stride()[:2]),
                directions, steps, rows, length, channels, n_states, chunks,
                launch.segment_chunks, launch.segments,
                GRID_ORDER=u.dim() == 3, HAS_INDEX=index is not None, PADDED=steps != length,
                HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None,
                SOFTPLUS=softplus, SEGMENTED=launch.segments > 1, CHUNK=CHUNK, GROUP=GROUP,
                BD=launch.channels, BN=launch.states, num_warps=launch.warps,
            )  # fmt: skip
    gradients = (
        du.sum(1) if u.dim() == 3 else du,
        ddt,
        dA.sum((0, 2)).transpose(1, 2),
        *side_by_side(dB.sum(2), dC.sum(2), dBC),
        None if dD is None else dD.sum((0, 2)),
        None if dz is None else dz.sum(1),
        None if dbias is None else dbias.sum((0, 2)),
    )
    return in_dtypes(gradients, inputs)
