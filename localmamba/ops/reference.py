"""The plain PyTorch form of every kernel: the truth that the other kernels are tested against.

Written for reading, differentiable, in float64 when the input is; no speed is intended. The kernel
interface made of these functions (`scan_forward`, ...), which `ops.cpu` and `ops.cuda` implement
too, stands in reference_backend.py. Letters: ops/README.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan_orders import PADDING


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens in the order of `index` [K, P], zeros at padding.

    Args:
        x: [B, L, D], shared by the directions, or [B, K, L, D].
        index: [K, P].

    Returns:
        [B, K, P, D].
    """
    if x.dim() == 3:
        x = x[:, None].expand(-1, index.shape[0], -1, -1)
    steps = index.clamp(min=0).long()[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3])
    return x.gather(2, steps) * (index != PADDING)[None, :, :, None]


def scatter_tokens(y: Tensor, index: Tensor, length: int) -> Tensor:
    """The inverse of `gather_tokens`: [B, K, P, D] -> [B, K, L, D], padding dropped."""
    spill = torch.where(index == PADDING, length, index).long()
    steps = spill[None, :, :, None].expand_as(y)
    out = y.new_zeros(y.shape[0], y.shape[1], length + 1, y.shape[3])
    return out.scatter(2, steps, y)[:, :, :length]


def selective_scan_reference(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    index: Tensor | None = None,
    length: int | None = None,
    softplus: bool = True,
) -> Tensor:
    """`ops.selective_scan`, step by step; the same arguments and result, any floating dtype."""
    dtype = accumulation_dtype(u.dtype)
    out_dtype = u.dtype
    grid_order = u.dim() == 3
    if length is None:
        length = u.shape[-2]
    u, dt, A, B, C = (x.to(dtype) for x in (u, dt, A, B, C))
    if grid_order:
        assert index is not None
        u, dt, B, C = (gather_tokens(x, index) for x in (u, dt, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)[:, None]
    if softplus:
        dt = F.softplus(dt)
    h = u.new_zeros(*u.shape[:2], u.shape[3], A.shape[2])  # [B, K, D, N]
    outputs = []
    for t in range(u.shape[2]):
        decay = torch.exp(dt[:, :, t, :, None] * A)
        h = decay * h + (dt[:, :, t] * u[:, :, t])[..., None] * B[:, :, t, None]
        outputs.append((h * C[:, :, t, None]).sum(-1))
    y = torch.stack(outputs, 2)  # [B, K, P, D]
    if D is not None:
        y = y + D.to(dtype)[:, None] * u
    if index is not None:
        y = scatter_tokens(y, index, length)
    if z is not None:
        y = y * F.silu(z.to(dtype))[:, None]
    return y.to(out_dtype)


def causal_conv_reference(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
    """`ops.causal_conv`: the same arguments and result, any floating dtype."""
    dtype = accumulation_dtype(x.dtype)
    width = weight.shape[2]
    tokens = F.pad(gather_tokens(x.to(dtype), index), (0, 0, width - 1, 0))
    u = bias.to(dtype)[:, None]
    for tap in range(width):
        u = u + weight[:, None, :, tap].to(dtype) * tokens[:, :, tap : tap + index.shape[1]]
    return F.silu(u).to(x.dtype)


def depthwise_conv_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`ops.depthwise_conv`: the same arguments and result, any floating dtype."""
    dtype, size = accumulation_dtype(x.dtype), weight.shape[-1]
    height, width, channels = x.shape[1:]
    tokens = F.pad(x.to(dtype), (0, 0) + 2 * (size // 2, size // 2))
    y = x.new_zeros(channels, dtype=dtype) if bias is None else bias.to(dtype)
    for i in range(size):
        for j in range(size):
            tap = weight[:, 0, i, j].to(dtype)
            y = y + tap * tokens[:, i : i + height, j : j + width]
    y = F.silu(y)
    if x.dtype == torch.float16:  # as everywhere, a float16 output saturates
        y = y.clamp(-65504.0, 65504.0)
    return y.to(x.dtype)


def pool_directions_reference(
    y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """`ops.pool_directions`: the same arguments and result, any floating dtype."""
    means = pool_means_reference(y, z, eps)
    return torch.addcmul(bias.to(means.dtype), means, weight.to(means.dtype))


def pool_means_reference(y: Tensor, z: Tensor | None, eps: float) -> Tensor:
    """The mean over tokens of y * SiLU(z), normalised over channels, [B, K, D]."""
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
    """`ops.combine_directions`: the same arguments and result, any floating dtype."""
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


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring pairs of channels by the angles of the tables [1, L, C]."""
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos[0] + turned * sin[0]


def scale_images(x: Tensor, scale: Tensor) -> Tensor:
    """Multiplies each image of x [B, ...] by its factor in `scale` [B]."""
    return x * scale.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def residual_norm_reference(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.residual_norm`: the same arguments and results, any floating dtype."""
    stream = hidden.to(accumulation_dtype(hidden.dtype))
    if scale is not None:
        stream = scale_images(stream, scale)
    if residual is not None:
        stream = residual + stream
    if cos is not None and sin is not None:
        stream = turn_pairs(stream, cos, sin)
    shape, gain = stream.shape[-1:], weight.to(stream.dtype)
    if bias is None:
        normed = torch.rms_norm(stream, shape, gain, eps)
    else:
        normed = F.layer_norm(stream, shape, gain, bias.to(stream.dtype), eps)
    return normed.to(dtype or weight.dtype), stream
