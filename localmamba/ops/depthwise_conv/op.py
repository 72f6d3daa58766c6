"""Depthwise convolution over a map of tokens, with SiLU: the public function and its custom op.

LocalVMamba's blocks begin with it (paper figure 3b; VMamba's block).
"""

from math import prod
from typing import TYPE_CHECKING, Optional, Protocol

import torch
from torch import Tensor

from .._common.backends import Backends
from .._common.checks import check_shape
from .._common.registration import Op, cast_activations
from . import reference


class DepthwiseConvKernels(Protocol):
    """Kernels of the depthwise convolution, for any strides and dtypes."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Computes y, [B, H, W, D], contiguous."""

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> list[Tensor | None]:
        """Computes the gradients of x, weight and bias, in their dtypes."""


if TYPE_CHECKING:
    from . import cpu, cuda

    _CHECKED: tuple[DepthwiseConvKernels, ...] = (cpu, cuda, reference)

kernels: Backends[DepthwiseConvKernels] = Backends(__package__)


_conv = Op(
    "depthwise_conv(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    kernel=lambda x, *args: kernels(x).forward(x, *args),
    fake=lambda x, *_: x.new_empty(x.shape),
    reference=reference.forward,
)
_conv.register_backward(
    lambda dy, x, *args: kernels(x).backward(dy, x, *args), reference.backward, tensors=3
)
_conv.register_autocast(cast_activations([0]))
_conv.register_flops(lambda x, weight, bias, **_: 2 * prod(x) * weight[2] * weight[3])


def depthwise_conv(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """Convolves a map of tokens per channel, with zeros around it, then applies SiLU.

    Args:
        x: Map of tokens, [B, H, W, D].
        weight: Weight of `nn.Conv2d(D, D, S, padding=S // 2, groups=D)`: [D, 1, S, S], S odd.
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
