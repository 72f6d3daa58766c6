"""The branches' projections in a dtype, with rows that matrix units read whole (Triton)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.triton_common import Kernel, cdiv, device_of
from .branches import ALIGN

_BLOCK = 1024


@Kernel
@triton.jit
def align_kernel(
    x_proj, dt_weight, x_out, dt_out, x_size, dt_size, rank, columns, width, channels,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows `rank` to `columns` of x_proj and the same columns of dt_weight become zeros."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_k, i_m, o_d = o // (width * channels), o // channels % width, o % channels
    row = i_k * (width - columns + rank) + tl.where(i_m < rank, i_m, i_m - columns + rank)
    there = (i_m < rank) | (i_m >= columns)
    b_x = tl.load(x_proj + row * channels + o_d, mask=(o < x_size) & there, other=0.0)
    tl.store(x_out + o, b_x, mask=o < x_size)
    o_r = o % columns
    b_dt = tl.load(
        dt_weight + o // columns * rank + o_r, mask=(o < dt_size) & (o_r < rank), other=0.0
    )
    tl.store(dt_out + o, b_dt, mask=o < dt_size)


def align_weights(x_proj: Tensor, dt_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x_proj, dt_weight = x_proj.contiguous(), dt_weight.contiguous()
    directions, width, channels = x_proj.shape
    rank = dt_weight.shape[2]
    columns = -(-rank // ALIGN) * ALIGN
    width += columns - rank
    x_out = torch.empty((directions, width, channels), dtype=dtype, device=x_proj.device)
    dt_out = torch.empty((directions, channels, columns), dtype=dtype, device=x_proj.device)
    with device_of(x_proj):
        align_kernel[(cdiv(max(x_out.numel(), dt_out.numel()), _BLOCK),)](
            x_proj, dt_weight, x_out, dt_out, x_out.numel(), dt_out.numel(),
            rank, columns, width, channels, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return x_out, dt_out
