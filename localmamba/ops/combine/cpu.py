"""The CPU kernels of the combination of directions; SCAttn's linear layers are PyTorch's."""

import torch
import torch.nn.functional as F

from .._common.registration import in_dtypes
from .cpu_merge import combine_backward, combine_forward
from .cpu_pool import pool_backward, pool_forward

__all__ = [
    "combine_backward",
    "combine_forward",
    "pool_backward",
    "pool_forward",
    "scattn_backward",
    "weights_forward",
]


def _pooled(means, pool_weight, pool_bias):
    """The affine part of the pooling's norm, [B * K, D]."""
    return torch.addcmul(pool_bias, means, pool_weight).flatten(0, -2)


def weights_forward(
    means, pool_weight, pool_bias, reduce_weight, reduce_bias, select_weight, select_bias
):
    pooled = _pooled(means, pool_weight, pool_bias)
    reduced = torch.addmm(reduce_bias, pooled, reduce_weight.t())
    logits = torch.addmm(select_bias, F.gelu(reduced), select_weight.t())
    return torch.sigmoid_(logits).view_as(means), reduced.unflatten(0, means.shape[:-1])


def weights_backward(
    dweights, means, weights, reduced,
    pool_weight, pool_bias, reduce_weight, reduce_bias, select_weight, select_bias,
):  # fmt: skip
    rows = reduced.flatten(0, -2)
    dlogits = (dweights * weights * (1 - weights)).flatten(0, -2)
    dreduced = torch.ops.aten.gelu_backward(dlogits @ select_weight, rows)
    dpooled = (dreduced @ reduce_weight).view_as(means)
    return dpooled * pool_weight, [
        (dpooled * means).sum((0, 1)),
        dpooled.sum((0, 1)),
        dreduced.t() @ _pooled(means, pool_weight, pool_bias),
        dreduced.sum(0),
        dlogits.t() @ F.gelu(rows),
        dlogits.sum(0),
    ]


def scattn_backward(
    dout, y, z, pool_weight, pool_bias, reduce_weight, reduce_bias, select_weight, select_bias,
    norm_weight, norm_bias, means, weights, reduced, gate_first, pool_eps, norm_eps,
):  # fmt: skip
    inputs = (
        y, z, pool_weight, pool_bias, reduce_weight, reduce_bias, select_weight, select_bias,
        norm_weight, norm_bias,
    )  # fmt: skip
    dy, dweights, _, dz, dnorm_weight, dnorm_bias = combine_backward(
        dout, y, weights, None, z, norm_weight, norm_bias, norm_eps
    )
    dmeans, dparameters = weights_backward(
        dweights, means, weights, reduced, *(x.to(means.dtype) for x in inputs[2:8])
    )
    dy, dgate = pool_backward(dmeans, y, z if gate_first else None, pool_eps, onto=dy)
    dz = dz if dgate is None else dz.add_(dgate)
    return in_dtypes((dy, dz, *dparameters, dnorm_weight, dnorm_bias), inputs)
