"""Depthwise convolution over a map of tokens, then SiLU: PyTorch's (oneDNN), in the dtype of x."""

import torch
import torch.nn.functional as F


def _maps(x, weight, bias):
    """The map as PyTorch's convolutions take it, [B, D, H, W], and the parameters in its dtype."""
    bias = bias if bias is None else bias.to(x.dtype)
    return x.permute(0, 3, 1, 2), weight.to(x.dtype), bias


def _before_silu(x, weight, bias):
    pre = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])
    return pre.clamp_(-65504.0, 65504.0) if pre.dtype == torch.float16 else pre


def depthwise_forward(x, weight, bias):
    """See `ops.backends`."""
    pre = _before_silu(*_maps(x, weight, bias))
    return F.silu(pre, inplace=True).permute(0, 2, 3, 1).contiguous()


def depthwise_backward(dy, x, weight, bias):
    """See `ops.backends`."""
    parameters, channels, padding = (weight, bias), x.shape[3], weight.shape[-1] // 2
    x, weight, bias = _maps(x.contiguous(), weight, bias)  # else each of the two copies it
    pre = _before_silu(x, weight, bias)
    dpre = torch.ops.aten.silu_backward.grad_input(dy.permute(0, 3, 1, 2), pre, grad_input=pre)
    dx, *dparameters = torch.ops.aten.convolution_backward(
        dpre, x, weight, None if bias is None else [channels],
        (1, 1), (padding, padding), (1, 1), False, (0, 0), channels,
        (True, True, bias is not None),
    )  # fmt: skip
    pairs = zip(dparameters, parameters, strict=True)
    return [dx.permute(0, 2, 3, 1), *(None if p is None else g.to(p.dtype) for g, p in pairs)]
