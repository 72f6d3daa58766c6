"""GPU kernels of the scan: CUDA C++ for the common case, Triton for every other input."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.triton_common import Kernel, cdiv, device_of
from . import triton_scan, warp_scan
from .branches import aligned_rank
from .reference import ScanInputs


def scan_forward(inputs: ScanInputs, save: bool) -> tuple[Tensor, Tensor]:
    if warp_scan.serves(inputs):
        return warp_scan.scan_forward(inputs, save)
    return triton_scan.scan_forward(inputs, save)


def scan_backward(
    dy: Tensor, inputs: ScanInputs, states: Tensor, dBC: Tensor | None = None
) -> list[Tensor | None]:
    if states.shape[2] == 0:  # the forward pass was told not to keep any
        _, states = scan_forward(inputs, save=True)
    if warp_scan.serves(inputs):
        return warp_scan.scan_backward(dy, inputs, states, dBC)
    return triton_scan.scan_backward(dy, inputs, states, dBC)


_BLOCK = 1024


@Kernel
@triton.jit
def align_kernel(
    x_proj, dt_weight, x_out, dt_out, x_size, dt_size, rank, columns, width, channels,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Inserts zeros as rows `rank` to `columns` of x_proj and as these columns of dt_weight."""
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
    columns = aligned_rank(rank)
    width += columns - rank
    x_out = torch.empty((directions, width, channels), dtype=dtype, device=x_proj.device)
    dt_out = torch.empty((directions, channels, columns), dtype=dtype, device=x_proj.device)
    with device_of(x_proj):
        align_kernel[(cdiv(max(x_out.numel(), dt_out.numel()), _BLOCK),)](
            x_proj, dt_weight, x_out, dt_out, x_out.numel(), dt_out.numel(),
            rank, columns, width, channels, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return x_out, dt_out
