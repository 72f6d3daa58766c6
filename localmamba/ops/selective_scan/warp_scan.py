"""Launches the scan kernels of scan.cu: the fast path for 16 states, inputs of one dtype, no gate.

The Triton kernels serve everything else. docs/performance.md holds what either takes.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .._common import nvrtc
from .._common.backends import CHUNK
from .._common.partials import sum_partials
from .._common.registration import in_dtypes
from .._common.tokens import scan_major
from .._common.triton_common import WAVE, Launch, cdiv, device_of, sequence_strides
from .scan_sums import ParameterSums, sum_blocks
from .triton_segments import combine_segments

_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STATES = 16
_GROUP = 8
_WARP = 32


def serves(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> bool:
    """Whether scan.cu has kernels for these inputs."""
    one_dtype = u.dtype in _ELEMENTS and dt.dtype == B.dtype == C.dtype == u.dtype
    whole = A.shape[2] == _STATES and A.shape[1] % _WARP == 0
    return u.is_cuda and one_dtype and whole and z is None and nvrtc.available(u.get_device())


def _aligned(x: Tensor) -> Tensor:
    """x itself when its rows can be read 16 bytes at a time, else a contiguous copy."""
    bytes_apart = [stride * x.element_size() for stride in x.stride()[:-1]]
    starts = all(distance % 16 == 0 for distance in (x.data_ptr(), *bytes_apart))
    return x if starts and x.stride(-1) == 1 else x.contiguous()


class _Cut(NamedTuple):
    """How sequences are cut into programs of a warp, from their shape alone."""

    split: int
    """Lanes that share a channel."""
    segments: int
    """Parts of a sequence that run side by side."""
    segment_chunks: int
    """Kept-state chunks of a segment."""


def _segments(programs: int, chunks: int) -> _Cut:
    """A warp for 32 channels of a sequence, or, of few long sequences, of a segment of it."""
    segments = 1
    # Other thresholds (1 and 2, 1 and 3, 1 and 4 waves) were within 5 % from 512 to 1024 pixels.
    if 0 < programs < 2 * WAVE and chunks > 1:
        segments = min(chunks, cdiv(4 * WAVE, programs))
    segment_chunks = max(cdiv(chunks, segments), 1)
    return _Cut(1, cdiv(chunks, segment_chunks), segment_chunks)


def _forward_cut(programs: int, chunks: int) -> _Cut:
    """More lanes a channel where they keep a GPU busy: segments need a second pass."""
    for split in (1, 2, 4):
        if programs * split >= 2 * WAVE:
            return _Cut(split, 1, max(chunks, 1))
    return _segments(programs, chunks)


def _strides(*tensors: Tensor) -> list[int]:
    """Of image, direction (64 bits) and step (32 bits)."""
    return [stride for x in tensors for stride in sequence_strides(x)]


_FLAGS = (
    "ELEMENT", "GRID_ORDER", "HAS_INDEX", "PADDED", "HAS_D", "HAS_BIAS", "SOFTPLUS", "SEGMENTED",
    "SAVE", "SPLIT",
)  # fmt: skip


@lru_cache(maxsize=256)
def _named(*values: int) -> tuple[tuple[str, int], ...]:
    return tuple(zip(_FLAGS, map(int, values), strict=True))


def _defines(u, D, dt_bias, index, padded, softplus, cut, save=False):
    """The macros that the kernels are compiled with for these inputs."""
    optional = (D is not None, dt_bias is not None)
    order = (u.dim() == 3, index is not None, padded)
    segmented = cut.segments > 1
    return _named(_ELEMENTS[u.dtype], *order, *optional, softplus, segmented, save, cut.split)


def _parameters(A: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """float32 and contiguous, as the kernels read them."""
    return [x if x is None else x.float().contiguous() for x in (A, *others)]


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _combine(A, ends, sums, reverse):
    """What enters each segment; A is [K, D, N]."""
    launch = Launch(_WARP, _STATES, 1, ends.shape[2], 0)
    return combine_segments(A.transpose(1, 2).contiguous(), ends, sums, launch, reverse)


def scan_forward(u, dt, A, B, C, D, dt_bias, index, length, softplus, save):
    u, dt, B, C = (_aligned(x) for x in (u, dt, B, C))
    A, D, dt_bias = _parameters(A, D, dt_bias)
    batch, channels = u.shape[0], u.shape[-1]
    directions, _, states = A.shape
    steps = u.shape[2] if index is None else index.shape[1]
    chunks = cdiv(steps, CHUNK)
    y = torch.empty((batch, directions, length, channels), dtype=u.dtype, device=u.device)
    kept = _float32(u, batch, directions, chunks if save else 0, states, channels)
    if y.numel() == 0:
        return y, kept
    cut = _forward_cut(batch * directions * (channels // _WARP), chunks)
    blocks = channels // _WARP * cut.split
    grid = (blocks * batch * directions, cut.segments)
    defines = _defines(u, D, dt_bias, index, steps != length, softplus, cut, save)
    with device_of(u):
        starts = None
        if cut.segments > 1:
            ends = _float32(u, batch, directions, cut.segments, states, channels)
            sums = _float32(u, batch, directions, cut.segments, channels)
            nvrtc.launch(
                "segment_end", defines, grid, _WARP, "8P" + 3 * "qqi" + "6i",
                u, dt, A, B, dt_bias, index, ends, sums, *_strides(u, dt, B),
                directions, blocks, steps, channels, cut.segment_chunks, cut.segments,
            )  # fmt: skip
            starts = _combine(A, ends, sums, reverse=False)
        nvrtc.launch(
            "scan_forward", defines, grid, _WARP, "11P" + 4 * "qqi" + "8i",
            u, dt, A, B, C, D, dt_bias, index, y, kept, starts, *_strides(u, dt, B, C),
            directions, blocks, steps, length, channels, chunks, cut.segment_chunks, cut.segments,
        )  # fmt: skip
    return y, kept


def _carries(dy, dt, A, C, dt_bias, index, steps, defines, grid, cut):
    """What enters each segment from the one behind it; None for whole sequences."""
    if cut.segments == 1:
        return None
    batch, (directions, channels, states) = dy.shape[0], A.shape
    ends = _float32(dy, batch, directions, cut.segments, states, channels)
    decays = _float32(dy, batch, directions, cut.segments, channels)
    nvrtc.launch(
        "segment_carry", defines, grid, _WARP, "8P" + 3 * "qqi" + "6i",
        dy, dt, A, C, dt_bias, index, ends, decays, *_strides(dy, dt, C),
        directions, channels // _WARP, steps, channels, cut.segment_chunks, cut.segments,
    )  # fmt: skip
    return _combine(A, ends, decays, reverse=True)


def scan_backward(dy, u, dt, A, B, C, D, dt_bias, index, length, softplus, states, dBC=None):
    inputs = (u, dt, A, B, C, D, dt_bias)
    dy, u, dt, B, C = (_aligned(x) for x in (dy.to(u.dtype), u, dt, B, C))
    A, D, dt_bias = _parameters(A, D, dt_bias)
    batch, channels, rows = u.shape[0], u.shape[-1], u.shape[-2]
    directions, _, n_states = A.shape
    steps = rows if index is None else index.shape[1]
    chunks = cdiv(steps, CHUNK)
    blocks = channels // _WARP
    cut = _segments(batch * directions * blocks, chunks)
    du, ddt = (scan_major(batch, directions, rows, channels, like=u) for _ in range(2))
    partial_dBC = _float32(u, directions, batch, blocks, rows, 2 * n_states)
    sums = ParameterSums(batch * cut.segments, [A, D, dt_bias], u.device)
    defines = _defines(u, D, dt_bias, index, steps != length, softplus, cut)
    grid = (blocks * batch * directions, cut.segments)
    if u.numel() > 0:
        scratch = _float32(u, grid[0] * grid[1], CHUNK // _GROUP, n_states * _WARP)
        with device_of(u):
            carries = _carries(dy, dt, A, C, dt_bias, index, steps, defines, grid, cut)
            dA, dD, dbias = sums.partial()
            nvrtc.launch(
                "scan_backward", defines, grid, _WARP, "18P" + 5 * "qqi" + "8iq",
                dy, u, dt, A, B, C, D, dt_bias, index, states, carries, scratch,
                du, ddt, dA, partial_dBC, dD, dbias, *_strides(dy, u, dt, B, C),
                directions, blocks, steps, rows, channels, chunks, cut.segment_chunks,
                cut.segments, sums.rows.shape[1],
            )  # fmt: skip
    if dBC is None:
        dBC = torch.empty((batch, directions, rows, 2 * n_states), dtype=u.dtype, device=u.device)
    sum_blocks(partial_dBC, dBC)
    dA, dD, dbias = sums.total()
    if u.dim() == 3:
        du = sum_partials(du.transpose(0, 1), 0, u.dtype)
    gradients = (du, ddt, dA, dBC[..., :n_states], dBC[..., n_states:], dD, dbias)
    return in_dtypes(gradients, inputs)
