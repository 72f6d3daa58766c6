"""A block's S6 branches as one op: convolution, projections and scan of all directions.

The parts are `causal_conv` and `selective_scan` with two batched matrix products between them. As
one op they keep for the backward pass only the tokens, the small projected parameters and the
states at chunk boundaries; the convolution's output and the step sizes, the two largest arrays, are
made again.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from .._common.checks import check_index, check_shape, check_together
from .._common.registration import (
    Op,
    cast_activations,
    contiguous,
    empty_gradients,
    in_dtypes,
    present_gradients,
    restore,
)
from ..causal_conv.op import kernels as conv_kernels
from . import reference
from .op import kernels as scan_kernels
from .op import states_shape

ALIGN = 8
"""Elements of half precision in the 16 bytes that matrix units and the scan kernels read whole."""


def aligned_rank(rank: int, x: Tensor) -> int:
    """Columns that the factor of dt takes in the kernels that serve x."""
    return -(-rank // ALIGN) * ALIGN if x.is_cuda and x.dtype != torch.float64 else rank


_TOKENS = 2048
"""Tokens of a part of a sum over all of them, at least."""


def _project(u: Tensor, x_proj: Tensor) -> Tensor:
    """Step sizes' factor, B and C of every token and direction: [B, K, T, M]."""
    batch, directions, steps = u.shape[0], x_proj.shape[0], u.shape[-2]
    if u.dim() == 3:
        params = u.reshape(batch * steps, u.shape[-1]) @ x_proj.flatten(0, 1).t()
        return params.view(batch, steps, directions, x_proj.shape[1]).transpose(1, 2)
    rows = u.transpose(0, 1).reshape(directions, batch * steps, u.shape[-1])
    return torch.bmm(rows, x_proj.transpose(1, 2)).unflatten(1, (batch, steps)).transpose(0, 1)


def _empty_params(x: Tensor, conv_weight: Tensor | None, index: Tensor, width: int) -> Tensor:
    """An array like that of `_project`, in memory too."""
    batch, length, _ = x.shape
    directions, steps = index.shape
    if conv_weight is None:
        return x.new_empty((batch, length, directions, width)).transpose(1, 2)
    return x.new_empty((directions, batch, steps, width)).transpose(0, 1)


def _per_direction(x: Tensor) -> Tensor:
    """[B, K, T, *] -> [K, B * T, *], the operand of a batched product over directions."""
    return x.transpose(0, 1).flatten(1, 2)


def _scan_parameters(params: Tensor, dt_weight: Tensor, states: int) -> tuple[Tensor, ...]:
    """dt before bias and softplus, B and C, of every step and direction."""
    dt = torch.bmm(_per_direction(params[..., : dt_weight.shape[2]]), dt_weight.transpose(1, 2))
    dt = dt.unflatten(1, (params.shape[0], params.shape[2])).transpose(0, 1)
    return dt, params[..., -2 * states : -states], params[..., -states:]


def _over_tokens(rows: Tensor, columns: Tensor, batch: int) -> Tensor:
    """[K, B * T, X] and [K, B * T, Y] to their product over B * T, [K, X, Y].

    Matrix libraries share few, very long sums badly among a GPU's multiprocessors: there they are
    cut into parts of whole images, in float32.
    """
    directions, tokens = rows.shape[:2]
    if not rows.is_cuda or rows.dtype not in (torch.bfloat16, torch.float16):
        return torch.bmm(rows.transpose(1, 2), columns)
    parts = next(n for n in range(max(tokens // _TOKENS, 1), 0, -1) if batch % n == 0)
    rows, columns = (
        x.contiguous().view(directions * parts, tokens // parts, x.shape[2])
        for x in (rows, columns)
    )
    sums = torch.bmm(rows.transpose(1, 2), columns, out_dtype=torch.float32)
    return sums.unflatten(0, (directions, parts)).sum(1)


def _forward(x, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, index, save):
    kernels = scan_kernels(x)
    u = x if conv_weight is None else conv_kernels(x).forward(x, conv_weight, conv_bias, index)
    x_proj, dt_weight = kernels.align_weights(x_proj, dt_weight, u.dtype)
    params = _project(u, x_proj)
    dt, B, C = _scan_parameters(params, dt_weight, A.shape[2])
    y, kept = kernels.scan_forward(u, dt, A, B, C, D, None, dt_bias, index, x.shape[1], True, save)
    return y, params, kept


def _fake(x, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, index, save):
    batch, length, channels = x.shape
    directions, width = x_proj.shape[0], aligned_rank(dt_weight.shape[2], x) + 2 * A.shape[2]
    y = x.new_empty((batch, directions, length, channels))
    params = _empty_params(x, conv_weight, index, width)
    kept = x.new_empty(states_shape(x, A, index.shape[1], save), dtype=torch.float32)
    return y, params, kept


def _backward(dy, x, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, index, params, kept):
    kernels = scan_kernels(x)
    x_proj_weight, dt_proj_weight = kernels.align_weights(x_proj, dt_weight, x.dtype)
    rank, padded = dt_weight.shape[2], dt_proj_weight.shape[2]
    u = x if conv_weight is None else conv_kernels(x).forward(x, conv_weight, conv_bias, index)
    dt, B, C = _scan_parameters(params, dt_proj_weight, A.shape[2])
    # Gradients of the parameters are written side by side, where the products after read them.
    dparams = _empty_params(x, conv_weight, index, params.shape[3])
    du, ddt, dA, _, _, dD, _, ddt_bias = kernels.scan_backward(
        dy, u, dt, A, B, C, D, None, dt_bias, index, x.shape[1], True, kept, dparams[..., padded:]
    )
    ddt, factor = _per_direction(ddt), _per_direction(params[..., :padded])
    ddt_weight = _over_tokens(ddt, factor, x.shape[0])[..., :rank]
    torch.bmm(ddt, dt_proj_weight, out=_per_direction(dparams[..., :padded]))
    if conv_weight is None:
        tokens = dparams.transpose(1, 2).flatten(2).flatten(0, 1)  # [B * L, K * M]
        flat = u.reshape(tokens.shape[0], u.shape[-1])
        dx_proj = (tokens.t() @ flat).view_as(x_proj_weight)
        dx = du.view_as(flat).addmm_(tokens, x_proj_weight.flatten(0, 1)).view_as(x)
        dconv_weight = dconv_bias = None
    else:
        dparams, du = _per_direction(dparams), _per_direction(du)
        dx_proj = _over_tokens(dparams, _per_direction(u), x.shape[0])
        du = du.baddbmm_(dparams, x_proj_weight)
        du = du.unflatten(1, (u.shape[0], u.shape[2])).transpose(0, 1)
        dx, dconv_weight, dconv_bias = conv_kernels(x).backward(
            du, x, conv_weight, conv_bias, index
        )
    dx_proj = torch.cat((dx_proj[:, :rank], dx_proj[:, padded:]), dim=1)
    gradients = (dx, dconv_weight, dconv_bias, dx_proj, ddt_weight, ddt_bias, dA, dD)
    inputs = (x, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D)
    return contiguous(in_dtypes(gradients, inputs))


def _backward_fake(
    dy, x, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, index, params, kept
):
    return empty_gradients((x, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D))


_TENSORS = (
    "Tensor x, Tensor? conv_weight, Tensor? conv_bias, Tensor x_proj, Tensor dt_weight, "
    "Tensor dt_bias, Tensor A, Tensor D, Tensor index"
)


def _reference(*args):
    """Computes what `_forward` does; params and states are for `_backward` alone."""
    *inputs, _ = args
    y = reference.s6_branches_reference(*inputs)
    _, params, kept = _fake(*args)
    return y, params.zero_(), kept.zero_()


_branches = Op(
    f"s6_branches({_TENSORS}, bool save) -> (Tensor, Tensor, Tensor)",
    kernel=_forward,
    fake=_fake,
    reference=_reference,
)
_branches_backward = Op(
    f"s6_branches_backward(Tensor dy, {_TENSORS}, Tensor params, Tensor kept) -> Tensor[]",
    kernel=_backward,
    fake=_backward_fake,
    reference=present_gradients(reference.s6_branches_backward),
    dispatch_on=1,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dy: Tensor | None, dparams: Tensor | None, dkept: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, index, params, kept = ctx.saved_tensors
    if dy is None:
        return (None,) * 10
    gradients = _branches_backward(dy, *inputs, index, params, kept)
    return (*restore(gradients, inputs), None, None)


_branches.register_autograd(_gradients, _setup_context)
_branches_backward.register_second_derivative()
_branches.register_autocast(cast_activations([0]))


def _flops(x, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, index, save):
    directions, steps = index
    _, channels, states = A
    taps = conv_weight[2] if conv_weight else 0
    projected = steps if taps else x[1]  # in grid order padding is not projected
    inputs = channels * taps + x_proj[1] * channels + channels * dt_weight[2]
    scan = channels * (5 * states + 2)
    return 2 * x[0] * directions * (projected * inputs + steps * scan)


_branches.register_flops(_flops)


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
    check_index(index, x.shape[1])
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
