"""Combination of a block's directions: public functions and custom ops.

Paper section 4.1, "State attention" (SCAttn). `pool_directions` and `combine_directions` read the
outputs of all directions once and write only what is smaller, so that no other array of shape
[B, K, L, D] is made. `scattn_combine` is both with SCAttn's two linear layers between them: one op
launches fewer kernels, and the two gradients of the directions' outputs are added where they are
computed.
"""

from math import prod
from typing import TYPE_CHECKING, Any, Optional, Protocol

import torch
from torch import Tensor

from .._common.backends import Backends
from .._common.checks import check_shape, check_together
from .._common.registration import Op, no_cast
from .._common.tokens import accumulation_dtype
from . import reference
from .reference import CombineInputs, SCAttnInputs, SCAttnParameters


class CombineKernels(Protocol):
    """Kernels of the combination of directions; strides and dtypes any."""

    def pool_forward(self, y: Tensor, z: Tensor | None, eps: float) -> Tensor:
        """Computes the means, [B, K, D], in float32."""

    def pool_backward(
        self, dmeans: Tensor, y: Tensor, z: Tensor | None, eps: float
    ) -> list[Tensor | None]:
        """Computes the gradients of y and z, in their dtypes."""

    def combine_forward(self, inputs: CombineInputs) -> Tensor:
        """Computes the weighted sum, [B, L, D], normalized and gated."""

    def combine_backward(self, dout: Tensor, inputs: CombineInputs) -> list[Tensor | None]:
        """Computes the gradients of the six tensors, in their dtypes."""

    def weights_forward(self, means: Tensor, parameters: SCAttnParameters) -> tuple[Tensor, Tensor]:
        """Computes SCAttn's channel weights and the output of its first linear layer."""

    def scattn_backward(
        self, dout: Tensor, means: Tensor, weights: Tensor, reduced: Tensor, inputs: SCAttnInputs
    ) -> list[Tensor | None]:
        """Computes the gradients of the ten tensors of `inputs`, in their dtypes."""


if TYPE_CHECKING:
    from . import cpu, cuda

    _CHECKED: tuple[CombineKernels, ...] = (cpu, cuda, reference)

kernels: Backends[CombineKernels] = Backends(__package__)


_pool = Op(
    "pool_directions(Tensor y, Tensor? z, float eps) -> Tensor",
    kernel=lambda y, *args: kernels(y).pool_forward(y, *args),
    fake=lambda y, *_: y.new_empty(
        (y.shape[0], y.shape[1], y.shape[3]), dtype=accumulation_dtype(y.dtype)
    ),
    reference=reference.pool_forward,
)
_pool.register_backward(
    lambda dmeans, y, *args: kernels(y).pool_backward(dmeans, y, *args),
    reference.pool_backward,
    tensors=2,
)
_pool.register_autocast(no_cast)

_combine = Op(
    "combine_directions(Tensor y, Tensor? channel_weights, Tensor? token_weights, Tensor? z, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps) -> Tensor",
    kernel=lambda y, *args: kernels(y).combine_forward(CombineInputs(y, *args)),
    fake=lambda y, *_: y.new_empty((y.shape[0], y.shape[2], y.shape[3])),
    reference=reference.combine_directions_reference,
)
_combine.register_backward(
    lambda dout, y, *args: kernels(y).combine_backward(dout, CombineInputs(y, *args)),
    lambda dout, *args: reference.combine_backward(dout, CombineInputs(*args)),
    tensors=6,
)
_combine.register_autocast(no_cast)


def _scattn_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, backend = SCAttnInputs(*args), kernels(args[0])
    means = backend.pool_forward(*inputs.pool_inputs())
    weights, reduced = backend.weights_forward(means, inputs.parameters())
    return backend.combine_forward(inputs.combine_inputs(weights)), means, weights, reduced


def _scattn_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, width = args[0], args[4].shape[0]
    batch, directions, length, channels = y.shape
    dtype = accumulation_dtype(y.dtype)
    means = y.new_empty((batch, directions, channels), dtype=dtype)
    reduced = y.new_empty((batch, directions, width), dtype=dtype)
    return y.new_empty((batch, length, channels)), means, torch.empty_like(means), reduced


def _scattn_backward(
    dout: Tensor, means: Tensor, weights: Tensor, reduced: Tensor, *args: Any
) -> list[Tensor | None]:
    backward = kernels(args[0]).scattn_backward
    return backward(dout, means, weights, reduced, SCAttnInputs(*args))


_scattn = Op(
    "scattn_combine(Tensor y, Tensor? z, Tensor pool_weight, Tensor pool_bias, "
    "Tensor reduce_weight, Tensor reduce_bias, Tensor select_weight, Tensor select_bias, "
    "Tensor? norm_weight, Tensor? norm_bias, bool gate_first, float pool_eps, float norm_eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_scattn_forward,
    fake=_scattn_fake,
    reference=lambda *args: reference.scattn_forward(SCAttnInputs(*args)),
)
_scattn.register_backward(
    _scattn_backward,
    lambda dout, means, weights, reduced, *args: reference.scattn_backward(
        dout, means, weights, reduced, SCAttnInputs(*args)
    ),
    tensors=10,
)
_scattn.register_autocast(no_cast)
_scattn.register_flops(
    lambda y, z, pool_weight, pool_bias, reduce_weight, reduce_bias, select_weight, *_, **__: (
        2 * y[0] * y[1] * (prod(reduce_weight) + prod(select_weight))
    )
)


def pool_directions(
    y: Tensor, z: Optional[Tensor], weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """Computes the mean over tokens of the layer-normalized output of each direction.

    This is SCAttn's pooling.

    Args:
        y: Outputs of the directions, [B, K, L, D].
        z: If given, [B, L, D]: y is first multiplied by SiLU(z).
        weight: Weight of the layer norm over channels, [D].
        bias: Bias of the layer norm, [D].
        eps: Added to the variance in the layer norm.

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
    channel_weights: Optional[Tensor] = None,
    token_weights: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    norm_weight: Optional[Tensor] = None,
    norm_bias: Optional[Tensor] = None,
    eps: float = 1e-5,
) -> Tensor:
    """Computes a weighted sum over directions, optionally normalized and gated.

    Args:
        y: Outputs of the directions, [B, K, L, D].
        channel_weights: Factors of y, [B, K, D]; 1 by default.
        token_weights: Factors of y, [B, K, L]; 1 by default.
        z: If given, [B, L, D]: the result is multiplied by SiLU(z), after the norm.
        norm_weight: If given, [D]: a layer norm over channels with this weight follows the sum.
        norm_bias: Bias of that norm, [D]; given if and only if `norm_weight` is.
        eps: Added to the variance in the layer norm.

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


def scattn_combine(
    y: Tensor,
    z: Optional[Tensor],
    pool_weight: Tensor,
    pool_bias: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    select_weight: Tensor,
    select_bias: Tensor,
    norm_weight: Optional[Tensor] = None,
    norm_bias: Optional[Tensor] = None,
    gate_first: bool = False,
    pool_eps: float = 1e-5,
    norm_eps: float = 1e-5,
) -> Tensor:
    """Computes the sum over directions weighted by SCAttn by channel, normalized and gated.

    The linear layers run in float32 whatever the dtype of y (float64 for a float64 y).

    Args:
        y: Outputs of the directions, [B, K, L, D].
        z: If given, [B, L, D]: the result is multiplied by SiLU(z), after the norm.
        pool_weight: Weight of the layer norm before pooling, [D].
        pool_bias: Bias of the layer norm before pooling, [D].
        reduce_weight: Weight of the first linear layer, [D / r, D].
        reduce_bias: Bias of the first linear layer, [D / r].
        select_weight: Weight of the second linear layer, [D, D / r].
        select_bias: Bias of the second linear layer, [D].
        norm_weight: If given, [D]: a layer norm over channels with this weight follows the sum.
        norm_bias: Bias of that norm, [D]; given if and only if `norm_weight` is.
        gate_first: Whether SCAttn's input is y * SiLU(z), as in LocalVim, rather than y.
        pool_eps: Added to the variance in the layer norm before pooling.
        norm_eps: Added to the variance in the layer norm after the sum.

    Returns:
        [B, L, D], in the dtype of y.

    Raises:
        ValueError: If shapes do not fit, or one of `norm_weight` and `norm_bias` is given alone.
    """
    if y.dim() != 4:
        raise ValueError(f"y must be [B, K, L, D], got {y.dim()} axes")
    batch, _, length, channels = y.shape
    if reduce_weight.dim() != 2 or reduce_weight.shape[1] != channels:
        raise ValueError(
            f"reduce_weight must be [D / r, {channels}], got {list(reduce_weight.shape)}"
        )
    reduced = reduce_weight.shape[0]
    check_shape("z", z, [batch, length, channels])
    check_shape("pool_weight", pool_weight, [channels])
    check_shape("pool_bias", pool_bias, [channels])
    check_shape("reduce_bias", reduce_bias, [reduced])
    check_shape("select_weight", select_weight, [channels, reduced])
    check_shape("select_bias", select_bias, [channels])
    check_together("norm_weight", norm_weight, "norm_bias", norm_bias)
    check_shape("norm_weight", norm_weight, [channels])
    check_shape("norm_bias", norm_bias, [channels])
    return torch.ops.localmamba.scattn_combine(
        y, z, pool_weight, pool_bias, reduce_weight, reduce_bias, select_weight, select_bias,
        norm_weight, norm_bias, gate_first, pool_eps, norm_eps,
    )[0]  # fmt: skip
