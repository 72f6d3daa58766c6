"""Causal depthwise convolution along scan orders, with SiLU: public function, custom op, autograd.

What LocalVim's branches do before their scan (spec of the method: paper figure 3a, Vim's block).
"""

import torch
from torch import Tensor

from .backends import backend
from .checks import check_shape
from .registration import contiguous, define_op, empty_gradients, register_autocast


@define_op("causal_conv(Tensor x, Tensor weight, Tensor bias, Tensor index) -> Tensor")
def _conv(x, weight, bias, index):
    return backend(x).conv_forward(x, weight, bias, index)


def scan_major(batch: int, directions: int, steps: int, channels: int, like: Tensor) -> Tensor:
    """An empty [B, K, P, D], in memory [K, B, P, D]: a batched product over K needs no copy."""
    return like.new_empty((directions, batch, steps, channels)).transpose(0, 1)


@_conv.register_fake
def _(x, weight, bias, index):
    directions, steps = index.shape
    return scan_major(x.shape[0], directions, steps, x.shape[2], like=x)


@define_op(
    "causal_conv_backward(Tensor du, Tensor x, Tensor weight, Tensor bias, Tensor index) "
    "-> Tensor[]"
)
def _conv_backward(du, x, weight, bias, index):
    return contiguous(backend(x).conv_backward(du, x, weight, bias, index))


@_conv_backward.register_fake
def _(du, x, weight, bias, index):
    return empty_gradients((x, weight, bias))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, du):
    return (*_conv_backward(du, *ctx.saved_tensors), None)


_conv.register_autograd(_backward, setup_context=_setup_context)
register_autocast(_conv, activations=(0,))


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
    """Convolves tokens along each scan order, causally and per channel, then applies SiLU.

    Padding reads as zero and yields an output like any other step.

    Args:
        x: Tokens in grid order, [B, L, D].
        weight: [K, D, W]; the last tap weighs the step itself.
        bias: [K, D].
        index: Scan orders from `scan_index`, int32 [K, P].

    Returns:
        Tokens in scan order, [B, K, P, D], in the dtype of x.

    Raises:
        ValueError: If shapes do not fit.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, L, D], got {x.dim()} axes")
    if index.dim() != 2:
        raise ValueError(f"index must be [K, P], got {index.dim()} axes")
    directions, channels = index.shape[0], x.shape[2]
    if weight.dim() != 3 or list(weight.shape[:2]) != [directions, channels]:
        raise ValueError(f"weight must be [{directions}, {channels}, W], got {list(weight.shape)}")
    check_shape("bias", bias, [directions, channels])
    return torch.ops.localmamba.causal_conv(x, weight, bias, index)
