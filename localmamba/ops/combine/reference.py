"""The combination of directions in differentiable PyTorch: the truth of its kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common.registration import vjp
from .._common.tokens import accumulation_dtype


def pool_directions_reference(
    y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Computes `ops.pool_directions`, of any floating dtype."""
    means = pool_means_reference(y, z, eps)
    return torch.addcmul(bias.to(means.dtype), means, weight.to(means.dtype))


def pool_means_reference(y: Tensor, z: Tensor | None, eps: float) -> Tensor:
    """Computes the mean over tokens of y * SiLU(z), normalized over channels, [B, K, D]."""
    y = y.to(accumulation_dtype(y.dtype))
    if z is not None:
        y = y * F.silu(z.to(y.dtype))[:, None]
    return F.layer_norm(y, y.shape[-1:], None, None, eps).mean(2)


def combine_directions_reference(
    y: Tensor,
    channel_weights: Tensor | None,
    token_weights: Tensor | None,
    z: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Computes `ops.combine_directions`, of any floating dtype."""
    dtype = accumulation_dtype(y.dtype)
    out = y.to(dtype)
    if channel_weights is not None:
        out = out * channel_weights.to(dtype)[:, :, None]
    if token_weights is not None:
        out = out * token_weights.to(dtype)[..., None]
    out = out.sum(1)
    if norm_weight is not None and norm_bias is not None:
        out = F.layer_norm(out, out.shape[-1:], norm_weight.to(dtype), norm_bias.to(dtype), eps)
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(y.dtype)


def weights_reference(
    means: Tensor,
    pool_weight: Tensor,
    pool_bias: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    select_weight: Tensor,
    select_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Computes SCAttn's channel weights, [B, K, D], and the output of its first linear layer."""
    pooled = torch.addcmul(pool_bias, means, pool_weight)
    reduced = F.linear(pooled, reduce_weight, reduce_bias)
    return torch.sigmoid(F.linear(F.gelu(reduced), select_weight, select_bias)), reduced


def scattn_combine_reference(
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
    gate_first: bool,
    pool_eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `ops.scattn_combine`, of any floating dtype; means, weights and reduced as well."""
    means = pool_means_reference(y, z if gate_first else None, pool_eps)
    parameters = (pool_weight, pool_bias, reduce_weight, reduce_bias, select_weight, select_bias)
    weights, reduced = weights_reference(means, *(x.to(means.dtype) for x in parameters))
    out = combine_directions_reference(y, weights, None, z, norm_weight, norm_bias, norm_eps)
    return out, means, weights, reduced


pool_forward = pool_means_reference
combine_forward = combine_directions_reference
weights_forward = weights_reference


def pool_backward(dmeans: Tensor, y: Tensor, z: Tensor | None, eps: float) -> list[Tensor | None]:
    """Computes the gradients of y and z."""
    return vjp(lambda y, z: pool_means_reference(y, z, eps), (y, z), dmeans)


def combine_backward(
    dout: Tensor,
    y: Tensor,
    channel_weights: Tensor | None,
    token_weights: Tensor | None,
    z: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> list[Tensor | None]:
    """Computes the gradients of the six tensors."""
    inputs = (y, channel_weights, token_weights, z, norm_weight, norm_bias)
    return vjp(lambda *inputs: combine_directions_reference(*inputs, eps), inputs, dout)


def scattn_backward(dout: Tensor, *args) -> list[Tensor | None]:
    """Computes the gradients of the ten tensors of `scattn_combine`."""
    inputs, constants = args[:10], args[-3:]
    return vjp(lambda *inputs: scattn_combine_reference(*inputs, *constants)[0], inputs, dout)


def weights_backward(
    dweights: Tensor, means: Tensor, weights: Tensor, reduced: Tensor, *parameters: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Computes the gradients of the means and of the six parameters."""
    del weights, reduced
    dmeans, *dparameters = vjp(
        lambda *inputs: weights_reference(*inputs)[0], (means, *parameters), dweights
    )
    return dmeans, dparameters
