"""Downsampling between stages (Swin's patch merging, as VMamba has it)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm import LayerNorm

torch.fx.wrap("join_neighbours")


def join_neighbours(x: Tensor) -> Tensor:
    """2 x 2 neighbours as one token, column by column: one copy, and one in the backward pass.

    An odd side is padded with zeros at the bottom or right.

    Args:
        x: [B, H, W, C].

    Returns:
        [B, ceil(H / 2), ceil(W / 2), 4C].
    """
    bottom, right = x.shape[1] % 2, x.shape[2] % 2
    if bottom + right > 0:  # padding by nothing would be a copy
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H / 2, 2, W / 2, 2, C]
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3)


class PatchMerging(nn.Module):
    """Joins 2 x 2 neighbouring tokens: norm of the 4C channels, linear to `out_dim` without bias.

    An odd side is padded with zeros at the bottom or right.

    Args:
        dim: Channels C.
        out_dim: Channels after the merging.
        device: Where the parameters live.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.norm = LayerNorm(4 * dim, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), out_dim]."""
        return self.reduction(self.norm(join_neighbours(x)))
