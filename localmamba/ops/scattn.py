"""What joins a block's directions: pooling for SCAttn, and the weighed sum. Custom ops, autograd.

Paper section 4.1 ("State attention", SCAttn). Both read the outputs of all directions once and
write only what is smaller than them, so that nothing of shape [B, K, L, D] is made in between.
"""

from typing import Optional

import torch
from torch import Tensor

from .backends import backend
from .checks import check_shape, check_together
from .reference import accumulation_dtype
from .registration import contiguous, define_op, empty_gradients, restore


@define_op("pool_directions(Tensor y, Tensor? z, float eps) -> Tensor")
def _pool(y, z, eps):
    return backend(y).pool_forward(y, z, eps)


@_pool.register_fake
def _(y, z, eps):
    return y.new_empty((y.shape[0], y.shape[1], y.shape[3]), dtype=accumulation_dtype(y.dtype))


@define_op("pool_directions_backward(Tensor dmeans, Tensor y, Tensor? z, float eps) -> Tensor[]")
def _pool_backward(dmeans, y, z, eps):
    return contiguous(backend(y).pool_backward(dmeans, y, z, eps))


@_pool_backward.register_fake
def _(dmeans, y, z, eps):
    return empty_gradients((y, z))


def _pool_setup(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _pool_grad(ctx, dmeans):
    inputs = ctx.saved_tensors
    return (*restore(_pool_backward(dmeans, *inputs, ctx.eps), inputs), None)


_pool.register_autograd(_pool_grad, setup_context=_pool_setup)


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


_MERGE_TENSORS = (
    "Tensor y, Tensor? channel_weights, Tensor? token_weights, Tensor? z, Tensor? norm_weight, "
    "Tensor? norm_bias"
)


@define_op(f"combine_directions({_MERGE_TENSORS}, float eps) -> Tensor")
def _merge(y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    return backend(y).merge_forward(
        y, channel_weights, token_weights, z, norm_weight, norm_bias, eps
    )


@_merge.register_fake
def _(y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    return y.new_empty((y.shape[0], y.shape[2], y.shape[3]))


@define_op(f"combine_directions_backward(Tensor dout, {_MERGE_TENSORS}, float eps) -> Tensor[]")
def _merge_backward(dout, y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    return contiguous(
        backend(y).merge_backward(
            dout, y, channel_weights, token_weights, z, norm_weight, norm_bias, eps
        )
    )


@_merge_backward.register_fake
def _(dout, y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    return empty_gradients((y, channel_weights, token_weights, z, norm_weight, norm_bias))


def _merge_setup(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _merge_grad(ctx, dout):
    inputs = ctx.saved_tensors
    return (*restore(_merge_backward(dout, *inputs, ctx.eps), inputs), None)


_merge.register_autograd(_merge_grad, setup_context=_merge_setup)


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
