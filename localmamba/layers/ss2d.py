"""LocalVMamba's mixer, VMamba's SS2D with any directions (paper section 4.1, figure 3b)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import combine_directions, depthwise_conv
from .mixer import DirectionalMixer
from .precision import saturate

for _name in ("depthwise_conv", "combine_directions", "check_map", "saturate"):
    torch.fx.wrap(_name)


def check_map(x: Tensor, dim: int) -> Tensor:
    """The map, or ValueError if it is not [B, H, W, dim]."""
    if x.dim() != 4 or x.shape[3] != dim:
        raise ValueError(f"a map of tokens must be [B, H, W, {dim}], got {x.shape}")
    return x


class SS2D(DirectionalMixer):
    """Mixes a map of tokens: 3 x 3 convolution, scans along several directions, norm, gate.

    Args:
        dim: Width C of the tokens.
        directions: Names of the scan directions, see `localmamba.ops.list_directions()`.
        scattn: `channel` (the release), `channel+spatial` (the paper), or None (VMamba).
        expand: Inner channels D = expand * dim.
        d_state: States per channel N.
        dt_rank: Rank of the step sizes; ceil(dim / 16) if None.
        device: Where the parameters live.
        dtype: Of the parameters.

    Raises:
        ValueError: If a direction or `scattn` is unknown.

    Example:
        >>> mixer = SS2D(64, directions=["h", "v_flip", "w7", "w7_flip"])
        >>> mixer(torch.randn(2, 10, 15, 64)).shape
        torch.Size([2, 10, 15, 64])
    """

    def __init__(
        self,
        dim: int,
        directions: Sequence[str] = ("h", "v", "h_flip", "v_flip"),
        scattn: str | None = "channel",
        expand: float = 2.0,
        d_state: int = 16,
        dt_rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, directions, scattn, expand, d_state, dt_rank, 0, device, dtype)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = self.inner_dim
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, **dd)
        self.norm = nn.LayerNorm(inner, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes a map of tokens.

        Args:
            x: [B, H, W, C].

        Returns:
            [B, H, W, C].

        Raises:
            ValueError: If the map has another width or number of axes.
        """
        x = check_map(x, self.dim)
        height, width = x.shape[1], x.shape[2]
        x, z = saturate(self.in_proj(x)).chunk(2, dim=-1)
        z = z.flatten(1, 2)
        x = depthwise_conv(x, self.conv.weight, self.conv.bias).flatten(1, 2)
        y = self._mix_directions(x, z, height, width)
        return saturate(self.out_proj(saturate(y))).unflatten(1, (height, width))

    def _mix_directions(self, x: Tensor, z: Tensor, height: int, width: int) -> Tensor:
        """Scans tokens [B, L, D] and combines the directions; overridden by supernets."""
        return self._combine(self._scan(x, height, width, -1), z)

    def _combine(self, y: Tensor, z: Tensor) -> Tensor:
        """Adds the outputs of the directions, normalizes, gates: [B, K, L, D] -> [B, L, D]."""
        norm = self.norm
        if self.attn is None:
            return combine_directions(y, None, None, z, norm.weight, norm.bias, norm.eps)
        return self.attn.join(y, z, False, norm.weight, norm.bias, norm.eps)
