"""The selective scan and the S6 branches in differentiable PyTorch: the truth of their kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common.registration import vjp
from .._common.tokens import accumulation_dtype, gather_tokens, scatter_tokens
from ..causal_conv.reference import causal_conv_reference


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
    dtype = accumulation_dtype(u.dtype)
    out_dtype = u.dtype
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
    params = torch.einsum("bktd,kmd->bktm", tokens.expand(-1, len(index), -1, -1), x_proj.to(dtype))
    factor, B, C = params.split([rank, states, states], dim=-1)
    dt = torch.einsum("bktr,kdr->bktd", factor, dt_weight.to(dtype))
    y = selective_scan_reference(u, dt, A, B, C, D, None, dt_bias, index, x.shape[1])
    return y.to(x.dtype)


def scan_forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    index: Tensor | None,
    length: int,
    softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Computes y, and no states: `scan_backward` computes its own."""
    del save
    y = selective_scan_reference(u, dt, A, B, C, D, z, dt_bias, index, length, softplus)
    states = A.new_empty((u.shape[0], A.shape[0], 0, A.shape[2], A.shape[1]), dtype=torch.float32)
    return y.contiguous(), states


def scan_backward(
    dy: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    index: Tensor | None,
    length: int,
    softplus: bool,
    states: Tensor,
    dBC: Tensor | None = None,
) -> list[Tensor | None]:
    """Computes the gradients of u, dt, A, B, C, D, z and dt_bias."""
    del states

    def scan(*inputs: Tensor) -> Tensor:
        return selective_scan_reference(*inputs, index, length, softplus)

    gradients = vjp(scan, (u, dt, A, B, C, D, z, dt_bias), dy)
    gradients[3], gradients[4] = side_by_side(gradients[3], gradients[4], dBC)
    return gradients


def side_by_side(
    dB: Tensor | None, dC: Tensor | None, dBC: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Copies dB and dC into `dBC`, if that is given."""
    if dBC is None or dB is None or dC is None:
        return dB, dC
    states = dB.shape[-1]
    return dBC[..., :states].copy_(dB), dBC[..., states:].copy_(dC)


def s6_branches_backward(dy: Tensor, *args: Tensor) -> list[Tensor | None]:
    """Computes the gradients of the eight inputs before `index`."""
    *inputs, index = args[:9]
    return vjp(lambda *inputs: s6_branches_reference(*inputs, index), inputs, dy)


def align_weights(x_proj: Tensor, dt_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Casts the weights; no alignment is wanted."""
    return x_proj.to(dtype), dt_weight.to(dtype)
