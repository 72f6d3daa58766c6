"""Selective scan, forward (Triton).

A program walks one sequence of one image, direction and block of channels, its states in registers
as a tile [N, channels]. Inputs are read at, and outputs written to, the token that the index names.
"""

import torch
import triton
import triton.language as tl

from .._common.backends import CHUNK
from .._common.triton_common import (
    Kernel,
    cdiv,
    device_of,
    load_decay,
    load_vector,
    scan_launch,
    sequence_of,
    sequence_strides,
    sigmoid,
    state_tile,
    step_size,
    store,
    unit_stride,
)
from .triton_segments import segment_starts


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
            token = i_t
            if HAS_INDEX:
                token = tl.load(p_index + i_t)
            source = i_t
            m_u, m_bc = m_load, m_n
            if GRID_ORDER:
                source = token
                if PADDED:
                    m_u = tl.where(token >= 0, m_load, False)
                    m_bc = tl.where(token >= 0, m_n, False)
            b_u = tl.load(p_u + source * u_t, mask=m_u, other=0.0).to(tl.float32)
            b_dt = tl.load(p_dt + source * dt_t, mask=m_u, other=0.0).to(tl.float32)
            b_B = tl.load(p_B + source * B_t, mask=m_bc, other=0.0).to(tl.float32)
            b_C = tl.load(p_C + source * C_t, mask=m_bc, other=0.0).to(tl.float32)
            b_delta = step_size(b_dt, b_bias, SOFTPLUS)
            b_h = tl.exp2(b_delta[None, :] * b_A) * b_h + (b_delta * b_u)[None, :] * b_B[:, None]
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


def scan_forward(u, dt, A, B, C, D, z, dt_bias, index, length, softplus, save):
    u, dt, B, C = (unit_stride(x) for x in (u, dt, B, C))
    z = z if z is None else unit_stride(z)
    D, dt_bias = (x if x is None else x.contiguous() for x in (D, dt_bias))
    grid_order = u.dim() == 3
    batch, channels = u.shape[0], u.shape[-1]
    directions, _, states = A.shape
    steps = u.shape[2] if index is None else index.shape[1]
    chunks = cdiv(steps, CHUNK)
    A = A.float().transpose(1, 2).contiguous()  # [K, N, D]: channels side by side
    y = torch.empty((batch, directions, length, channels), dtype=u.dtype, device=u.device)
    kept = torch.empty(
        (batch, directions, chunks if save else 0, states, channels),
        dtype=torch.float32,
        device=u.device,
    )
    if y.numel() == 0:
        return y, kept
    launch = scan_launch(batch, directions, channels, states, chunks)
    with device_of(u):
        starts = None
        if launch.segments > 1:
            starts = segment_starts(u, dt, A, B, dt_bias, index, softplus, launch, steps)
        grid = (cdiv(channels, launch.channels) * batch * directions, launch.segments)
        scan_forward_kernel[grid](
            u, dt, A, B, C, D, z, dt_bias, index, y, kept, starts,
            *sequence_strides(u), *sequence_strides(dt), *sequence_strides(B),
            *sequence_strides(C), *((0, 0) if z is None else z.stride()[:2]),
            directions, steps, length, channels, states, chunks, launch.segment_chunks,
            launch.segments,
            GRID_ORDER=grid_order, HAS_INDEX=index is not None, PADDED=steps != length,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None,
            SOFTPLUS=softplus, SAVE=save, SEGMENTED=launch.segments > 1,
            EVEN=channels % launch.channels == 0, CHUNK=CHUNK,
            BD=launch.channels, BN=launch.states, num_warps=launch.warps,
        )  # fmt: skip
    return y, kept
