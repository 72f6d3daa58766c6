"""Depthwise convolution over a map of tokens, with SiLU: public function, custom op, autograd.

What LocalVMamba's blocks do before their scans (paper figure 3b; VMamba's block).
"""

from typing import Optional

import torch
from torch import Tensor

from .backends import backend
from .checks import check_shape
from .registration import (
    contiguous,
    define_op,
    empty_gradients,
    register_autocast,
    restore,
)


@define_op("depthwise_conv(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
def _conv(x, weight, bias):
    return backend(x).depthwise_forward(x, weight, bias)


@_conv.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape)


@define_op("depthwise_conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias) -> Tensor[]")
def _conv_backward(dy, x, weight, bias):
    return contiguous(backend(x).depthwise_backward(dy, x, weight, bias))


@_conv_backward.register_fake
def _(dy, x, weight, bias):
    return empty_gradients((x, weight, bias))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    inputs = ctx.saved_tensors
    return tuple(restore(_conv_backward(dy, *inputs), inputs))


_conv.register_autograd(_backward, setup_context=_setup_context)
register_autocast(_conv, activations=(0,))


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,  # noqa: UP045 - TorchScript reads this
) -> Tensor:
    """Convolves a map of tokens per channel, with zeros around it, then applies SiLU.

    Args:
        x: Map of tokens, [B, H, W, D].
        weight: As of `nn.Conv2d(D, D, S, padding=S // 2, groups=D)`: [D, 1, S, S], S odd.
        bias: [D], or None.

    Returns:
        [B, H, W, D], in the dtype of x.

    Raises:
        ValueError: If shapes do not fit.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be [B, H, W, D], got {x.dim()} axes")
    channels = x.shape[3]
    size = weight.shape[3] if weight.dim() == 4 else 0
    if size % 2 == 0 or list(weight.shape) != [channels, 1, size, size]:
        raise ValueError(
            f"weight must be [{channels}, 1, S, S] with S odd, got {list(weight.shape)}"
        )
    check_shape("bias", bias, [channels])
    return torch.ops.localmamba.depthwise_conv(x, weight, bias)
