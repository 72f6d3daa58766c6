"""A block's S6 branches as one op: convolution, projections and scan of all directions.

The parts are `causal_conv` and `selective_scan` with two batched matrix products between them. As
one op they keep for the backward pass only the tokens, the small projected parameters and the
states at chunk boundaries; the convolution's output and the step sizes, the two largest arrays, are
recomputed.
"""

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from .._common.checks import check_index, check_shape, check_together
from .._common.registration import Op, cast_activations, in_dtypes
from ..causal_conv.op import kernels as conv_kernels
from . import reference
from .op import kernels as scan_kernels
from .op import scan_multiply_adds, states_shape
from .reference import ScanInputs


class BranchInputs(NamedTuple):
    """The checked arguments of `s6_branches`, in the order of the op."""

    x: Tensor
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    index: Tensor  # type: ignore[assignment] # shadows tuple.index


_ALIGN = 8
"""Elements of half precision in the 16 bytes that matrix units and the scan kernels load whole."""

_MIN_TOKENS = 2048
"""Fewest tokens of a part of a sum over all of them."""


def aligned_rank(rank: int) -> int:
    """Returns R rounded up to whole aligned loads."""
    return -(-rank // _ALIGN) * _ALIGN


def _project(u: Tensor, x_proj: Tensor) -> Tensor:
    """Returns the factor of dt, B and C of every token and direction, [B, K, T, M]."""
    batch, directions, steps = u.shape[0], x_proj.shape[0], u.shape[-2]
    if u.dim() == 3:
        params = u.reshape(batch * steps, u.shape[-1]) @ x_proj.flatten(0, 1).t()
        return params.view(batch, steps, directions, x_proj.shape[1]).transpose(1, 2)
    rows = u.transpose(0, 1).reshape(directions, batch * steps, u.shape[-1])
    return torch.bmm(rows, x_proj.transpose(1, 2)).unflatten(1, (batch, steps)).transpose(0, 1)


def _empty_params(inputs: BranchInputs, width: int) -> Tensor:
    """Allocates [B, K, T, M] with the strides of `_project`."""
    (batch, length, _), (directions, steps) = inputs.x.shape, inputs.index.shape
    if inputs.conv_weight is None:
        return inputs.x.new_empty((batch, length, directions, width)).transpose(1, 2)
    return inputs.x.new_empty((directions, batch, steps, width)).transpose(0, 1)


def _per_direction(x: Tensor) -> Tensor:
    """[B, K, T, *] -> [K, B * T, *], the operand of a batched product over directions."""
    return x.transpose(0, 1).flatten(1, 2)


def _convolve(inputs: BranchInputs) -> Tensor:
    """Returns what the branches project and scan: x, or its convolution along each order."""
    x, weight, bias, *_ = inputs
    if weight is None or bias is None:
        return x
    return conv_kernels(x).forward(x, weight, bias, inputs.index)


def _scan_inputs(inputs: BranchInputs, u: Tensor, params: Tensor, dt_weight: Tensor) -> ScanInputs:
    states = inputs.A.shape[2]
    dt = torch.bmm(_per_direction(params[..., : dt_weight.shape[2]]), dt_weight.transpose(1, 2))
    dt = dt.unflatten(1, (params.shape[0], params.shape[2])).transpose(0, 1)
    B, C = params[..., -2 * states : -states], params[..., -states:]
    A, D, dt_bias, length = inputs.A, inputs.D, inputs.dt_bias, inputs.x.shape[1]
    return ScanInputs(u, dt, A, B, C, D, None, dt_bias, inputs.index, length, True)


def _over_tokens(rows: Tensor, columns: Tensor, batch: int) -> Tensor:
    """[K, B * T, X] and [K, B * T, Y] to their product over B * T, [K, X, Y].

    Matrix libraries share few, very long sums badly among a GPU's SMs: in half precision they are
    cut into parts of whole images, added in float32.
    """
    directions, tokens = rows.shape[:2]
    if not rows.is_cuda or rows.dtype not in (torch.bfloat16, torch.float16):
        return torch.bmm(rows.transpose(1, 2), columns)
    parts = next(n for n in range(max(tokens // _MIN_TOKENS, 1), 0, -1) if batch % n == 0)
    rows, columns = (
        x.contiguous().view(directions * parts, tokens // parts, x.shape[2])
        for x in (rows, columns)
    )
    sums = torch.bmm(rows.transpose(1, 2), columns, out_dtype=torch.float32)
    return sums.unflatten(0, (directions, parts)).sum(1)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, save = BranchInputs(*args[:-1]), args[-1]
    kernels = scan_kernels(inputs.x)
    u = _convolve(inputs)
    x_proj, dt_weight = kernels.align_weights(inputs.x_proj, inputs.dt_weight, u.dtype)
    params = _project(u, x_proj)
    y, states = kernels.scan_forward(_scan_inputs(inputs, u, params, dt_weight), save)
    return y, params, states


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, save = BranchInputs(*args[:-1]), args[-1]
    x, A, rank = inputs.x, inputs.A, inputs.dt_weight.shape[2]
    y = x.new_empty((x.shape[0], A.shape[0], x.shape[1], x.shape[2]))
    if x.is_cuda and x.dtype != torch.float64:
        rank = aligned_rank(rank)
    shape = states_shape(x, A, inputs.index.shape[1], save)
    params = _empty_params(inputs, rank + 2 * A.shape[2])
    return y, params, x.new_empty(shape, dtype=torch.float32)


def _reference(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Computes y; params and states serve `_backward` alone."""
    y = reference.s6_branches_reference(*args[:-1])
    _, params, states = _fake(*args)
    return y, params.zero_(), states.zero_()


def _backward(dy: Tensor, params: Tensor, states: Tensor, *args: Any) -> list[Tensor | None]:
    inputs = BranchInputs(*args[:-1])
    x, rank = inputs.x, inputs.dt_weight.shape[2]
    kernels = scan_kernels(x)
    x_proj, dt_weight = kernels.align_weights(inputs.x_proj, inputs.dt_weight, x.dtype)
    padded = dt_weight.shape[2]
    u = _convolve(inputs)
    scan_inputs = _scan_inputs(inputs, u, params, dt_weight)
    # Gradients of the parameters are written side by side, where the products after read them.
    dparams = _empty_params(inputs, params.shape[3])
    du, ddt, dA, _, _, dD, _, ddt_bias = kernels.scan_backward(
        dy, scan_inputs, states, dparams[..., padded:]
    )
    assert du is not None
    assert ddt is not None
    ddt, factor = _per_direction(ddt), _per_direction(params[..., :padded])
    ddt_weight = _over_tokens(ddt, factor, x.shape[0])[..., :rank]
    torch.bmm(ddt, dt_weight, out=_per_direction(dparams[..., :padded]))
    dx: Tensor | None
    dconv_weight = dconv_bias = None
    if inputs.conv_weight is None or inputs.conv_bias is None:
        tokens = dparams.transpose(1, 2).flatten(2).flatten(0, 1)  # [B * L, K * M]
        flat = u.reshape(tokens.shape[0], u.shape[-1])
        dx_proj = (tokens.t() @ flat).view_as(x_proj)
        dx = du.view_as(flat).addmm_(tokens, x_proj.flatten(0, 1)).view_as(x)
    else:
        dparams, du = _per_direction(dparams), _per_direction(du)
        dx_proj = _over_tokens(dparams, _per_direction(u), x.shape[0])
        du = du.baddbmm_(dparams, x_proj)
        du = du.unflatten(1, (u.shape[0], u.shape[2])).transpose(0, 1)
        dx, dconv_weight, dconv_bias = conv_kernels(x).backward(
            du, x, inputs.conv_weight, inputs.conv_bias, inputs.index
        )
    dx_proj = torch.cat((dx_proj[:, :rank], dx_proj[:, padded:]), dim=1)
    gradients = (dx, dconv_weight, dconv_bias, dx_proj, ddt_weight, ddt_bias, dA, dD)
    return in_dtypes(gradients, inputs[:8])


_branches = Op(
    "s6_branches(Tensor x, Tensor? conv_weight, Tensor? conv_bias, Tensor x_proj, "
    "Tensor dt_weight, Tensor dt_bias, Tensor A, Tensor D, Tensor index, bool save) "
    "-> (Tensor, Tensor, Tensor)",
    kernel=_forward,
    fake=_fake,
    reference=_reference,
)
_branches.register_backward(
    _backward,
    lambda dy, params, states, *args: reference.s6_branches_backward(dy, *args[:-1]),
    tensors=8,
)


class BranchSizes(NamedTuple):
    """Sizes of one call of `s6_branches`, from which its operations are counted."""

    batch: int  # B
    directions: int  # K
    tokens: int  # L
    steps: int  # P, padding included
    channels: int  # D
    states: int  # N
    taps: int  # W, 0 without a convolution along the scan
    rank: int  # R

    @classmethod
    def from_shapes(cls, *shapes: Any) -> "BranchSizes":
        """Reads the shapes of the op's arguments."""
        x, conv_weight, _, _, dt_weight, _, A, _, index, *_ = shapes
        taps = conv_weight[2] if conv_weight else 0
        return cls(x[0], index[0], x[1], index[1], x[2], A[2], taps, dt_weight[2])

    def inputs(self, steps: int) -> int:
        """Multiply-adds of convolution, x_proj and dt_proj in one direction of one image."""
        return steps * self.channels * (self.taps + 2 * self.rank + 2 * self.states)

    def scan(self, steps: int, per_state: int = 5, per_channel: int = 2) -> int:
        """Multiply-adds of the scan of one direction of one image: see `scan_multiply_adds`."""
        return scan_multiply_adds(steps, self.channels, self.states, per_state, per_channel)


def _flops(*shapes: Any) -> int:
    """Counts FLOPs, two per multiply-add; in grid order padding is not projected."""
    sizes = BranchSizes.from_shapes(*shapes)
    projected = sizes.steps if sizes.taps else sizes.tokens
    per_direction = sizes.inputs(projected) + sizes.scan(sizes.steps)
    return 2 * sizes.batch * sizes.directions * per_direction


_branches.register_autocast(cast_activations([0]))
_branches.register_flops(_flops)


def s6_branches(
    x: Tensor,
    x_proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    index: Tensor,
    conv_weight: Optional[Tensor] = None,
    conv_bias: Optional[Tensor] = None,
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
