"""Selective scan in Triton, for every input that scan.cu does not serve.

A program walks one sequence of one image, direction and block of channels, its states in registers
as a tile [N, channels]. Inputs are read at, and outputs written to, the token that the index names.

Few long sequences are cut into segments of time that run side by side. First each segment is run
from zero for the state that it ends in, then these ends are combined over the segments into the
states from which the scan proper runs; backward the same from the last segment.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.backends import CHUNK
from .._common.registration import in_dtypes
from .._common.tiles import token_strides
from .._common.triton_common import (
    LOG2E,
    Kernel,
    Launch,
    as_int32,
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
    step_size,
    store,
    unit_stride,
    wave_size,
)
from .reference import ScanInputs, side_by_side


@triton.jit
def _locate(
    index, i_t, m_d, m_n,
    GRID_ORDER: tl.constexpr, HAS_INDEX: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Returns a step's token, the row that it reads, and the masks of channels and states there."""
    token = i_t
    if HAS_INDEX:
        token = tl.load(index + i_t)
    row = i_t
    if GRID_ORDER:
        row = token
        if PADDED:
            m_d = tl.where(token >= 0, m_d, False)
            m_n = tl.where(token >= 0, m_n, False)
    return token, row, m_d, m_n


@triton.jit
def _load_step(p_u, p_dt, p_B, u_t, dt_t, B_t, row, m_row, m_state):
    """Returns u, dt and B of one step."""
    b_u = tl.load(p_u + row * u_t, mask=m_row, other=0.0).to(tl.float32)
    b_dt = tl.load(p_dt + row * dt_t, mask=m_row, other=0.0).to(tl.float32)
    b_B = tl.load(p_B + row * B_t, mask=m_state, other=0.0).to(tl.float32)
    return b_u, b_dt, b_B


@triton.jit
def _advance(b_h, b_u, b_delta, b_B, b_A):
    """Returns the states after one step."""
    return tl.exp2(b_delta[None, :] * b_A) * b_h + (b_delta * b_u)[None, :] * b_B[:, None]


@Kernel
@triton.jit
def scan_forward_kernel(
    u, dt, A, B, C, D, z, dt_bias, index, y, states, starts,
    u_b, u_k, u_t, dt_b, dt_k, dt_t, B_b, B_k, B_t, C_b, C_k, C_t, z_b, z_t,
    K, steps, length, channels, n_states, chunks, segment_chunks, segments,
    GRID_ORDER: tl.constexpr, HAS_INDEX: tl.constexpr, PADDED: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    SAVE: tl.constexpr, SEGMENTED: tl.constexpr, EVEN: tl.constexpr, CHUNK: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Computes the outputs of a segment and, with SAVE, the states at the start of its chunks."""
    i_d, i_bk, i_b, i_k = sequence_of(K, channels, BD)
    i_s = tl.program_id(1)
    o_d, o_n, o_state, m_d, m_n, m_dn = state_tile(i_d, channels, n_states, BD, BN)
    if EVEN:  # noqa: SIM108 - decided when the kernel is compiled
        m_load = tl.full([BD], 1, tl.int1)
    else:
        m_load = m_d

    b_A = load_decay(A, i_k, o_state, m_dn, channels, n_states)
    b_D = load_vector(D, i_k, o_d, m_d, channels, HAS_D, BD)
    b_bias = load_vector(dt_bias, i_k, o_d, m_d, channels, HAS_BIAS, BD)

    p_u = u + i_b * u_b + i_k * u_k + o_d
    p_dt = dt + i_b * dt_b + i_k * dt_k + o_d
    p_B = B + i_b * B_b + i_k * B_k + o_n
    p_C = C + i_b * C_b + i_k * C_k + o_n
    p_y = y + i_bk * length * channels + o_d
    p_index = index
    if HAS_INDEX:
        p_index += i_k * steps

    b_h = tl.zeros([BN, BD], tl.float32)
    if SEGMENTED:
        p_start = starts + (i_bk * segments + i_s) * n_states * channels
        b_h = tl.load(p_start + o_state, mask=m_dn, other=0.0)
    for i_c in range(i_s * segment_chunks, tl.minimum((i_s + 1) * segment_chunks, chunks)):
        if SAVE:
            p_state = states + (i_bk * chunks + i_c) * n_states * channels
            tl.store(p_state + o_state, b_h, mask=m_dn)
        for i_t in range(i_c * CHUNK, tl.minimum((i_c + 1) * CHUNK, steps)):
            token, row, m_row, m_state = _locate(
                p_index, i_t, m_load, m_n, GRID_ORDER, HAS_INDEX, PADDED
            )
            b_u, b_dt, b_B = _load_step(p_u, p_dt, p_B, u_t, dt_t, B_t, row, m_row, m_state)
            b_C = tl.load(p_C + row * C_t, mask=m_state, other=0.0).to(tl.float32)
            b_delta = step_size(b_dt, b_bias, SOFTPLUS)
            b_h = _advance(b_h, b_u, b_delta, b_B, b_A)
            b_y = tl.sum(b_h * b_C[:, None], axis=0)
            if HAS_D:
                b_y += b_D * b_u
            m_y = m_load
            if PADDED:
                m_y = tl.where(token >= 0, m_load, False)
            if HAS_Z:
                p_z = z + i_b * z_b + token * z_t + o_d
                b_z = tl.load(p_z, mask=m_y, other=0.0).to(tl.float32)
                b_y *= b_z * sigmoid(b_z)
            store(p_y + token * channels, b_y, m_y)


@Kernel
@triton.jit
def segment_end_kernel(
    u, dt, A, B, dt_bias, index, ends, sums,
    u_b, u_k, u_t, dt_b, dt_k, dt_t, B_b, B_k, B_t,
    K, steps, channels, n_states, segment_steps, segments,
    GRID_ORDER: tl.constexpr, PADDED: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Computes the state that a segment reaches from zero, and the sum of its step sizes."""
    i_d, i_bk, i_b, i_k = sequence_of(K, channels, BD)
    i_s = tl.program_id(1)
    o_d, o_n, o_state, m_d, m_n, m_dn = state_tile(i_d, channels, n_states, BD, BN)
    b_A = load_decay(A, i_k, o_state, m_dn, channels, n_states)
    b_bias = load_vector(dt_bias, i_k, o_d, m_d, channels, HAS_BIAS, BD)
    p_u = u + i_b * u_b + i_k * u_k + o_d
    p_dt = dt + i_b * dt_b + i_k * dt_k + o_d
    p_B = B + i_b * B_b + i_k * B_k + o_n
    p_index = index
    if GRID_ORDER:
        p_index += i_k * steps
    b_h = tl.zeros([BN, BD], tl.float32)
    b_sum = tl.zeros([BD], tl.float32)
    for i_t in range(i_s * segment_steps, tl.minimum((i_s + 1) * segment_steps, steps)):
        _, row, m_row, m_state = _locate(p_index, i_t, m_d, m_n, GRID_ORDER, GRID_ORDER, PADDED)
        b_u, b_dt, b_B = _load_step(p_u, p_dt, p_B, u_t, dt_t, B_t, row, m_row, m_state)
        b_delta = step_size(b_dt, b_bias, SOFTPLUS)
        b_h = _advance(b_h, b_u, b_delta, b_B, b_A)
        b_sum += b_delta
    i_out = i_bk * segments + i_s
    tl.store(ends + i_out * n_states * channels + o_state, b_h, mask=m_dn)
    tl.store(sums + i_out * channels + o_d, b_sum, mask=m_d)


@Kernel
@triton.jit
def segment_carry_kernel(
    dy, dt, A, C, z, dt_bias, index, ends, sums,
    dy_b, dy_k, dy_t, dt_b, dt_k, dt_t, C_b, C_k, C_t, z_b, z_t,
    K, steps, channels, n_states, segment_steps, segments,
    GRID_ORDER: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Computes the gradient that a segment passes to the one before it if none reaches its end."""
    i_d, i_bk, i_b, i_k = sequence_of(K, channels, BD)
    i_s = tl.program_id(1)
    o_d, o_n, o_state, m_d, m_n, m_dn = state_tile(i_d, channels, n_states, BD, BN)
    b_A = load_decay(A, i_k, o_state, m_dn, channels, n_states)
    b_bias = load_vector(dt_bias, i_k, o_d, m_d, channels, HAS_BIAS, BD)
    p_dt = dt + i_b * dt_b + i_k * dt_k + o_d
    p_C = C + i_b * C_b + i_k * C_k + o_n
    p_dy = dy + i_b * dy_b + i_k * dy_k + o_d
    p_index = index
    if HAS_INDEX:
        p_index += i_k * steps
    b_carry = tl.zeros([BN, BD], tl.float32)
    b_sum = tl.zeros([BD], tl.float32)
    first, last = i_s * segment_steps, tl.minimum((i_s + 1) * segment_steps, steps)
    for i_back in range(first, last):
        i_t = last - 1 - (i_back - first)
        token, row, m_row, m_state = _locate(p_index, i_t, m_d, m_n, GRID_ORDER, HAS_INDEX, True)
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


@Kernel
@triton.jit
def combine_segments_kernel(
    A, ends, sums, starts, K, channels, n_states, segments,
    REVERSE: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Scans the ends of segments for what enters each of them, from the last one if REVERSE."""
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


GROUP = 4
"""Steps whose states the backward kernel holds in registers together."""


@triton.jit
def _locate_within(index, i_t, steps, GRID_ORDER: tl.constexpr):
    """Returns the row that a step reads, and whether it reads one; past the end none does."""
    row = i_t
    reads = i_t < steps
    if GRID_ORDER:
        row = tl.load(index + i_t, mask=reads, other=-1)
        reads = row >= 0
    return row, reads


@triton.jit
def _load_inputs(
    inputs, index, i_t, steps, m_d, m_n, GRID_ORDER: tl.constexpr, SOFTPLUS: tl.constexpr
):
    """Returns u, dt + bias, delta and B of a step; past the end delta is 0: the state stays."""
    p_u, p_dt, p_B, u_t, dt_t, B_t, b_bias = inputs
    row, reads = _locate_within(index, i_t, steps, GRID_ORDER)
    m_u = tl.where(reads, m_d, False)
    b_u = tl.load(p_u + row * u_t, mask=m_u, other=0.0).to(tl.float32)
    b_x = tl.load(p_dt + row * dt_t, mask=m_u, other=0.0).to(tl.float32) + b_bias
    b_B = tl.load(p_B + row * B_t, mask=tl.where(reads, m_n, False), other=0.0).to(tl.float32)
    b_delta = b_x
    if SOFTPLUS:
        b_delta = softplus(b_x)
    return b_u, b_x, tl.where(i_t < steps, b_delta, 0.0), b_B


@triton.jit
def _reverse_step(
    sums, b_before, b_after, step, b_A, b_D, pointers, index, p_z, p_dz, channels, n_states, i_t,
    steps, m_d, m_n,
    GRID_ORDER: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_Z: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One step back: stores the gradients of its inputs, returns the carry and the sums so far."""
    b_carry, b_dA, b_dD, b_dbias = sums
    b_u, b_x, b_delta, b_B = step
    p_C, C_t, p_dy, dy_t, z_t, p_du, p_ddt, p_dB, p_dC = pointers
    row, reads = _locate_within(index, i_t, steps, GRID_ORDER)
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
        b_z = tl.load(p_z + token * z_t, mask=m_token, other=0.0).to(tl.float32)
        b_gate = sigmoid(b_z)
        b_y = tl.sum(b_after * b_C[:, None], axis=0) + b_D * b_u
        b_dz = b_dy * b_y * silu_grad(b_z, b_gate)
        tl.store(p_dz + token * channels, b_dz, mask=m_token)
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
    GRID_ORDER: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, SEGMENTED: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of a segment, from its last chunk to its first.

    In each chunk the states are recomputed from the kept one, those at the start of each group of
    steps go to scratch memory, and the groups are walked back with their states in registers. Sums
    over channels (dB, dC) leave as one partial sum per block of channels, sums over time (dA, dD,
    ddt_bias) as one per program.
    """
    tl.static_assert(GROUP == 4)
    blocks = tl.cdiv(channels, BD)
    i_d, i_bk, i_b, i_k = sequence_of(K, channels, BD)
    i_s = tl.program_id(1)
    o_d, o_n, o_state, m_d, m_n, m_dn = state_tile(i_d, channels, n_states, BD, BN)
    b_A = load_decay(A, i_k, o_state, m_dn, channels, n_states)
    b_D = load_vector(D, i_k, o_d, m_d, channels, HAS_D, BD)
    b_bias = load_vector(dt_bias, i_k, o_d, m_d, channels, HAS_BIAS, BD)

    p_index = index
    if HAS_INDEX:
        p_index += i_k * steps
    p_u = u + i_b * u_b + i_k * u_k + o_d
    p_dt = dt + i_b * dt_b + i_k * dt_k + o_d
    p_B = B + i_b * B_b + i_k * B_k + o_n
    inputs = (p_u, p_dt, p_B, u_t, dt_t, B_t, b_bias)
    p_C = C + i_b * C_b + i_k * C_k + o_n
    p_dy = dy + i_b * dy_b + i_k * dy_k + o_d
    p_du = du + i_bk * rows * channels + o_d
    p_ddt = ddt + i_bk * rows * channels + o_d
    p_dB = dB + (i_bk * blocks + i_d) * rows * n_states + o_n
    p_dC = dC + (i_bk * blocks + i_d) * rows * n_states + o_n
    p_z, p_dz = z, dz
    if HAS_Z:
        p_z += i_b * z_b + o_d
        p_dz += i_bk * length * channels + o_d
    pointers = (p_C, C_t, p_dy, dy_t, z_t, p_du, p_ddt, p_dB, p_dC)

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
                t = i_c * CHUNK + i_g * GROUP + i_j
                b_u, _, b_delta, b_B = _load_inputs(
                    inputs, p_index, t, steps, m_d, m_n, GRID_ORDER, SOFTPLUS
                )
                b_h = _advance(b_h, b_u, b_delta, b_B, b_A)
        tl.debug_barrier()
        for i_g_back in range(groups):
            i_g = groups - 1 - i_g_back
            t_0 = i_c * CHUNK + i_g * GROUP
            b_h0 = tl.load(p_scratch + i_g * BN * BD)
            step0 = _load_inputs(inputs, p_index, t_0, steps, m_d, m_n, GRID_ORDER, SOFTPLUS)
            step1 = _load_inputs(inputs, p_index, t_0 + 1, steps, m_d, m_n, GRID_ORDER, SOFTPLUS)
            step2 = _load_inputs(inputs, p_index, t_0 + 2, steps, m_d, m_n, GRID_ORDER, SOFTPLUS)
            step3 = _load_inputs(inputs, p_index, t_0 + 3, steps, m_d, m_n, GRID_ORDER, SOFTPLUS)
            b_h1 = _advance(b_h0, step0[0], step0[2], step0[3], b_A)
            b_h2 = _advance(b_h1, step1[0], step1[2], step1[3], b_A)
            b_h3 = _advance(b_h2, step2[0], step2[2], step2[3], b_A)
            b_h4 = _advance(b_h3, step3[0], step3[2], step3[3], b_A)
            sums = (b_carry, b_dA, b_dD, b_dbias)
            sums = _reverse_step(
                sums, b_h3, b_h4, step3, b_A, b_D, pointers, p_index, p_z, p_dz, channels, n_states,
                t_0 + 3, steps, m_d, m_n, GRID_ORDER, HAS_INDEX, HAS_Z, SOFTPLUS,
            )  # fmt: skip
            sums = _reverse_step(
                sums, b_h2, b_h3, step2, b_A, b_D, pointers, p_index, p_z, p_dz, channels, n_states,
                t_0 + 2, steps, m_d, m_n, GRID_ORDER, HAS_INDEX, HAS_Z, SOFTPLUS,
            )  # fmt: skip
            sums = _reverse_step(
                sums, b_h1, b_h2, step1, b_A, b_D, pointers, p_index, p_z, p_dz, channels, n_states,
                t_0 + 1, steps, m_d, m_n, GRID_ORDER, HAS_INDEX, HAS_Z, SOFTPLUS,
            )  # fmt: skip
            b_carry, b_dA, b_dD, b_dbias = _reverse_step(
                sums, b_h0, b_h1, step0, b_A, b_D, pointers, p_index, p_z, p_dz, channels, n_states,
                t_0, steps, m_d, m_n, GRID_ORDER, HAS_INDEX, HAS_Z, SOFTPLUS,
            )  # fmt: skip
        tl.debug_barrier()
    tl.store(dA + i_out * n_states * channels + o_state, b_dA, mask=m_dn)
    if HAS_D:
        tl.store(dD + i_out * channels + o_d, b_dD, mask=m_d)
    if HAS_BIAS:
        tl.store(dbias + i_out * channels + o_d, b_dbias, mask=m_d)


def combine_segments(
    A: Tensor, ends: Tensor, sums: Tensor, launch: Launch, reverse: bool
) -> Tensor:
    """Returns what enters each segment, [B, K, S, N, D], from the ends of the others.

    Args:
        A: [K, N, D].
        ends: What each segment ends in when nothing enters it, [B, K, S, N, D].
        sums: Sums of step sizes, [B, K, S, D].
        launch: How the scan is cut.
        reverse: Whether segments follow one another from the last to the first.
    """
    starts = torch.empty_like(ends)
    batch, directions, segments, states, channels = ends.shape
    combine_segments_kernel[(cdiv(channels, launch.channels) * batch * directions,)](
        A, ends, sums, starts, directions, channels, states, segments,
        REVERSE=reverse, BD=launch.channels, BN=launch.states, num_warps=launch.warps,
    )  # fmt: skip
    return starts


def _prepare(inputs: ScanInputs) -> tuple[ScanInputs, Launch, int, tuple[int, int]]:
    """Returns the inputs as the kernels read them, how the scan is cut, its chunks and its grid.

    Channels and states stand side by side, A as float32 [K, N, D].
    """
    u, dt, A, B, C, D, z, dt_bias, index, length, softplus = inputs
    directions, channels, states = A.shape
    chunks = cdiv(inputs.steps, CHUNK)
    launch = scan_launch(u.shape[0], directions, channels, states, chunks, wave_size(u))
    grid = (cdiv(channels, launch.channels) * u.shape[0] * directions, launch.segments)
    u, dt, B, C = (unit_stride(x) for x in (u, dt, B, C))
    A = A.float().transpose(1, 2).contiguous()
    D, dt_bias = (x if x is None else x.contiguous() for x in (D, dt_bias))
    z = z if z is None else unit_stride(z)
    prepared = ScanInputs(u, dt, A, B, C, D, z, dt_bias, as_int32(index), length, softplus)
    return prepared, launch, chunks, grid


def _segment_buffers(A: Tensor, batch: int, segments: int) -> tuple[Tensor, Tensor]:
    """Allocates the ends and sums of `combine_segments`."""
    directions, states, channels = A.shape
    shape = (batch, directions, segments)
    ends = torch.empty((*shape, states, channels), dtype=torch.float32, device=A.device)
    return ends, torch.empty((*shape, channels), dtype=torch.float32, device=A.device)


def scan_forward(inputs: ScanInputs, save: bool) -> tuple[Tensor, Tensor]:
    inputs, launch, chunks, grid = _prepare(inputs)
    u, dt, A, B, C, D, z, dt_bias, index, length, softplus = inputs
    directions, states, channels = A.shape
    batch, steps = u.shape[0], inputs.steps
    y = torch.empty((batch, directions, length, channels), dtype=u.dtype, device=u.device)
    shape = (batch, directions, chunks * states * channels if save else 0)
    kept = torch.empty(shape, dtype=torch.float32, device=u.device)
    if y.numel() == 0:
        return y, kept
    flags: dict[str, Any] = {
        "GRID_ORDER": inputs.grid_order, "HAS_BIAS": dt_bias is not None, "SOFTPLUS": softplus,
        "BD": launch.channels, "BN": launch.states, "num_warps": launch.warps,
    }  # fmt: skip
    with device_of(u):
        starts = None
        if launch.segments > 1:
            ends, sums = _segment_buffers(A, batch, launch.segments)
            segment_end_kernel[grid](
                u, dt, A, B, dt_bias, index, ends, sums,
                *sequence_strides(u, dt, B), directions, steps, channels, states,
                launch.segment_chunks * CHUNK, launch.segments,
                PADDED=inputs.grid_order and steps != length, **flags,
            )  # fmt: skip
            starts = combine_segments(A, ends, sums, launch, reverse=False)
        scan_forward_kernel[grid](
            u, dt, A, B, C, D, z, dt_bias, index, y, kept, starts,
            *sequence_strides(u, dt, B, C), *token_strides(z),
            directions, steps, length, channels, states, chunks, launch.segment_chunks,
            launch.segments, HAS_INDEX=index is not None, PADDED=steps != length,
            HAS_D=D is not None, HAS_Z=z is not None, SAVE=save, SEGMENTED=launch.segments > 1,
            EVEN=channels % launch.channels == 0, CHUNK=CHUNK, **flags,
        )  # fmt: skip
    return y, kept


def scan_backward(
    dy: Tensor, inputs: ScanInputs, states: Tensor, dBC: Tensor | None = None
) -> list[Tensor | None]:
    given = inputs.tensors
    inputs, launch, chunks, grid = _prepare(inputs)
    u, dt, A, B, C, D, z, dt_bias, index, length, softplus = inputs
    dy = unit_stride(dy)
    directions, n_states, channels = A.shape
    batch, rows, steps = u.shape[0], u.shape[-2], inputs.steps
    sequences, blocks = (batch, directions), cdiv(channels, launch.channels)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=u.device)

    du = empty(*sequences, rows, channels, dtype=u.dtype)
    ddt = empty(*sequences, rows, channels, dtype=dt.dtype)
    dB, dC = (empty(*sequences, blocks, rows, n_states) for _ in range(2))
    dA = empty(*sequences, launch.segments, n_states, channels)
    dD = None if D is None else empty(*sequences, launch.segments, channels)
    dbias = None if dt_bias is None else empty(*sequences, launch.segments, channels)
    dz = None if z is None else empty(*sequences, length, channels, dtype=z.dtype)
    flags: dict[str, Any] = {
        "GRID_ORDER": inputs.grid_order, "HAS_INDEX": index is not None, "HAS_Z": z is not None,
        "HAS_BIAS": dt_bias is not None, "SOFTPLUS": softplus,
        "BD": launch.channels, "BN": launch.states, "num_warps": launch.warps,
    }  # fmt: skip
    if u.numel() > 0:
        scratch = empty(grid[0] * grid[1], CHUNK // GROUP, launch.states, launch.channels)
        with device_of(u):
            carries = None
            if launch.segments > 1:
                ends, sums = _segment_buffers(A, batch, launch.segments)
                segment_carry_kernel[grid](
                    dy, dt, A, C, z, dt_bias, index, ends, sums,
                    *sequence_strides(dy, dt, C), *token_strides(z), directions, steps, channels,
                    n_states, launch.segment_chunks * CHUNK, launch.segments, **flags,
                )  # fmt: skip
                carries = combine_segments(A, ends, sums, launch, reverse=True)
            scan_backward_kernel[grid](
                dy, u, dt, A, B, C, D, z, dt_bias, index, states, carries, scratch,
                du, ddt, dA, dB, dC, dD, dz, dbias,
                *sequence_strides(dy, u, dt, B, C), *token_strides(z),
                directions, steps, rows, length, channels, n_states, chunks,
                launch.segment_chunks, launch.segments, HAS_D=D is not None,
                SEGMENTED=launch.segments > 1, CHUNK=CHUNK, GROUP=GROUP, **flags,
            )  # fmt: skip
    gradients = (
        du.sum(1) if inputs.grid_order else du,
        ddt,
        dA.sum((0, 2)).transpose(1, 2),
        *side_by_side(dB.sum(2), dC.sum(2), dBC),
        None if dD is None else dD.sum((0, 2)),
        None if dz is None else dz.sum(1),
        None if dbias is None else dbias.sum((0, 2)),
    )
    return in_dtypes(gradients, given)
