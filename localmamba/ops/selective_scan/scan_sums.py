"""What programs of scan.cu add up apart, added up: gradients of parameters, of B and of C."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.partials import sum_partials
from .._common.triton_common import Kernel, cdiv, device_of, program_2d

_ROWS = 32
"""Steps of a program."""


class ParameterSums:
    """Partial sums of parameters' gradients, float32: a row a program, all parameters in it.

    Args:
        rows: Number of rows.
        parameters: The parameters, None for one that is not there.
        device: Where the sums live.
    """

    def __init__(self, rows: int, parameters: list[Tensor | None], device: torch.device) -> None:
        self.shapes = [None if x is None else x.shape for x in parameters]
        self.sizes = [0 if x is None else x.numel() for x in parameters]
        self.rows = torch.empty((rows, sum(self.sizes)), dtype=torch.float32, device=device)

    def _of_each(self, x: Tensor) -> list[Tensor | None]:
        pairs = zip(x.split(self.sizes, dim=-1), self.shapes, strict=True)
        return [None if shape is None else part for part, shape in pairs]

    def partial(self) -> list[Tensor | None]:
        """Where each parameter's sums lie."""
        return self._of_each(self.rows)

    def total(self) -> list[Tensor | None]:
        """The gradients."""
        sums = self._of_each(sum_partials(self.rows, 0, torch.float32))
        pairs = zip(sums, self.shapes, strict=True)
        return [None if x is None else x.view(shape) for x, shape in pairs]


@Kernel
@triton.jit
def sum_blocks_kernel(
    x, out, out_k, out_b, out_t, batch, blocks, rows, WIDTH: tl.constexpr, BT: tl.constexpr
):
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
    """Adds up, over blocks of channels, [K, B, blocks, T, M] into [B, K, T, M] of any strides."""
    directions, batch, blocks, rows, width = x.shape
    if out.numel() > 0:
        with device_of(x):
            sum_blocks_kernel[(cdiv(rows, _ROWS) * directions * batch,)](
                x, out, out.stride(1), out.stride(0), out.stride(2), batch, blocks, rows,
                WIDTH=width, BT=_ROWS, num_warps=2,
            )  # fmt: skip
