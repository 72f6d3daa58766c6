"""Sums of partial results, in one launch and in a fixed order (Triton).

A program sums all rows of a block of columns, a tile of rows and columns at a time, so that many
loads are under way at once.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import Kernel, cdiv, device_of, next_power_of_2, program_3d, wave_size

_OF_A_LANE = 16
"""Elements of a tile that a lane holds."""

_WARPS = 8
"""Warps of a program at most."""

_TILE = _WARPS * 32 * _OF_A_LANE
"""Elements of a tile at most."""

_NARROWEST, _WIDEST = 8, 1024
"""Columns of a tile; the fewest are 32 bytes, what memory hands out at once."""


class _View(NamedTuple):
    """A contiguous tensor as [outer, rows, middle, inner_rows, columns]; both rows are summed."""

    outer: int
    rows: int
    middle: int
    inner_rows: int
    columns: int


@Kernel
@triton.jit
def sum_partials_kernel(
    x, out, rows, middle, inner_rows, columns, BR: tl.constexpr, BC: tl.constexpr
):
    i_c, i_m, i_o = program_3d(tl.cdiv(columns, BC), middle)
    o_c = i_c * BC + tl.arange(0, BC)[None, :]
    m_c = o_c < columns
    p_x = x + (i_o * rows * middle + i_m) * inner_rows * columns + o_c
    b_sum = tl.zeros([BR, BC], tl.float32)
    for i in range(0, rows * inner_rows, BR):
        o_r = (i + tl.arange(0, BR)[:, None]).to(tl.int64)
        m = (o_r < rows * inner_rows) & m_c
        o_r += o_r // inner_rows * (middle - 1) * inner_rows  # past the other middles' rows
        b_sum += tl.load(p_x + o_r * columns, mask=m, other=0.0).to(tl.float32)
    p_out = out + (i_o * middle + i_m) * columns + o_c
    tl.store(p_out, tl.sum(b_sum, axis=0, keep_dims=True), mask=m_c)


def _view(shape: torch.Size, axes: tuple[int, ...]) -> _View:
    first, last = axes[0], axes[-1]
    outer, columns = math.prod(shape[:first]), math.prod(shape[last + 1 :])
    if first == last:
        return _View(outer, shape[first], 1, 1, columns)
    return _View(outer, shape[first], math.prod(shape[first + 1 : last]), shape[last], columns)


def _tile(view: _View, wave: int) -> tuple[int, int]:
    """Returns rows and columns of a tile: as many columns as leave half a wave of programs.

    Where that leaves many, they keep memory busy row by row, with nothing to add up between lanes.
    """
    columns = min(_WIDEST, next_power_of_2(view.columns))
    outputs = view.outer * view.middle
    if outputs * cdiv(view.columns, columns) >= 4 * wave:
        return 1, columns
    while columns > _NARROWEST and outputs * cdiv(view.columns, columns) < wave // 2:
        columns //= 2
    rows = next_power_of_2(max(view.rows * view.inner_rows, 1))
    return min(rows, max(1, _TILE // columns)), columns


def sum_partials(x: Tensor, axes: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Sums a contiguous tensor over one or two axes, in float32.

    Args:
        x: Of any shape and dtype.
        axes: One axis, or two in ascending order.
        dtype: Dtype of the result.
    """
    axes = (axes,) if isinstance(axes, int) else axes
    shape = [size for axis, size in enumerate(x.shape) if axis not in axes]
    out = torch.empty(shape, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    view = _view(x.shape, axes)
    rows, columns = _tile(view, wave_size(x))
    programs = cdiv(view.columns, columns) * view.middle * view.outer
    with device_of(x):
        sum_partials_kernel[(programs,)](
            x, out, *view[1:], BR=rows, BC=columns,
            num_warps=min(_WARPS, max(1, rows * columns // (32 * _OF_A_LANE))),
        )  # fmt: skip
    return out
