"""SCAttn by channel and the sum over directions as one op, the end of a block's mixer.

Paper section 4.1. Made of `pool_directions`, two small linear layers and `combine_directions`. One
op launches fewer kernels, and the two gradients that reach the directions' outputs are added where
they are computed. The linear layers run in float32 whatever the dtype of the outputs.
"""

from math import prod
from typing import Any, Optional

import torch
from torch import Tensor

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
from .op import kernels


def _forward(
    y, z, pool_weight, pool_bias, reduce_weight, reduce_bias, select_weight, select_bias,
    norm_weight, norm_bias, gate_first, pool_eps, norm_eps,
):  # fmt: skip
    backend = kernels(y)
    means = backend.pool_forward(y, z if gate_first else None, pool_eps)
    parameters = (pool_weight, pool_bias, reduce_weight, reduce_bias, select_weight, select_bias)
    weights, reduced = backend.weights_forward(means, *(x.to(means.dtype) for x in parameters))
    out = backend.combine_forward(y, weights, None, z, norm_weight, norm_bias, norm_eps)
    return out, means, weights, reduced


def _fake(y, z, pool_weight, pool_bias, reduce_weight, *rest):
    batch, directions, length, channels = y.shape
    dtype = accumulation_dtype(y.dtype)
    means = y.new_empty((batch, directions, channels), dtype=dtype)
    reduced = y.new_empty((batch, directions, reduce_weight.shape[0]), dtype=dtype)
    return y.new_empty((batch, length, channels)), means, torch.empty_like(means), reduced


def _backward(dout, y, *args):
    return contiguous(kernels(y).scattn_backward(dout, y, *args))


def _backward_fake(dout, *args):
    return empty_gradients(args[:10])


_TENSORS = (
    "Tensor y, Tensor? z, Tensor pool_weight, Tensor pool_bias, Tensor reduce_weight, "
    "Tensor reduce_bias, Tensor select_weight, Tensor select_bias, Tensor? norm_weight, "
    "Tensor? norm_bias"
)
_CONSTANTS = "bool gate_first, float pool_eps, float norm_eps"
_combine = Op(
    f"scattn_combine({_TENSORS}, {_CONSTANTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_forward,
    fake=_fake,
    reference=reference.scattn_combine_reference,
)
_combine_backward = Op(
    f"scattn_combine_backward(Tensor dout, {_TENSORS}, Tensor means, Tensor weights, "
    f"Tensor reduced, {_CONSTANTS}) -> Tensor[]",
    kernel=_backward,
    fake=_backward_fake,
    reference=present_gradients(reference.scattn_backward),
    dispatch_on=1,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.constants = inputs[10:]
    ctx.save_for_backward(*inputs[:10], *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 13
    saved = ctx.saved_tensors  # asked for once: checkpointing unpacks them only once
    gradients = _combine_backward(dout, *saved, *ctx.constants)
    return (*restore(gradients, saved[:10]), None, None, None)


_combine.register_autograd(_gradients, _setup_context)
_combine_backward.register_second_derivative()
_combine.register_autocast(no_cast)
_combine.register_flops(
    lambda y, z, pool_weight, pool_bias, reduce_weight, reduce_bias, select_weight, *_, **__: (
        2 * y[0] * y[1] * (prod(reduce_weight) + prod(select_weight))
    )
)


def scattn_combine(
    y: Tensor,
    z: Optional[Tensor],  # noqa: UP045 - TorchScript reads these
    pool_weight: Tensor,
    pool_bias: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    select_weight: Tensor,
    select_bias: Tensor,
    norm_weight: Optional[Tensor] = None,  # noqa: UP045
    norm_bias: Optional[Tensor] = None,  # noqa: UP045
    gate_first: bool = False,
    pool_eps: float = 1e-5,
    norm_eps: float = 1e-5,
) -> Tensor:
    """Weighs the directions' outputs by SCAttn's channel weights, and adds, normalises, gates them.

    Args:
        y: Outputs of the directions, [B, K, L, D].
        z: Gate, [B, L, D]: the result is multiplied by SiLU(z).
        pool_weight: Of the layer norm before pooling, [D].
        pool_bias: [D].
        reduce_weight: Of the first linear layer, [D / r, D].
        reduce_bias: [D / r].
        select_weight: Of the second, [D, D / r].
        select_bias: [D].
        norm_weight: If given, the sum over directions passes a layer norm with this weight, [D].
        norm_bias: With `norm_weight`, [D].
        gate_first: Whether SCAttn looks at gated outputs, as in LocalVim, rather than at y itself.
        pool_eps: Of the norm before pooling.
        norm_eps: Of the norm after the sum.

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
