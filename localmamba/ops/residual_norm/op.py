"""A step of the residual stream: scale, add, rotate, normalize; public functions and custom ops.

Blocks begin with it: the plain models' with an RMS norm (Vim's "fused add norm"; the rotary
embedding of hidden tokens and residual alike is one rotation of their sum), the hierarchical ones'
with a layer norm. `token_norm` is the norm alone.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, Optional, Protocol

import torch
from torch import Tensor

from .._common.backends import Backends
from .._common.checks import check_shape, check_together
from .._common.registration import (
    Op,
    contiguous,
    empty_gradients,
    present_gradients,
    restore,
    set_dtype,
)
from .._common.tokens import accumulation_dtype
from . import reference


class NormKernels(Protocol):
    """Kernels of the norm, for any strides and dtypes."""

    def forward(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None,
        cos: Tensor | None, sin: Tensor | None, scale: Tensor | None, eps: float,
        dtype: torch.dtype, keep_stream: bool = True,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Computes the normalized tokens in `dtype` and, if it is kept, the new stream."""

    def backward(
        self, dnormed: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor,
        bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, scale: Tensor | None,
        eps: float, hidden_dtype: torch.dtype, has_residual: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
        """Computes the gradients of hidden, residual, weight and bias, from the new stream."""


if TYPE_CHECKING:
    from . import cpu, cuda

    _CHECKED: tuple[NormKernels, ...] = (cpu, cuda, reference)

kernels: Backends[NormKernels] = Backends(__package__)


def _forward(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor | None]:
    return kernels(hidden).forward(hidden, *args)


def _fake(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    stream = hidden.new_empty(hidden.shape, dtype=accumulation_dtype(hidden.dtype))
    return hidden.new_empty(hidden.shape, dtype=args[-1]), stream


def _backward(dnormed: Tensor, dstream: Tensor | None, stream: Tensor, *args: Any) -> list[Tensor]:
    return contiguous(kernels(stream).backward(dnormed, dstream, stream, *args))


def _backward_fake(
    dnormed: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, bias: Tensor | None,
    *args: Any,
) -> list[Tensor]:  # fmt: skip
    *_, hidden_dtype, has_residual = args
    dhidden = stream.new_empty(stream.shape, dtype=hidden_dtype)
    return [dhidden, *empty_gradients((stream if has_residual else None, weight, bias))]


_TENSORS = "Tensor weight, Tensor? bias, Tensor? cos, Tensor? sin, Tensor? scale, float eps"
_norm = Op(
    f"residual_norm(Tensor hidden, Tensor? residual, {_TENSORS}, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    kernel=_forward,
    fake=_fake,
    reference=reference.forward,
)
_norm_backward = Op(
    f"residual_norm_backward(Tensor dnormed, Tensor? dstream, Tensor stream, {_TENSORS}, "
    "ScalarType hidden_dtype, bool has_residual) -> Tensor[]",
    kernel=_backward,
    fake=_backward_fake,
    reference=present_gradients(reference.backward),
    dispatch_on=2,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, residual, weight, bias, cos, sin, scale, ctx.eps, _ = inputs
    ctx.hidden_dtype, ctx.has_residual = hidden.dtype, residual is not None
    ctx.save_for_backward(output[1], weight, bias, cos, sin, scale)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dnormed: Tensor | None, dstream: Tensor | None
) -> tuple[Tensor | None, ...]:
    stream, weight, bias, cos, sin, scale = ctx.saved_tensors
    if dnormed is None:
        dnormed = torch.zeros_like(stream)
    dhidden, *gradients = _norm_backward(
        dnormed, dstream, stream, weight, bias, cos, sin, scale, ctx.eps, ctx.hidden_dtype,
        ctx.has_residual,
    )  # fmt: skip
    residual = stream if ctx.has_residual else None
    return dhidden, *restore(gradients, (residual, weight, bias)), *[None] * 5


_norm.register_autograd(_gradients, _setup_context)
_norm_backward.register_second_derivative()
_norm.register_autocast(set_dtype(8))


def _forward_alone(x: Tensor, *args: Any, backend: NormKernels | None = None) -> Tensor:
    weight, bias, eps, dtype = args
    backend = backend or kernels(x)
    return backend.forward(x, None, weight, bias, None, None, None, eps, dtype, False)[0]


def _backward_alone(
    dnormed: Tensor, x: Tensor, *args: Any, backend: NormKernels | None = None
) -> list[Tensor | None]:
    weight, bias, eps, _ = args
    backend = backend or kernels(x)
    dx, _, *gradients = backend.backward(
        dnormed, None, x, weight, bias, None, None, None, eps, x.dtype, False
    )
    return [dx, *gradients]


_norm_alone = Op(
    "token_norm(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType dtype) -> Tensor",
    kernel=_forward_alone,
    fake=lambda x, weight, bias, eps, dtype: x.new_empty(x.shape, dtype=dtype),
    reference=partial(_forward_alone, backend=reference),
)
_norm_alone.register_backward(
    _backward_alone, partial(_backward_alone, backend=reference), tensors=3
)
_norm_alone.register_autocast(set_dtype(4))


def residual_norm(
    hidden: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor] = None,
    cos: Optional[Tensor] = None,
    sin: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Adds hidden tokens to the residual stream, rotates the sum, and normalizes it.

    With `scale`, hidden tokens are multiplied first, as stochastic depth does.

    Args:
        hidden: Output of the previous block, [..., L, C].
        residual: The stream that it is added to, [..., L, C]; None for the first block.
        weight: Weight of the norm, [C].
        bias: With it the norm is a layer norm, [C]; without, an RMS norm.
        cos: Rotary table, [1, L, C], each angle twice; None for no rotation. It has no gradient.
        sin: Rotary table, [1, L, C], with `cos`.
        scale: Factor of the hidden tokens of each image, [B], where B is the first axis of
            `hidden`; None for 1. It has no gradient.
        eps: Added to the variance.

    Returns:
        The normalized tokens, [..., L, C] in the dtype of `weight` (of autocast, under it), and the
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
        raise ValueError(f"rotary tables rotate pairs of channels, got {channels} channels")
    return torch.ops.localmamba.residual_norm(
        hidden, residual, weight, bias, cos, sin, scale, eps, weight.dtype
    )


def token_norm(
    x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, eps: float = 1e-5
) -> Tensor:
    """Normalizes tokens that join no stream.

    Args:
        x: Tokens, [..., L, C].
        weight: Weight of the norm, [C].
        bias: With it the norm is a layer norm, [C]; without, an RMS norm.
        eps: Added to the variance.

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
