"""Sums of partial results, in one pass and in a fixed order (Triton)."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import device_of, program_of_two

_BLOCK = 1024


@triton.jit
def sum_partials_kernel(x, out, parts, inner, BLOCK: tl.constexpr):
    i_block, i_outer = program_of_two(tl.cdiv(inner, BLOCK))
    o = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < inner
    p_x = x + i_outer * parts * inner + o
    b_sum = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        b_sum += tl.load(p_x, mask=m, other=0.0).to(tl.float32)
        p_x += inner
    tl.store(out + i_outer * inner + o, b_sum, mask=m)


def sum_partials(x: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    """Sums a contiguous tensor over one axis in float32 and stores the sums in a dtype."""
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    out = torch.empty(shape, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    outer = math.prod(shape[:axis])
    inner = out.numel() // outer
    with device_of(x):
        sum_partials_kernel[(triton.cdiv(inner, _BLOCK) * outer,)](
            x, out, x.shape[axis], inner, BLOCK=_BLOCK, num_warps=4
        )
    return out
