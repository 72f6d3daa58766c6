"""A block's S6 branches as one op: convolution, projections and scan of all directions.

The parts are `causal_conv` and `selective_scan` with two batched matrix products between them. As
one op they keep for the backward pass only the tokens, the small projected parameters and the
states at chunk boundaries; the convolution's output and the step sizes, the two largest arrays, are
made again.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import backend, states_shape
from .checks import check_shape, check_together
from .registration import (
    contiguous,
    define_op,
    empty_gradients,
    in_dtypes,
    register_autocast,
    restore,
)

ALIGN = 8
"""The factor of dt is padded to this many columns, so that rows of half precision start at 16
bytes: matrix units and the scan kernels read them whole."""


def _padded_rank(rank: int, device: torch.device) -> int:
    """Columns of the factor of dt: padded on a GPU, as they are elsewhere."""
    return (rank + ALIGN - 1) // ALIGN * ALIGN if device.type == "cuda" else rank


def _aligned_weights(
    x_proj: Tensor, dt_weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x_proj as [K, M, D] and dt_weight as [K, D, R'] in a dtype, with M = R' + 2N."""
    rank = dt_weight.shape[2]
    pad = _padded_rank(rank, x_proj.device) - rank
    x_proj, dt_weight = x_proj.to(dtype), dt_weight.to(dtype)
    if pad == 0:
        return x_proj, dt_weight
    zeros = x_proj.new_zeros(x_proj.shape[0], pad, x_proj.shape[2])
    x_proj = torch.cat((x_proj[:, :rank], zeros, x_proj[:, rank:]), dim=1)
    return x_proj, F.pad(dt_weight, (0, pad))


def _project(u: Tensor, x_proj: Tensor) -> Tensor:
    """Step sizes' factor, B and C of every token and direction: [B, K, T, M]."""
    batch, directions, steps = u.shape[0], x_proj.shape[0], u.shape[-2]
    if u.dim() == 3:
        params = u.reshape(batch * steps, u.shape[-1]) @ x_proj.flatten(0, 1).t()
        return params.view(batch, steps, directions, x_proj.shape[1]).transpose(1, 2)
    rows = u.transpose(0, 1).reshape(directions, batch * steps, u.shape[-1])
    return torch.bmm(rows, x_proj.transpose(1, 2)).unflatten(1, (batch, steps)).transpose(0, 1)


def _per_direction(x: Tensor) -> Tensor:
    """[B, K, T, *] -> [K, B * T, *], the operand of a batched product over directions."""
    return x.transpose(0, 1).flatten(1, 2)


def _step_sizes(params: Tensor, dt_weight: Tensor) -> Tensor:
    """dt before bias and softplus, [B, K, T, D]."""
    factor = _per_direction(params[..., : dt_weight.shape[2]])
    dt = torch.bmm(factor, dt_weight.transpose(1, 2))
    return dt.unflatten(1, (params.shape[0], params.shape[2])).transpose(0, 1)


def _scan_parameters(params: Tensor, dt_weight: Tensor, states: int) -> tuple[Tensor, ...]:
    """dt, B and C of every step and direction."""
    B, C = params[..., -2 * states : -states], params[..., -states:]
    return _step_sizes(params, dt_weight), B, C


@define_op(
    "s6_branches(Tensor x, Tensor? conv_weight, Tensor? conv_bias, Tensor x_proj, "
    "Tensor dt_weight, Tensor dt_bias, Tensor A, Tensor D, Tensor index, bool save) "
    "-> (Tensor, Tensor, Tensor)"
)
def _branches(x, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, index, save):
    kernels = backend(x)
    u = x if conv_weight is None else kernels.conv_forward(x, conv_weight, conv_bias, index)
    x_proj, dt_weight = _aligned_weights(x_proj, dt_weight, u.dtype)
    params = _project(u, x_proj)
    dt, B, C = _scan_parameters(params, dt_weight, A.shape[2])
    y, kept = kernels.scan_forward(u, dt, A, B, C, D, None, dt_bias, index, x.shape[1], True, save)
    return y, params, kept


@_branches.register_fake
def _(x, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, index, save):
    batch, length, channels = x.shape
    directions, width = x_proj.shape[0], _padded_rank(dt_weight.shape[2], x.device) + 2 * A.shape[2]
    y = x.new_empty((batch, directions, length, channels))
    if conv_weight is None:
        params = x.new_empty((batch, length, directions, width)).transpose(1, 2)
    else:
        params = x.new_empty((directions, batch, index.shape[1], width)).transpose(0, 1)
    kept = x.new_empty(states_shape(x, A, index.shape[1], save), dtype=torch.float32)
    return y, params, kept


@define_op(
    "s6_branches_backward(Tensor dy, Tensor x, Tensor? conv_weight, Tensor? conv_bias, "
    "Tensor x_proj, Tensor dt_weight, Tensor dt_bias, Tensor A, Tensor D, Tensor index, "
    "Tensor params, Tensor kept) -> Tensor[]"
)
def _branches_backward(
    dy, x, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, index, params, kept
):
    kernels = backend(x)
    x_proj_weight, dt_proj_weight = _aligned_weights(x_proj, dt_weight, x.dtype)
    rank, padded = dt_weight.shape[2], dt_proj_weight.shape[2]
    u = x if conv_weight is None else kernels.conv_forward(x, conv_weight, conv_bias, index)
    dt, B, C = _scan_parameters(params, dt_proj_weight, A.shape[2])
    du, ddt, dA, dB, dC, dD, _, ddt_bias = kernels.scan_backward(
        dy, u, dt, A, B, C, D, None, dt_bias, index, x.shape[1], True, kept
    )
    ddt = _per_direction(ddt)
    ddt_weight = torch.bmm(ddt.transpose(1, 2), _per_direction(params[..., :padded]))[..., :rank]
    dfactor = torch.bmm(ddt, dt_proj_weight)
    dparams = torch.cat((dfactor, _per_direction(dB), _per_direction(dC)), dim=-1)  # [K, B * T, M]
    if conv_weight is None:
        tokens = dparams.transpose(0, 1).flatten(1)  # [B * L, K * M]
        flat = u.reshape(tokens.shape[0], u.shape[-1])
        dx_proj = (tokens.t() @ flat).view_as(x_proj_weight)
        dx = torch.addmm(du.reshape_as(flat), tokens, x_proj_weight.flatten(0, 1)).view_as(x)
        dconv_weight = dconv_bias = None
    else:
        dx_proj = torch.bmm(dparams.transpose(1, 2), _per_direction(u))
        du = torch.baddbmm(_per_direction(du), dparams, x_proj_weight)
        du = du.unflatten(1, (u.shape[0], u.shape[2])).transpose(0, 1)
        dx, dconv_weight, dconv_bias = kernels.conv_backward(du, x, conv_weight, conv_bias, index)
    dx_proj = torch.cat((dx_proj[:, :rank], dx_proj[:, padded:]), dim=1)
    gradients = (dx, dconv_weight, dconv_bias, dx_proj, ddt_weight, ddt_bias, dA, dD)
    inputs = (x, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D)
    return contiguous(in_dtypes(gradients, inputs))


@_branches_backward.register_fake
def _(dy, x, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, index, params, kept):
    return empty_gradients((x, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D))


def _setup_context(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dparams, dkept):
    *inputs, index, params, kept = ctx.saved_tensors
    if dy is None:
        return (None,) * 10
    gradients = _branches_backward(dy, *inputs, index, params, kept)
    return (*restore(gradients, inputs), None, None)


_branches.register_autograd(_backward, setup_context=_setup_context)
register_autocast(_branches, activations=(0,))


def s6_branches(
    x: Tensor,
    x_proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    index: Tensor,
    conv_weight: Optional[Tensor] = None,  # noqa: UP045 - TorchScript reads these
    conv_bias: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    """Runs tokens through K S6 branches, each along its own scan order with its own parameters.

    Args:
        x: Tokens in grid order, [B, L, D].
        x_proj: Makes the factor of dt, B and C from a token, [K, R + 2N, D].
        dt_weight: Makes dt from its factor, [K, D, R].
        dt_bias: Added to dt before softplus, [K, D].
        A: State matrix, negative, [K, D, N].
        D: Skip weights, [K, D].
        index: Scan orders from `scan_index`, int32 [K, P].
        conv_weight: With it, tokens first pass `causal_conv` along each order, [K, D, W].
        conv_bias: [K, D], with `conv_weight`.

    Returns:
        Output of each branch, in grid order, [B, K, L, D], in the dtype of x.

    Raises:
        ValueError: If shapes do not fit, or one of `conv_weight` and `conv_bias` is given alone.
    """
    if A.dim() != 3:
        raise ValueError(f"A must be [K, D, N], got {A.dim()} axes")
    directions, channels, states = A.shape
    rows = [directions, channels]
    if dt_weight.dim() != 3 or list(dt_weight.shape[:2]) != rows:
        raise ValueError(
            f"dt_weight must be [{directions}, {channels}, R], got {list(dt_weight.shape)}"
        )
    rank = dt_weight.shape[2]
    if x.dim() != 3 or x.shape[2] != channels:
        raise ValueError(f"x must be [B, L, {channels}], got {list(x.shape)}")
    check_shape("x_proj", x_proj, [directions, rank + 2 * states, channels])
    check_shape("dt_bias", dt_bias, rows)
    check_shape("D", D, rows)
    if index.dim() != 2 or index.shape[0] != directions:
        raise ValueError(f"index must be [{directions}, P], got {list(index.shape)}")
    check_together("conv_weight", conv_weight, "conv_bias", conv_bias)
    if conv_weight is not None:  # noqa: SIM102 - TorchScript narrows no type inside `and`
        if conv_weight.dim() != 3 or list(conv_weight.shape[:2]) != rows:
            raise ValueError(
                f"conv_weight must be [{directions}, {channels}, W], got {list(conv_weight.shape)}"
            )
    check_shape("conv_bias", conv_bias, rows)
    save = torch.is_grad_enabled()
    return torch.ops.localmamba.s6_branches(
        x, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, index, save
    )[0]
