"""One step of the residual stream: scale, add, turn by the rotary embedding, normalise.

Blocks begin so: the plain models' with an RMS norm (Vim's "fused add norm"; the rotary embedding of
hidden tokens and residual alike is one turn of their sum), the hierarchical ones' with a layer
norm. In one pass over memory on a GPU. The same norm stands alone where no stream begins.
"""

from typing import Optional

import torch
from torch import Tensor

from .backends import backend
from .checks import check_shape, check_together
from .reference import accumulation_dtype
from .registration import (
    contiguous,
    define_op,
    empty_gradients,
    register_autocast_dtype,
    restore,
)

_TENSORS = (
    "Tensor hidden, Tensor? residual, Tensor weight, Tensor? bias, Tensor? cos, Tensor? sin, "
    "Tensor? scale"
)


@define_op(f"residual_norm({_TENSORS}, float eps, ScalarType dtype) -> (Tensor, Tensor)")
def _norm(hidden, residual, weight, bias, cos, sin, scale, eps, dtype):
    forward = backend(hidden).norm_forward
    return forward(hidden, residual, weight, bias, cos, sin, scale, eps, dtype, True)


@_norm.register_fake
def _(hidden, residual, weight, bias, cos, sin, scale, eps, dtype):
    stream = hidden.new_empty(hidden.shape, dtype=accumulation_dtype(hidden.dtype))
    return hidden.new_empty(hidden.shape, dtype=dtype), stream


@define_op(
    "residual_norm_backward(Tensor dnormed, Tensor? dstream, Tensor stream, Tensor weight, "
    "Tensor? bias, Tensor? cos, Tensor? sin, Tensor? scale, float eps, ScalarType hidden_dtype, "
    "bool has_residual) -> Tensor[]"
)
def _norm_backward(
    dnormed, dstream, stream, weight, bias, cos, sin, scale, eps, hidden_dtype, has_residual
):
    return contiguous(
        backend(stream).norm_backward(
            dnormed, dstream, stream, weight, bias, cos, sin, scale, eps, hidden_dtype, has_residual
        )
    )


@_norm_backward.register_fake
def _(dnormed, dstream, stream, weight, bias, cos, sin, scale, eps, hidden_dtype, has_residual):
    dhidden = stream.new_empty(stream.shape, dtype=hidden_dtype)
    return [dhidden, *empty_gradients((stream if has_residual else None, weight, bias))]


def _setup_context(ctx, inputs, output):
    hidden, residual, weight, bias, cos, sin, scale, ctx.eps, _ = inputs
    ctx.hidden_dtype, ctx.has_residual = hidden.dtype, residual is not None
    ctx.save_for_backward(output[1], weight, bias, cos, sin, scale)
    ctx.set_materialize_grads(False)


def _backward(ctx, dnormed, dstream):
    stream, weight, bias, cos, sin, scale = ctx.saved_tensors
    if dnormed is None:
        dnormed = torch.zeros_like(stream)
    dhidden, *gradients = _norm_backward(
        dnormed, dstream, stream, weight, bias, cos, sin, scale, ctx.eps, ctx.hidden_dtype,
        ctx.has_residual,
    )  # fmt: skip
    residual = stream if ctx.has_residual else None
    return dhidden, *restore(gradients, (residual, weight, bias)), *[None] * 5


_norm.register_autograd(_backward, setup_context=_setup_context)
register_autocast_dtype(_norm, argument=8)


@define_op(
    "token_norm(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType dtype) -> Tensor"
)
def _norm_alone(x, weight, bias, eps, dtype):
    forward = backend(x).norm_forward
    return forward(x, None, weight, bias, None, None, None, eps, dtype, False)[0]


@_norm_alone.register_fake
def _(x, weight, bias, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


def _setup_context_alone(ctx, inputs, output):
    x, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward_alone(ctx, dnormed):
    x, weight, bias = ctx.saved_tensors
    dx, *gradients = _norm_backward(
        dnormed, None, x, weight, bias, None, None, None, ctx.eps, x.dtype, False
    )
    return dx, *restore(gradients, (weight, bias)), None, None


_norm_alone.register_autograd(_backward_alone, setup_context=_setup_context_alone)
register_autocast_dtype(_norm_alone, argument=4)


def residual_norm(
    hidden: Tensor,
    residual: Optional[Tensor],  # noqa: UP045 - TorchScript reads these
    weight: Tensor,
    bias: Optional[Tensor] = None,  # noqa: UP045
    cos: Optional[Tensor] = None,  # noqa: UP045
    sin: Optional[Tensor] = None,  # noqa: UP045
    scale: Optional[Tensor] = None,  # noqa: UP045
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Adds hidden tokens to the residual stream, turns the sum, and normalises it.

    With `scale`, hidden tokens are multiplied first, as stochastic depth does.

    Args:
        hidden: What the block before put out, [..., L, C].
        residual: The stream that it is added to, [..., L, C]; None for the first block.
        weight: Of the norm, [C].
        bias: With it the norm is a layer norm, [C]; without, an RMS norm.
        cos: Rotary table, [1, L, C], each angle twice; None for no rotation.
        sin: Rotary table, [1, L, C], with `cos`.
        scale: Factors of the hidden tokens by image, [B] for hidden tokens [B, ..., L, C], whose
            first axis counts the images however many follow; None for 1. They have no gradient.
        eps: Of the norm.

    Returns:
        The normalised tokens, [..., L, C] in the dtype of `weight` (of autocast, under it), and the
        new stream, [..., L, C], in float32 (float64 for float64 tokens).

    Raises:
        ValueError: If shapes do not fit, one of the rotary tables is given alone, or C is odd with
            them.
    """
    if hidden.dim() < 2:
        raise ValueError(f"hidden must be [..., L, C], got {hidden.dim()} axes")
    length, channels = hidden.shape[-2:]
    check_shape("residual", residual, list(hidden.shape))
    check_shape("weight", weight, [channels])
    check_shape("bias", bias, [channels])
    check_together("cos", cos, "sin", sin)
    check_shape("cos", cos, [1, length, channels])
    check_shape("sin", sin, [1, length, channels])
    check_shape("scale", scale, [hidden.shape[0]])
    if cos is not None and channels % 2 == 1:
        raise ValueError(f"rotary tables turn pairs of channels, got {channels} channels")
    return torch.ops.localmamba.residual_norm(
        hidden, residual, weight, bias, cos, sin, scale, eps, weight.dtype
    )


def token_norm(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,  # noqa: UP045
    eps: float = 1e-5,
) -> Tensor:
    """The norm alone, of tokens that join no stream.

    Args:
        x: Tokens, [..., L, C].
        weight: Of the norm, [C].
        bias: With it the norm is a layer norm, [C]; without, an RMS norm.
        eps: Of the norm.

    Returns:
        [..., L, C] in the dtype of `weight` (of autocast, under it).

    Raises:
        ValueError: If shapes do not fit.
    """
    if x.dim() < 2:
        raise ValueError(f"x must be [..., L, C], got {x.dim()} axes")
    check_shape("weight", weight, [x.shape[-1]])
    check_shape("bias", bias, [x.shape[-1]])
    return torch.ops.localmamba.token_norm(x, weight, bias, eps, weight.dtype)
