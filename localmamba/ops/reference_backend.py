"""The kernel interface of `backends.py` in plain PyTorch, gradients written out (ops/README.md).

Serves float64 and devices that have no kernels. Inside a custom op autograd is off, hence the
formulas; the tests hold them against autograd through `reference.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .backends import attend_in_parts, cast_weights, side_by_side
from .reference import (
    accumulation_dtype,
    causal_conv_reference,
    combine_directions_reference,
    depthwise_conv_reference,
    gather_tokens,
    pool_means_reference,
    residual_norm_reference,
    scale_images,
    scatter_tokens,
    selective_scan_reference,
    turn_pairs,
)
from .registration import in_dtypes


def _silu_grad(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def scan_forward(u, dt, A, B, C, D, z, dt_bias, index, length, softplus, save):
    y = selective_scan_reference(u, dt, A, B, C, D, z, dt_bias, index, length, softplus)
    y = y.contiguous()
    return y, A.new_empty((u.shape[0], A.shape[0], 0, A.shape[2], A.shape[1]), dtype=torch.float32)


def scan_backward(dy, u, dt, A, B, C, D, z, dt_bias, index, length, softplus, states, dBC=None):
    inputs = [u, dt, A, B, C, D, z, dt_bias]
    dtype = accumulation_dtype(u.dtype)
    grid_order = u.dim() == 3
    dy, u, dt, A, B, C = (x.to(dtype) for x in (dy, u, dt, A, B, C))
    dz = None
    if z is not None:
        ungated = selective_scan_reference(
            u, dt, A, B, C, D, None, dt_bias, index, length, softplus
        )
        dz = (dy * ungated).sum(1) * _silu_grad(z.to(dtype))
        dy = dy * F.silu(z.to(dtype))[:, None]
    if index is not None:
        dy = gather_tokens(dy, index)
    if grid_order:
        u, dt, B, C = (gather_tokens(x, index) for x in (u, dt, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)[:, None]
    delta = F.softplus(dt) if softplus else dt
    du, ddelta, dA, dB, dC = _scan_steps_backward(dy, u, delta, A, B, C)
    dD = None
    if D is not None:
        du = du + D.to(dtype)[:, None] * dy
        dD = (u * dy).sum((0, 2))
    ddt = ddelta * torch.sigmoid(dt) if softplus else ddelta
    ddt_bias = ddt.sum((0, 2)) if dt_bias is not None else None
    if grid_order:
        du, ddt, dB, dC = (scatter_tokens(x, index, length) for x in (du, ddt, dB, dC))
        du = du.sum(1)
    dB, dC = side_by_side(dB, dC, dBC)
    return in_dtypes([du, ddt, dA, dB, dC, dD, dz, ddt_bias], inputs)


def _scan_steps_backward(dy, u, delta, A, B, C):
    """Gradients of the recurrence for inputs in scan order, [B, K, P, *]."""
    decays, states = [], [u.new_zeros(*u.shape[:2], u.shape[3], A.shape[2])]  # [B, K, D, N]
    for t in range(u.shape[2]):
        decays.append(torch.exp(delta[:, :, t, :, None] * A))
        drive = (delta[:, :, t] * u[:, :, t])[..., None] * B[:, :, t, None]
        states.append(decays[t] * states[t] + drive)
    g, dA = torch.zeros_like(states[0]), torch.zeros_like(A)
    du, ddelta, dB, dC = (torch.zeros_like(x) for x in (u, delta, B, C))
    for t in reversed(range(u.shape[2])):
        g = g + C[:, :, t, None] * dy[:, :, t, :, None]
        dC[:, :, t] = (states[t + 1] * dy[:, :, t, :, None]).sum(2)
        dB[:, :, t] = (g * (delta[:, :, t] * u[:, :, t])[..., None]).sum(2)
        driven = (g * B[:, :, t, None]).sum(-1)
        g = g * decays[t]
        decayed = g * states[t]
        du[:, :, t] = delta[:, :, t] * driven
        ddelta[:, :, t] = u[:, :, t] * driven + (decayed * A).sum(-1)
        dA += (decayed * delta[:, :, t, :, None]).sum(0)
    return du, ddelta, dA, dB, dC


def conv_forward(x, weight, bias, index):
    u = causal_conv_reference(x, weight, bias, index)
    return u.transpose(0, 1).contiguous().transpose(0, 1)


def conv_backward(du, x, weight, bias, index):
    inputs, width, steps = [x, weight, bias], weight.shape[2], index.shape[1]
    dtype = accumulation_dtype(x.dtype)
    du, x, weight, bias = (t.to(dtype) for t in (du, x, weight, bias))
    tokens = F.pad(gather_tokens(x, index), (0, 0, width - 1, 0))
    taps = [tokens[:, :, tap : tap + steps] for tap in range(width)]
    before_silu = bias[:, None] + sum(weight[:, None, :, tap] * taps[tap] for tap in range(width))
    du = du * _silu_grad(before_silu)
    dweight = torch.stack([(du * taps[tap]).sum((0, 2)) for tap in range(width)], dim=-1)
    dtokens = torch.zeros_like(tokens)
    for tap in range(width):
        dtokens[:, :, tap : tap + steps] += weight[:, None, :, tap] * du
    dx = scatter_tokens(dtokens[:, :, width - 1 :], index, x.shape[1]).sum(1)
    return in_dtypes([dx, dweight, du.sum((0, 2))], inputs)


def depthwise_forward(x, weight, bias):
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return depthwise_conv_reference(x, weight, bias).contiguous()


def depthwise_backward(dy, x, weight, bias):
    inputs = [x, weight, bias]
    if x.numel() == 0:
        return [i if i is None else torch.zeros_like(i) for i in inputs]
    channels, padding = x.shape[3], weight.shape[-1] // 2
    dtype = accumulation_dtype(x.dtype)
    dy, x = (t.to(dtype).permute(0, 3, 1, 2) for t in (dy, x))
    weight, bias = (t if t is None else t.to(dtype) for t in (weight, bias))
    before_silu = F.conv2d(x, weight, bias, padding=padding, groups=channels)
    dy = dy * _silu_grad(before_silu)
    dx = conv2d_input(x.shape, weight, dy, padding=padding, groups=channels)
    dweight = conv2d_weight(x, weight.shape, dy, padding=padding, groups=channels)
    return in_dtypes([dx.permute(0, 2, 3, 1), dweight, dy.sum((0, 2, 3))], inputs)


def pool_forward(y, z, eps):
    return pool_means_reference(y, z, eps)


def _layer_norm_backward(dout, x, weight, bias, eps):
    """Gradients of a layer norm over the last axis: of x, weight and bias."""
    shape = x.shape[-1:]
    _, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
    return torch.ops.aten.native_layer_norm_backward(
        dout.contiguous(), x, shape, mean, rstd, weight, bias, [True, True, True]
    )


def pool_backward(dmeans, y, z, eps, onto=None):
    inputs = [y, z]
    dtype = accumulation_dtype(y.dtype)
    y = y.to(dtype)
    gated = y if z is None else y * F.silu(z.to(dtype))[:, None]
    dout = (dmeans.to(dtype)[:, :, None] / y.shape[2]).expand_as(y)
    ones = y.new_ones(y.shape[-1])
    dy, _, _ = _layer_norm_backward(dout, gated, ones, torch.zeros_like(ones), eps)
    dz = None
    if z is not None:
        dz = (dy * y).sum(1) * _silu_grad(z.to(dtype))
        dy = dy * F.silu(z.to(dtype))[:, None]
    return in_dtypes([dy if onto is None else dy + onto, dz], inputs)


def merge_forward(y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    return combine_directions_reference(
        y, channel_weights, token_weights, z, norm_weight, norm_bias, eps
    )


def merge_backward(dout, y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    inputs = [y, channel_weights, token_weights, z, norm_weight, norm_bias]
    dtype = accumulation_dtype(y.dtype)
    dout, y = dout.to(dtype), y.to(dtype)
    channel = 1.0 if channel_weights is None else channel_weights.to(dtype)[:, :, None]
    token = 1.0 if token_weights is None else token_weights.to(dtype)[..., None]
    total = (y * channel * token).sum(1)
    dz = dnorm_weight = dnorm_bias = None
    out = total
    if norm_weight is not None:
        norm_weight, norm_bias = norm_weight.to(dtype), norm_bias.to(dtype)
        out = F.layer_norm(total, total.shape[-1:], norm_weight, norm_bias, eps)
    if z is not None:
        dz = dout * out * _silu_grad(z.to(dtype))
        dout = dout * F.silu(z.to(dtype))
    if norm_weight is not None:
        dout, dnorm_weight, dnorm_bias = _layer_norm_backward(
            dout, total, norm_weight, norm_bias, eps
        )
    dout = dout[:, None]
    dchannel = (dout * y * token).sum(2) if channel_weights is not None else None
    dtoken = (dout * y * channel).sum(3) if token_weights is not None else None
    dy = (dout * channel * token).expand_as(y)
    return in_dtypes([dy, dchannel, dtoken, dz, dnorm_weight, dnorm_bias], inputs)


def _pooled(means, pool_weight, pool_bias):
    """The affine part of the pooling's norm, [B * K, D]."""
    return torch.addcmul(pool_bias, means, pool_weight).flatten(0, -2)


def select_forward(
    means, pool_weight, pool_bias, reduce_weight, reduce_bias, select_weight, select_bias
):
    pooled = _pooled(means, pool_weight, pool_bias)
    reduced = torch.addmm(reduce_bias, pooled, reduce_weight.t())
    logits = torch.addmm(select_bias, F.gelu(reduced), select_weight.t())
    return torch.sigmoid_(logits).view_as(means), reduced.unflatten(0, means.shape[:-1])


def select_backward(
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


attend_backward = attend_in_parts(merge_backward, select_backward, pool_backward)
align_weights = cast_weights


def norm_forward(hidden, residual, weight, bias, cos, sin, scale, eps, dtype, keep_stream):
    normed, stream = residual_norm_reference(
        hidden, residual, weight, bias, cos, sin, scale, eps, dtype
    )
    if stream is hidden and keep_stream:
        stream = stream.clone(memory_format=torch.contiguous_format)
    return normed.contiguous(), stream.contiguous() if keep_stream else None


def norm_backward(
    dnormed, dstream, stream, weight, bias, cos, sin, scale, eps, hidden_dtype, has_residual
):
    stream = stream.to(accumulation_dtype(stream.dtype))
    dnormed = dnormed.to(stream.dtype)
    centred = stream if bias is None else stream - stream.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    xhat = centred * rstd
    dweight = (dnormed * xhat).flatten(0, -2).sum(0)
    dbias = None if bias is None else dnormed.flatten(0, -2).sum(0).to(bias.dtype)
    g = dnormed * weight.to(stream.dtype)
    dx = rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    if bias is not None:
        dx = dx - rstd * g.mean(-1, keepdim=True)
    if dstream is not None:
        dx = dx + dstream
    if cos is not None:
        dx = turn_pairs(dx, cos, -sin)
    dhidden = dx if scale is None else scale_images(dx, scale)
    dresidual = dx.to(stream.dtype) if has_residual else None
    return dhidden.to(hidden_dtype, copy=True), dresidual, dweight.to(weight.dtype), dbias
