"""Pooling for SCAttn, and the weighted sum over directions: public functions and custom ops.

Paper section 4.1 ("State attention", SCAttn). Both read the outputs of all directions once and
write only what is smaller, so that no other array of shape [B, K, L, D] is made.
"""

from typing import TYPE_CHECKING, Any, Optional, Protocol

import torch
from torch import Tensor

from .._common.backends import Backends
from .._common.checks import check_shape, check_together
from .._common.registration import (
    Op,
    contiguous,
    empty_gradients,
    no_cast,
    present_gradients,
    restore,
)
from .._common.tokens import accumulation_dtype
from . import reference


class CombineKernels(Protocol):
    """Kernels of the combination of directions; strides and dtypes any."""

    def pool_forward(self, y: Tensor, z: Tensor | None, eps: float) -> Tensor:
        """Computes the means, [B, K, D], in float32."""

    def pool_backward(
        self, dmeans: Tensor, y: Tensor, z: Tensor | None, eps: float
    ) -> list[Tensor | None]:
        """Computes the gradients of y and z, in their dtypes."""

    def combine_forward(
        self,
        y: Tensor,
        channel_weights: Tensor | None,
        token_weights: Tensor | None,
        z: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Computes the weighted sum, [B, L, D], normalized and gated."""

    def combine_backward(
        self,
        dout: Tensor,
        y: Tensor,
        channel_weights: Tensor | None,
        token_weights: Tensor | None,
        z: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
    ) -> list[Tensor | None]:
        """Computes the gradients of the six tensors, in their dtypes."""

    def weights_forward(self, means: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Computes SCAttn's channel weights and the output of its first linear layer.

        The parameters, in the dtype of the means: weight and bias of the pooling's norm, of the
        first linear layer and of the second.
        """

    def scattn_backward(
        self,
        dout: Tensor,
        y: Tensor,
        z: Tensor | None,
        pool_weight: Tensor,
        pool_bias: Tensor,
        reduce_weight: Tensor,
        reduce_bias: Tensor,
        select_weight: Tensor,
        select_bias: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        means: Tensor,
        weights: Tensor,
        reduced: Tensor,
        gate_first: bool,
        pool_eps: float,
        norm_eps: float,
    ) -> list[Tensor | None]:
        """Computes the gradients of the ten tensors before `means`."""


if TYPE_CHECKING:
    from . import cpu, cuda

    _CHECKED: tuple[CombineKernels, ...] = (cpu, cuda, reference)

kernels: Backends[CombineKernels] = Backends(__package__)


def _pool_forward(y, z, eps):
    return kernels(y).pool_forward(y, z, eps)


def _pool_fake(y, z, eps):
    return y.new_empty((y.shape[0], y.shape[1], y.shape[3]), dtype=accumulation_dtype(y.dtype))


def _pool_backward_kernel(dmeans, y, z, eps):
    return contiguous(kernels(y).pool_backward(dmeans, y, z, eps))


def _pool_backward_fake(dmeans, y, z, eps):
    return empty_gradients((y, z))


_pool = Op(
    "pool_directions(Tensor y, Tensor? z, float eps) -> Tensor",
    kernel=_pool_forward,
    fake=_pool_fake,
    reference=reference.pool_forward,
)
_pool_backward = Op(
    "pool_directions_backward(Tensor dmeans, Tensor y, Tensor? z, float eps) -> Tensor[]",
    kernel=_pool_backward_kernel,
    fake=_pool_backward_fake,
    reference=present_gradients(reference.pool_backward),
    dispatch_on=1,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _pool_gradients(ctx: Any, dmeans: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    return (*restore(_pool_backward(dmeans, *inputs, ctx.eps), inputs), None)


_pool.register_autograd(_pool_gradients, _setup_context)
_pool_backward.register_second_derivative()
_pool.register_autocast(no_cast)


def _combine_forward(y, *args):
    return kernels(y).combine_forward(y, *args)


def _combine_fake(y, *args):
    return y.new_empty((y.shape[0], y.shape[2], y.shape[3]))


def _combine_backward_kernel(dout, y, *args):
    return contiguous(kernels(y).combine_backward(dout, y, *args))


def _combine_backward_fake(dout, *args):
    return empty_gradients(args[:6])


_TENSORS = (
    "Tensor y, Tensor? channel_weights, Tensor? token_weights, Tensor? z, Tensor? norm_weight, "
    "Tensor? norm_bias"
)
_combine = Op(
    f"combine_directions({_TENSORS}, float eps) -> Tensor",
    kernel=_combine_forward,
    fake=_combine_fake,
    reference=reference.combine_forward,
)
_combine_backward = Op(
    f"combine_directions_backward(Tensor dout, {_TENSORS}, float eps) -> Tensor[]",
    kernel=_combine_backward_kernel,
    fake=_combine_backward_fake,
    reference=present_gradients(reference.combine_backward),
    dispatch_on=1,
)


def _combine_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    return (*restore(_combine_backward(dout, *inputs, ctx.eps), inputs), None)


_combine.register_autograd(_combine_gradients, _setup_context)
_combine_backward.register_second_derivative()
_combine.register_autocast(no_cast)


def pool_directions(
    y: Tensor,
    z: Optional[Tensor],  # noqa: UP045 - TorchScript reads these
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """The mean over tokens of the layer-normalised output of each direction (SCAttn's pooling).

    Args:
        y: Outputs of the directions, [B, K, L, D].
        z: If given, [B, L, D]: y is first multiplied by SiLU(z).
        weight: Of the layer norm over channels, [D].
        bias: Of the layer norm, [D].
        eps: Of the layer norm.

    Returns:
        [B, K, D], float32 (float64 for a float64 y).

    Raises:
        ValueError: If shapes do not fit.
    """
    if y.dim() != 4:
        raise ValueError(f"y must be [B, K, L, D], got {y.dim()} axes")
    batch, _, length, channels = y.shape
    check_shape("z", z, [batch, length, channels])
    check_shape("weight", weight, [channels])
    check_shape("bias", bias, [channels])
    means = torch.ops.localmamba.pool_directions(y, z, eps)
    return torch.addcmul(bias.to(means.dtype), means, weight.to(means.dtype))


def combine_directions(
    y: Tensor,
    channel_weights: Optional[Tensor] = None,  # noqa: UP045 - TorchScript reads these
    token_weights: Optional[Tensor] = None,  # noqa: UP045
    z: Optional[Tensor] = None,  # noqa: UP045
    norm_weight: Optional[Tensor] = None,  # noqa: UP045
    norm_bias: Optional[Tensor] = None,  # noqa: UP045
    eps: float = 1e-5,
) -> Tensor:
    """Weighs the outputs of the directions, adds them, and optionally normalises and gates the sum.

    Args:
        y: Outputs of the directions, [B, K, L, D].
        channel_weights: [B, K, D], multiplied onto y.
        token_weights: [B, K, L], multiplied onto y.
        z: If given, [B, L, D]: the result is multiplied by SiLU(z), last.
        norm_weight: If given, the sum passes a layer norm over channels with this weight, [D].
        norm_bias: With `norm_weight`, [D].
        eps: Of the layer norm.

    Returns:
        [B, L, D], in the dtype of y.

    Raises:
        ValueError: If shapes do not fit, or one of `norm_weight` and `norm_bias` is given alone.
    """
    if y.dim() != 4:
        raise ValueError(f"y must be [B, K, L, D], got {y.dim()} axes")
    batch, directions, length, channels = y.shape
    check_shape("channel_weights", channel_weights, [batch, directions, channels])
    check_shape("token_weights", token_weights, [batch, directions, length])
    check_shape("z", z, [batch, length, channels])
    check_together("norm_weight", norm_weight, "norm_bias", norm_bias)
    check_shape("norm_weight", norm_weight, [channels])
    check_shape("norm_bias", norm_bias, [channels])
    return torch.ops.localmamba.combine_directions(
        y, channel_weights, token_weights, z, norm_weight, norm_bias, eps
    )
