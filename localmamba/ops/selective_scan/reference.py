"""The selective scan and the S6 branches in differentiable PyTorch: the truth of their kernels."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common.registration import vjp
from .._common.tokens import accumulation_dtype, gather_tokens, scatter_tokens
from ..causal_conv.reference import causal_conv_reference


class ScanInputs(NamedTuple):
    """The checked arguments of `selective_scan`, as every backend takes them."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    index: Tensor | None  # type: ignore[assignment] # shadows tuple.index
    length: int
    softplus: bool

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The inputs that have gradients."""
        return self[:8]

    @property
    def grid_order(self) -> bool:
        """Whether u, dt, B and C stand in grid order."""
        return self.u.dim() == 3

    @property
    def steps(self) -> int:
        """Steps of a sequence, P."""
        return self.u.shape[-2] if self.index is None else self.index.shape[1]


def selective_scan_reference(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    index: Tensor | None = None,
    length: int | None = None,
    softplus: bool = True,
) -> Tensor:
    """Computes `ops.selective_scan` step by step, of any floating dtype."""
    dtype, out_dtype = accumulation_dtype(u.dtype), u.dtype
    grid_order = u.dim() == 3
    if length is None:
        length = u.shape[-2]
    u, dt, A, B, C = (x.to(dtype) for x in (u, dt, A, B, C))
    if grid_order:
        assert index is not None
        u, dt, B, C = (gather_tokens(x, index) for x in (u, dt, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)[:, None]
    if softplus:
        dt = F.softplus(dt)
    h = u.new_zeros(*u.shape[:2], u.shape[3], A.shape[2])  # [B, K, D, N]
    outputs = []
    for t in range(u.shape[2]):
        decay = torch.exp(dt[:, :, t, :, None] * A)
        h = decay * h + (dt[:, :, t] * u[:, :, t])[..., None] * B[:, :, t, None]
        outputs.append((h * C[:, :, t, None]).sum(-1))
    y = torch.stack(outputs, 2)  # [B, K, P, D]
    if D is not None:
        y = y + D.to(dtype)[:, None] * u
    if index is not None:
        y = scatter_tokens(y, index, length)
    if z is not None:
        y = y * F.silu(z.to(dtype))[:, None]
    return y.to(out_dtype)


def scan_forward(inputs: ScanInputs, save: bool) -> tuple[Tensor, Tensor]:
    """Computes y, and no states: `scan_backward` computes its own."""
    del save
    shape = (inputs.u.shape[0], inputs.A.shape[0], 0)
    states = inputs.A.new_empty(shape, dtype=torch.float32)
    return selective_scan_reference(*inputs).contiguous(), states


def scan_backward(
    dy: Tensor, inputs: ScanInputs, states: Tensor, dBC: Tensor | None = None
) -> list[Tensor | None]:
    del states

    def scan(*tensors: Any) -> Tensor:
        arguments: tuple[Any, ...] = (*tensors, *inputs[8:])
        return selective_scan_reference(*arguments)

    gradients = vjp(scan, inputs.tensors, dy)
    gradients[3], gradients[4] = side_by_side(gradients[3], gradients[4], dBC)
    return gradients


def side_by_side(
    dB: Tensor | None, dC: Tensor | None, dBC: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Copies dB and dC into the columns of `dBC`, if that is given."""
    if dBC is None or dB is None or dC is None:
        return dB, dC
    states = dB.shape[-1]
    return dBC[..., :states].copy_(dB), dBC[..., states:].copy_(dC)


def s6_branches_reference(
    x: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    index: Tensor,
) -> Tensor:
    """Computes `ops.s6_branches`, of any floating dtype."""
    dtype = accumulation_dtype(x.dtype)
    u = x.to(dtype)
    if conv_weight is not None and conv_bias is not None:
        u = causal_conv_reference(u, conv_weight, conv_bias, index)
    rank, states = dt_weight.shape[2], A.shape[2]
    tokens = u[:, None] if u.dim() == 3 else u
    params = tokens @ x_proj.to(dtype).transpose(1, 2)
    factor, B, C = params.split([rank, states, states], dim=-1)
    dt = factor @ dt_weight.to(dtype).transpose(1, 2)
    y = selective_scan_reference(u, dt, A, B, C, D, None, dt_bias, index, x.shape[1])
    return y.to(x.dtype)


def s6_branches_backward(dy: Tensor, *args: Any) -> list[Tensor | None]:
    """Computes the gradients of the eight inputs before `index`."""

    def branches(*tensors: Any) -> Tensor:
        arguments: tuple[Any, ...] = (*tensors, args[8])
        return s6_branches_reference(*arguments)

    return vjp(branches, args[:8], dy)


def align_weights(x_proj: Tensor, dt_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Casts the projections; no padding is wanted."""
    return x_proj.to(dtype), dt_weight.to(dtype)
