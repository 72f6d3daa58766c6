"""The norm of the residual stream in differentiable PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common.registration import vjp
from .._common.tokens import accumulation_dtype


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighboring pairs of channels by the angles of the tables [1, L, C]."""
    rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos[0] + rotated * sin[0]


def scale_images(x: Tensor, scale: Tensor) -> Tensor:
    """Multiplies each image of x [B, ...] by its factor in `scale` [B]."""
    return x * scale.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def residual_norm_reference(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None = None,
    cos: Tensor | None = None, sin: Tensor | None = None, scale: Tensor | None = None,
    eps: float = 1e-5, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes `ops.residual_norm` in any floating dtype."""
    stream = hidden.to(accumulation_dtype(hidden.dtype))
    if scale is not None:
        stream = scale_images(stream, scale)
    if residual is not None:
        stream = residual + stream
    if cos is not None and sin is not None:
        stream = rotate_pairs(stream, cos, sin)
    shape, gain = stream.shape[-1:], weight.to(stream.dtype)
    if bias is None:
        normed = torch.rms_norm(stream, shape, gain, eps)
    else:
        normed = F.layer_norm(stream, shape, gain, bias.to(stream.dtype), eps)
    return normed.to(dtype or weight.dtype), stream


def forward(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, scale: Tensor | None, eps: float, dtype: torch.dtype,
    keep_stream: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Computes the normalized tokens and, if it is kept, the new stream."""
    cos, sin, scale = (x if x is None else x.detach() for x in (cos, sin, scale))  # constants
    normed, stream = residual_norm_reference(
        hidden, residual, weight, bias, cos, sin, scale, eps, dtype
    )
    if stream is hidden and keep_stream:
        stream = stream.clone(memory_format=torch.contiguous_format)
    return normed.contiguous(), stream.contiguous() if keep_stream else None


def backward(
    dnormed: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, scale: Tensor | None, eps: float,
    hidden_dtype: torch.dtype, has_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    stream = stream.to(accumulation_dtype(stream.dtype))

    def norm(stream: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return residual_norm_reference(stream, None, weight, bias, eps=eps, dtype=dnormed.dtype)[0]

    dx, dweight, dbias = vjp(norm, (stream, weight, bias), dnormed)
    assert dx is not None
    assert dweight is not None
    if dstream is not None:
        dx = dx + dstream
    if cos is not None and sin is not None:
        dx = rotate_pairs(dx, cos, -sin)
    dhidden = dx if scale is None else scale_images(dx, scale)
    dresidual = dx if has_residual else None
    return dhidden.to(hidden_dtype, copy=True), dresidual, dweight, dbias
