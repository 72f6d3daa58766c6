"""Launches the scan kernels of scan.cu: the fast path for 16 states, inputs of one dtype, no gate.

docs/performance.md compares their time with that of the Triton kernels.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import nvrtc
from .._common.backends import CHUNK
from .._common.partials import sum_partials
from .._common.registration import in_dtypes
from .._common.tokens import scan_major
from .._common.triton_common import (
    Kernel,
    Launch,
    as_int32,
    cdiv,
    device_of,
    program_2d,
    sequence_strides,
    wave_size,
)
from .reference import ScanInputs
from .triton_scan import combine_segments

_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STATES = 16
_GROUP = 8
_WARP = 32


def serves(inputs: ScanInputs) -> bool:
    """Whether scan.cu has kernels for these inputs."""
    u, dt, A, B, C, _, z, *_ = inputs
    one_dtype = u.dtype in _ELEMENTS and dt.dtype == B.dtype == C.dtype == u.dtype
    whole = A.shape[2] == _STATES and A.shape[1] % _WARP == 0
    return u.is_cuda and one_dtype and whole and z is None and nvrtc.available(u.get_device())


class _Cut(NamedTuple):
    """How sequences are cut into programs of a warp, from their shape alone."""

    split: int
    """Lanes that share a channel."""
    segments: int
    """Segments of a sequence that run side by side."""
    segment_chunks: int
    """Kept-state chunks per segment."""


def _segments(programs: int, chunks: int, wave: int) -> _Cut:
    """One warp per 32 channels of a sequence or, of few long sequences, of a segment."""
    segments = 1
    # Other thresholds (1 and 2, 1 and 3, 1 and 4 waves) were within 5 % from 512 to 1024 pixels.
    if 0 < programs < 2 * wave and chunks > 1:
        segments = min(chunks, cdiv(4 * wave, programs))
    segment_chunks = max(cdiv(chunks, segments), 1)
    return _Cut(1, cdiv(chunks, segment_chunks), segment_chunks)


def _forward_cut(programs: int, chunks: int, wave: int) -> _Cut:
    """More lanes per channel where they keep a GPU busy: segments need a second pass."""
    for split in (1, 2, 4):
        if programs * split >= 2 * wave:
            return _Cut(split, 1, max(chunks, 1))
    return _segments(programs, chunks, wave)


def _aligned(x: Tensor) -> Tensor:
    """Returns x if its rows can be read 16 bytes at a time, else a contiguous copy."""
    bytes_apart = [stride * x.element_size() for stride in x.stride()[:-1]]
    starts = all(distance % 16 == 0 for distance in (x.data_ptr(), *bytes_apart))
    return x if starts and x.stride(-1) == 1 else x.contiguous()


def _prepare(inputs: ScanInputs) -> ScanInputs:
    """Returns the inputs as the kernels read them: rows aligned, parameters float32."""
    u, dt, A, B, C, D, _, dt_bias, index, length, softplus = inputs
    u, dt, B, C = (_aligned(x) for x in (u, dt, B, C))
    D, dt_bias = (x if x is None else x.float().contiguous() for x in (D, dt_bias))
    A = A.float().contiguous()
    return ScanInputs(u, dt, A, B, C, D, None, dt_bias, as_int32(index), length, softplus)


_FLAGS = (
    "ELEMENT", "GRID_ORDER", "HAS_INDEX", "PADDED", "HAS_D", "HAS_BIAS", "SOFTPLUS", "SEGMENTED",
    "SAVE", "SPLIT",
)  # fmt: skip


@lru_cache(maxsize=256)
def _named(*values: int) -> tuple[tuple[str, int], ...]:
    return tuple(zip(_FLAGS, map(int, values), strict=True))


def _defines(inputs: ScanInputs, cut: _Cut, save: bool = False) -> tuple[tuple[str, int], ...]:
    """Returns the macros that the kernels are compiled with for these inputs."""
    u, _, _, _, _, D, _, dt_bias, index, length, softplus = inputs
    order = (u.dim() == 3, index is not None, inputs.steps != length)
    optional = (D is not None, dt_bias is not None, softplus)
    return _named(_ELEMENTS[u.dtype], *order, *optional, cut.segments > 1, save, cut.split)


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _combine(A: Tensor, ends: Tensor, sums: Tensor, reverse: bool) -> Tensor:
    """Returns what enters each segment; A is [K, D, N]."""
    launch = Launch(_WARP, _STATES, 1, ends.shape[2], 0)
    return combine_segments(A.transpose(1, 2).contiguous(), ends, sums, launch, reverse)


def scan_forward(inputs: ScanInputs, save: bool) -> tuple[Tensor, Tensor]:
    inputs = _prepare(inputs)
    u, dt, A, B, C, D, _, dt_bias, index, length, _ = inputs
    batch, (directions, channels, states), steps = u.shape[0], A.shape, inputs.steps
    chunks = cdiv(steps, CHUNK)
    y = torch.empty((batch, directions, length, channels), dtype=u.dtype, device=u.device)
    kept = _float32(u, batch, directions, chunks * states * channels if save else 0)
    if y.numel() == 0:
        return y, kept
    cut = _forward_cut(batch * directions * (channels // _WARP), chunks, wave_size(inputs.u))
    blocks = channels // _WARP * cut.split
    grid = (blocks * batch * directions, cut.segments)
    defines = _defines(inputs, cut, save)
    with device_of(u):
        starts = None
        if cut.segments > 1:
            ends = _float32(u, batch, directions, cut.segments, states, channels)
            sums = _float32(u, batch, directions, cut.segments, channels)
            nvrtc.launch(
                "segment_end", defines, grid, _WARP, "8P" + 3 * "qqi" + "6i",
                u, dt, A, B, dt_bias, index, ends, sums, *sequence_strides(u, dt, B),
                directions, blocks, steps, channels, cut.segment_chunks, cut.segments,
            )  # fmt: skip
            starts = _combine(A, ends, sums, reverse=False)
        nvrtc.launch(
            "scan_forward", defines, grid, _WARP, "11P" + 4 * "qqi" + "8i",
            u, dt, A, B, C, D, dt_bias, index, y, kept, starts, *sequence_strides(u, dt, B, C),
            directions, blocks, steps, length, channels, chunks, cut.segment_chunks, cut.segments,
        )  # fmt: skip
    return y, kept


def scan_backward(
    dy: Tensor, inputs: ScanInputs, states: Tensor, dBC: Tensor | None = None
) -> list[Tensor | None]:
    given = inputs.tensors
    inputs = _prepare(inputs)
    u, dt, A, B, C, D, _, dt_bias, index, _, _ = inputs
    dy = _aligned(dy.to(u.dtype))
    batch, rows, (directions, channels, n_states) = u.shape[0], u.shape[-2], A.shape
    steps = inputs.steps
    chunks = cdiv(steps, CHUNK)
    blocks = channels // _WARP
    cut = _segments(batch * directions * blocks, chunks, wave_size(inputs.u))
    du, ddt = (scan_major(batch, directions, rows, channels, like=u) for _ in range(2))
    partial_dBC = _float32(u, directions, batch, blocks, rows, 2 * n_states)
    parameters = [A, D, dt_bias]
    partial = _float32(
        u, batch * cut.segments, sum(0 if x is None else x.numel() for x in parameters)
    )
    defines = _defines(inputs, cut)
    grid = (blocks * batch * directions, cut.segments)
    if u.numel() > 0:
        scratch = _float32(u, grid[0] * grid[1], CHUNK // _GROUP, n_states * _WARP)
        with device_of(u):
            carries = None
            if cut.segments > 1:
                ends = _float32(u, batch, directions, cut.segments, n_states, channels)
                sums = _float32(u, batch, directions, cut.segments, channels)
                nvrtc.launch(
                    "segment_carry", defines, grid, _WARP, "8P" + 3 * "qqi" + "6i",
                    dy, dt, A, C, dt_bias, index, ends, sums, *sequence_strides(dy, dt, C),
                    directions, blocks, steps, channels, cut.segment_chunks, cut.segments,
                )  # fmt: skip
                carries = _combine(A, ends, sums, reverse=True)
            dA, dD, dbias = _split(partial, parameters)
            nvrtc.launch(
                "scan_backward", defines, grid, _WARP, "18P" + 5 * "qqi" + "8iq",
                dy, u, dt, A, B, C, D, dt_bias, index, states, carries, scratch,
                du, ddt, dA, partial_dBC, dD, dbias, *sequence_strides(dy, u, dt, B, C),
                directions, blocks, steps, rows, channels, chunks, cut.segment_chunks,
                cut.segments, partial.shape[1],
            )  # fmt: skip
    if dBC is None:
        dBC = torch.empty((batch, directions, rows, 2 * n_states), dtype=u.dtype, device=u.device)
    sum_blocks(partial_dBC, dBC)
    sums = _split(sum_partials(partial, 0, torch.float32), parameters)
    dA, dD, dbias = (
        None if p is None or x is None else x.view(p.shape)
        for p, x in zip(parameters, sums, strict=True)
    )
    if inputs.grid_order:
        du = sum_partials(du.transpose(0, 1), 0, u.dtype)
    dB, dC = dBC[..., :n_states], dBC[..., n_states:]
    return in_dtypes((du, ddt, dA, dB, dC, dD, None, dbias), given)


def _split(x: Tensor, parameters: list[Tensor | None]) -> list[Tensor | None]:
    """Splits the last axis into as many elements as each parameter has; None stays."""
    parts = x.split([0 if p is None else p.numel() for p in parameters], dim=-1)
    return [None if p is None else part for p, part in zip(parameters, parts, strict=True)]


_ROWS = 32
"""Steps per program of `sum_blocks_kernel`."""


@Kernel
@triton.jit
def sum_blocks_kernel(
    x, out, out_k, out_b, out_t, batch, blocks, rows, WIDTH: tl.constexpr, BT: tl.constexpr
):
    """Sums a tile of steps over the blocks of channels."""
    i_t, i_kb = program_2d(tl.cdiv(rows, BT))
    o_t = i_t * BT + tl.arange(0, BT)
    o_c = tl.arange(0, WIDTH)
    m = (o_t < rows)[:, None]
    p_x = x + (i_kb * blocks * rows + o_t[:, None]) * WIDTH + o_c[None, :]
    b_sum = tl.zeros([BT, WIDTH], tl.float32)
    for _ in range(blocks):
        b_sum += tl.load(p_x, mask=m, other=0.0)
        p_x += rows * WIDTH
    p_out = out + i_kb % batch * out_b + i_kb // batch * out_k
    tl.store(p_out + o_t.to(tl.int64)[:, None] * out_t + o_c[None, :], b_sum, mask=m)


def sum_blocks(x: Tensor, out: Tensor) -> None:
    """Sums [K, B, blocks, T, M] over blocks of channels into [B, K, T, M] of any strides."""
    directions, batch, blocks, rows, width = x.shape
    if out.numel() > 0:
        with device_of(x):
            sum_blocks_kernel[(cdiv(rows, _ROWS) * directions * batch,)](
                x, out, out.stride(1), out.stride(0), out.stride(2), batch, blocks, rows,
                WIDTH=width, BT=_ROWS, num_warps=2,
            )  # fmt: skip
