"""SCAttn: how much each channel and each token of a direction counts (paper section 4.1)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..ops import combine_directions, pool_directions, scattn_combine

for _name in ("scattn_combine", "combine_directions", "pool_directions"):
    torch.fx.wrap(_name)

KINDS = ("channel", "channel+spatial")


class SCAttn(nn.Module):
    """Weights for the outputs of a block's directions, by channel and by token.

    Channel weights: LayerNorm, mean over tokens, linear to D / reduction, GELU, linear to D,
    sigmoid. Token weights: each normalised token (linear to D / reduction, GELU) joined with the
    reduced mean, linear to 1, sigmoid. All directions share the module; the weights multiply the
    outputs as they are, not normalised. The released models have the channel weights alone.

    Args:
        dim: Channels D.
        kind: `channel` (the release), or `channel+spatial` (the paper).
        reduction: By how much the width shrinks between the two linear layers.
        device: Where the parameters live.
        dtype: Of the parameters.

    Raises:
        ValueError: If `kind` is unknown.

    Example:
        >>> attn = SCAttn(64, kind="channel+spatial")
        >>> y = torch.randn(2, 4, 49, 64)  # 2 images, 4 directions, 49 tokens
        >>> channel, token = attn(y)
        >>> (y * channel[:, :, None] * token[..., None]).sum(1).shape
        torch.Size([2, 49, 64])
    """

    def __init__(
        self,
        dim: int,
        kind: str = "channel",
        reduction: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"scattn must be one of {', '.join(KINDS)} or none, got {kind!r}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        reduced = max(dim // reduction, 1)
        self.norm = nn.LayerNorm(dim, **dd)
        self.global_reduce = nn.Linear(dim, reduced, **dd)
        self.channel_select = nn.Linear(reduced, dim, **dd)
        spatial = kind == "channel+spatial"
        self.local_reduce = nn.Linear(dim, reduced, **dd) if spatial else None
        self.spatial_select = nn.Linear(2 * reduced, 1, **dd) if spatial else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear weights truncated normal 0.02, biases 0."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        y: Tensor,
        z: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Looks at the outputs of the directions.

        Args:
            y: [B, K, L, D].
            z: [B, L, D]; if given, what is looked at is y * SiLU(z).

        Returns:
            Channel weights [B, K, D], and token weights [B, K, L] or None.
        """
        pooled = pool_directions(y, z, self.norm.weight, self.norm.bias, self.norm.eps)
        reduced = F.gelu(self.global_reduce(pooled.to(self.global_reduce.weight.dtype)))
        channel = torch.sigmoid(self.channel_select(reduced))
        if self.local_reduce is None or self.spatial_select is None:
            return channel, None
        tokens = y if z is None else y * F.silu(z)[:, None]
        local = F.gelu(self.local_reduce(self.norm(tokens)))  # [B, K, L, D / reduction]
        joined = torch.cat((local, reduced[:, :, None].expand_as(local)), dim=-1)
        return channel, torch.sigmoid(self.spatial_select(joined))[..., 0]

    def join(
        self,
        y: Tensor,
        z: Tensor,
        gate_first: bool,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        norm_eps: float = 1e-5,
    ) -> Tensor:
        """Weighs the outputs of the directions, adds them, and optionally normalises the sum.

        Args:
            y: [B, K, L, D].
            z: Gate, [B, L, D]: the result is multiplied by SiLU(z).
            gate_first: Whether the weights come from y * SiLU(z) rather than from y.
            norm_weight: With it the sum passes a layer norm, [D].
            norm_bias: [D].
            norm_eps: Of that norm.

        Returns:
            [B, L, D].
        """
        if self.local_reduce is not None:
            channel, token = self.forward(y, z if gate_first else None)
            return combine_directions(y, channel, token, z, norm_weight, norm_bias, norm_eps)
        return scattn_combine(
            y,
            z,
            self.norm.weight,
            self.norm.bias,
            self.global_reduce.weight,
            self.global_reduce.bias,
            self.channel_select.weight,
            self.channel_select.bias,
            norm_weight,
            norm_bias,
            gate_first,
            self.norm.eps,
            norm_eps,
        )
