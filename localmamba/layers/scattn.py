"""SCAttn: weights of the directions by channel and by token (paper section 4.1)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..ops import combine_directions, pool_directions, scattn_combine
from .fusion import is_plain

for _name in ("scattn_combine", "combine_directions", "pool_directions"):
    torch.fx.wrap(_name)

KINDS = ("channel", "channel+spatial")


class SCAttn(nn.Module):
    """Weights for the outputs of a block's directions, by channel and by token.

    Channel weights: LayerNorm, mean over tokens, linear to D / reduction, GELU, linear to D,
    sigmoid. Token weights: each normalized token (linear to D / reduction, GELU) joined with the
    reduced mean, linear to 1, sigmoid. All directions share the module; the weights multiply the
    outputs as they are, not normalized. The released models have the channel weights alone.

    Args:
        dim: Channels D.
        kind: `channel` (the release), or `channel+spatial` (the paper).
        reduction: Width D over the width between the two linear layers.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

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

    def forward(self, y: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Computes the weights of the directions.

        Args:
            y: Outputs of the directions, [B, K, L, D].
            z: Gate, [B, L, D]; if given, the weights come from y * SiLU(z).

        Returns:
            Channel weights [B, K, D], and token weights [B, K, L] or None.
        """
        tokens = y
        if torch.jit.is_scripting() or self._norm_is_plain():
            pooled = pool_directions(y, z, self.norm.weight, self.norm.bias, self.norm.eps)
            if z is not None and self.local_reduce is not None:
                tokens = y * F.silu(z)[:, None]
        else:
            if z is not None:
                tokens = y * F.silu(z)[:, None]
            pooled = self.norm(tokens).mean(2)
        reduced = F.gelu(self.global_reduce(pooled.to(y.dtype)))
        channel = torch.sigmoid(self.channel_select(reduced))
        if self.local_reduce is None or self.spatial_select is None:
            return channel, None
        local = F.gelu(self.local_reduce(self.norm(tokens)))  # [B, K, L, D / reduction]
        joined = torch.cat((local, reduced[:, :, None].expand_as(local)), dim=-1)
        return channel, torch.sigmoid(self.spatial_select(joined))[..., 0]

    def combine(
        self,
        y: Tensor,
        z: Tensor | None,
        gate_first: bool,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        norm_eps: float = 1e-5,
    ) -> Tensor:
        """Weights and adds the outputs of the directions, optionally normalizes and gates the sum.

        Args:
            y: Outputs of the directions, [B, K, L, D].
            z: Gate, [B, L, D]: the result is multiplied by SiLU(z). None for no gate.
            gate_first: Whether the weights come from y * SiLU(z) rather than from y.
            norm_weight: If given, the sum passes a layer norm with this weight, [D].
            norm_bias: Bias of that norm, [D].
            norm_eps: Epsilon of that norm.

        Returns:
            [B, L, D].
        """
        if self.local_reduce is None and (torch.jit.is_scripting() or self._is_plain()):
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
        channel, token = self(y, z if gate_first else None)
        return combine_directions(y, channel, token, z, norm_weight, norm_bias, norm_eps)

    @torch.jit.unused
    def _norm_is_plain(self) -> bool:
        return is_plain(self.norm, nn.LayerNorm)

    @torch.jit.unused
    def _is_plain(self) -> bool:
        """Whether neither this module nor one of its layers has to be called."""
        return (
            is_plain(self, SCAttn)
            and is_plain(self.norm, nn.LayerNorm)
            and is_plain(self.global_reduce, nn.Linear)
            and is_plain(self.channel_select, nn.Linear)
        )
