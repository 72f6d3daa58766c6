"""Causal depthwise convolution along scan orders, with SiLU: the public function and its custom op.

LocalVim's branches begin with it (paper figure 3a; Vim's block).
"""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .._common.backends import Backends
from .._common.checks import check_index, check_shape
from .._common.registration import Op, cast_activations
from .._common.tokens import scan_major
from . import reference


class CausalConvKernels(Protocol):
    """Kernels of the causal convolution, for any strides and dtypes; index is [K, P]."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
        """Computes u, [B, K, P, D], in memory [K, B, P, D]."""

    def backward(
        self, du: Tensor, x: Tensor, weight: Tensor, bias: Tensor, index: Tensor
    ) -> list[Tensor | None]:
        """Computes the gradients of x, weight and bias, in their dtypes."""


if TYPE_CHECKING:
    from . import cpu, cuda

    _CHECKED: tuple[CausalConvKernels, ...] = (cpu, cuda, reference)

kernels: Backends[CausalConvKernels] = Backends(__package__)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
    directions, steps = index.shape
    return scan_major(x.shape[0], directions, steps, x.shape[2], like=x)


_conv = Op(
    "causal_conv(Tensor x, Tensor weight, Tensor bias, Tensor index) -> Tensor",
    kernel=lambda x, *args: kernels(x).forward(x, *args),
    fake=_fake,
    reference=reference.forward,
)
_conv.register_backward(
    lambda du, x, *args: kernels(x).backward(du, x, *args), reference.backward, tensors=3
)
_conv.register_autocast(cast_activations([0]))
_conv.register_flops(
    lambda x, weight, bias, index, **_: 2 * x[0] * index[0] * index[1] * x[2] * weight[2]
)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
    """Convolves tokens along each scan order, causally and per channel, then applies SiLU.

    Padding reads as zero and yields an output like any other step.

    Args:
        x: Tokens in grid order, [B, L, D].
        weight: [K, D, W]; the last tap multiplies the step itself.
        bias: [K, D].
        index: Scan orders, int32 [K, P]: from `scan_index`, or made by hand and then checked once
            (not in compiled programs).

    Returns:
        Tokens in scan order, [B, K, P, D], in the dtype of x.

    Raises:
        ValueError: If shapes do not fit, or the index is no scan order of the tokens.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, L, D], got {x.dim()} axes")
    if index.dim() != 2:
        raise ValueError(f"index must be [K, P], got {index.dim()} axes")
    directions, channels = index.shape[0], x.shape[2]
    if weight.dim() != 3 or list(weight.shape[:2]) != [directions, channels]:
        raise ValueError(f"weight must be [{directions}, {channels}, W], got {list(weight.shape)}")
    check_shape("bias", bias, [directions, channels])
    check_index(index, x.shape[1])
    return torch.ops.localmamba.causal_conv(x, weight, bias, index)
