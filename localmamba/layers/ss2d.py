"""LocalVMamba's mixer, VMamba's SS2D with any directions (paper section 4.1, figure 3b)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import combine_directions, depthwise_conv
from .fusion import is_plain
from .mixer import CROSS, DirectionalMixer
from .precision import saturate

for _name in ("depthwise_conv", "combine_directions", "check_map", "saturate"):
    torch.fx.wrap(_name)


def check_map(x: Tensor, dim: int) -> Tensor:
    """Returns the map; raises ValueError if it is not [B, H, W, dim]."""
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
        device: Device of the parameters.
        dtype: Dtype of the parameters.

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
        directions: Sequence[str] = CROSS,
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
        if torch.jit.is_scripting() or self._conv_is_plain():
            x = depthwise_conv(x, self.conv.weight, self.conv.bias)
        else:
            x = saturate(F.silu(self.conv(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        y = self._mix_directions(x.flatten(1, 2), z, height, width)
        return saturate(self.out_proj(saturate(y))).unflatten(1, (height, width))

    def _mix_directions(self, x: Tensor, z: Tensor, height: int, width: int) -> Tensor:
        """Scans tokens [B, L, D] and combines the directions; overridden by supernets."""
        return self._combine(self._scan(x, height, width, -1), z)

    def _combine(self, y: Tensor, z: Tensor) -> Tensor:
        """Adds the outputs of the directions, normalizes, gates: [B, K, L, D] -> [B, L, D]."""
        norm = self.norm
        if torch.jit.is_scripting() or self._norm_is_plain():
            return self._sum(y, z, norm.weight, norm.bias, norm.eps)
        return norm(self._sum(y, None, None, None, norm.eps)) * F.silu(z)

    def _sum(
        self, y: Tensor, z: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        if self.attn is None:
            return combine_directions(y, None, None, z, weight, bias, eps)
        return self.attn.combine(y, z, False, weight, bias, eps)

    @torch.jit.unused
    def _conv_is_plain(self) -> bool:
        return is_plain(self.conv, nn.Conv2d)

    @torch.jit.unused
    def _norm_is_plain(self) -> bool:
        return is_plain(self.norm, nn.LayerNorm)
