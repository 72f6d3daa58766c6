"""The combination of directions in differentiable PyTorch: the truth of its kernels."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common.registration import vjp
from .._common.tokens import accumulation_dtype


class CombineInputs(NamedTuple):
    """Arguments of `combine_directions`, in the order of its schema."""

    y: Tensor
    channel_weights: Tensor | None
    token_weights: Tensor | None
    z: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float


class SCAttnParameters(NamedTuple):
    """Weights and biases of SCAttn: the pooling's norm and two linear layers."""

    pool_weight: Tensor
    pool_bias: Tensor
    reduce_weight: Tensor
    reduce_bias: Tensor
    select_weight: Tensor
    select_bias: Tensor


class SCAttnInputs(NamedTuple):
    """Arguments of `scattn_combine`, in the order of its schema."""

    y: Tensor
    z: Tensor | None
    pool_weight: Tensor
    pool_bias: Tensor
    reduce_weight: Tensor
    reduce_bias: Tensor
    select_weight: Tensor
    select_bias: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    gate_first: bool
    pool_eps: float
    norm_eps: float

    def pool_inputs(self) -> tuple[Tensor, Tensor | None, float]:
        """Returns the arguments of the pooling."""
        return self.y, self.z if self.gate_first else None, self.pool_eps

    def parameters(self) -> SCAttnParameters:
        """Returns the parameters in the dtype in which SCAttn is computed."""
        dtype = accumulation_dtype(self.y.dtype)
        return SCAttnParameters(*(x.to(dtype) for x in self[2:8]))

    def combine_inputs(self, weights: Tensor) -> CombineInputs:
        """Returns the arguments of the weighted sum, given the channel weights."""
        y, z, norm_weight, norm_bias = self.y, self.z, self.norm_weight, self.norm_bias
        return CombineInputs(y, weights, None, z, norm_weight, norm_bias, self.norm_eps)


def pool_forward(y: Tensor, z: Tensor | None, eps: float) -> Tensor:
    """Computes the mean over tokens of y * SiLU(z), normalized over channels, [B, K, D]."""
    y = y.to(accumulation_dtype(y.dtype))
    if z is not None:
        y = y * F.silu(z.to(y.dtype))[:, None]
    return F.layer_norm(y, y.shape[-1:], None, None, eps).mean(2)


def pool_backward(dmeans: Tensor, y: Tensor, z: Tensor | None, eps: float) -> list[Tensor | None]:
    return vjp(lambda y, z: pool_forward(y, z, eps), (y, z), dmeans)


def pool_directions_reference(
    y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Computes `ops.pool_directions`, of any floating dtype."""
    means = pool_forward(y, z, eps)
    return torch.addcmul(bias.to(means.dtype), means, weight.to(means.dtype))


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


def combine_forward(inputs: CombineInputs) -> Tensor:
    """Computes the weighted sum, [B, L, D], normalized and gated."""
    return combine_directions_reference(*inputs)


def combine_backward(dout: Tensor, inputs: CombineInputs) -> list[Tensor | None]:

    def forward(*tensors: Tensor | None) -> Tensor:
        return combine_forward(CombineInputs._make((*tensors, inputs.eps)))

    return vjp(forward, inputs[:-1], dout)


def weights_forward(means: Tensor, parameters: SCAttnParameters) -> tuple[Tensor, Tensor]:
    """Computes SCAttn's channel weights, [B, K, D], and the output of its first linear layer."""
    pooled = torch.addcmul(parameters.pool_bias, means, parameters.pool_weight)
    reduced = F.linear(pooled, parameters.reduce_weight, parameters.reduce_bias)
    logits = F.linear(F.gelu(reduced), parameters.select_weight, parameters.select_bias)
    return torch.sigmoid(logits), reduced


def weights_backward(
    dweights: Tensor, means: Tensor, weights: Tensor, reduced: Tensor, parameters: SCAttnParameters
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Computes the gradients of the means and of the six parameters."""
    del weights, reduced

    def forward(means: Tensor, *parameters: Tensor) -> Tensor:
        return weights_forward(means, SCAttnParameters(*parameters))[0]

    dmeans, *dparameters = vjp(forward, (means, *parameters), dweights)
    return dmeans, dparameters


def scattn_forward(inputs: SCAttnInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `ops.scattn_combine`, of any floating dtype; means, weights and reduced as well."""
    means = pool_forward(*inputs.pool_inputs())
    weights, reduced = weights_forward(means, inputs.parameters())
    return combine_forward(inputs.combine_inputs(weights)), means, weights, reduced


def scattn_backward(
    dout: Tensor, means: Tensor, weights: Tensor, reduced: Tensor, inputs: SCAttnInputs
) -> list[Tensor | None]:
    del means, weights, reduced

    def forward(*tensors: Tensor | None) -> Tensor:
        return scattn_forward(SCAttnInputs._make((*tensors, *inputs[10:])))[0]

    return vjp(forward, inputs[:10], dout)
